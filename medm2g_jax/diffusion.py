"""Latent diffusion (section 3.1, Eq. 1-2): schedule, forward process, eps loss, guidance, samplers.

    q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I)                       `add_noise`
    L = E || eps - eps_theta(z_t, t, C(y)) ||^2                              `eps_loss`
    eps = eps_u + s (eps_c - eps_u)                                          `guide_eps`: s is the guidance scale

The schedule is linear in sqrt(beta), 0.00085 .. 0.0120 over T = 1000 steps, which latent diffusion calls "linear";
Eq. 1's alpha_t and sigma_t mix alpha with its cumulative product, meant is the line above.

A sampler is a table of times, one row a step, and a function of (z_t, eps, noise): `sampler_table` and `sampler_step`,
the same for DDIM (Song et al. 2021, Eq. 12; eta 0 is deterministic, 1 ancestral) and DDPM (Eq. 1, variance beta_t).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medm2g_jax.arrays import Latent, Times
from medm2g_jax.errors import UserError

T = 1000
BETAS = np.linspace(0.00085**0.5, 0.0120**0.5, T, dtype=np.float64) ** 2
ABAR = np.cumprod(1.0 - BETAS)


def _per_row(table: np.ndarray, t: Times, like: Latent) -> Float[Array, "b ..."]:
    return jnp.asarray(table, jnp.float32)[t].reshape(t.shape + (1,) * (like.ndim - 1))


def add_noise(z: Latent, t: Times, eps: Latent) -> Latent:
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps; t (b,) integers in 0 .. 999."""
    return _per_row(np.sqrt(ABAR), t, z) * z + _per_row(np.sqrt(1 - ABAR), t, z) * eps


def eps_loss(eps: Latent, prediction: Latent) -> Float[Array, ""]:
    """Eq. 2: squared error, mean over the latent's dimensions and the rows, in float32."""
    return jnp.mean(jnp.square(eps.astype(jnp.float32) - prediction.astype(jnp.float32)))


def guide_eps(unconditional: Latent, conditional: Latent, guidance: float | Float[Array, ""]) -> Latent:
    """Classifier-free guidance in the paper's convention: scale 1 is the conditional prediction alone."""
    return unconditional + guidance * (conditional - unconditional)


class Steps(NamedTuple):
    """One row a sampling step, from noise to data: the time t, and abar at t and at the time stepped to."""

    t: Float[Array, "s"]
    abar: Float[Array, "s"]
    abar_next: Float[Array, "s"]
    last: Float[Array, "s"]  # 1.0 on the last step, where DDPM returns its estimate of z_0


def sampler_table(steps: int) -> Steps:
    """Times 1 + i * (T // steps), descending, as latent diffusion takes them: {981, ..., 21, 1} for 50 steps.

    All 1000 steps are 999 .. 0: the offset of 1 would pass the end of the schedule. DDIM's last step goes to abar_0
    (there is no time -1 in training).
    """
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps}: a sampler takes 1 .. {T} steps")
    stride = T // steps
    t = np.arange(steps)[::-1] * stride
    t = t + 1 if t[0] + 1 < T else t
    abar_next = ABAR[np.maximum(t - stride, 0)]
    last = (np.arange(steps) == steps - 1).astype(np.float32)
    return Steps(*(jnp.asarray(x, jnp.float32) for x in (t, ABAR[t], abar_next, last)))


def sampler_step(sampler: str, step: Steps, z: Latent, eps: Latent, noise: Latent, eta: Float[Array, ""]) -> Latent:
    """z_t -> z at the next time of the table.

    Args:
      sampler: "ddim", or "ddpm" (which ignores eta: the posterior mean of Eq. 1 plus sqrt(beta) noise).
      step: one row of the table (scalars).
    """
    z, eps = z.astype(jnp.float32), eps.astype(jnp.float32)
    a, a_next = step.abar, step.abar_next
    z0 = (z - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)
    if sampler == "ddim":
        sigma = eta * jnp.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        return jnp.sqrt(a_next) * z0 + jnp.sqrt(jnp.maximum(1 - a_next - sigma**2, 0)) * eps + sigma * noise
    if sampler == "ddpm":
        a_next = jnp.where(step.last > 0, 1.0, a_next)
        beta = 1 - a / a_next
        mean = jnp.sqrt(a_next) * beta / (1 - a) * z0 + jnp.sqrt(a / a_next) * (1 - a_next) / (1 - a) * z
        return mean + (1 - step.last) * jnp.sqrt(beta) * noise
    raise UserError(f"sampler={sampler!r}: expected 'ddim' or 'ddpm'")
