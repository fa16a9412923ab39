"""Autoencoder losses (section 3.1: diffusion runs in the latent space of an autoencoder).

Both are variational: reconstruction plus a KL term per latent dimension. The KL weight of the text autoencoder decides
whether reports survive sampling noise in their latent (DESIGN: what tiny measured), so it is not a formality.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medm2g_jax.arrays import Latent


def kl_per_dimension(mean: Latent, logvar: Latent) -> Float[Array, ""]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, mean over rows and latent dimensions."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)


def token_cross_entropy(logits: Float[Array, "b n v"], ids: Int[Array, "b m"], pad: int) -> Float[Array, ""]:
    """Next-token cross-entropy in nats, mean over the tokens that are not padding.

    logits[:, i] predicts ids[:, i + 1]; the logits of the last position are not used.
    """
    logits = logits[:, : ids.shape[1] - 1].astype(jnp.float32)
    target = ids[:, 1:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0]
    real = target != pad
    return jnp.sum(jnp.where(real, nll, 0.0)) / jnp.maximum(real.sum(), 1)
