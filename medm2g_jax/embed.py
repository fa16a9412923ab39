"""The aligned space (3.2) as a tool of its own: unit vectors of texts and images, and what lies nearest to one.

    medm2g embed --model RUN --out vectors.npz scans/ film.png --stream ct --text reports.txt
    medm2g retrieve --model RUN --given text="large mass" --among vectors.npz --sheet sheet.png

A row's name leads back to it: a file; "FILE#12", a slice of
a volume or a line of a text file, from 0; "manifest:DIR#12", a record of a data set by its number there, whose id stays
where it is. A volume is one vector, the mean of its slices' made a unit again, or one a slice.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from medm2g_jax.data import formats
from medm2g_jax.data.formats import dicom
from medm2g_jax.data.source import SPLITS, Source
from medm2g_jax.data.volume import MOST_VOXELS, Volume
from medm2g_jax.errors import UserError
from medm2g_jax.fill import data_of
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, centre, split_stream
from medm2g_jax.train.log import duration
from medm2g_jax.vectors import Vectors
from medm2g_jax.volumes import cut, shows

EVERY = 5.0  # seconds between two lines of progress
CHUNK = 64  # values embedded at a time: one executable a modality


class Item(NamedTuple):
    """Something that has a vector: its name, and (model) -> its stream and what networks read of it, a row each of its
    slices. Reading raises UserError where it is broken, or of no modality that the model takes."""

    name: str
    read: Callable[[Model], tuple[str, list[Any]]]


# --- what there is to embed -----------------------------------------------------------------------------------------


def of_files(model: Model, paths: Iterable[str], stream: str | None = None, plane: str = "axial") -> list[Item]:
    """Images of any format, and those in folders and the folders in them; a folder of DICOM slices is one volume.

    Args:
      stream: what all are of; None for what each file says of itself.

    Raises:
      UserError: the model has no vectors of this stream, or a folder is without images; of a path that is not there
        reading says it.
    """
    if stream is not None:
        _check_stream(model, stream)
    out = []
    for path in map(Path, paths):
        inside = _inside(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: no image in it; expected files that end in {', '.join(formats.FORMATS)}")
        out += [Item(str(p), lambda model, p=p: _of_file(model, p, stream, plane)) for p in inside]
    return out


def _inside(folder: Path) -> list[Path]:
    """The images in a folder and the folders in it; of one that holds a series of DICOM slices the folder itself."""
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _is_image(path):
            found.setdefault(path.parent, []).append(path)
    return [p for place, files in found.items() for p in ([place] if _is_series(place, files) else files)]


def _is_series(place: Path, files: Sequence[Path]) -> bool:
    if len(files) < 2 or not all(map(dicom.is_dicom, files)):
        return False
    try:
        found = dicom.series(place, MOST_VOXELS)
    except UserError:  # one of them is damaged: each is read, and it is said which
        return False
    flat = [m.dicom for m in MODALITIES.values() if m.is_image and not m.projection]
    return len(found) == 1 and found[0].modality in flat


def _is_image(path: Path) -> bool:
    """By its name, or by its content where it is DICOM; of a header and its data the header alone."""
    try:
        formats.format_at(path)
    except UserError:
        return False
    pair = path.name.lower().endswith((".img", ".img.gz"))
    return not (pair and path.with_name(path.name[: path.name.lower().rindex(".img")] + ".hdr").exists())


def _of_file(model: Model, path: Path, stream: str | None, plane: str) -> tuple[str, list[Any]]:
    image = formats.load(path, MOST_VOXELS)
    stream = stream or _stream_of(model, image, str(path))
    _check_stream(model, stream)
    if not isinstance(image, Volume) or min(image.values.shape) == 1:
        return stream, list(model.model_input(stream, [path]))
    pictures = cut(image, stream, plane).pictures()
    return stream, list(model.model_input(stream, [p for p in pictures if shows(p)] or pictures))


def _stream_of(model: Model, image: Any, name: str) -> str:
    """What a file says it is of; where it says nothing, the one kind of image that the model takes."""
    images = [m for m in model.givable if MODALITIES[m].is_image]
    found = [m for m in images if image.modality and MODALITIES[m].dicom == image.modality]
    if not found and not image.modality and len(images) == 1:
        found = images
    if not found:
        said = f"says it is {image.modality}" if image.modality else "does not say what it is of"
        raise UserError(f"{name}: {said}; say what to take it for, --stream {' or '.join(images) or 'STREAM'}")
    return found[0]


def _check_stream(model: Model, stream: str) -> None:
    if split_stream(stream)[0] not in model.givable:
        takes = ", ".join(model.givable) or "nothing"
        raise UserError(f"{stream!r}: this model has no prompt encoder of it, and so no vectors; it takes {takes}")


def of_texts(model: Model, said: Iterable[str]) -> list[Item]:
    """Texts: each a text itself, or a text file, every line of which is one; empty lines are none.

    Raises:
      UserError: the model reads no texts, or a file cannot be read.
    """
    out = []
    for one in said:
        if not one.endswith(".txt"):
            lines = [(one, one)]
        else:
            try:
                read = Path(one).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--text {one}: cannot be read: {getattr(error, 'strerror', '') or error}") from error
            lines = [(f"{one}#{n}", line) for n, line in enumerate(read) if line.strip()]
        out += [of_text(model, text, name) for name, text in lines]
    return out


def of_text(model: Model, text: str, name: str = "") -> Item:
    """A text, named by itself where it has no other name.

    Raises:
      UserError: the model reads no texts.
    """
    stream = centre().name
    _check_stream(model, stream)
    return Item(name or text, lambda model: (stream, _ids(model, text)))


def _ids(model: Model, text: str) -> list[Any]:
    return [jax.tree.map(lambda x: x[0], model.ids([text]))]


def of_data(model: Model, spec: str, split: str, stream: str | None = None) -> list[Item]:
    """The records of a split of a data set: all their streams that the model takes, or one.

    Raises:
      UserError: no such data or split, or nothing in it that the model takes.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split!r}: expected one of {', '.join(SPLITS)}")
    source, out = data_of(model, spec), []
    for i, record in enumerate(source.records):
        for s in record.streams if record.split == split else ():
            if s == stream or stream is None and split_stream(s)[0] in model.givable:
                out.append(Item(f"{spec}#{i}", lambda model, i=i, s=s: _of_record(model, source, i, s)))
    if not out:
        held = dict.fromkeys(s for r in source.records if r.split == split for s in r.streams)
        raise UserError(
            f"--data {spec}: split {split!r} holds {', '.join(held) or 'nothing'}, the model takes "
            f"{', '.join(model.givable) or 'nothing'}{f', and --stream is {stream}' if stream else ''}"
        )
    return out


def _of_record(model: Model, source: Source, index: int, stream: str) -> tuple[str, list[Any]]:
    _check_stream(model, stream)
    value = source.read(index, stream, np.random.default_rng([0, index]))
    return stream, [value] if isinstance(value, np.ndarray) else _ids(model, value)


def named(model: Model, name: str, stream: str) -> Item | None:
    """What a row of this name was made of, to be shown: an image; None of a text, of what is not there any more, and of
    records of data that are not open."""
    place, _, number = name.rpartition("#")
    if not MODALITIES[split_stream(stream)[0]].is_image:
        return None
    if Path(name).exists():
        return of_files(model, [name], stream)[0]
    if not number.isdigit():
        return None
    if Path(place).exists():
        return Item(name, lambda model: _one(_of_file(model, Path(place), stream, "axial"), int(number)))
    source = _opened(model, place)
    if source is None or not source.open or int(number) >= len(source.records):
        return None
    return Item(name, lambda model: _of_record(model, source, int(number), stream))


@functools.lru_cache(maxsize=1)  # what is found is mostly of one set
def _opened(model: Model, spec: str) -> Source | None:
    try:
        return data_of(model, spec)
    except UserError:
        return None


def _one(read: tuple[str, list[Any]], number: int) -> tuple[str, list[Any]]:
    return read[0], read[1][number : number + 1]


# --- their vectors --------------------------------------------------------------------------------------------------


def embed(
    model: Model, items: Sequence[Item], slices: bool = False, say: Callable[[str], Any] = print
) -> tuple[Vectors, list[tuple[str, str]]]:
    """(the vectors of all that can be read, in their order; the name of each that cannot, and why).

    Args:
      slices: a volume is a row a slice; else one row, their mean.
      say: is told how far it is.

    Raises:
      UserError: nothing could be read.
    """
    began, told = time.monotonic(), time.monotonic()
    rows: list[tuple[str, str, list[Any]]] = []  # name, stream, vectors of its slices
    left: list[tuple[str, str]] = []
    waiting: dict[str, list[tuple[list[Any], Any]]] = {}
    for done, item in enumerate(items, 1):
        try:
            stream, inputs = item.read(model)
        except UserError as error:
            left.append((item.name, str(error)))
            continue
        rows.append((item.name, stream, []))
        queue = waiting.setdefault(stream, [])
        queue += [(rows[-1][2], x) for x in inputs]
        while len(queue) >= CHUNK:
            _flush(model, stream, queue)
        if (now := time.monotonic()) - told > EVERY:
            rate = done / (now - began)
            say(f"{done}/{len(items)}  {rate:.3g}/s  {duration((len(items) - done) / rate)} left")
            told = now
    if not rows:
        raise UserError(f"nothing of {len(items)} could be embedded: {'; '.join(why for _, why in left[:3]) or 'none'}")
    for stream, queue in waiting.items():
        while queue:
            _flush(model, stream, queue)
    return _joined(model, rows, slices), left


def _flush(model: Model, stream: str, queue: list[tuple[list[Any], Any]]) -> None:
    """Embed the first of a queue; a chunk that is not full is filled up, so that it needs no executable of its own."""
    some = queue[:CHUNK]
    del queue[:CHUNK]
    full = [x for _, x in some] + [some[-1][1]] * (CHUNK - len(some))
    vectors = model.embedded(stream, jax.tree.map(lambda *x: np.stack(x), *full))
    for (own, _), vector in zip(some, vectors, strict=False):
        own.append(vector)


def _joined(model: Model, rows: Sequence[tuple[str, str, list[Any]]], slices: bool) -> Vectors:
    names: list[str] = []
    streams: list[str] = []
    values: list[np.ndarray] = []
    for name, stream, own in rows:
        if slices or len(own) == 1:
            names += [f"{name}#{n}" for n in range(len(own))] if len(own) > 1 else [name]
            values += own
        else:
            names.append(name)
            values.append(np.mean(own, axis=0))
        streams += [stream] * (len(names) - len(streams))
    x = np.asarray(values, np.float32)
    return Vectors(tuple(names), tuple(streams), x / np.linalg.norm(x, axis=1, keepdims=True), model.fingerprint)
