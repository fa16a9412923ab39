"""Inception v3 of 2015-12-05, which FID is named after, as torch-fidelity and pytorch-fid publish its weights: 2048
features; its average pools do not count what is beyond the border, and its last block pools by the maximum.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.evaluate.extractors.layers import Fixed, Maps, conv, max_pool

SIZE = 299
# Blocks: name -> branches, each a chain of (name, features, size, stride, padding).
_1 = lambda name, features: (name, features, 1, 1, 0)  # noqa: E731


def _a(pool: int) -> list:
    return [
        [_1("branch1x1", 64)],
        [_1("branch5x5_1", 48), ("branch5x5_2", 64, 5, 1, 2)],
        [_1("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)],
        ["mean", _1("branch_pool", pool)],
    ]


def _wide(name: str, features: int) -> tuple:
    return (name, features, (1, 7), 1, (0, 3))


def _tall(name: str, features: int) -> tuple:
    return (name, features, (7, 1), 1, (3, 0))


def _c(c: int) -> list:
    double = [_1("branch7x7dbl_1", c), _tall("branch7x7dbl_2", c), _wide("branch7x7dbl_3", c)]
    return [
        [_1("branch1x1", 192)],
        [_1("branch7x7_1", c), _wide("branch7x7_2", c), _tall("branch7x7_3", 192)],
        [*double, _tall("branch7x7dbl_4", c), _wide("branch7x7dbl_5", 192)],
        ["mean", _1("branch_pool", 192)],
    ]


def _e(pool: str) -> list:
    """Two of its branches end in two convolutions side by side."""
    ends = lambda name: [(f"{name}a", 384, (1, 3), 1, (0, 1)), (f"{name}b", 384, (3, 1), 1, (1, 0))]  # noqa: E731
    return [
        [_1("branch1x1", 320)],
        [_1("branch3x3_1", 384), ends("branch3x3_2")],
        [_1("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3, 1, 1), ends("branch3x3dbl_3")],
        [pool, _1("branch_pool", 192)],
    ]


BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": [
        [("branch3x3", 384, 3, 2, 0)],
        [_1("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2, 0)],
        ["half"],
    ],
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": [
        [_1("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2, 0)],
        [_1("branch7x7x3_1", 192), _wide("branch7x7x3_2", 192), _tall("branch7x7x3_3", 192),
         ("branch7x7x3_4", 192, 3, 2, 0)],
        ["half"],
    ],
    "Mixed_7b": _e("mean"),
    "Mixed_7c": _e("max"),
}  # fmt: skip
POOLS = {
    "mean": lambda x: nn.avg_pool(x, (3, 3), (1, 1), [(1, 1)] * 2, count_include_pad=False),
    "max": lambda x: nn.max_pool(x, (3, 3), (1, 1), [(1, 1)] * 2),
    "half": max_pool,
}


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x: Maps) -> tuple[list[Maps], Float[Array, "b d"]]:
        """Pixels in [-1, 1), 299 a side -> (maps before each halving, features)."""

        def unit(x: Maps, name: str, features: int, *how) -> Maps:
            return jax.nn.relu(Fixed(1e-3, name=f"{name}.bn")(conv(x, f"{name}.conv", features, *how)))

        x = unit(x, "Conv2d_1a_3x3", 32, 3, 2)
        x = unit(unit(x, "Conv2d_2a_3x3", 32, 3), "Conv2d_2b_3x3", 64, 3, 1, 1)
        maps = [x]
        x = unit(unit(max_pool(x), "Conv2d_3b_1x1", 80), "Conv2d_4a_3x3", 192, 3)
        maps, x = [*maps, x], max_pool(x)
        for block, branches in BLOCKS.items():
            maps += [x] if block in ("Mixed_6a", "Mixed_7a") else []
            out = []
            for branch in branches:
                y = x
                for step in branch:
                    if isinstance(step, str):
                        y = POOLS[step](y)
                    elif isinstance(step, list):
                        y = jnp.concatenate([unit(y, f"{block}.{name}", *how) for name, *how in step], -1)
                    else:
                        y = unit(y, f"{block}.{step[0]}", *step[1:])
                out.append(y)
            x = jnp.concatenate(out, -1)
        return [*maps, x], x.mean((1, 2))


def pixels(x: Float[Array, "b h w 1"]) -> Maps:
    """Images in [-1, 1] as the published pipelines take them: 256 levels; at 299 by TensorFlow 1's bilinear rule, which
    puts the first pixel on the first one and knows no smoothing."""
    x = jnp.round(jnp.clip((x + 1) * 127.5, 0, 255))
    for axis in (1, 2):
        n = x.shape[axis]
        at = jnp.arange(SIZE, dtype=jnp.float32) * jnp.float32(n / SIZE)
        low = at.astype(jnp.int32)
        part = (at - low).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        first, second = (jnp.take(x, jnp.minimum(i, n - 1), axis) for i in (low, low + 1))
        x = first + (second - first) * part
    return jnp.broadcast_to((x - 128) / 128, (*x.shape[:-1], 3))
