"""The serious baseline of translation: the flow's own UNet as a regression, on the same latents.

No noise and one answer: the UNet reads the sources on its input channels and is trained, from fresh weights, to say the
target's latents in the mean square. It says the mean of what may be, which is what PSNR rewards.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics.image import Images
from medm2g_jax.evaluate.samples import CHUNK
from medm2g_jax.inference import Model
from medm2g_jax.modality import split_stream
from medm2g_jax.model import OnGrid, init, null_context
from medm2g_jax.nn.attention import context

ALL = 2**30  # records: as many as there are
Latents = Mapping[str, jax.Array | np.ndarray]


class Fit(NamedTuple):
    """What makes the target of the sources, its last training loss, and the seconds its steps took."""

    answer: Callable[[Mapping[str, Images]], Images]
    loss: float
    seconds: float


def fit(
    held: Model,
    train: Mapping[str, Images],
    target: str,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 4e-3,
    seed: int = 0,
) -> Fit:
    """Train it on `train`: images (n h w 1) in [-1, 1] of the target and of each source.

    Raises:
      UserError: the flow of the target has no input channels for sources on its grid.
    """
    given = [s for s in train if s != target]
    name, number = split_stream(target)
    model, flow = held.model, held.model.flows[name]
    if not flow.slots:
        raise UserError(f"the flow of {name} reads nothing on its grid: a regression by its UNet needs that")
    encode = {m: jax.jit(lambda x, m=m: model.encode(held.params, m, x)) for m in model.flows}

    def latents(some: Mapping[str, Images]) -> dict[str, np.ndarray]:
        out = {}
        for stream, x in some.items():
            one = encode[split_stream(stream)[0]]
            out[stream] = np.concatenate([np.asarray(one(x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)])
        return out

    def near(z: Latents) -> jax.Array:
        ones = jnp.ones((len(z[given[0]]),), bool)
        return flow.on_grid(
            OnGrid(m, z[s], ones[:, None, None, None].astype(jnp.float32), jnp.full(len(ones), index, jnp.int32), ones)
            for s in given
            for m, index in [split_stream(s)]
        )

    empty = held.ids([""]) if held.tokenizers else {}
    frozen = {**held.params, **model.null(held.params, empty)}

    def said(params: dict, z: Latents) -> jax.Array:
        """The UNet sees its sources, the null prompt, and a blank in place of noise."""
        rows = len(z[given[0]])
        blank, at = jnp.zeros((rows, *flow.family.latent_shape)), jnp.full((rows,), number, jnp.int32)
        prompt = null_context(flow.null(frozen), rows)
        return flow.predict({**frozen, **params}, blank, jnp.zeros_like(at), prompt, None, at, near(z))

    z = latents(train)
    first = {s: x[:1] for s, x in z.items()}
    blank, at = jnp.zeros((1, *flow.family.latent_shape)), jnp.zeros((1,), jnp.int32)
    prompt, stream = context(jnp.zeros((1, 2, model.width))), at if flow.modality.contrasts else None
    params = init(flow.unet, f"{name}/unet", jax.random.key(seed), blank, at, prompt, None, stream, near(first))
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 20, steps, lr / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))
    opt = tx.init(params)

    @jax.jit
    def step(params, opt, z):
        value, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(said(p, z) - z[target])))(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    rng, began, value = np.random.default_rng(seed), time.time(), jnp.inf
    for _ in range(steps):
        rows = rng.choice(len(z[target]), batch, replace=len(z[target]) < batch)
        params, opt, value = step(params, opt, {s: x[rows] for s, x in z.items()})
    loss, seconds = float(value), time.time() - began
    decode = jax.jit(lambda z: model.decode(held.params, name, said(params, z)))

    def answer(some: Mapping[str, Images]) -> Images:
        z = latents({s: some[s] for s in given})
        n = len(z[given[0]])
        parts = [decode({s: x[i : i + CHUNK] for s, x in z.items()}) for i in range(0, n, CHUNK)]
        return np.concatenate([np.asarray(x) for x in parts])

    return Fit(answer, loss, seconds)
