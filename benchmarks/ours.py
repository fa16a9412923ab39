"""Our side of a benchmark: parameters and inputs at random, and the wait for a result."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from medm2g_jax.device import activation_dtype, jit


def params(module: nn.Module, *args: Any, dtype: str = "float32", **kwargs: Any) -> Any:
    """What `module.apply` takes, at random and scaled by fan-in, without compiling `init`."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= float(np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25) ** -0.5
        return jnp.asarray(values, activation_dtype(dtype))

    return jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs))


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def call(function: Callable, *args: Any) -> Callable[[], Any]:
    """Run the function, compiled as the package compiles its own, and wait for its result."""
    compiled = jit(function)
    return lambda: jax.block_until_ready(compiled(*args))
