"""Latent diffusion (section 3.1, Eq. 1-2): the process, its loss, guidance, and samplers that know no network.

    q(z_t | z_0) = N(alpha_t z_0, sigma_t^2 I)                               `Process.add_noise`
    L = E || target - network(z_t, t, C(y)) ||^2                             `denoising_loss`, Eq. 2 where target = eps

The schedule is linear in sqrt(beta), 0.00085 .. 0.0120 over T = 1000 steps, which latent diffusion calls "linear";
alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t). Eq. 1's alpha_t and sigma_t mix alpha with its cumulative product.

What a network predicts is a row of `PREDICTIONS`. Everything else speaks of a *denoiser*,

    denoise(z, t) -> {stream: (z0, eps)}        z: {stream: (b ...)}, t: one noise level for all

which any prediction gives. `guided` wraps one in classifier-free guidance, `sample` moves a dict of streams from noise
to data by one. A sampler is one function, a step, and a row of `SAMPLERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from medm2g_jax.arrays import Latent, Times
from medm2g_jax.errors import UserError
from medm2g_jax.keys import row_normal, salt

T = 1000
BETAS = np.linspace(0.00085**0.5, 0.0120**0.5, T, dtype=np.float64) ** 2
ABAR = np.cumprod(1.0 - BETAS)
ALPHA, SIGMA = np.sqrt(ABAR), np.sqrt(1.0 - ABAR)

Streams = dict[str, Latent]
Denoised = dict[str, tuple[Array, Array]]  # (z0, eps) of each stream, of as many rows as z or, in halves, twice
Denoise = Callable[[Streams, Array], Denoised]

# --- the process ----------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a network may predict: the target it learns, and the (z0, eps) that a prediction p of it means."""

    target: Callable[..., Latent]  # (z0, eps, alpha, sigma)
    split: Callable[..., tuple[Latent, Latent]]  # (p, z_t, alpha, sigma)


PREDICTIONS = {
    "eps": Prediction(lambda z0, eps, a, s: eps, lambda p, z, a, s: ((z - s * p) / a, p)),
    "v": Prediction(lambda z0, eps, a, s: a * eps - s * z0, lambda p, z, a, s: (a * z - s * p, s * z + a * p)),
    "sample": Prediction(lambda z0, eps, a, s: z0, lambda p, z, a, s: (p, (z - a * p) / s)),
}


@dataclass(frozen=True)
class Process:
    """The forward process of one flow, and what its network predicts: a name in PREDICTIONS.

    Raises:
      UserError: there is no such prediction.
    """

    predict: str = "eps"

    def __post_init__(self):
        if self.predict not in PREDICTIONS:
            raise UserError(f"config.predict={self.predict!r}: expected one of {', '.join(PREDICTIONS)}")

    def at(self, t: Times, like: Latent) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(alpha_t, sigma_t) of each row, to multiply `like` with; t integers in 0 .. 999."""
        shape = t.shape + (1,) * (like.ndim - t.ndim)
        return tuple(jnp.asarray(table, jnp.float32)[t].reshape(shape) for table in (ALPHA, SIGMA))

    def add_noise(self, z: Latent, t: Times, eps: Latent) -> Latent:
        """z_t = alpha_t z + sigma_t eps."""
        alpha, sigma = self.at(t, z)
        return alpha * z + sigma * eps

    def target(self, z: Latent, t: Times, eps: Latent) -> Latent:
        """What the network has to say of z_t."""
        return PREDICTIONS[self.predict].target(z, eps, *self.at(t, z))

    def split(self, prediction: Latent, z_t: Latent, t: Times) -> tuple[Latent, Latent]:
        """(z0, eps), float32, that a prediction means."""
        prediction, z_t = prediction.astype(jnp.float32), z_t.astype(jnp.float32)
        return PREDICTIONS[self.predict].split(prediction, z_t, *self.at(t, z_t))


def denoising_loss(target: Latent, prediction: Latent, rows: Bool[Array, "b"] | None = None) -> Float[Array, ""]:
    """Squared error, mean over the latent's dimensions and the rows, in float32. rows: which count; all by default."""
    error = jnp.square(target.astype(jnp.float32) - prediction.astype(jnp.float32))
    if rows is None:
        return jnp.mean(error)
    each = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
    return jnp.sum(jnp.where(rows, each, 0.0)) / jnp.maximum(jnp.sum(rows), 1)


def guided(halves: Denoise, guidance: float | Float[Array, ""]) -> Denoise:
    """Classifier-free guidance in the paper's convention, eps_u + s (eps_c - eps_u): scale 1 is the conditional
    prediction alone. z0 follows the same line, since it is affine in the prediction.

    Args:
      halves: a denoiser that answers b rows with 2 b, unconditional ones first: both halves go through the network as
        one batch.
    """

    def combine(both: Array) -> Array:
        unconditional, conditional = jnp.split(both, 2)
        return unconditional + guidance * (conditional - unconditional)

    return lambda z, t: jax.tree.map(combine, halves(z, t))


# --- samplers -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One sampling step, from time t to t_next; as a table, arrays of all steps from noise to data."""

    t: Float[Array, "*s"]
    t_next: Float[Array, "*s"]
    alpha: Float[Array, "*s"]
    sigma: Float[Array, "*s"]
    alpha_next: Float[Array, "*s"]
    sigma_next: Float[Array, "*s"]
    beta: Float[Array, "*s"]  # 1 - abar / abar_next
    first: Float[Array, "*s"]  # 1.0 on the first step
    last: Float[Array, "*s"]  # 1.0 on the last step


class State(NamedTuple):
    """What a sampler moves: the streams, and what it remembers of earlier steps."""

    z: Streams
    memory: Any = ()


class Sampler(NamedTuple):
    """step(denoise, state, row, noise, eta) -> state; `memory(z)` is what there is to remember before the first."""

    step: Callable[..., State]
    memory: Callable[[Streams], Any] = lambda z: ()


SPACINGS = ("auto", "leading", "trailing", "linspace")
LEADING = 20  # steps from which "leading" starts at the top, but for a twentieth of the schedule


def times(steps: int, spacing: str = "auto") -> np.ndarray:
    """The times of a sampler, descending.

    leading: 1 + i (T // steps), as latent diffusion takes them ({981, ..., 21, 1} for 50; all 1000 are 999 .. 0).
    trailing: T - i T / steps - 1. linspace: 0 to 999, ends included. Each has the values of diffusers' DDIMScheduler.
    auto: leading where it begins at the top, which it does for 20 steps and more that divide T; else trailing, which
    does so always: a table that begins lower takes pure noise for a half denoised latent.

    Raises:
      UserError: steps or spacing out of range.
    """
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps}: a sampler takes 1 .. {T} steps")
    if spacing not in SPACINGS:
        raise UserError(f"spacing={spacing!r}: expected one of {', '.join(SPACINGS)}")
    if spacing == "auto":
        spacing = "leading" if steps >= LEADING and T % steps == 0 else "trailing"
    if spacing == "trailing":
        return np.round(np.arange(T, 0, -T / steps)[:steps]).astype(int) - 1
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps).round()[::-1].astype(int)
    t = np.arange(steps)[::-1] * (T // steps)
    return t + 1 if t[0] + 1 < T else t


def sampler_table(steps: int, spacing: str = "auto") -> Row:
    """The rows of a sampler. The step after the last time goes to abar_0, as Stable Diffusion's DDIM does (there is no
    time -1 in training); samplers that end on z_0 itself see `Row.last`."""
    t = times(steps, spacing)
    t_next = np.append(t[1:], 0)
    place = np.arange(steps)
    beta = 1 - ABAR[t] / ABAR[t_next]
    columns = (t, t_next, ALPHA[t], SIGMA[t], ALPHA[t_next], SIGMA[t_next], beta, place == 0, place == steps - 1)
    return Row(*(jnp.asarray(x, jnp.float32) for x in columns))


def _to_data(row: Row) -> Row:
    """The row with a last step that ends on z_0 itself."""
    last = row.last > 0
    return row._replace(
        alpha_next=jnp.where(last, 1.0, row.alpha_next),
        sigma_next=jnp.where(last, 0.0, row.sigma_next),
        beta=jnp.where(last, row.sigma**2, row.beta),
    )


def _each(f: Callable[..., Latent], *streams: Mapping[str, Any]) -> Streams:
    return {s: f(*(d[s] for d in streams)) for s in streams[0]}


def ddim(denoise: Denoise, state: State, row: Row, noise: Streams, eta: Float[Array, ""]) -> State:
    """Song et al. 2021, Eq. 12; eta 0 is deterministic, 1 ancestral."""
    spread = eta * row.sigma_next / row.sigma * jnp.sqrt(jnp.maximum(row.beta, 0.0))
    along = jnp.sqrt(jnp.maximum(row.sigma_next**2 - spread**2, 0.0))

    def move(out, noise):
        z0, eps = out
        return row.alpha_next * z0 + along * eps + spread * noise

    return State(_each(move, denoise(state.z, row.t), noise))


def ddpm(denoise: Denoise, state: State, row: Row, noise: Streams, eta: Float[Array, ""]) -> State:
    """Eq. 1: the posterior mean, and noise of variance beta_t; ends on z_0. Takes no eta."""
    row = _to_data(row)

    def move(z, out, noise):
        z0, _ = out
        ratio = row.alpha / row.alpha_next
        mean = (row.alpha_next * row.beta * z0 + ratio * row.sigma_next**2 * z) / row.sigma**2
        return mean + (1 - row.last) * jnp.sqrt(row.beta) * noise

    return State(_each(move, state.z, denoise(state.z, row.t), noise))


def euler(denoise: Denoise, state: State, row: Row, noise: Streams, eta: Float[Array, ""]) -> State:
    """One Euler step of the probability-flow ODE in x = z / alpha over sigma / alpha (Karras et al. 2022); takes no
    eta."""
    row = _to_data(row)
    move = lambda out: row.alpha_next * out[0] + row.sigma_next * out[1]  # noqa: E731
    return State(_each(move, denoise(state.z, row.t)))


def heun(denoise: Denoise, state: State, row: Row, noise: Streams, eta: Float[Array, ""]) -> State:
    """Heun's second-order step of the same ODE (Karras et al. 2022, Algorithm 1): asks the denoiser a second time where
    Euler's step has led; the last step is Euler's. Takes no eta."""
    to_data = _to_data(row)
    here = denoise(state.z, row.t)
    there = denoise(euler(lambda *_: here, state, row, noise, eta).z, row.t_next)
    level, level_next = row.sigma / row.alpha, to_data.sigma_next / to_data.alpha_next

    def move(z, a, b):
        moved = z / row.alpha + (level_next - level) * 0.5 * (a[1] + b[1])
        return jnp.where(row.last > 0, a[0], to_data.alpha_next * moved)

    return State(_each(move, state.z, here, there))


def dpmpp_2m(denoise: Denoise, state: State, row: Row, noise: Streams, eta: Float[Array, ""]) -> State:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order from the step before; first and last steps are of
    first order. Remembers z0 and log(alpha / sigma) of the step before. Takes no eta."""
    z0_before, level_before = state.memory
    level, level_next = jnp.log(row.alpha / row.sigma), jnp.log(row.alpha_next / row.sigma_next)
    single = (row.first > 0) | (row.last > 0)
    slope = jnp.where(single, 0.0, 0.5 * (level_next - level) / jnp.where(single, 1.0, level - level_before))
    row = _to_data(row)
    shrink = row.sigma_next / row.sigma
    out = denoise(state.z, row.t)

    def move(z, out, before):
        z0 = out[0] + slope * (out[0] - before)
        return shrink * z + (row.alpha_next - row.alpha * shrink) * z0

    return State(_each(move, state.z, out, z0_before), (_each(lambda o: o[0], out), level))


SAMPLERS = {
    "ddim": Sampler(ddim),
    "ddpm": Sampler(ddpm),
    "euler": Sampler(euler),
    "heun": Sampler(heun),
    "dpmpp_2m": Sampler(dpmpp_2m, lambda z: (jax.tree.map(jnp.zeros_like, z), jnp.float32(0))),
}


def sample(
    denoise: Denoise,
    z: Streams,
    keys: Array,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "auto",
    eta: float | Float[Array, ""] = 0.0,
) -> Streams:
    """Noise {stream: (b ...)} to latents z_0, all streams in lockstep through one `lax.scan`.

    Args:
      denoise: see the module's docstring; t comes as an int32 scalar.
      keys: one a row (b,); a step's noise is a function of it, the step and the stream's name.
      sampler, spacing: names in SAMPLERS and SPACINGS.

    Raises:
      UserError: no such sampler or spacing, or steps out of range.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler={sampler!r}: expected one of {', '.join(SAMPLERS)}")
    step, memory = SAMPLERS[sampler]

    def at_integer(z: Streams, t: Array) -> Denoised:
        return denoise(z, t.astype(jnp.int32))

    def body(state: State, numbered: tuple[Array, Row]) -> tuple[State, None]:
        i, row = numbered
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        noise = {s: row_normal(own, x.shape[1:], salt(f"step {s}")) for s, x in state.z.items()}
        return step(at_integer, state, row, noise, jnp.asarray(eta, jnp.float32)), None

    z = {s: x.astype(jnp.float32) for s, x in z.items()}
    numbered = jnp.arange(steps), sampler_table(steps, spacing)
    state, _ = jax.lax.scan(body, State(z, memory(z)), numbered)
    return state.z
