"""The autoencoder of the imaging modalities (section 3.1: z = E(x), diffused by Eq. 1-2, x = D(z)).

Stable Diffusion's AutoencoderKL, layer by layer, so that its published weights fit (83,653,863 parameters at the
default size). One is shared by all imaging modalities. Shapes:

    x (b h w colours) in [-1, 1]  ->  mean, logvar (b h/f w/f latent)  ->  (b h w colours);  f = patch * 2**(levels - 1)

f = 8 and latent = 4 in Stable Diffusion. Latents are unscaled here; `model.encode` and `model.decode_image` apply the
scale. Easy to get wrong: a downsample pads right and bottom only, every GroupNorm has eps 1e-6, and the attention in
the middle is one head of full width whose projections have biases.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from medm2g_jax.nn.attention import attend
from medm2g_jax.nn.layers import GroupNorm, ResBlock, conv, upsample

EPS = 1e-6  # of every GroupNorm
LOGVAR_RANGE = (-30.0, 20.0)


class _Mid(nn.Module):
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        x = ResBlock(c, self.groups, EPS, dtype=self.dtype, name="res_0")(x)
        if self.attention:
            x = _MidAttention(self.groups, self.dtype, name="attn")(x)
        return ResBlock(c, self.groups, EPS, dtype=self.dtype, name="res_1")(x)


class _MidAttention(nn.Module):
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, EPS, self.dtype, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(tokens)[:, :, None] for name in "qkv")
        out = nn.Dense(c, dtype=self.dtype, name="out")(attend(q, k, v)[:, :, 0])
        return x + out.reshape(x.shape)


class _Level(nn.Module):
    """Residual blocks at one resolution, then, but at the last level, a change of resolution by two."""

    channels: int
    layers: int
    groups: int
    resample: str  # "downsample", "upsample" or ""
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for j in range(self.layers):
            x = ResBlock(self.channels, self.groups, EPS, dtype=self.dtype, name=f"res_{j}")(x)
        if self.resample == "downsample":
            right_and_bottom = ((0, 1), (0, 1))
            x = nn.Conv(
                self.channels, (3, 3), strides=2, padding=right_and_bottom, dtype=self.dtype, name="downsample"
            )(x)
        if self.resample == "upsample":
            x = conv(self.channels, "upsample", self.dtype)(upsample(x))
        return x


class _Encoder(nn.Module):
    channels: Sequence[int]
    layers: int
    groups: int
    out_channels: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = conv(self.channels[0], "conv_in", self.dtype)(x)
        last = len(self.channels) - 1
        for i, channels in enumerate(self.channels):
            resample = "downsample" if i < last else ""
            x = _Level(channels, self.layers, self.groups, resample, self.dtype, name=f"down_{i}")(x)
        x = _Mid(self.groups, self.attention, self.dtype, name="mid")(x)
        x = nn.silu(GroupNorm(self.groups, EPS, self.dtype, name="norm_out")(x))
        return conv(self.out_channels, "conv_out", self.dtype)(x)


class _Decoder(nn.Module):
    channels: Sequence[int]
    layers: int
    groups: int
    out_channels: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, z):
        deepest_first = tuple(reversed(self.channels))
        x = conv(deepest_first[0], "conv_in", self.dtype)(z)
        x = _Mid(self.groups, self.attention, self.dtype, name="mid")(x)
        for i, channels in enumerate(deepest_first):
            resample = "upsample" if i < len(deepest_first) - 1 else ""
            x = _Level(channels, self.layers + 1, self.groups, resample, self.dtype, name=f"up_{i}")(x)
        x = nn.silu(GroupNorm(self.groups, EPS, self.dtype, name="norm_out")(x))
        return conv(self.out_channels, "conv_out", self.dtype)(x)


class ImageVAE(nn.Module):
    """E and D. The default size is Stable Diffusion's.

    channels: per level, finest first. layers: residual blocks a level of the encoder; the decoder has one more.
    groups: of every GroupNorm. latent: channels of z.
    patch: p > 1 folds p x p pixels into channels in front of conv_in and unfolds them behind conv_out, which a small
      model needs more than convolutions at full resolution. mid_attention: the attention in the two middle blocks.
      colours: of the images; one is all a small model needs of grey ones.
      (patch=1, mid_attention=True, colours=3) is Stable Diffusion; the others are ours.
    """

    channels: Sequence[int] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    latent: int = 4
    patch: int = 1
    mid_attention: bool = True
    colours: int = 3
    dtype: Any = jnp.float32

    def setup(self):
        sizes = dict(channels=self.channels, layers=self.layers, groups=self.groups, attention=self.mid_attention)
        self.encoder = _Encoder(**sizes, out_channels=2 * self.latent, dtype=self.dtype)
        # 1x1 convolutions. Logvar starts at -4: at 0 its noise drowns what the decoder is to learn from.
        self.quant = nn.Dense(2 * self.latent, dtype=self.dtype, bias_init=_quiet)
        self.post_quant = nn.Dense(self.latent, dtype=self.dtype)
        self.decoder = _Decoder(**sizes, out_channels=self.colours * self.patch**2, dtype=self.dtype)

    def encode(
        self, x: Float[Array, "b h w colours"]
    ) -> tuple[Float[Array, "b h2 w2 latent"], Float[Array, "b h2 w2 latent"]]:
        """Mean and log-variance of q(z | x), float32; logvar in [-30, 20]."""
        moments = self.quant(self.encoder(_space_to_depth(x, self.patch))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Float[Array, "b h2 w2 latent"]) -> Float[Array, "b h w colours"]:
        """The image, not clipped to [-1, 1]."""
        return _depth_to_space(self.decoder(self.post_quant(z)), self.patch)

    def __call__(self, x: Float[Array, "b h w colours"]) -> Float[Array, "b h w colours"]:
        return self.decode(self.encode(x)[0])


def _quiet(key, shape, dtype=jnp.float32):
    return jnp.concatenate([jnp.zeros(shape[0] // 2, dtype), jnp.full(shape[0] // 2, -4.0, dtype)])


def _space_to_depth(x: Array, patch: int) -> Array:
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def _depth_to_space(x: Array, patch: int) -> Array:
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)
