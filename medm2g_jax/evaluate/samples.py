"""Samples of a model in numbers, from values as its networks read them, for whoever measures them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from medm2g_jax.inference import Model
from medm2g_jax.keys import row_keys

CHUNK = 100  # generated at a time


def samples(
    model: Model, given: Mapping[str, Any], make: Sequence[str], count: int, seed: int, first: int = 0, **options: Any
) -> dict[str, Any]:
    """{stream: list of str, or images (count h w 1) in [-1, 1]}; sample i's noise is a function of (seed, i).

    Args:
      given: {stream: list of str, or images (count h w 1) in [-1, 1]}.
      first: the number of the first sample.
      options: of `Model.request`.
    """
    request = model.request(tuple(given), tuple(make), **options)
    inputs = {s: model.ids(v) if isinstance(v, list) else v for s, v in given.items()}
    scales = model.defaults["guidance"], model.defaults["eta"]
    z = model.sample(request, inputs, row_keys(jax.random.key(seed), first + count)[first:], *scales, CHUNK)
    return {m: model.decode(m, z[m], CHUNK) for m in make}
