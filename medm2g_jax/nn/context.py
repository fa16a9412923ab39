"""The context encoder V_B and the adaptation f_B (section 3.4, Eq. 5-6): what one flow tells the others.

    f_B = F_emb(phi_s(C_B))          Eq. 5: K free tokens, at first rows sampled from C_B's tokens of training data
    V_B([z_t^B, f_B]) -> tokens      Eq. 6: the guide of every other flow A, which reads it through theta_c

z_t^B is the latent at the source's own noise level t (0 where B is given, the current one where B is being made too).
It becomes a few tokens, a grid of them for an image: a single pooled token would carry no anatomy. f_B (K d) joins on
the token axis, and one transformer layer lets all see all. Returned are all tokens (b n+K d), z's first, and the
L2-normalised mean of z's alone (b d), which a pair's two encoders are aligned by.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medm2g_jax.arrays import Times
from medm2g_jax.nn.layers import Attention, GroupNorm, ResBlock, conv, gelu, layer_norm, time_embedding

Guide = tuple[Float[Array, "b m d"], Float[Array, "b d"]]


class Mix(nn.Module):
    """z's tokens and f's through one pre-LN transformer layer and a final LayerNorm; with the pooled z tokens."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"], f: Float[Array, "k d"]) -> Guide:
        b, n, d = tokens.shape
        x = jnp.concatenate([tokens, jnp.broadcast_to(f.astype(tokens.dtype), (b, *f.shape))], axis=1)
        x += Attention(self.heads, dtype=self.dtype, name="self")(layer_norm("self_norm", self.dtype)(x))
        h = nn.Dense(4 * d, dtype=self.dtype, name="fc_1")(layer_norm("fc_norm", self.dtype)(x))
        x += nn.Dense(d, dtype=self.dtype, name="fc_2")(gelu(h))
        x = layer_norm("norm_out", self.dtype)(x)
        mean = jnp.mean(x[:, :n].astype(jnp.float32), axis=1)
        return x, mean * jax.lax.rsqrt(jnp.sum(jnp.square(mean), axis=-1, keepdims=True) + 1e-12)


class ImageContext(nn.Module):
    """V_B of an imaging modality: a convolutional stem to (h/stride w/stride) tokens, time-conditioned.

    `channels`: of the stem; each step from one to the next is a residual block, the first ones halve the grid until
    `stride` is reached. At the default sizes 64x64 latents give 16x16 tokens.
    """

    width: int = 768
    heads: int = 12
    channels: Sequence[int] = (128, 256, 512)
    stride: int = 4
    streams: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w c"],
        t: Times,
        f: Float[Array, "k d"],
        stream: Int[Array, "b"] | None = None,
    ) -> Guide:
        halvings = int(math.log2(self.stride))
        if 2**halvings != self.stride or halvings >= len(self.channels):
            raise ValueError(f"stride {self.stride} is no power of 2 that {len(self.channels)} channels can reach")
        groups = math.gcd(32, self.channels[0] // 4)
        time = time_embedding(t, stream, self.channels[0], self.streams, self.dtype)
        x = conv(self.channels[0], "conv_in", self.dtype)(z)
        for i, channels in enumerate(self.channels[1:]):
            x = ResBlock(channels, groups, dtype=self.dtype, name=f"res_{i}")(x, time)
            if i < halvings:
                x = conv(channels, f"downsample_{i}", self.dtype, stride=2)(x)
        x = jax.nn.silu(GroupNorm(groups, dtype=self.dtype, name="norm")(x))
        x = nn.Dense(self.width, dtype=self.dtype, name="tokens")(x)
        x += jnp.asarray(positions(*x.shape[1:]), x.dtype)
        return Mix(self.heads, self.dtype, name="mix")(x.reshape(x.shape[0], -1, self.width), f)


class TextContext(nn.Module):
    """V_B of a text modality: the latent vector (b latent) as `tokens` tokens, time-conditioned."""

    width: int = 768
    heads: int = 12
    tokens: int = 4
    latent: int = 768
    streams: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b latent"],
        t: Times,
        f: Float[Array, "k d"],
        stream: Int[Array, "b"] | None = None,
    ) -> Guide:
        if z.shape[-1] != self.latent:
            raise ValueError(f"this network reads latents of {self.latent} features, found {z.shape[-1]}")
        time = time_embedding(t, stream, self.width // 4, self.streams, self.dtype)
        x = nn.Dense(self.tokens * self.width, dtype=self.dtype, name="tokens")(z)
        x = x.reshape(z.shape[0], self.tokens, self.width) + time[:, None]
        table = self.param("positions", nn.initializers.normal(0.02), (self.tokens, self.width))
        return Mix(self.heads, self.dtype, name="mix")(x + table.astype(x.dtype), f)


class Adaptation(nn.Module):
    """f_B = F_emb(rows): `count` free rows, which the trainer sets to rows of C_B's tokens (phi_s), through a linear
    F_emb that starts as the identity; so f_B starts as these very tokens and is trained from there."""

    count: int = 16
    width: int = 768
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "k d"]:
        rows = self.param("rows", nn.initializers.normal(0.02), (self.count, self.width))
        return nn.Dense(self.width, kernel_init=_identity, dtype=self.dtype, name="emb")(rows)


def _identity(key, shape, dtype=jnp.float32):
    return jnp.eye(*shape, dtype=dtype)


def positions(h: int, w: int, width: int) -> np.ndarray:
    """2-D sin-cos positions (h w width): the first half of the features tells the row, the second the column."""

    def axis(n):
        frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
        angles = np.arange(n)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows = np.broadcast_to(axis(h)[:, None], (h, w, width // 2))
    columns = np.broadcast_to(axis(w)[None], (h, w, width // 2))
    return np.concatenate([rows, columns], axis=-1)
