"""eps_theta(z_t, t, prompt, guide) of the text flow: Versatile Diffusion's text UNet at any size (sections 3.1, 3.4).

The image UNet's own way (`unet.through`), on a vector: `positions` stand where height and width did, and never change
in number. Convolutions are fully connected over channels and positions together; transformers see a token a position.

    z (b 768) -> linear_in -> flat (b 320*4) -> ... -> norm_out, SiLU, linear_out -> eps (b 768)

A flat vector has the channel first: feature c*positions + s is channel c at position s. So a group of channels at all
positions is a run of features, concatenating flat vectors concatenates channels, and published weights fit as they are.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medm2g_jax.arrays import Times
from medm2g_jax.nn.attention import Context
from medm2g_jax.nn.layers import GroupNorm, faint, time_embedding
from medm2g_jax.nn.unet import Operators, check_width, through


def operators(positions: int) -> Operators:
    """Fully connected layers on flat vectors, a token a position for transformers."""

    def layer(name):
        return lambda x, features, dtype: nn.Dense(features, dtype=dtype, name=name)(x)

    return Operators(
        layer="fc",
        positions=positions,
        downsample=layer("downsample"),
        upsample=layer("upsample"),
        tokens=lambda x: jnp.swapaxes(x.reshape(x.shape[0], -1, positions), 1, 2),
        hidden=lambda tokens, like: jnp.swapaxes(tokens, 1, 2).reshape(like.shape),
    )


class TextUNet(nn.Module):
    """The noise in z_t, given the noise level, a prompt and, from other flows, a guide. Attributes: see `unet.UNet`.

    `positions`: of a hidden state, per channel; `latent`: features of z_t.
    """

    channels: Sequence[int] = (320, 640, 1280, 1280)
    attention: Sequence[bool] = (True, True, True, False)
    layers: int = 2
    heads: int = 8
    groups: int = 32
    positions: int = 4
    width: int = 768
    latent: int = 768
    streams: int = 1
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "b d"],
        t: Times,
        prompt: Context,
        guide: Context | None = None,
        stream: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b d"]:
        """eps at z_t, float32."""
        check_width(self.width, prompt, guide)
        kind = operators(self.positions)
        time = time_embedding(t, stream, self.channels[0], self.streams, self.dtype)
        x = nn.Dense(self.channels[0] * self.positions, dtype=self.dtype, name="linear_in")(z_t)
        x = through(self, kind, x, time, prompt, guide)
        # The last norm's scale and bias are per channel, the FC blocks' per feature: it sees tokens, as a transformer.
        tokens = jax.nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(kind.tokens(x)))
        x = kind.hidden(tokens, x)
        out = nn.Dense(self.latent, kernel_init=faint, dtype=self.dtype, name="linear_out")
        return out(x).astype(jnp.float32)
