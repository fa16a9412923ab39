"""Data that a user brings: manifest folders.

A manifest folder holds `manifest.jsonl`, one JSON object a line:

    {"id": "s1", "subject": "p1", "split": "train", "images": {"ct": "ct/s1.png", "mri_t2": "mri/s1.png"},
     "text": "findings : ...", "text_origin": "report", "license": "CC BY 4.0"}

`split` is train, val or test; the last four fields may be missing. `"registered": true` says that all images of the
row share one grid, pixel by pixel, a list of image keys that these do (`config.data.registered` says it of every row
that does not say). Image keys are streams with "_" in place of ":"
("mri_t1ce" is "mri:t1ce", also spelt "mri_t1gd"), files are of the formats in `data.formats`, of one picture each. PNG,
JPEG, TIFF carry no Hounsfield units: they are taken as windowed already, 8-bit ones over 0 .. 255, 16-bit ones as
`data.check` says. A DICOM or NIfTI file of one slice is in its unit, see `data.volume`.

`"synthetic"`, a list of image keys and "text", says what a model made (`medm2g generate --data` writes it).

`id` and `subject` are strings or whole numbers: 1, 1.0 and " 1" are one subject. Half a character in a text (JSON can
spell a lone surrogate) becomes U+FFFD; how many is said in one line.
"""

import functools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from medm2g_jax.data import formats
from medm2g_jax.data.check import Examined, Item
from medm2g_jax.data.picture import MOST_PIXELS, Picture, Span, network_input
from medm2g_jax.data.source import SPLITS, SURROGATE, Record, check_subjects, identity, images_of, is_open, stream_of
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, split_stream

LISTED = 200  # missing files in a message
MEMORY = 2 * 2**30  # bytes of decoded images kept; what goes beyond is decoded anew each time


class _Row(NamedTuple):
    where: str  # file:line, for messages
    folder: Path
    id: str
    subject: str
    split: str
    images: Mapping[str, str]
    text: str
    origin: str
    licence: str
    registered: bool | tuple[str, ...] | None  # image keys, or all or none of them; None: not said
    synthetic: tuple[str, ...]  # keys of what a model made


class Manifest:
    """A `Source` over one manifest folder, or over the manifest folders in one folder."""

    def __init__(
        self,
        path: str | Path,
        size: int,
        template_text: bool = False,
        ranges: Mapping[str, Span] | None = None,
        most_pixels: int = MOST_PIXELS,
        registered: bool = False,
    ):
        """Open `path`; images are padded to a square and resized to `size`.

        Images of other formats and keys that are no stream are left out and counted in one log line.

        Args:
          template_text: also take texts written from metadata (`text_origin` "template"), which are no reports.
          ranges: stream or modality -> the values of its 16-bit images that count as -1 and +1; found if not said.
          most_pixels: an image of more is an error: a file of a few kB can hold gigabytes.
          registered: of rows that do not say: their images share one grid.

        Raises:
          UserError: no manifest, a bad line, missing images, a subject in two splits, or nothing that can be used.
        """
        path = Path(path).expanduser()
        self.name = path.resolve().name
        rows = [row for folder in _folders(path) for row in _read_manifest(folder)]
        check_subjects(str(path), ((row.subject, row.split, row.where) for row in rows))
        left_out: Counter[str] = Counter()
        missing: list[str] = []
        values = [_values(row, template_text, left_out, missing) for row in rows]
        if missing:
            more = f"; and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
            raise UserError(f"{'; '.join(missing[:LISTED])}{more}")
        kept = [(row, value) for row, value in zip(rows, values, strict=True) if value]
        counts = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
        if not kept:
            raise UserError(f"{path}: {len(rows)} rows hold nothing that can be used (left out: {counts or 'nothing'})")
        if counts:
            logging.warning("data %s: %d of %d rows used; left out: %s", self.name, len(kept), len(rows), counts)
        if halves := sum(len(SURROGATE.findall(row.text)) for row, value in kept if "text" in value):
            logging.warning("data %s: %d half characters (lone surrogates) in texts became U+FFFD", self.name, halves)
        if made := sum(bool(row.synthetic) for row, _ in kept):
            logging.warning("data %s: %d of %d rows hold what a model made (synthetic)", self.name, made, len(kept))
        if tested := sum(bool(row.synthetic) and row.split != "train" for row, _ in kept):
            logging.warning("data %s: %d of these are held out: do not measure against them", self.name, tested)
        times = Counter(row.id for row, _ in kept)
        self.records: Sequence[Record] = [
            Record(
                row.id if times[row.id] == 1 else f"{row.folder.name}/{row.id}",
                row.subject,
                row.split,
                tuple(value),
                row.licence,
                _grid(row, value, registered),
                tuple(stream for stream in value if stream in map(stream_of, row.synthetic)),
            )
            for row, value in kept
        ]
        self.open = all(is_open(record.licence) for record in self.records)
        self._values = [value for _, value in kept]
        self._folders = [row.folder for row, _ in kept]
        self._size, self._most_pixels = size, most_pixels
        self._examined = Examined(self.name, ranges or {}, most_pixels, self._items)
        self._memory: dict[tuple[Path, str], np.ndarray] = {}
        self._remembered = 0  # bytes
        self._lock = threading.Lock()

    def _items(self) -> Iterator[Item]:
        for record, value in zip(self.records, self._values, strict=True):
            for stream, file in value.items():
                if isinstance(file, Path):
                    about = file.stat()
                    modality = MODALITIES[split_stream(stream)[0]]
                    read = functools.partial(formats.read, file, self._most_pixels, modality)
                    yield Item(f"row {record.id!r}: ", stream, str(file), (about.st_size, about.st_mtime_ns), read)

    def check(self, cache: epath.PathLike | None = None, say: Callable[[str], Any] | None = None) -> None:
        """See `source.check`: opens every image once, and finds the range of the 16-bit ones."""
        self._examined.check(cache, say)

    @property
    def ranges(self) -> dict[str, Span]:
        """See `source.ranges`."""
        return self._examined.ranges

    @property
    def steady(self) -> tuple[str, ...]:
        """See `source.steady`: all that is in files."""
        return images_of({stream for record in self.records for stream in record.streams})

    def file(self, index: int, stream: str) -> Path | None:
        """The file that an image of a record is in; None of a text."""
        value = self._values[index][stream]
        return value if isinstance(value, Path) else None

    def picture(self, index: int, stream: str) -> Picture:
        """An image of a record as it is in its file, with its set's range.

        Raises:
          UserError: it is broken; names the row and the file.
        """
        try:
            modality = MODALITIES[split_stream(stream)[0]]
            picture = formats.read(self._values[index][stream], self._most_pixels, modality)
            return self._examined.ranged(stream, picture)
        except UserError as error:
            raise UserError(f"row {self.records[index].id!r}: {error}") from error

    def identity(self) -> Iterator[str]:
        """What each record holds, image by image and text by text, wherever the folder stands: names and sizes."""
        for record, folder, values in zip(self.records, self._folders, self._values, strict=True):
            if record.grid:
                yield f"one grid: {' '.join(record.grid)}"
            for value in values.values():
                if isinstance(value, str):
                    yield value
                else:
                    name = value.relative_to(folder) if value.is_relative_to(folder) else value.name
                    yield f"{name} {value.stat().st_size}"

    @property
    def licences(self) -> dict[str, int]:
        """How many records are under which licence, as the manifests put it."""
        return dict(Counter(record.licence for record in self.records))

    def read(self, index: int, stream: str, rng: np.random.Generator) -> np.ndarray | str:
        """See `Source.read`; nothing here is random.

        Raises:
          UserError: the image is broken; names the row and the file.
        """
        del rng
        value = self._values[index][stream]
        if isinstance(value, str):
            return value
        small = self._memory.get((value, stream))
        if small is None:
            picture = self.picture(index, stream)
            try:
                image = network_input(picture, MODALITIES[split_stream(stream)[0]], self._size)
            except UserError as error:
                raise UserError(f"row {self.records[index].id!r}: {error}") from error
            # As many levels as the file has, over the window: a quarter, or half, of the memory.
            code = np.uint8 if picture.pixels.dtype == np.uint8 else np.uint16
            small = np.round((image + 1) * (np.iinfo(code).max / 2)).astype(code)
            with self._lock:
                if (value, stream) not in self._memory and self._remembered + small.nbytes <= MEMORY:
                    self._memory[value, stream] = small
                    self._remembered += small.nbytes
        return small.astype(np.float32) / (np.iinfo(small.dtype).max / 2) - 1


def _folders(path: Path) -> list[Path]:
    if (path / "manifest.jsonl").is_file():
        return [path]
    folders = sorted(file.parent for file in path.glob("*/manifest.jsonl"))
    if not folders:
        raise UserError(f"{path}: no manifest.jsonl there, nor in a folder in it")
    return folders


def _read_manifest(folder: Path) -> list[_Row]:
    file, rows, lines = folder / "manifest.jsonl", [], {}
    try:
        content = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{where}: not JSON that can be read ({type(error).__name__})") from None
        rows.append(_checked(where, folder, row))
        if (first := lines.setdefault(rows[-1].id, number)) != number:
            raise UserError(f"{where}: id {rows[-1].id!r} is taken by line {first}; ids are unique in a manifest")
    if not rows:
        raise UserError(f"{file}: empty; expected one JSON object a line")
    return rows


def _checked(where: str, folder: Path, row: Any) -> _Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field in ("id", "subject", "split"):
        if row.get(field) in (None, ""):
            raise UserError(f"{where}: no {field!r}; a row needs id, subject, split, and images or text or both")
    names = {}
    for field in ("id", "subject"):
        try:
            names[field] = identity(row[field])
        except UserError as error:
            raise UserError(f"{where}: {field!r}: {error}") from None
    if row["split"] not in SPLITS:
        raise UserError(f"{where}: split {row['split']!r}; expected one of {', '.join(SPLITS)}")
    files, text = row.get("images") or {}, row.get("text") or ""
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{where}: 'images' must map stream keys to file names")
    if any(SURROGATE.search(name) for name in (*files, *files.values())):
        raise UserError(f"{where}: 'images' holds half a character (a lone surrogate), which no file name can")
    if not isinstance(text, str):
        raise UserError(f"{where}: 'text' must be a string, found {type(text).__name__}")
    registered = row.get("registered")
    if isinstance(registered, list):
        unknown = [key for key in registered if not isinstance(key, str) or key not in files]
        if unknown:
            said = repr(unknown[0]) if isinstance(unknown[0], str) else f"a {type(unknown[0]).__name__}"
            raise UserError(f"{where}: 'registered' names {said}, which is no key of 'images'")
        registered = tuple(registered)
    elif registered is not None and not isinstance(registered, bool):
        raise UserError(
            f"{where}: 'registered' must be true, false or a list of keys of 'images', found "
            f"{type(registered).__name__}"
        )
    synthetic = row.get("synthetic") or []
    if not isinstance(synthetic, list) or not all(isinstance(key, str) for key in synthetic):
        raise UserError(f"{where}: 'synthetic' must be a list of keys of 'images', and \"text\"")
    origin, licence = (SURROGATE.sub("\ufffd", str(row.get(f) or "")) for f in ("text_origin", "license"))
    who = names["id"], names["subject"], row["split"]
    return _Row(where, folder, *who, files, text.strip(), origin, licence, registered, tuple(synthetic))


def _grid(row: _Row, value: Mapping[str, Path | str], by_default: bool) -> tuple[str, ...]:
    """The streams of a row that share a grid."""
    said = by_default if row.registered is None else row.registered
    if isinstance(said, bool):
        return images_of(value) if said else ()
    named = {stream_of(key) for key in said}
    return tuple(stream for stream in value if stream in named)


def _values(row: _Row, template_text: bool, left_out: Counter, missing: list[str]) -> dict[str, Path | str]:
    values: dict[str, Path | str] = {}
    for key, name in row.images.items():
        stream = stream_of(key)
        if stream is None or not MODALITIES[stream.partition(":")[0]].is_image:
            left_out[f"of unknown key {key!r}"] += 1
        elif formats.format_of(name) is None:
            left_out[f"images not {formats.NAMES}"] += 1
        elif stream in values:
            raise UserError(f"{row.where}: row {row.id!r} has two images for stream {stream!r}")
        elif not (file := row.folder / name).is_file():
            missing.append(f"{row.where}: row {row.id!r}: no file {file}")
        else:
            values[stream] = file
    if row.text and row.origin == "template" and not template_text:
        left_out["template texts (they are no reports)"] += 1
    elif row.text:
        values["text"] = SURROGATE.sub("\ufffd", row.text)
    return values
