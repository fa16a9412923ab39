"""Unified central alignment (section 3.2, Eq. 3): InfoNCE over central pairs.

    L_{A,B} = -log exp(z_A . z_B / tau) / (exp(z_A . z_B / tau) + sum_{j != i} exp(z_A . z_B^j / tau))

taken both ways, L_{A,B} + L_{B,A}, and halved. The paper's Eq. 3 lacks the L2 normalisation that keeps it stable; both
vectors are unit length here. Under jit over a sharded batch the negatives are the global batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 or bf16 products would blur cosines near 1
LOG_SCALE_INIT = float(np.log(1 / 0.07))
LOG_SCALE_MAX = float(np.log(100.0))


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x / |x|, in float32."""
    x = x.astype(jnp.float32)
    # The square root of a floored sum: that of a floored norm has no gradient at zero, and NaN is what it returns.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-16))


def info_nce(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    log_scale: float | Float[Array, ""],
    rows: Bool[Array, "b"] | None = None,
    same: Bool[Array, "b b"] | None = None,
) -> Float[Array, ""]:
    """Symmetric InfoNCE of paired rows, in nats.

    Args:
      a, b: pooled embeddings; row i of one belongs to row i of the other. Normalised here.
      log_scale: ln(1/tau), clamped to [0, ln 100].
      rows: which rows take part, as anchors and as negatives; all by default. Below two of them the loss is zero.
      same: rows that cannot be told apart (one record drawn twice, equal captions): no negatives of each other.
    """
    scale = jnp.exp(jnp.clip(log_scale, 0.0, LOG_SCALE_MAX))
    logits = scale * jnp.matmul(unit(a), unit(b).T, precision=HIGHEST)
    if rows is None:
        rows = jnp.ones(logits.shape[0], bool)
    logits = jnp.where(rows[None, :] & rows[:, None], logits, -1e9)
    if same is not None:
        logits = jnp.where(same & ~jnp.eye(len(same), dtype=bool), -1e9, logits)
    both = -jnp.diagonal(jax.nn.log_softmax(logits, 1)) - jnp.diagonal(jax.nn.log_softmax(logits, 0))
    count = rows.sum()
    return jnp.where(count > 1, 0.5 * jnp.sum(jnp.where(rows, both, 0.0)) / jnp.maximum(count, 1), 0.0)
