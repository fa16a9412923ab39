"""Samples of a model in numbers, from values as its networks read them, for whoever measures them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medm2g_jax.loading import Model

CHUNK = 100  # generated at a time


def samples(
    model: Model, given: Mapping[str, Any], make: Sequence[str], count: int, seed: int, **options: Any
) -> dict[str, Any]:
    """{stream: list of str, or images (count h w 1) in [-1, 1]}; sample i's noise is a function of (seed, i).

    In chunks of one size, so that one executable does it.

    Args:
      given: {stream: list of str, or images (count h w 1) in [-1, 1]}.
      options: of `Model.request`.
    """
    parts: dict[str, list] = {m: [] for m in make}
    request = model.request(tuple(given), tuple(make), **options)
    for start in range(0, count, CHUNK):
        chosen = [min(i, count - 1) for i in range(start, start + CHUNK)]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(start, start + CHUNK))
        inputs = {
            s: model.ids([v[i] for i in chosen]) if isinstance(v, list) else v[np.asarray(chosen)]
            for s, v in given.items()
        }
        z = model.sample(request, inputs, keys, model.defaults["guidance"], model.defaults["eta"])
        for m in make:
            parts[m] += list(model.decode(m, z[m]))
    return {m: np.stack(p[:count]) if not isinstance(p[0], str) else p[:count] for m, p in parts.items()}
