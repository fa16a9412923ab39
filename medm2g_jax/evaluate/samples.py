"""Samples of a model in numbers, from values as its networks read them, for whoever measures them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from medm2g_jax.inference import Model, of_best
from medm2g_jax.keys import draw_keys

CHUNK = 100  # generated at a time


def samples(
    model: Model,
    given: Mapping[str, Any],
    make: Sequence[str],
    count: int,
    seed: int,
    first: int = 0,
    best_of: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """{stream: list of str, or images (count h w 1) in [-1, 1]}; sample i's noise is a function of (seed, i).

    Args:
      given: {stream: list of str, or images (count h w 1) in [-1, 1]}.
      first: the number of the first sample.
      best_of: of so many draws each the one that agrees best with what is given (`Model.ranked`).
      options: of `Model.request`.
    """
    request = model.request(tuple(given), tuple(make), **options)
    inputs = {s: model.ids(v) if isinstance(v, list) else v for s, v in given.items()}
    scales = model.defaults["guidance"], model.defaults["eta"]
    repeated = jax.tree.map(lambda x: np.repeat(x, best_of, axis=0), inputs)
    z = model.sample(request, repeated, draw_keys(seed, range(first, first + count), best_of), *scales, CHUNK)
    made = {m: model.decode(m, z[m], CHUNK) for m in make}
    return of_best(made, model.ranked(inputs, made)[0]) if best_of > 1 else made
