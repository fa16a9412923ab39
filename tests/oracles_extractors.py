"""The published convolutional extractors in torch, layer for layer under the names of their files: what theirs say."""

import torch
import torch.nn.functional as F
from torch import nn


class Unit(nn.Module):
    def __init__(self, i, o, k=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def mean_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, i, pool):
        super().__init__()
        self.branch1x1, self.branch_pool = Unit(i, 64), Unit(i, pool)
        self.branch5x5_1, self.branch5x5_2 = Unit(i, 48), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 64), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(mean_pool(x))], 1)


class B(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.branch3x3, self.branch3x3dbl_1 = Unit(i, 384, 3, 2), Unit(i, 64)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(64, 96, 3, padding=1), Unit(96, 96, 3, 2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    def __init__(self, i, c):
        super().__init__()
        wide, tall = dict(k=(1, 7), padding=(0, 3)), dict(k=(7, 1), padding=(3, 0))
        self.branch1x1, self.branch_pool = Unit(i, 192), Unit(i, 192)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Unit(i, c), Unit(c, c, **wide), Unit(c, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(i, c), Unit(c, c, **tall)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(c, c, **wide), Unit(c, c, **tall)
        self.branch7x7dbl_5 = Unit(c, 192, **wide)

    def forward(self, x):
        y = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        y = self.branch7x7dbl_5(self.branch7x7dbl_4(y))
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        return torch.cat([self.branch1x1(x), seven, y, self.branch_pool(mean_pool(x))], 1)


class D(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(i, 192), Unit(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(i, 192), Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1), padding=(3, 0)), Unit(192, 192, 3, 2)

    def forward(self, x):
        y = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), y, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, i, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1, self.branch_pool = Unit(i, 320), Unit(i, 192)
        self.branch3x3_1, self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(i, 384), Unit(i, 448), Unit(448, 384, 3, 1, 1)
        for name in ("branch3x3_2", "branch3x3dbl_3"):
            setattr(self, f"{name}a", Unit(384, 384, (1, 3), padding=(0, 1)))
            setattr(self, f"{name}b", Unit(384, 384, (3, 1), padding=(1, 0)))

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y)]
        return torch.cat([*parts, self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z), self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, 32, 3, 2), Unit(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Unit(32, 64, 3, 1, 1), Unit(64, 80)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = B(288), C(768, 128), C(768, 160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = C(768, 160), C(768, 192), D(768)
        self.Mixed_7b, self.Mixed_7c = E(1280, mean_pool), E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))


class DenseNet(nn.Module):
    def __init__(self, blocks=(6, 12, 24, 16)):
        super().__init__()
        self.features, c = nn.Sequential(), 64
        self.features.add_module("conv0", nn.Conv2d(1, c, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(c))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for i, count in enumerate(blocks, 1):
            block = nn.Module()
            for j in range(1, count + 1):
                at = nn.Module()
                at.norm1, at.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, 128, 1, bias=False)
                at.norm2, at.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, 1, 1, bias=False)
                at.forward = lambda x, a=at: torch.cat(
                    [x, a.conv2(F.relu(a.norm2(a.conv1(F.relu(a.norm1(x))))))], 1)  # fmt: skip
                block.add_module(f"denselayer{j}", at)
                c += 32
            block.forward = lambda x, b=block: nn.Sequential(*b.children())(x)
            self.features.add_module(f"denseblock{i}", block)
            if i < len(blocks):
                down = nn.Sequential()
                down.add_module("norm", nn.BatchNorm2d(c))
                down.add_module("relu", nn.ReLU())
                down.add_module("conv", nn.Conv2d(c, c // 2, 1, bias=False))
                down.add_module("pool", nn.AvgPool2d(2, 2))
                self.features.add_module(f"transition{i}", down)
                c //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(c))
        self.classifier = nn.Linear(c, 18)

    def forward(self, x):
        return F.relu(self.features(x)).mean((2, 3))


class Bottleneck(nn.Module):
    def __init__(self, i, width, stride, first):
        super().__init__()
        norm = lambda c: nn.BatchNorm2d(c, eps=1.001e-5)  # noqa: E731
        self.conv1, self.bn1 = nn.Conv2d(i, width, 1, stride), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1), norm(4 * width)
        self.downsample = nn.Sequential(nn.Conv2d(i, 4 * width, 1, stride), norm(4 * width)) if first else None

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    def __init__(self, blocks=(3, 4, 6, 3)):
        super().__init__()
        self.conv1, self.bn1, i = nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64, eps=1.001e-5), 64
        for stage, count in enumerate(blocks, 1):
            width, layers = 32 * 2**stage, []
            for block in range(count):
                layers.append(Bottleneck(i, width, 2 if stage > 1 and not block else 1, not block))
                i = 4 * width
            self.add_module(f"layer{stage}", nn.Sequential(*layers))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep what passes alive, and norms that have seen something."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan) ** 0.5
            if module.bias is not None:
                module.bias.data = 0.1 * torch.randn(module.bias.shape, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = 0.5 + torch.rand(shape, generator=generator)
            module.running_var.data = 0.5 + torch.rand(shape, generator=generator)
            for value in (module.bias.data, module.running_mean):
                value.copy_(0.1 * torch.randn(shape, generator=generator))
    return network.eval()
