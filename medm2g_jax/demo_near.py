"""What lies nearest to what is on the page of `medm2g demo`, in the aligned space: subjects of the data that the model
was trained on, of those that it has not seen."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from medm2g_jax import embed
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.fill import data_of
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream, stream_word
from medm2g_jax.retrieve import Near, nearest
from medm2g_jax.vectors import Vectors

SUBJECTS, NEAREST = 256, 4  # among how many subjects, and how many are shown


class Neighbour(NamedTuple):
    """A subject that was found.

    Attributes:
      near: rank, cosine, name and stream.
      image: (h w) in the modality's unit.
      text: of the same subject; "" where there is none.
    """

    near: Near
    image: np.ndarray
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What lies nearest to a result.

    Attributes:
      rows: (stream of what asked, whether that was made, those nearest to it of one stream).
      among: of how many subjects, of which data.
    """

    rows: tuple[tuple[str, bool, tuple[Neighbour, ...]], ...]
    among: str


def find(
    model: Model,
    given: Mapping[str, Any],
    made: Mapping[str, Any],
    known: dict[str, Vectors],
    say: Callable[[str], Any],
) -> Found:
    """To all that was given, what lies nearest of every other modality; to each image that was made, of its own.

    Args:
      given, made: stream -> a value as `Model.generate` takes it.
      known: the vectors of a stream, which are made once and kept here.
      say: is told how far it is; what it raises ends the search.

    Raises:
      UserError: the model has no vectors of any of it, its data are not there, or may not be shown.
    """
    spec = model.meta["shared"]["data"]["source"]
    source = data_of(model, spec)
    if not source.open:
        raise UserError(f"{spec}: these data may not be shown; medm2g retrieve names what lies nearest")
    images = [m for m in model.givable if MODALITIES[m].is_image]
    # Of a modality the contrast that is on the page.
    streams = {m: next((s for s in (*made, *given) if split_stream(s)[0] == m), m) for m in images}
    asked = [(s, False, s_) for s in given for m, s_ in streams.items() if m != split_stream(s)[0]]
    asked += [(s, True, s) for s in made if s in streams.values()]
    rows = []
    for stream, own, target in asked:
        if split_stream(stream)[0] in model.givable:
            vectors = _vectors(model, spec, target, known, say)
            found = nearest(model, _item(stream, (made if own else given)[stream]), vectors, NEAREST)
            rows.append((stream, own, tuple(_neighbour(model, source, near) for near in found)))
    if not rows:
        raise UserError("this model has no prompt encoder of anything that is on the page, and so no vectors")
    return Found(tuple(rows), f"{len(vectors.names)} subjects of {spec} that it was not trained on")


def _vectors(model: Model, spec: str, stream: str, known: dict[str, Vectors], say: Callable[[str], Any]) -> Vectors:
    if stream not in known:
        items = embed.of_data(model, spec, "test", stream)[:SUBJECTS]
        what = f"reading {stream_word(stream)} of {len(items)} subjects, which is done once"
        say(what)
        known[stream], _ = embed.embed(model, items, say=lambda rate: say(f"{what}: {rate}"))
    return known[stream]


def _item(stream: str, value: Any) -> embed.Item:
    if isinstance(value, str):
        return embed.Item(value, lambda model: embed.of_text(model, value).read(model))
    return embed.Item(stream, lambda model: (stream, list(model.model_input(stream, [value]))))


def _neighbour(model: Model, source: Source, near: Near) -> Neighbour:
    number = int(near.name.rpartition("#")[2])  # `embed.of_data` names a record so

    def read(stream: str) -> Any:
        return source.read(number, stream, np.random.default_rng([0, number]))

    texts = [s for s in source.records[number].streams if not MODALITIES[split_stream(s)[0]].is_image]
    (image,) = model.in_units(near.stream, read(near.stream)[None])
    return Neighbour(near, image, " ".join(map(read, texts)))
