"""`medm2g retrieve`: what lies nearest to a text or an image in the aligned space (3.2), among vectors or a folder.

    medm2g retrieve --model RUN --given ct=slice.png --among vectors.npz --stream xray -k 5 --sheet sheet.png

Cosines of one stream can be compared with each other. Those of several hardly can: texts, and images of each modality,
lie apart from all others in the space, so name the stream that is looked for.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from medm2g_jax.data.write import unwritable
from medm2g_jax.embed import Item, embed, named, of_files, of_text
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream, stream_word
from medm2g_jax.vectors import Vectors, read

FOOT = "images as they were given; not for clinical use"
_SHOWN = 60  # letters of a name, its last ones, below a tile


class Near(NamedTuple):
    """One that was found; cosine 1 is the same direction."""

    rank: int
    cosine: float
    name: str
    stream: str

    def __str__(self) -> str:
        return f"{self.rank:3d}  {self.cosine:+.4f}  {self.name}  ({self.stream})"


def query_of(model: Model, given: str) -> Item:
    """What STREAM=VALUE names.

    Raises:
      UserError: it is not of that form.
    """
    stream, equals, value = given.partition("=")
    if not equals or not value.strip():
        raise UserError(f"--given {given!r}: expected STREAM=VALUE, as in --given text='...' or --given ct=FILE.png")
    split_stream(stream)
    if MODALITIES[split_stream(stream)[0]].is_image:
        items = of_files(model, [value], stream)
        if len(items) != 1:
            raise UserError(f"--given {given}: {len(items)} images; expected one, or one volume")
        return items[0]
    return of_text(model, value)


def among(model: Model, where: str, stream: str | None, say: Callable[[str], Any] = print) -> Vectors:
    """The vectors of a file, or of the images in a folder, which are embedded now; of a stream, where one is named.

    Raises:
      UserError: neither, or vectors of another model.
    """
    if Path(where).is_dir():
        found, left = embed(model, of_files(model, [where], stream), say=say)
        if left:
            say(f"{len(left)} of {len(left) + len(found.names)} could not be read; the first: {left[0][1]}")
    else:
        found = read(where)
    if found.fingerprint != model.fingerprint:
        raise UserError(
            f"{where}: vectors of the model {found.fingerprint}, and this model is {model.fingerprint}; spaces of two "
            "models have nothing in common: embed again with this one, or name that one"
        )
    return found.of(stream)


def nearest(model: Model, query: Item, vectors: Vectors, k: int = 5) -> list[Near]:
    """The k rows of the greatest cosine, the greatest first; of equal ones the first row first. Of a volume its mean
    asks.

    Raises:
      UserError: the query cannot be read.
    """
    cosine = vectors.values @ embed(model, [query])[0].values[0]
    cosine = np.round(cosine, 6)  # the product's last bits depend on a row's place
    order = np.argsort(-cosine, kind="stable")[:k]
    return [Near(n, float(cosine[i]), vectors.names[i], vectors.streams[i]) for n, i in enumerate(order, 1)]


def sheet(path: str, model: Model, query: Item, found: Sequence[Near]) -> list[str]:
    """Write a picture of the query and what was found; returns the names of those that could not be shown: texts, what
    is not where it was, and what may not be shown, records of data that are not open.

    Raises:
      UserError: it cannot be written.
    """
    tiles = [_tile(model, query)] + [_tile(model, named(model, one.name, one.stream)) for one in found]
    captions = [f"given: {query.name}"[:200]]
    captions += [f"{one.rank}: {one.cosine:.3f}, {stream_word(one.stream)} {one.name[-_SHOWN:]}" for one in found]
    title = f"nearest in the aligned space of {model.meta['stage']}, {model.fingerprint}"
    try:
        grid(epath.Path(path), [("given, and the nearest", tiles)], captions, title, foot=FOOT)
    except OSError as error:
        raise unwritable(path, error, "--sheet") from error
    return [one.name for one, tile in zip(found, tiles[1:], strict=True) if tile is None]


def _tile(model: Model, item: Item | None) -> np.ndarray | None:
    """(size size 1) in [-1, 1]; of a volume its middle slice; None of what is no image, or cannot be read."""
    if item is None:
        return None
    try:
        _, inputs = item.read(model)
    except UserError:
        return None
    x = inputs[len(inputs) // 2] if inputs else None
    return x if isinstance(x, np.ndarray) else None
