"""Prompt encoders C_T, C_CT, C_MRI, C_Xray (section 3.2): the two towers of CLIP, ViT-L/14 at the default size.

A prompt is the whole token sequence in the shared space, as Versatile Diffusion has it: every state, after the final
norm, through the projection, divided by the norm of the projected pooled state (77 text and 257 image tokens). Only the
pooled vector is aligned (Eq. 3). Shapes:

    ids (b n)                      ->  tokens (b n d), pooled (b d), hidden (b n w)
    pixels (b image image 3)       ->  the same with n = 1 + (image / patch)**2, the class token first

Both towers are pre-norm with quick-GELU, x sigmoid(1.702 x), and LayerNorm eps 1e-5; the text tower is causal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from medm2g_jax.nn.layers import Attention, layer_norm

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


def embedding_init(width: int):
    """Normal with CLIP's 0.02 at width 768 and more in narrow towers (0.24 at 64), whose words and places otherwise
    drown in what the layers add."""
    return nn.initializers.normal(0.02 * 768 / width)


class Encoded(NamedTuple):
    """What a tower says of a batch, float32.

    tokens: all projected states, divided by the norm of the projected pooled one: the prompt.
    pooled: the projected pooled state, not normalised.
    hidden: all states after the final norm, not projected; Stable Diffusion's own prompt.
    """

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b d"]
    hidden: Float[Array, "b n w"]


class _Layer(nn.Module):
    heads: int
    ff: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        attention = Attention(self.heads, qkv_bias=True, dtype=self.dtype, name="attn")
        x = x + attention(layer_norm("norm_1", self.dtype)(x), causal=self.causal)
        h = nn.Dense(self.ff, dtype=self.dtype, name="fc_1")(layer_norm("norm_2", self.dtype)(x))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="fc_2")(h * nn.sigmoid(1.702 * h))


def _encoded(hidden: Array, at: Array, features: int) -> Encoded:
    """Project the hidden states; `at` (b,) is the place of the pooled one. Called inside a tower's `__call__`."""
    hidden = hidden.astype(jnp.float32)
    # Full float32 products: the cosines of the alignment are made of these.
    dense = nn.Dense(features, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="projection")
    projected = dense(hidden)
    pooled = jnp.take_along_axis(projected, at[:, None, None], axis=1)[:, 0]
    return Encoded(projected / jnp.linalg.norm(pooled, axis=-1)[:, None, None], pooled, hidden)


class CLIPText(nn.Module):
    """C_T. The default size is ViT-L/14's text tower; its vocabulary has 49,408 ids, the highest of which ends a text.

    length: the most ids a text may have. projection: width d of the shared space.
    """

    vocab: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    ff: int = 3072
    length: int = 77
    projection: int = 768
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"]) -> Encoded:
        """ids end with the highest id of the vocabulary; the state at its first place is the pooled one."""
        if ids.shape[1] > self.length:
            raise ValueError(f"{ids.shape[1]} ids, but the text tower has {self.length} positions")

        def embed(count, name):
            return nn.Embed(count, self.width, dtype=self.dtype, embedding_init=embedding_init(self.width), name=name)

        x = embed(self.vocab, "token")(ids) + embed(self.length, "position")(jnp.arange(ids.shape[1]))
        for i in range(self.layers):
            x = _Layer(self.heads, self.ff, causal=True, dtype=self.dtype, name=f"layer_{i}")(x)
        hidden = layer_norm("norm", self.dtype)(x)
        return _encoded(hidden, jnp.argmax(ids, axis=1), self.projection)


class CLIPVision(nn.Module):
    """C_CT, C_MRI, C_Xray: one copy each. The default size is ViT-L/14's vision tower.

    patch, image: pixels a side. projection: width d of the shared space.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    ff: int = 4096
    patch: int = 14
    image: int = 224
    projection: int = 768
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b image image 3"]) -> Encoded:
        """x: what `clip_pixels` makes of images. The pooled state is the class token's."""
        b, p, side = x.shape[0], self.patch, self.image // self.patch
        if x.shape[1] != self.image:
            raise ValueError(f"images of {x.shape[1]} pixels, but the vision tower takes {self.image}")
        # The strided convolution as one product: its gradient on CPU is otherwise slow. The kernel keeps HWIO.
        x = x.reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5)
        patch = nn.DenseGeneral(self.width, axis=(2, 3, 4), use_bias=False, dtype=self.dtype, name="patch")
        x = patch(x.reshape(b, side * side, p, p, 3))
        first = self.param("class_embedding", embedding_init(self.width), (self.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, self.width)), x], axis=1)
        position = nn.Embed(
            1 + side * side, self.width, dtype=self.dtype, embedding_init=embedding_init(self.width), name="position"
        )
        x = layer_norm("pre_norm", self.dtype)(x + position(jnp.arange(1 + side * side)))
        for i in range(self.layers):
            x = _Layer(self.heads, self.ff, causal=False, dtype=self.dtype, name=f"layer_{i}")(x)
        hidden = layer_norm("norm", self.dtype)(x)
        return _encoded(hidden, jnp.zeros((b,), jnp.int32), self.projection)


def clip_pixels(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size 3"]:
    """Images (b h w 1 or 3) in [-1, 1] as the vision towers take them: resized on device (antialiased bicubic,
    torch's), in [0, 1], normalised with CLIP's mean and standard deviation."""
    if x.shape[1:3] != (size, size):
        shape = (x.shape[0], size, size, x.shape[3])
        x = jax.image.resize(x, shape, jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=True)
    return (0.5 * (x + 1) - jnp.asarray(MEAN, x.dtype)) / jnp.asarray(STD, x.dtype)
