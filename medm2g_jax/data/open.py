"""From a data spec to its source."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.data import mixture
from medm2g_jax.data.check import parse_ranges
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.mixture import Mixture
from medm2g_jax.data.picture import MOST_PIXELS
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError

OWN = "own"  # the scheme of data that were handed over in Python


def open_source(
    spec: str,
    *,
    size: int,
    seed: int,
    pairs: Any,
    template_text: bool,
    phantom: dict,
    range: str = "",
    most_pixels: int = MOST_PIXELS,
    registered: bool = False,
    weights: Sequence[int | float] = (),
) -> Source:
    """The source that `spec` names: "phantom", "manifest:PATH" or "tfds:NAME", or several with "+" between them.

    Args:
      size: side of the images.
      seed, pairs, phantom: of the phantom alone.
      template_text, most_pixels, registered: see `Manifest`; the phantom knows what it has rendered.
      range: of 16-bit images, see `check.parse_ranges`; "" finds it.
      weights: of a mixture alone, see `Mixture`.

    Raises:
      UserError: no such form, or the data cannot be opened.
    """
    parts, ranges = mixture.split(spec), parse_ranges(range)
    mixture.check_weights(weights, len(parts))
    several = len(parts) > 1

    def one(spec: str) -> Source:
        scheme, _, name = spec.partition(":")
        if spec == "phantom":
            from medm2g_jax.data.phantom.render import Phantom

            return Phantom(size=size, seed=seed, pairs=pairs, **phantom)
        if scheme == "manifest" and name:
            return Manifest(name, size, template_text, ranges, most_pixels, registered, part=several)
        if scheme == "tfds" and name:
            from medm2g_jax.data.tfds import Tfds

            return Tfds(name, size, ranges=ranges, most_pixels=most_pixels, registered=registered, part=several)
        if scheme == OWN and name:
            raise UserError(
                f"data {spec!r} were handed over in Python, as run(config, source=...); they have no other name"
            )
        raise UserError(f"data {spec!r}: expected phantom, manifest:PATH or tfds:NAME")

    if not several:
        return one(spec)
    whole = Mixture([one(part) for part in parts], weights)
    mixture.check_ranges(whole, list(ranges))
    return whole


def source_of(shared: Mapping[str, Any] | ConfigDict) -> Source:
    """The source that a config names, or the `shared` fields of a model.json."""
    d = shared["data"]
    return open_source(
        d["source"],
        size=shared["image_size"],
        seed=shared["seed"],
        pairs=rounds.graph(shared["listing"]).pairs,
        template_text=d["template_text"],
        range=d["range"],
        most_pixels=d["most_pixels"],
        registered="registered" in d and d["registered"],  # left out where it is not
        weights=d["weights"] if "weights" in d else (),  # likewise
        phantom=dict(train=d["train"], val=d["val"], test=d["test"]),
    )
