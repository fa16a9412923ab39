"""What the published convolutional networks are made of. Their layers are called as in the files, dots and all, so that
a file's keys are our names: "Mixed_5b.branch1x1.conv.weight" is "Mixed_5b.branch1x1.conv/kernel".
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.convert.rules import CONV, SAME, Rule

Maps = Float[Array, "_ _ _ _"]  # (b h w c)
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
UNREAD = r"num_batches_tracked$"


class Fixed(nn.Module):
    """Batch normalisation as it is after training: by the mean and the variance that it has kept."""

    eps: float

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        one, zero, c = nn.initializers.ones_init(), nn.initializers.zeros_init(), x.shape[-1:]
        leaves = (("scale", one), ("bias", zero), ("mean", zero), ("var", one))
        scale, bias, mean, var = (self.param(name, init, c) for name, init in leaves)
        return (x - mean) * (scale * jax.lax.rsqrt(var + self.eps)) + bias


def conv(
    x: Maps, name: str, features: int, size: int | tuple[int, int] = 1, stride: int = 1,
    pad: int | tuple[int, int] = 0, bias: bool = False,
) -> Maps:  # fmt: skip
    """torch's convolution; called inside a module's `__call__`."""
    sizes, pads = ((v, v) if isinstance(v, int) else v for v in (size, pad))
    padding = [(p, p) for p in pads]
    return nn.Conv(features, sizes, stride, padding, use_bias=bias, precision="highest", name=name)(x)


def max_pool(x: Maps, pad: int = 0) -> Maps:
    """3 x 3, every second."""
    return nn.max_pool(x, (3, 3), (2, 2), [(pad, pad)] * 2)


def rules(expected: Mapping[str, Sequence[int]]) -> list[Rule]:
    """The table of a network whose layers are called as in its file."""
    out = []
    for name, shape in expected.items():
        module, leaf = name.rsplit("/", 1)
        theirs = f"{module.split('/', 1)[1]}.{LEAVES[leaf]}"
        out.append(Rule(theirs, name, CONV if len(shape) == 4 else SAME))
    return out


def grey(x: Float[Array, "b h w 1"], size: int, channels: int = 3) -> Maps:
    """At the side that a network was trained with: bilinear, smoothed where it gets smaller."""
    x = jax.image.resize(x, (x.shape[0], size, size, 1), "linear", antialias=True)
    return jnp.broadcast_to(x, (*x.shape[:-1], channels))
