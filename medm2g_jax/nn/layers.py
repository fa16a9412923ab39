"""Blocks shared by the networks: what Stable Diffusion's UNet is made of (section 3.1), and theta_c (section 3.4).

Everything computes in `dtype` with float32 parameters; norms, softmax and the time sinusoid are float32 throughout.
A 1x1 convolution is a Dense: the same product, and on CPU the faster one.

The transformer block of a flow reads a prompt and a guide, both contexts (`attention.Context`):

    x += self-attention(x);  x += attention(x, prompt);  x += theta_c(x, guide);  x += feed-forward(x)

theta_c is Eq. 6's cross-attention to V_B, one a block, shared by all sources B. Its output layer starts at zero, so a
new guide changes nothing; without a guide it is skipped, and the block is Stable Diffusion's to the last bit.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medm2g_jax.arrays import Times
from medm2g_jax.nn.attention import Context, attend, present

zeros = nn.initializers.zeros_init()
# Of the last layer of each residual branch and of eps. Latent diffusion starts them at zero; a tenth of the usual
# spread trained better (loss after 160 steps of a tiny UNet: 0.239, at zero 0.245, at the full spread 0.270), and lets
# a gradient through to the guides of a flow that was never trained.
faint = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


class GroupNorm(nn.Module):
    """Normalise each of `groups` groups of channels over its channels and all positions; leaves scale, bias."""

    groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *positions c"]) -> Float[Array, "b *positions c"]:
        b, c = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (c,))
        bias = self.param("bias", zeros, (c,))

        def of_group(x):
            """Mean over each channel's group and all positions, at each channel. Positions first: XLA's CPU loops are
            vectorised over whole channels, not over the few of a group."""
            mean = jnp.mean(x, axis=tuple(range(1, x.ndim - 1))).reshape(b, self.groups, -1).mean(axis=-1)
            return jnp.repeat(mean, c // self.groups, axis=-1).reshape(b, *(1,) * (x.ndim - 2), c)

        x = x.astype(jnp.float32)
        x -= of_group(x)
        return (x * (jax.lax.rsqrt(of_group(jnp.square(x)) + self.eps) * scale) + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention; leaves q, k, v (with biases if `qkv_bias`) and out (always with one).

    `norm`: a LayerNorm of the queries' side stands in front, in the same scope (leaf norm), as theta_c has it.
    `out_init`: initialiser of the output layer's kernel.
    """

    heads: int
    qkv_bias: bool = False
    norm: bool = False
    out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        source: Float[Array, "b m d"] | None = None,
        bias: Float[Array, "b m"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "b n c"]:
        """Attend from x to source, or to x itself where there is none."""
        c = x.shape[-1]
        if self.norm:
            x = layer_norm("norm", self.dtype)(x)
        source = x if source is None else source

        def heads_of(name, tokens):
            tokens = nn.Dense(c, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(tokens)
            return tokens.reshape(*tokens.shape[:2], self.heads, c // self.heads)

        out = attend(heads_of("q", x), heads_of("k", source), heads_of("v", source), bias, causal)
        return nn.Dense(c, kernel_init=self.out_init, dtype=self.dtype, name="out")(out.reshape(x.shape))


class FeedForward(nn.Module):
    """GEGLU: the first half of proj's output is the value, the second the gate, through the exact (erf) GELU."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        c = x.shape[-1]
        value, gate = jnp.split(nn.Dense(8 * c, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return nn.Dense(c, dtype=self.dtype, name="out")(value * gelu(gate))


def gelu(x: Array) -> Array:
    """x Phi(x), exact, by erf as torch has it: `jax.nn.gelu` takes erfc, which on CPU costs twice the time or more."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def layer_norm(name: str, dtype: Any, eps: float = 1e-5) -> nn.LayerNorm:
    """A LayerNorm with torch's epsilon and its variance in two passes."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


class Transformer(nn.Module):
    """One transformer site of a UNet on its tokens (b n c): norm, projections, one block between them, residual."""

    heads: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], prompt: Context, guide: Context | None = None
    ) -> Float[Array, "b n c"]:
        c, dtype = x.shape[-1], self.dtype
        h = GroupNorm(self.groups, 1e-6, dtype, name="norm")(x)
        h = nn.Dense(c, dtype=dtype, name="proj_in")(h)
        h += Attention(self.heads, dtype=dtype, name="self")(layer_norm("self_norm", dtype)(h))
        h += Attention(self.heads, dtype=dtype, name="prompt")(
            layer_norm("prompt_norm", dtype)(h), prompt.tokens, prompt.bias
        )
        if guide is not None:
            theta_c = Attention(self.heads, norm=True, out_init=zeros, dtype=dtype, name="guide")
            h += theta_c(h, guide.tokens, guide.bias) * present(guide)[:, None, None].astype(dtype)
        h += FeedForward(dtype=dtype, name="ff")(layer_norm("ff_norm", dtype)(h))
        return x + nn.Dense(c, kernel_init=faint, dtype=dtype, name="proj_out")(h)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, layer, + time; GroupNorm, SiLU, layer; + skip. Without `time` (autoencoders) no time layer.

    `layer` is "conv" (3x3, leaves conv_1, conv_2) or "fc" (fc_1, fc_2 on flat vectors); `features` are its outputs.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    layer: str = "conv"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *positions c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b *positions o"]:
        def layer(i, **kwargs):
            name = f"{self.layer}_{i}"
            return conv(self.features, name, self.dtype, **kwargs) if self.layer == "conv" else dense(name, **kwargs)

        def dense(name, **kwargs):
            return nn.Dense(self.features, dtype=self.dtype, name=name, **kwargs)

        h = layer(1)(jax.nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm_1")(x)))
        if time is not None:
            shift = dense("time")(jax.nn.silu(time))
            h += shift.reshape(shift.shape[0], *(1,) * (h.ndim - 2), -1)
        h = layer(2, kernel_init=faint)(jax.nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm_2")(h)))
        return h + (x if x.shape == h.shape else dense("skip")(x))


def conv(features: int, name: str, dtype: Any, stride: int = 1, **kwargs: Any) -> nn.Conv:
    """A 3x3 convolution, padded by 1 on every side (torch's padding=1, also where it strides)."""
    kwargs["conv_general_dilated_cls"] = _convolution
    return nn.Conv(features, (3, 3), strides=stride, padding=1, dtype=dtype, name=name, **kwargs)


def _convolution():
    """What flax asks for the function that convolves."""
    return _convolve


def _convolve(x, kernel, strides, padding, **options):
    """`jax.lax.conv_general_dilated`; on maps smaller than the kernel one matrix product, since XLA's CPU compiler has
    only a plain loop for those (16 maps of 2 x 2 x 512 to 256: 36 ms instead of 2, with gradients 83 instead of 4)."""
    (_, h, w, c), (rows, columns, _, _) = x.shape, kernel.shape
    if h >= rows and w >= columns:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    patches = [x[:, i : i + h : strides[0], j : j + w : strides[1]] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(rows * columns * c, -1)


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Nearest neighbour, twice as high and wide."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def sinusoid(t: Times, width: int) -> Float[Array, "b width"]:
    """cos(t f_i) then sin(t f_i), f_i = 10000^(-2 i / width): float32, since t f reaches 999 radians."""
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeMLP(nn.Module):
    """Sinusoid of the noise level (`width`), Dense, SiLU, Dense (`features`)."""

    width: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Times) -> Float[Array, "b features"]:
        h = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(sinusoid(t, self.width))
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(jax.nn.silu(h))


def time_embedding(
    t: Times, stream: Int[Array, "b"] | None, width: int, streams: int, dtype: Any
) -> Float[Array, "b features"]:
    """Embedding of the noise level and, where a modality has several streams, of the stream (zero at first).

    Called inside a module's `__call__`, to which the leaves time/ and stream/ belong. No stream given: stream 0, the
    one that says nothing of the contrast.
    """
    embedding = TimeMLP(width, 4 * width, dtype, name="time")(t)
    if streams > 1:
        table = nn.Embed(streams, 4 * width, embedding_init=zeros, dtype=dtype, name="stream")
        embedding += table(jnp.zeros(t.shape, jnp.int32) if stream is None else stream)
    return embedding
