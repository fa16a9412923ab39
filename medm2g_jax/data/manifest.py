"""Data that a user brings: manifest folders.

A manifest folder holds `manifest.jsonl`, one JSON object a line:

    {"id": "s1", "subject": "p1", "split": "train", "images": {"ct": "ct/s1.png", "mri_t2": "mri/s1.png"},
     "text": "findings : ...", "text_origin": "report", "license": "CC BY 4.0"}

`split` is train, val or test; the last four fields may be missing. `"registered": true` says that all images of the
row share one grid, pixel by pixel, a list of image keys that these do (`config.data.registered` says it of every row
that does not say). Image keys are streams with "_" in place of ":"
("mri_t1ce" is "mri:t1ce", also spelt "mri_t1gd"), files are of the formats in `data.formats`, of one picture each. PNG,
JPEG, TIFF carry no Hounsfield units: where the row says nothing they are taken as windowed already, 8-bit ones over
0 .. 255, 16-bit ones as `data.check` says. A DICOM or NIfTI file of one slice is in its unit, see `data.volume`.

A row may say more of an image, each an object with image keys (`medm2g prepare` writes them):

    "scale": {"ct": [1, -1024]}         value = slope * stored + intercept of a PNG, JPEG or TIFF: in HU, or, with a
                                        span, in the scanner's own unit
    "span": {"mri_t2": [0, 1830]}       the values, after the scale if there is one, that count as -1 and +1
    "spacing": {"ct": [0.7, 0.7]}       mm from row to row and from column to column
    "orientation": {"ct": "PL"}         where rows and columns go, see `Picture`

What has a scale or a span needs no range: `data.check` looks whether it is whole, and no further. `"info"`, an object,
is for people; of it only the labels are read, by who trains a classifier (`data.findings`).

An image named "shards/train-00003.array_record#17" is record 17 of that shard, see `data.shards`.

`"synthetic"`, a list of image keys and "text", says what a model made (`medm2g generate --data` writes it).

`id` and `subject` are strings or whole numbers: 1, 1.0 and " 1" are one subject. Half a character in a text (JSON can
spell a lone surrogate) becomes U+FFFD; how many is said in one line.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from medm2g_jax.data import formats, manifest_rows
from medm2g_jax.data.check import Examined, Item
from medm2g_jax.data.findings import stated
from medm2g_jax.data.formats import raster
from medm2g_jax.data.manifest_table import Table
from medm2g_jax.data.picture import MOST_PIXELS, Picture, Span, network_input
from medm2g_jax.data.said import Said
from medm2g_jax.data.shards import Shards, split_name
from medm2g_jax.data.source import images_of, is_open
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, Modality

LISTED = 200  # missing files in a message
MEMORY = 2 * 2**30  # bytes of decoded images kept; what goes beyond is decoded anew each time


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
        part: bool = False,
    ):
        """Open `path`; images are padded to a square and resized to `size`.

        Images of other formats and keys that are no stream are left out and counted in one log line.

        Args:
          template_text: also take texts written from metadata (`text_origin` "template"), which are no reports.
          ranges: stream or modality -> the values of its 16-bit images that count as -1 and +1; found if not said.
          most_pixels: an image of more is an error: a file of a few kB can hold gigabytes.
          registered: of rows that do not say: their images share one grid.
          part: it is one of several sets, and `ranges` may be of streams that another one holds.

        Raises:
          UserError: no manifest, a bad line, missing images, a subject in two splits, or nothing that can be used.
        """
        path = Path(path).expanduser()
        self.name = path.resolve().name
        self._shards = Shards()
        table = self._table = Table(self._shards, template_text, registered)
        table.read(path)
        table.subjects.check(str(path))
        if table.missing:
            more = f"; and {len(table.missing) - LISTED} more" if len(table.missing) > LISTED else ""
            raise UserError(f"{'; '.join(table.missing[:LISTED])}{more}")
        self.records = table.records
        _say(self.name, str(path), table)
        self.open = all(map(is_open, self.licences))
        self._size, self._most_pixels = size, most_pixels
        self._examined = Examined(self.name, ranges or {}, most_pixels, self._items, part)
        self._memory: dict[tuple, np.ndarray] = {}
        self._remembered = 0  # bytes
        self._lock = threading.Lock()

    def check(self, cache: epath.PathLike | None = None, say: Callable[[str], Any] | None = None) -> None:
        """See `source.check`: opens every image once, and finds the range of the 16-bit ones of which none is said."""
        self._examined.check(cache, say)

    @property
    def ranges(self) -> dict[str, Span]:
        """See `source.ranges`."""
        return self._examined.ranges

    @property
    def extents(self) -> dict[str, Span]:
        """See `source.extents`."""
        return self._examined.extents

    @property
    def steady(self) -> tuple[str, ...]:
        """See `source.steady`: all that is in files."""
        return images_of({stream for streams in {record.streams for record in self.records} for stream in streams})

    @property
    def licences(self) -> dict[str, int]:
        """How many records are under which licence, as the manifests put it."""
        return dict(Counter(record.licence for record in self.records))

    def entry(self, index: int, stream: str) -> dict[str, Any] | None:
        """See `source.entry_of`; None of a text."""
        if not _modality(stream).is_image:
            return None
        name, said = self._image(index, stream)
        return {"images": str(self._table.folders[index].resolve() / name), **(said.fields() if said else {})}

    def picture(self, index: int, stream: str) -> Picture | None:
        """An image of a record as it is in its file, with what its row says of it, else with its set's range; None of a
        text.

        Raises:
          UserError: it is broken; names the row and the file.
        """
        if not _modality(stream).is_image:
            return None
        try:
            return self._examined.ranged(stream, self._opened(index, stream))
        except UserError as error:
            raise UserError(f"row {self.records[index].id!r}: {error}") from error

    @functools.cached_property
    def present(self) -> Callable[[int], Mapping[str, bool | None]] | None:
        """See `source.present`: what "info" says, of which nothing is kept before somebody asks."""
        folders = self._table.folders
        of = {
            folder: {own: said for own, info in manifest_rows.infos(folder) if (said := stated(info)) is not None}
            for folder in dict.fromkeys(folders)
        }

        def found(index: int) -> Mapping[str, bool | None]:
            folder, own = folders[index], self.records[index].id
            return of[folder].get(own) or of[folder].get(own.removeprefix(f"{folder.name}/")) or {}

        return found if any(of.values()) else None

    def read(self, index: int, stream: str, rng: np.random.Generator) -> np.ndarray | str:
        """See `Source.read`; nothing here is random.

        Raises:
          UserError: the image is broken; names the row and the file.
        """
        del rng
        modality = _modality(stream)
        name, said = self._image(index, stream)
        if not modality.is_image:
            return name
        key = self._table.folders[index], name, stream, said
        small = self._memory.get(key)
        if small is None:
            picture = self.picture(index, stream)
            try:
                image = network_input(picture, modality, self._size)
            except UserError as error:
                raise UserError(f"row {self.records[index].id!r}: {error}") from error
            # As many levels as the file has, over the window: a quarter, or half, of the memory.
            code = np.uint8 if picture.pixels.dtype == np.uint8 else np.uint16
            small = np.round((image + 1) * (np.iinfo(code).max / 2)).astype(code)
            with self._lock:
                if key not in self._memory and self._remembered + small.nbytes <= MEMORY:
                    self._memory[key] = small
                    self._remembered += small.nbytes
        return small.astype(np.float32) / (np.iinfo(small.dtype).max / 2) - 1

    def identity(self) -> Iterator[str]:
        """What each record holds, image by image and text by text, wherever the folder stands: names and sizes, and
        what is said of the images."""
        sizes: dict[tuple[Path, str], int] = {}  # of shards
        for i, record in enumerate(self.records):
            if record.grid:
                yield f"one grid: {' '.join(record.grid)}"
            folder = self._table.folders[i]
            for stream, name in zip(record.streams, self._table.values[i], strict=True):
                if not _modality(stream).is_image:
                    yield name
                    continue
                file, *number = split_name(name) or (name,)
                size = sizes.get((folder, file))
                if size is None:
                    size = (folder / file).stat().st_size
                    if number:
                        sizes[folder, file] = size
                said = self._image(i, stream)[1]
                yield f"{_inside(folder, name)} {size}{f' {said.fields()}' if said else ''}"

    def _image(self, index: int, stream: str) -> tuple[str, Said | None]:
        """What the row has of a stream, an image's name or the text, and what is said of it."""
        place, said = self.records[index].streams.index(stream), self._table.said[index]
        return self._table.values[index][place], said[place] if said else None

    def _opened(self, index: int, stream: str) -> Picture:
        """An image of a record, with what its row says of it.

        Raises:
          UserError: it is broken; names the file, not the row.
        """
        name, said = self._image(index, stream)
        file, modality = self._table.folders[index] / name, _modality(stream)
        if (packed := split_name(str(file))) is None:
            picture = formats.read(file, self._most_pixels, modality)
        else:
            picture = raster.decode(self._shards.read(*packed), str(file), self._most_pixels)
        return said.of(picture, modality) if said else picture

    def _items(self) -> Iterator[Item]:
        stamps: dict[Path, tuple[int, int]] = {}  # of shards
        for index, record in enumerate(self.records):
            for stream in images_of(record.streams):
                name, said = self._image(index, stream)
                file = self._table.folders[index] / name
                packed = split_name(str(file))
                place = Path(packed[0]) if packed else file
                if (stamp := stamps.get(place)) is None:
                    about = place.stat()
                    stamp = about.st_size, about.st_mtime_ns
                    if packed:
                        stamps[place] = stamp
                read = functools.partial(self._opened, index, stream)
                key = f"{file} {said.fields()}" if said else str(file)
                yield Item(f"row {record.id!r}: ", stream, key, stamp, read)


def _modality(stream: str) -> Modality:
    return MODALITIES[stream.partition(":")[0]]


def _inside(folder: Path, name: str) -> str:
    """A file's name as the folder has it, in one spelling; of one that is elsewhere, its own."""
    if "./" not in name and "//" not in name and not name.startswith("/"):
        return name
    file = folder / name
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file.name)


def _say(name: str, path: str, table: Table) -> None:
    """What was left out, and what is not as it was written, a line each.

    Raises:
      UserError: nothing is left.
    """
    used = len(table.records)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(table.left_out.items()))
    if not used:
        raise UserError(f"{path}: {table.rows} rows hold nothing that can be used (left out: {counts or 'nothing'})")
    if counts:
        logging.warning("data %s: %d of %d rows used; left out: %s", name, used, table.rows, counts)
    if table.halves:
        logging.warning("data %s: %d half characters (lone surrogates) in texts became U+FFFD", name, table.halves)
    if table.made:
        logging.warning("data %s: %d of %d rows hold what a model made (synthetic)", name, table.made, used)
    if table.tested:
        logging.warning("data %s: %d of these are held out: do not measure against them", name, table.tested)
