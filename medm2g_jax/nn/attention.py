"""Attention over contexts: what every cross-attention of the system reads, and the one place that picks a backend.

A *context* is what a flow is told by others: a prompt C(y) (section 3.1) or a guide V_B([z_t^B, f_B]) (section 3.4).
It is tokens (b n d) in the shared space with one logit bias a token, the same for every head and query:

    softmax_m(q k_m / sqrt(e) + bias_m)

The bias -log(n) on each of a source's n tokens makes sources of different lengths weigh the same: with equal keys, 4
text tokens together get the mass of 16 image tokens. MASKED takes a token out; rows of a batch can so differ in what
they are given while one executable serves them all.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SCORES, KEYS, BLOCK = 2**16, 128, 512  # from so many, CPU takes one head at a time, and so many queries of it
MANY = 2**22  # scores of a head from which accelerators without a fused kernel take blocks of queries: 4096 x 1024
TRACED_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("traced_for", default=None)
MASKED = -1e9  # finite: a row without any token stays a number (its output is multiplied by `present`)


@contextlib.contextmanager
def traced_for(backend: str) -> Iterator[None]:
    """What is traced inside is for `backend` ("cpu", "gpu", "tpu"), whichever this process runs on."""
    token = TRACED_FOR.set(backend)
    try:
        yield
    finally:
        TRACED_FOR.reset(token)


class Context(NamedTuple):
    """Tokens (b n d) and what is added to their attention logits (b n)."""

    tokens: Float[Array, "b n d"]
    bias: Float[Array, "b n"]


def context(tokens: Float[Array, "b n d"]) -> Context:
    """One source: bias -log(n) for each of its n tokens."""
    b, n, _ = tokens.shape
    return Context(tokens, jnp.full((b, n), -jnp.log(n), jnp.float32))


def concat(contexts: Sequence[Context]) -> Context:
    """Several sources on the token axis, each with the weight of one."""
    return Context(*(jnp.concatenate(parts, axis=1) for parts in zip(*contexts, strict=True)))


def mask(ctx: Context, keep: Bool[Array, "b"]) -> Context:
    """The context as given in the rows that are kept, no token in the others."""
    return ctx._replace(bias=jnp.where(keep[:, None], ctx.bias, MASKED))


def present(ctx: Context) -> Bool[Array, "b"]:
    """Does the row have any token that is not masked?"""
    return jnp.any(ctx.bias > MASKED / 2, axis=1)


def attend(
    q: Float[Array, "b n k e"],
    k: Float[Array, "b m k e"],
    v: Float[Array, "b m k e"],
    bias: Float[Array, "b m"] | None = None,
    causal: bool = False,
) -> Float[Array, "b n k e"]:
    """softmax(q k / sqrt(e) + bias) v per head, the softmax in float32; causal: query i sees keys 0 .. i.

    In half precision cuDNN's fused kernel on GPUs that have it; on CPU what suits its compiler (`_on_cpu`); else two
    einsums, as `jax.nn.dot_product_attention` has them, of so many queries at a time that the scores of all never lie
    in memory at once, nor are kept for the gradient.
    """
    backend = TRACED_FOR.get() or jax.default_backend()
    if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and _has_fused_kernel():
        folded = fold_bias(q, k, v, bias, causal)
        if folded[0].shape[-1] <= 128:  # more is refused in training before Hopper; SD's 160 goes to XLA
            scale = q.shape[-1] ** -0.5
            out = jax.nn.dot_product_attention(*folded, scale=scale, is_causal=causal, implementation="cudnn")
            return out[:, : q.shape[1], :, : q.shape[-1]]
    if backend == "cpu":
        return _on_cpu(q, k, v, bias, causal)
    n, order = q.shape[1], jnp.arange(q.shape[1])
    if n * k.shape[1] < MANY or n % BLOCK:
        return _einsums(q, order, k, v, bias, causal)
    # Rows stay the first dimension: a mesh splits them, and no block of queries moves between its devices.
    some = jax.checkpoint(lambda block: _einsums(*block, k, v, bias, causal))
    blocks = q.reshape(q.shape[0], -1, BLOCK, *q.shape[2:]).swapaxes(0, 1)
    return jax.lax.map(some, (blocks, order.reshape(-1, BLOCK))).swapaxes(0, 1).reshape(q.shape)


def _einsums(q, order, k, v, bias, causal):
    """`attend` of the queries (b n k e) at the places `order` (n)."""
    logits = jnp.einsum("bnke,bmke->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits += bias[:, None, None, :]
    if causal:
        logits = jnp.where(order[:, None] >= jnp.arange(k.shape[1]), logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bmke->bnke", weights, v)


def _has_fused_kernel() -> bool:
    """Is this process' GPU one that cuDNN's kernel runs on: NVIDIA's from Ampere on, not T4 or V100, nor AMD's?"""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    return major.isdigit() and int(major) >= 8


def _on_cpu(q, k, v, bias, causal):
    """`attend` as XLA's CPU compiler runs it fast: plain matrix products with the heads in front, and where a head has
    many scores one head of one row, and 512 queries, at a time.

    Against the einsums, ms forward and with gradients, two cores: 240 for 1130 and 1390 for 3950 with 4096 tokens, 8
    heads of 40; 12 for 45 and 64 for 98 with 16 rows of 256 tokens, 8 heads of 8.
    """
    b, n, heads, e = q.shape
    q = (q.astype(jnp.float32) * e**-0.5).astype(q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    bias = jnp.zeros((b, k.shape[2])) if bias is None else bias
    order = jnp.arange(n) if causal else None
    if k.shape[2] < KEYS or n * k.shape[2] < SCORES:
        out = _weighted(q, k, v, bias[:, None, None], order)
    else:
        block = BLOCK if n % BLOCK == 0 else n
        order = order if order is None else order.reshape(-1, block)

        def one(head):
            q, k, v, bias = head
            return jax.lax.map(lambda some: _weighted(some[0], k, v, bias, some[1]), (q.reshape(-1, block, e), order))

        rows = [x.reshape(b * heads, *x.shape[2:]) for x in (q, k, v)]
        out = jax.lax.map(one, (*rows, jnp.repeat(bias, heads, axis=0))).reshape(b, heads, n, e)
    return out.transpose(0, 2, 1, 3)


def _weighted(q, k, v, bias, order):
    """Queries (... n e), already scaled, on keys and values (... m e): (... n e). order: places (n) of the queries, if
    they see no later key."""
    logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32) + bias
    if order is not None:
        logits = jnp.where(order[:, None] >= jnp.arange(k.shape[-2]), logits, MASKED)
    # The greatest by halves: whole vectors are compared, and only the last 64 numbers with each other.
    most = jax.lax.stop_gradient(logits)
    while most.shape[-1] > 64 and most.shape[-1] % 2 == 0:
        most = jnp.maximum(*jnp.split(most, 2, axis=-1))
    weights = jnp.exp(logits - most.max(axis=-1, keepdims=True)).astype(v.dtype)
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    # Divided at last: (n e) numbers instead of (n m).
    return (out / weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)).astype(v.dtype)


def fold_bias(
    q: Float[Array, "b n k e"],
    k: Float[Array, "b m k e"],
    v: Float[Array, "b m k e"],
    bias: Float[Array, "b m"] | None,
    causal: bool = False,
) -> tuple[Float[Array, "b n2 k f"], Float[Array, "b m2 k f"], Float[Array, "b m2 k f"]]:
    """Carry the bias as two more features of the head: q has 1 1, k the bias (times sqrt(e)) and what rounding left.

    cuDNN takes a bias as a full (b k n m) tensor in half precision, where log(272) is off by a hundredth, and computes
    its gradient, which nobody wants. What jax asks for in training is padded with zeros: head dims to a multiple of 8,
    odd numbers of tokens (CLIP has 77 and 257) by one, masked where nothing else hides it.
    """
    m, e = k.shape[1], q.shape[-1]
    if m % 2 and not (causal and bias is None):
        bias = jnp.zeros((k.shape[0], m)) if bias is None else bias
        bias = jnp.pad(bias, [(0, 0), (0, 1)], constant_values=MASKED)
    q, k, v = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (q, k, v))
    if bias is not None:
        # At least -3e4, which float16 can hold and exp() turns into 0 all the same.
        exact = jnp.maximum(bias * e**0.5, -3e4)
        rounded = exact.astype(k.dtype)
        rest = (exact - rounded.astype(exact.dtype)).astype(k.dtype)
        features = jnp.stack([rounded, rest], axis=-1)[:, :, None]
        q = jnp.concatenate([q, jnp.ones((*q.shape[:3], 2), q.dtype)], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(features, (*k.shape[:3], 2))], axis=-1)
        v = jnp.pad(v, [(0, 0)] * 3 + [(0, 2)])
    pad = [(0, 0)] * 3 + [(0, -q.shape[-1] % 8)]
    return jnp.pad(q, pad), jnp.pad(k, pad), jnp.pad(v, pad)
