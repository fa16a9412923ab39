"""The one train step, for every stage: it knows no loss by name.

Frozen is not stop_gradient: parameters are split, only the trainable dict is differentiated, and the whole graph stays,
so that in round text-CT V_CT learns from the text loss through the frozen text UNet. No gradient, optimizer slot or EMA
exists for a frozen parameter.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from medm2g_jax.arrays import Params
from medm2g_jax.recipes import Recipe, weighted


class State(NamedTuple):
    """What a checkpoint holds. `step` counts micro-steps (config.accumulate of them a step)."""

    step: Array
    trainable: Params
    ema: Params
    opt: Any


def create(trainable: Params, tx: optax.GradientTransformation) -> State:
    return State(jnp.int32(0), trainable, jax.tree.map(jnp.copy, trainable), tx.init(trainable))


def _module(name: str) -> str:
    """ "ct/unet/mid/..." -> "ct/unet"; of a round's UNets only theta_c trains."""
    return "/".join(name.split("/")[:2])


def make_train_step(recipe: Recipe, config: ConfigDict, tx: optax.GradientTransformation):
    """step(state, frozen, batch, key) -> (state, metrics): loss, every term, gradient norms of all that
    trains and of each module; for jit, state donated."""
    weights = dict(config.loss)

    def loss(trainable: Params, frozen: Params, prepared: Any):
        return weighted(recipe, weights, recipe.features({**frozen, **trainable}, prepared))

    def train_step(state: State, frozen: Params, batch: Mapping, key: Array) -> tuple[State, dict]:
        key = jax.random.fold_in(key, state.step)
        prepared = recipe.prepare(frozen, batch, key)
        (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, prepared)
        updates, opt = tx.update(grads, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        done = (state.step + 1) // config.accumulate
        real = (state.step + 1) % config.accumulate == 0
        decay = jnp.where(real, jnp.minimum(config.ema, (1.0 + done) / (10.0 + done)), 1.0)
        ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), state.ema, trainable)
        metrics = {"loss": total, **terms}
        metrics["norm/gradient"] = optax.global_norm(grads)
        for module in sorted({_module(name) for name in grads}):
            own = [g for name, g in grads.items() if _module(name) == module]
            metrics[f"norm/gradient/{module}"] = optax.global_norm(own)
        return State(state.step + 1, trainable, ema, opt), metrics

    return train_step


def make_eval_step(recipe: Recipe, config: ConfigDict):
    """loss(params, frozen, batch, key, t) -> (loss, terms) without a gradient; t: the noise level, or None."""
    weights = dict(config.loss)

    def eval_step(params: Params, frozen: Params, batch: Mapping, key: Array, t: Array | None):
        prepared = recipe.prepare({**frozen, **params}, batch, key, t)
        return weighted(recipe, weights, recipe.features({**frozen, **params}, prepared))

    return eval_step
