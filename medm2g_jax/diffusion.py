"""Latent diffusion (section 3.1, Eq. 1-2): the process, its loss, guidance, and samplers that know no network.

    q(z_t | z_0) = N(alpha_t z_0, sigma_t^2 I)                               `Process.add_noise`
    L = E || target - network(z_t, t, C(y)) ||^2                             `denoising_loss`, Eq. 2 where target = eps

The schedule is linear in sqrt(beta), 0.00085 .. 0.0120 over T = 1000 steps, which latent diffusion calls "linear";
alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t). Eq. 1's alpha_t and sigma_t mix alpha with its cumulative product.
Its last abar is 0.0047: a network learns with a trace of the image in its noise, and samples from noise alone. The
other row of `SCHEDULES` closes that gap.

What a network predicts is a row of `PREDICTIONS`. Everything else speaks of a *denoiser*,

    denoise(z, t) -> {stream: (z0, eps)}        z: {stream: (b ...)}, t: one noise level for all

which any prediction gives. `guided` wraps one in classifier-free guidance, `sample` (and `sample_some`, a part of the
way) moves a dict of streams from noise to data by one. A sampler is one function, a step, and a row of `SAMPLERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medm2g_jax.arrays import Latent, Times
from medm2g_jax.errors import UserError
from medm2g_jax.keys import row_normal, salt

T = 1000
BETAS = np.linspace(0.00085**0.5, 0.0120**0.5, T, dtype=np.float64) ** 2
ABAR = np.cumprod(1.0 - BETAS)
LEAST = 2.0**-24  # what "no signal" is, so that samplers may divide by it


def _to_no_signal(abar: np.ndarray) -> np.ndarray:
    """The schedule shifted and scaled in sqrt(abar) until it ends without signal (Lin et al. 2024, Algorithm 1)."""
    root = np.sqrt(abar)
    return np.maximum(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2, LEAST)


SCHEDULES = {"scaled_linear": ABAR, "zero_snr": _to_no_signal(ABAR)}  # name -> abar_t

# How training spreads the times of its rows: uniform numbers in [0, 1) -> shares of T. Between the ends, where the
# noise hides all and where it hides nothing, is what a prompt decides (Esser et al. 2024, logit-normal of mean 0).
TIMES: dict[str, Callable[[Array], Array]] = {
    "uniform": lambda u: u,
    "logit_normal": lambda u: jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.maximum(u, 1e-7))),
}

Streams = dict[str, Latent]
Denoised = dict[str, tuple[Array, Array]]  # (z0, eps) of each stream, of as many rows as z, or parts of so many
Denoise = Callable[[Streams, Array], Denoised]

# --- the process ----------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a network may predict: the target it learns, the (z0, eps) that a prediction p of it means, and how many
    times z0's squared error its own is."""

    target: Callable[..., Latent]  # (z0, eps, alpha, sigma)
    split: Callable[..., tuple[Latent, Latent]]  # (p, z_t, alpha, sigma)
    error: Callable[[Array], Array]  # (alpha^2 / sigma^2)


PREDICTIONS = {
    "eps": Prediction(
        lambda z0, eps, a, s: eps,
        lambda p, z, a, s: ((z - s * p) / a, p),
        lambda snr: snr,
    ),
    "v": Prediction(
        lambda z0, eps, a, s: a * eps - s * z0,
        lambda p, z, a, s: (a * z - s * p, s * z + a * p),
        lambda snr: 1 + snr,
    ),
    "sample": Prediction(
        lambda z0, eps, a, s: z0,
        lambda p, z, a, s: (p, (z - a * p) / s),
        lambda snr: jnp.ones_like(snr),
    ),
}


@dataclass(frozen=True)
class Process:
    """The forward process of one flow, and what its network predicts: names in SCHEDULES and PREDICTIONS.

    Raises:
      UserError: there are no such ones.
    """

    predict: str = "eps"
    schedule: str = "scaled_linear"

    def __post_init__(self):
        for field, name, known in (("predict", self.predict, PREDICTIONS), ("schedule", self.schedule, SCHEDULES)):
            if name not in known:
                raise UserError(f"config.{field}={name!r}: expected one of {', '.join(known)}")

    def at(self, t: Times, like: Latent) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(alpha_t, sigma_t) of each row, to multiply `like` with; t integers in 0 .. 999."""
        shape, abar = t.shape + (1,) * (like.ndim - t.ndim), SCHEDULES[self.schedule]
        return tuple(jnp.asarray(np.sqrt(table), jnp.float32)[t].reshape(shape) for table in (abar, 1 - abar))

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

    def weight(self, t: Times, most: float) -> Float[Array, "b"]:
        """What the squared error at time t counts where that of z0 counts min(SNR, most) (Hang et al. 2023, min-SNR);
        most=0: one at all times, for whatever is predicted (Ho et al. 2020, "simple")."""
        if not most:
            return jnp.ones(t.shape)
        abar = SCHEDULES[self.schedule]
        snr = jnp.asarray(abar / (1 - abar), jnp.float32)[t]
        return jnp.minimum(snr, most) / PREDICTIONS[self.predict].error(snr)


def denoising_loss(
    target: Latent, prediction: Latent, weight: Float[Array, "b"] | None = None, rows: Bool[Array, "b"] | None = None
) -> Float[Array, ""]:
    """Squared error, mean over the latent's dimensions and the rows, in float32.

    Args:
      weight: of each row (`Process.weight`); one by default.
      rows: which count; all by default.
    """
    error = jnp.square(target.astype(jnp.float32) - prediction.astype(jnp.float32))
    each = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
    each = each if weight is None else weight * each
    return jnp.mean(each) if rows is None else jnp.sum(jnp.where(rows, each, 0.0)) / jnp.maximum(jnp.sum(rows), 1)


def guided(parts: Denoise, guidance: float | Float[Array, "..."]) -> Denoise:
    """Classifier-free guidance in the paper's convention, eps_u + s (eps_c - eps_u): scale 1 is the conditional
    prediction alone. z0 follows the same line, since it is affine in the prediction.

    Args:
      parts: a denoiser that answers b rows with b unconditional ones, then b for each further condition, all of which
        go through the network as one batch.
      guidance: a scale for each condition, which adds s times what it changes beside those before it.
    """
    scales = jnp.atleast_1d(guidance)

    def combine(all_: Array) -> Array:
        first, *more = jnp.split(all_, len(scales) + 1)
        out, before = first, first
        for scale, now in zip(scales, more, strict=True):
            out, before = out + scale * (now - before), now
        return out

    return lambda z, t: jax.tree.map(combine, parts(z, t))


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


def times(steps: int, spacing: str = "auto", schedule: str = "scaled_linear") -> np.ndarray:
    """The times of a sampler, descending.

    leading: 1 + i (T // steps), as latent diffusion takes them ({981, ..., 21, 1} for 50; all 1000 are 999 .. 0).
    trailing: T - i T / steps - 1. linspace: 0 to 999, ends included. Each has the values of diffusers' DDIMScheduler.
    auto: leading where it begins at the top, which it does for 20 steps and more that divide T; else trailing, which
    does so always: a table that begins lower takes pure noise for a half denoised latent. Of a schedule that ends
    without signal the top is its very last time: always trailing.

    Raises:
      UserError: steps or spacing out of range.
    """
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps}: a sampler takes 1 .. {T} steps")
    if spacing not in SPACINGS:
        raise UserError(f"spacing={spacing!r}: expected one of {', '.join(SPACINGS)}")
    if spacing == "auto":
        near = steps >= LEADING and T % steps == 0 and schedule != "zero_snr"
        spacing = "leading" if near else "trailing"
    if spacing == "trailing":
        return np.round(np.arange(T, 0, -T / steps)[:steps]).astype(int) - 1
    if spacing == "linspace":
        return np.linspace(0, T - 1, steps).round()[::-1].astype(int)
    t = np.arange(steps)[::-1] * (T // steps)
    return t + 1 if t[0] + 1 < T else t


def sampler_table(steps: int, spacing: str = "auto", schedule: str = "scaled_linear") -> Row:
    """The rows of a sampler. The step after the last time goes to abar_0, as Stable Diffusion's DDIM does (there is no
    time -1 in training); samplers that end on z_0 itself see `Row.last`."""
    t = times(steps, spacing, schedule)
    t_next = np.append(t[1:], 0)
    place, abar = np.arange(steps), SCHEDULES[schedule]
    beta = 1 - abar[t] / abar[t_next]
    levels = (np.sqrt(x[at]) for at in (t, t_next) for x in (abar, 1 - abar))
    columns = (t, t_next, *levels, beta, place == 0, place == steps - 1)
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
    schedule: str = "scaled_linear",
) -> Streams:
    """Noise {stream: (b ...)} to latents z_0, all streams in lockstep through one `lax.scan`.

    Args:
      denoise: see the module's docstring; t comes as an int32 scalar.
      keys: one a row (b,); a step's noise is a function of it, the step and the stream's name.
      sampler, spacing, schedule: names in SAMPLERS, SPACINGS and SCHEDULES.

    Raises:
      UserError: no such sampler or spacing, or steps out of range.
    """
    state = State({s: x.astype(jnp.float32) for s, x in z.items()})
    state = state._replace(memory=remembered(state.z, sampler))
    move = _mover(denoise, keys, sampler, eta)
    numbered = jnp.arange(steps), sampler_table(steps, spacing, schedule)
    state, _ = jax.lax.scan(lambda state, at: (move(state, *at), None), state, numbered)
    return state.z


def sample_some(
    denoise: Denoise,
    state: State,
    keys: Array,
    table: Row,
    begin: Int[Array, ""],
    end: Int[Array, ""],
    sampler: str = "ddim",
    eta: float | Float[Array, ""] = 0.0,
) -> State:
    """The steps `begin` to `end` of a table, with the noise that `sample` has. Where they are traced one executable
    serves any number of steps, whole or in parts between which somebody hears how far it is.

    Args:
      table: see `padded_table`.
    """
    move = _mover(denoise, keys, sampler, eta)
    row = lambda i: jax.tree.map(lambda x: x[i], table)  # noqa: E731
    return jax.lax.fori_loop(begin, end, lambda i, state: move(state, i, row(i)), state)


def padded_table(steps: int, spacing: str = "auto", schedule: str = "scaled_linear") -> Row:
    """`sampler_table`, filled up with zeros to T rows: of one shape whatever the number of steps."""
    return jax.tree.map(lambda x: np.pad(x, (0, T - steps)), sampler_table(steps, spacing, schedule))


def remembered(z: Mapping[str, Any], sampler: str) -> Any:
    """What a sampler remembers of latents before its first step.

    Raises:
      UserError: no such sampler.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler={sampler!r}: expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler].memory(z)


def _mover(denoise: Denoise, keys: Array, sampler: str, eta: float | Float[Array, ""]) -> Callable[..., State]:
    """(state, number of the step, its row) -> state."""

    def at_integer(z: Streams, t: Array) -> Denoised:
        return denoise(z, t.astype(jnp.int32))

    def move(state: State, i: Array, row: Row) -> State:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        noise = {s: row_normal(own, x.shape[1:], salt(f"step {s}")) for s, x in state.z.items()}
        return SAMPLERS[sampler].step(at_integer, state, row, noise, jnp.asarray(eta, jnp.float32))

    return move
