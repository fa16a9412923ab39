"""The autoencoder of text (section 3.1): Optimus, a BERT encoder and a GPT-2 decoder around one latent vector.

    bert ids (b n), 0 = pad  ->  mean, logvar (b latent)  ->  gpt2 logits (b n v)

The two networks are BERT-base and GPT-2 small at the default size and take their published weights. The latent enters
the decoder twice: as *memory*, one vector a layer that stands in slot 0 as key and as value, not passed through c_attn,
visible to every token; and as *embed*, added to the embedding of every token. The memory slot has position 0, so
tokens start at position 1. BERT is post-norm with erf-GELU and LayerNorm eps 1e-12; GPT-2 pre-norm with tanh-GELU and
eps 1e-5, its output layer tied to the token embedding.

The decoder's vocabulary ends with three special ids: pad = v - 3, bos = v - 2, eos = v - 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from medm2g_jax.nn.attention import MASKED, attend
from medm2g_jax.nn.layers import Attention, gelu, layer_norm

BERT_EPS = 1e-12
Cache = tuple[tuple[Array, Array], ...]  # per layer keys and values (b 1+length heads e); slot 0 is the memory


def _embedding_init(width: int):
    """Normal with the published 0.02 at width 768 and more in narrow models (0.24 at 64), whose words otherwise drown
    in what the layers add: a tiny model then learns the language and leaves the latent unread."""
    return nn.initializers.normal(0.02 * 768 / width)


def _scaled(variance: float):
    return nn.initializers.variance_scaling(variance, "fan_in", "normal")


def _latent_init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Wide means and logvar = 0: there is no bias to lower logvar with, so that a latent that is to be heard above its
    own noise of 1 from the first step has to be loud."""
    mean = _scaled(16.0)(key, (shape[0], shape[1] // 2), dtype)
    return jnp.concatenate([mean, jnp.zeros_like(mean)], axis=1)


def _heads(x: Float[Array, "b n w"], heads: int) -> Float[Array, "b n heads e"]:
    return x.reshape(*x.shape[:2], heads, -1)


def _merge(x: Float[Array, "b n heads e"]) -> Float[Array, "b n w"]:
    return x.reshape(*x.shape[:2], -1)


# --- encoder: BERT --------------------------------------------------------------------------------------------------


class _BertLayer(nn.Module):
    heads: int
    ff: int
    dtype: Any

    @nn.compact
    def __call__(self, x, bias):
        attention = Attention(self.heads, qkv_bias=True, dtype=self.dtype, name="attn")
        x = layer_norm("attn_norm", self.dtype, BERT_EPS)(x + attention(x, bias=bias))
        h = gelu(nn.Dense(self.ff, dtype=self.dtype, name="fc_1")(x))
        h = nn.Dense(x.shape[-1], dtype=self.dtype, name="fc_2")(h)
        return layer_norm("ff_norm", self.dtype, BERT_EPS)(x + h)


class _BertEmbeddings(nn.Module):
    vocab: int
    width: int
    positions: int
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        def embed(count, name):
            return nn.Embed(count, self.width, dtype=self.dtype, embedding_init=_embedding_init(self.width), name=name)

        x = embed(self.vocab, "word")(ids) + embed(self.positions, "position")(jnp.arange(ids.shape[1]))
        x = x + embed(2, "token_type")(jnp.zeros((1,), jnp.int32))  # one segment: always type 0
        return layer_norm("norm", self.dtype, BERT_EPS)(x)


class _Encoder(nn.Module):
    vocab: int
    width: int
    layers: int
    heads: int
    ff: int
    latent: int
    positions: int
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        x = _BertEmbeddings(self.vocab, self.width, self.positions, self.dtype, name="embeddings")(ids)
        bias = jnp.where(ids > 0, 0.0, MASKED)
        for i in range(self.layers):
            x = _BertLayer(self.heads, self.ff, self.dtype, name=f"layer_{i}")(x, bias)
        pooled = jnp.tanh(nn.Dense(self.width, dtype=self.dtype, name="pooler")(x[:, 0]))
        moments = nn.Dense(2 * self.latent, use_bias=False, dtype=self.dtype, kernel_init=_latent_init, name="latent")
        return moments(pooled)


# --- decoder: GPT-2 -------------------------------------------------------------------------------------------------


class _GPT2Attention(nn.Module):
    heads: int
    out_init: nn.initializers.Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x, memory, cache, position):
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="c_attn")(x)
        q, k, v = (_heads(y, self.heads) for y in jnp.split(qkv, 3, axis=-1))
        memory = _heads(memory[:, None], self.heads)
        if cache is None:
            # Slot 0 gets a query as well, so that the causal mask is square; what it reads is dropped.
            k, v = (jnp.concatenate([memory, y], axis=1) for y in (k, v))
            y = attend(jnp.pad(q, ((0, 0), (1, 0), (0, 0), (0, 0))), k, v, causal=True)[:, 1:]
        else:
            put = jax.lax.dynamic_update_slice_in_dim
            cache = tuple(put(put(c, memory, 0, 1), y, position + 1, 1) for c, y in zip(cache, (k, v), strict=True))
            slots = jnp.arange(cache[0].shape[1])
            bias = jnp.where(slots <= position + 1, 0.0, MASKED)
            y = attend(q, *cache, jnp.broadcast_to(bias, (x.shape[0], bias.size)))
        return nn.Dense(width, dtype=self.dtype, kernel_init=self.out_init, name="c_proj")(_merge(y)), cache


class _GPT2MLP(nn.Module):
    ff: int
    out_init: nn.initializers.Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(self.ff, dtype=self.dtype, name="c_fc")(x), approximate=True)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="c_proj")(h)


class _GPT2Layer(nn.Module):
    heads: int
    ff: int
    out_init: nn.initializers.Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x, memory, cache, position):
        attention = _GPT2Attention(self.heads, self.out_init, self.dtype, name="attn")
        h, cache = attention(layer_norm("ln_1", self.dtype)(x), memory, cache, position)
        x = x + h
        return x + _GPT2MLP(self.ff, self.out_init, self.dtype, name="mlp")(layer_norm("ln_2", self.dtype)(x)), cache


class _Decoder(nn.Module):
    vocab: int
    width: int
    layers: int
    heads: int
    ff: int
    positions: int
    dtype: Any

    @nn.compact
    def __call__(self, z, ids, cache=None, position=0):
        embedding = _embedding_init(self.width)
        out_init = _scaled(1 / (2 * self.layers))  # GPT-2's: the residual stream keeps its size at any depth
        wte = nn.Embed(self.vocab, self.width, dtype=self.dtype, embedding_init=embedding, name="wte")
        wpe = nn.Embed(self.positions, self.width, dtype=self.dtype, embedding_init=embedding, name="wpe")

        def from_latent(features, name):
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=_scaled(0.25), name=name)(z)

        memory = jnp.split(from_latent(self.layers * self.width, "memory"), self.layers, axis=-1)
        x = wte(ids) + wpe(position + 1 + jnp.arange(ids.shape[1])) + from_latent(self.width, "embed")[:, None]
        new = []
        for i in range(self.layers):
            layer = _GPT2Layer(self.heads, self.ff, out_init, self.dtype, name=f"h_{i}")
            x, kept = layer(x, memory[i], None if cache is None else cache[i], position)
            new.append(kept)
        x = layer_norm("ln_f", self.dtype)(x)
        # float32 sums: bfloat16 logits over a vocabulary of 50,000 would tie.
        logits = jnp.einsum(
            "bnd,vd->bnv", x, wte.embedding.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return logits, tuple(new)


# --- both -----------------------------------------------------------------------------------------------------------


class TextVAE(nn.Module):
    """Optimus. The default size is the published one (BERT-base, GPT-2 small, a latent of 768).

    bert_vocab, gpt2_vocab: sizes of the two vocabularies, the decoder's with its three special ids.
    layers, heads, ff: of each of the two networks. bert_positions: longest input. gpt2_positions: one more than the
      longest output, since the memory holds position 0.
    """

    bert_vocab: int
    gpt2_vocab: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    ff: int = 3072
    latent: int = 768
    bert_positions: int = 512
    gpt2_positions: int = 1024
    dtype: Any = jnp.float32

    def setup(self):
        sizes = dict(width=self.width, layers=self.layers, heads=self.heads, ff=self.ff, dtype=self.dtype)
        self.encoder = _Encoder(self.bert_vocab, latent=self.latent, positions=self.bert_positions, **sizes)
        self.decoder = _Decoder(self.gpt2_vocab, positions=self.gpt2_positions, **sizes)

    @property
    def pad(self) -> int:
        return self.gpt2_vocab - 3

    @property
    def bos(self) -> int:
        return self.gpt2_vocab - 2

    @property
    def eos(self) -> int:
        return self.gpt2_vocab - 1

    def encode(self, ids: Int[Array, "b n"]) -> tuple[Float[Array, "b latent"], Float[Array, "b latent"]]:
        """Mean and log-variance of q(z | text), float32. ids: BERT's, [CLS] first, padded with 0."""
        if ids.shape[1] > self.bert_positions:
            raise ValueError(f"{ids.shape[1]} ids, but the encoder has {self.bert_positions} positions")
        mean, logvar = jnp.split(self.encoder(ids).astype(jnp.float32), 2, axis=-1)
        return mean, logvar

    def logits(self, z: Float[Array, "b latent"], ids: Int[Array, "b n"]) -> Float[Array, "b n v"]:
        """Logits of the token after each one of ids, which start with bos; float32."""
        if ids.shape[1] >= self.gpt2_positions:
            raise ValueError(
                f"{ids.shape[1]} ids, but the decoder has {self.gpt2_positions} positions, the memory's included"
            )
        return self.decoder(z, ids)[0]

    def step(
        self, z: Float[Array, "b latent"], token: Int[Array, "b"], position: int | Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Logits of the token after `token`, which is number `position` (bos is 0), and the cache that knows it."""
        logits, cache = self.decoder(z, token[:, None], cache, position)
        return logits[:, 0], cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens, bos included."""
        shape = (batch, 1 + length, self.heads, self.width // self.heads)
        return tuple((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.layers))

    def __call__(self, bert_ids: Int[Array, "b n"], gpt2_ids: Int[Array, "b m"]) -> Float[Array, "b m v"]:
        return self.logits(self.encode(bert_ids)[0], gpt2_ids)


def _check_length(vae: TextVAE, length: int) -> None:
    if length >= vae.gpt2_positions:
        raise ValueError(f"length {length}, but the decoder has {vae.gpt2_positions} positions, the memory's included")


def decode_greedy(vae: TextVAE, params: Any, z: Float[Array, "b latent"], length: int) -> Int[Array, "b length"]:
    """The likeliest token at each place, cached, in one scan. Ids up to eos, then pad; no bos.

    Args:
      params: the module's own, nested.
      z: unscaled latents.
      length: of the output, at most gpt2_positions - 1.
    """
    _check_length(vae, length)

    def body(carry, position):
        token, done, cache = carry
        logits, cache = vae.apply({"params": params}, z, token, position, cache, method="step")
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (token, done | (token == vae.eos), cache), jnp.where(done, vae.pad, token)

    batch = z.shape[0]
    start = (jnp.full((batch,), vae.bos, jnp.int32), jnp.zeros((batch,), bool), vae.init_cache(batch, length))
    return jax.lax.scan(body, start, jnp.arange(length))[1].T


def decode_beam(
    vae: TextVAE, params: Any, z: Float[Array, "b latent"], length: int, beams: int
) -> Int[Array, "b length"]:
    """The likeliest of the texts that `beams` hypotheses a row find, by log-probability a token (eos included), cached,
    in one scan. One beam is `decode_greedy`. Ids up to eos, then pad; no bos.

    Args:
      params: the module's own, nested.
      z: unscaled latents.
      length: of the output, at most gpt2_positions - 1.
    """
    _check_length(vae, length)
    batch, vocab = z.shape[0], vae.gpt2_vocab
    latents = jnp.repeat(z, beams, axis=0)
    only_pad = jnp.where(jnp.arange(vocab) == vae.pad, 0.0, -jnp.inf)  # what is finished costs nothing more

    def body(carry, position):
        token, done, score, texts, cache = carry
        logits, cache = vae.apply({"params": params}, latents, token, position, cache, method="step")
        step = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocab)
        step = jnp.where(done[..., None], only_pad, step)
        score, best = jax.lax.top_k((score[..., None] + step).reshape(batch, -1), beams)
        parent, token = best // vocab, (best % vocab).astype(jnp.int32)
        rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        done = jnp.take_along_axis(done, parent, axis=1)
        texts = jnp.take_along_axis(texts, parent[..., None], axis=1)
        texts = texts.at[:, :, position].set(token)  # pad where it was done before
        cache = jax.tree.map(lambda c: c[rows], cache)
        return (token.reshape(-1), done | (token == vae.eos), score, texts, cache), None

    start = (
        jnp.full((batch * beams,), vae.bos, jnp.int32),
        jnp.zeros((batch, beams), bool),
        jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) * jnp.ones((batch, 1)),  # all begin alike: one counts
        jnp.full((batch, beams, length), vae.pad, jnp.int32),
        vae.init_cache(batch * beams, length),
    )
    (_, _, score, texts, _), _ = jax.lax.scan(body, start, jnp.arange(length))
    each = score / jnp.maximum(jnp.sum(texts != vae.pad, axis=-1), 1)
    return jnp.take_along_axis(texts, jnp.argmax(each, axis=1)[:, None, None], axis=1)[:, 0]
