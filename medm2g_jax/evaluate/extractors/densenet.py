"""DenseNet-121 of torchxrayvision (Cohen et al. 2022), trained on chest X-rays of several sets: 1024 features."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.evaluate.extractors.layers import Fixed, Maps, conv, grey, max_pool

SIZE, EPS, GROWTH = 224, 1e-5, 32


class DenseNet(nn.Module):
    blocks: Sequence[int] = (6, 12, 24, 16)

    @nn.compact
    def __call__(self, x: Maps) -> tuple[list[Maps], Float[Array, "b d"]]:
        """Pixels (b 224 224 1) in [-1024, 1024] -> (maps after each block, features: the mean of the last)."""

        def norm(x: Maps, name: str) -> Maps:
            return jax.nn.relu(Fixed(EPS, name=f"features.{name}")(x))

        x = max_pool(norm(conv(x, "features.conv0", 64, 7, 2, 3), "norm0"), 1)
        maps = []
        for i, layers in enumerate(self.blocks, 1):
            for j in range(1, layers + 1):
                at = f"denseblock{i}.denselayer{j}"
                y = conv(norm(x, f"{at}.norm1"), f"features.{at}.conv1", 4 * GROWTH)
                y = conv(norm(y, f"{at}.norm2"), f"features.{at}.conv2", GROWTH, 3, 1, 1)
                x = jnp.concatenate([x, y], -1)
            maps.append(x)
            if i < len(self.blocks):
                x = norm(x, f"transition{i}.norm")
                x = nn.avg_pool(conv(x, f"features.transition{i}.conv", x.shape[-1] // 2), (2, 2), (2, 2))
        maps[-1] = norm(x, "norm5")
        return maps, maps[-1].mean((1, 2))


def pixels(x: Float[Array, "b h w 1"]) -> Maps:
    """Images in [-1, 1]."""
    return 1024 * grey(x, SIZE, 1)
