"""Optimizer and schedule. AdamW where the paper says Adam with weight decay 1e-4 (`optimizer="adam"` adds the decay to
the gradient, as those words have it); f_B's free rows have a learning rate of their own, as in textual inversion."""

import re
from collections.abc import Iterable

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from medm2g_jax.errors import UserError

ADAPT_ROWS = r"[^/]+/adapt/rows$"


def schedule(config: ConfigDict) -> optax.Schedule:
    """Cosine from lr to final_lr * lr over all steps, times a linear warm-up, which is evaluated at step + 1: one that
    starts at 0 wastes the first step."""
    warm = max(1.0, config.warmup * config.steps)

    def lr(step):
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / max(config.steps, 1), 1.0)))
        return config.lr * jnp.minimum(1.0, (step + 1) / warm) * (config.final_lr + (1 - config.final_lr) * cosine)

    return lr


def make(config: ConfigDict, names: Iterable[str]) -> optax.GradientTransformation:
    """The update rule for a flat dict of parameters with these names."""
    names = tuple(names)
    decay = optax.add_decayed_weights(
        config.weight_decay,
        mask=lambda params: {k: v.ndim > 1 and not re.match(ADAPT_ROWS, k) for k, v in params.items()},
    )
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    if config.optimizer not in ("adam", "adamw"):
        raise UserError(f"config.optimizer={config.optimizer!r}: expected 'adamw' or 'adam'")
    core = (decay, adam) if config.optimizer == "adam" else (adam, decay)
    own = config.lr_adapt / config.lr if config.lr_adapt and config.lr else 1.0
    factors = {k: own if re.match(ADAPT_ROWS, k) else 1.0 for k in names}
    rates = optax.stateless(lambda updates, _: {k: u * factors[k] for k, u in updates.items()})
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip), *core, rates, optax.scale_by_learning_rate(schedule(config))
    )
    # One jitted micro-step called from Python: training steps inside lax.scan are slow on CPU.
    return optax.MultiSteps(tx, config.accumulate).gradient_transformation() if config.accumulate > 1 else tx
