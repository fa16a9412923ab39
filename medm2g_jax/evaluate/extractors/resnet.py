"""ResNet-50 of RadImageNet (Mei et al. 2022), trained on CT, MRI and ultrasound, as Warvito/radimagenet-models has it
for torch, taken over from Keras: biases in the convolutions, strides in the first of each block. 2048 features.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.evaluate.extractors.layers import Fixed, Maps, conv, grey, max_pool

SIZE, EPS = 224, 1.001e-5
BGR = (0.406, 0.456, 0.485)  # taken off, as MONAI's FID recipe does


class ResNet(nn.Module):
    blocks: Sequence[int] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: Maps) -> tuple[list[Maps], Float[Array, "b d"]]:
        """Pixels (b 224 224 3), blue first -> (maps after each stage, features: the mean of the last)."""

        def unit(x: Maps, at: str, i: int, features: int, *how) -> Maps:
            return Fixed(EPS, name=f"{at}bn{i}")(conv(x, f"{at}conv{i}", features, *how, bias=True))

        x, maps = max_pool(jax.nn.relu(unit(x, "", 1, 64, 7, 2, 3)), 1), []
        for stage, blocks in enumerate(self.blocks, 1):
            width = 32 * 2**stage
            for block in range(blocks):
                at, stride = f"layer{stage}.{block}.", 2 if stage > 1 and not block else 1
                y = jax.nn.relu(unit(x, at, 1, width, 1, stride))
                y = jax.nn.relu(unit(y, at, 2, width, 3, 1, 1))
                y = unit(y, at, 3, 4 * width)
                if not block:
                    x = conv(x, f"{at}downsample.0", 4 * width, 1, stride, bias=True)
                    x = Fixed(EPS, name=f"{at}downsample.1")(x)
                x = jax.nn.relu(x + y)
            maps.append(x)
        return maps, x.mean((1, 2))


def pixels(x: Float[Array, "b h w 1"]) -> Maps:
    """Images in [-1, 1]."""
    return grey((x + 1) / 2, SIZE) - jnp.asarray(BGR)
