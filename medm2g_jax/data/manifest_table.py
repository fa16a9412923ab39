"""What the rows of manifests hold together, laid out so that millions fit: what many rows share is kept once.

2,000,000 rows of a prepared set are a few hundred bytes each. No path is made and no file is asked for before it is
read: which names are there is known from one listing a folder, and how many records a shard holds from the shard.
"""

import contextlib
import dataclasses
import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medm2g_jax.data import formats, manifest_rows
from medm2g_jax.data.manifest_rows import About, Row
from medm2g_jax.data.said import Said
from medm2g_jax.data.shards import Shards, split_name
from medm2g_jax.data.source import SURROGATE, Record, Subjects, images_of, stream_of
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES


class _Like(NamedTuple):
    """What the records of many rows have in common, see `Record`; tells: the rows name something that a model made."""

    split: str
    streams: tuple[str, ...]
    licence: str
    grid: tuple[str, ...]
    made: tuple[str, ...]
    said: tuple[Said | None, ...]
    tells: bool


class Table:
    """Columns, a place a record; and what there is to say of them all.

    Attributes:
      records: what the rest of the package sees.
      values: names of files and the text, in the order of the record's streams.
      said: what is said of each, likewise; () where nothing is of any.
      folders: the folder that a record's names are in.
      rows: how many there were, those that hold nothing included.
      left_out: what was left out -> how often.
      missing: what is not there, in words.
      halves: half characters in texts.
      made, tested: records that hold what a model made, and those of them that are held out.
    """

    def __init__(self, shards: Shards, template_text: bool, registered: bool):
        """template_text, registered: see `data.manifest.Manifest`."""
        self.records: list[Record] = []
        self.values: list[tuple[str, ...]] = []
        self.said: list[tuple[Said | None, ...]] = []
        self.folders: list[Path] = []
        self.rows = self.halves = self.made = self.tested = 0
        self.left_out: Counter[str] = Counter()
        self.missing: list[str] = []
        self.subjects = Subjects()
        self._shards, self._template_text, self._registered = shards, template_text, registered
        self._shared: dict[Any, Any] = {}
        self._streams: dict[str, str | None] = {}
        self._like: dict[tuple[About, tuple[str, ...]], _Like] = {}
        self._whole: dict[
            tuple[About, bool], _Like
        ] = {}  # of rows of which nothing is left out, with a text or without

    def read(self, path: Path) -> None:
        """Take all rows of the folder `path`, or of the manifest folders in it.

        Raises:
          UserError: see `manifest_rows.folders` and `manifest_rows.read`; or a row has two images of one stream.
        """
        folders = manifest_rows.folders(path)
        with _no_cycles():
            for folder in folders:
                files = _Files(folder, self._shards)
                for row in manifest_rows.read(folder):
                    self._add(row, folder, files)
        if len(folders) > 1:  # ids are unique in a folder
            times = Counter(record.id for record in self.records)
            for i, (record, folder) in enumerate(zip(self.records, self.folders, strict=True)):
                if times[record.id] > 1:
                    self.records[i] = dataclasses.replace(record, id=f"{folder.name}/{record.id}")

    def _add(self, row: Row, folder: Path, files: "_Files") -> None:
        self.rows += 1
        about = row.about
        subject = self.subjects.add(row.subject, about.split, row.where)
        # Most rows are like one before, and all that they name is there: then nothing has to be picked out of them.
        like = self._whole.get((about, row.text != ""))
        if like is not None and all(map(files.known, row.images.values())) and row.text.isascii():
            values = (*row.images.values(), row.text) if row.text else tuple(row.images.values())
        else:
            value = self._value(row, files)
            if not value:
                return
            values, streams = tuple(value.values()), tuple(value)
            like = self._like.get((about, streams))
            if like is None:
                like = self._like[about, streams] = self._of(about, self._one(streams))
            if len(values) == len(row.images) + (row.text != ""):
                self._whole[about, row.text != ""] = like
        self.made += like.tells
        self.tested += like.tells and like.split != "train"
        self.records.append(Record(row.id, subject, like.split, like.streams, like.licence, like.grid, like.made))
        self.values.append(values)
        self.said.append(like.said)
        self.folders.append(folder)

    def _of(self, about: About, streams: tuple[str, ...]) -> "_Like":
        """What all rows have that say this and whose streams are these."""
        near = self._registered if about.registered is None else about.registered
        near = set(map(stream_of, near)) if isinstance(near, tuple) else set(images_of(streams) if near else ())
        made = set(map(stream_of, about.synthetic))
        said = {self._stream(key): value for key, value in about.said.items()}
        return _Like(
            self._one(about.split),
            streams,
            self._one(about.licence),
            tuple(s for s in streams if s in near),
            tuple(s for s in streams if s in made),
            self._one(tuple(said.get(s) for s in streams)) if said else (),
            bool(about.synthetic),
        )

    def _value(self, row: Row, files: "_Files") -> dict[str, str]:
        """Stream -> its file or text, of what can be used."""
        values: dict[str, str] = {}
        for key, name in row.images.items():
            stream = self._streams[key] if key in self._streams else self._stream(key)
            if stream is None:
                self.left_out[f"of unknown key {key!r}"] += 1
            elif (packed := split_name(name)) is None and formats.format_of(name) is None:
                self.left_out[f"images not {formats.NAMES}"] += 1
            elif stream in values:
                raise UserError(f"{row.where}: row {row.id!r} has two images for stream {stream!r}")
            elif wrong := files.wrong(name, packed):
                self.missing.append(f"{row.where}: row {row.id!r}: {wrong}")
            else:
                values[stream] = name
        if row.text and row.about.origin == "template" and not self._template_text:
            self.left_out["template texts (they are no reports)"] += 1
        elif row.text:
            values["text"] = row.text
            if not row.text.isascii() and (halves := len(SURROGATE.findall(row.text))):
                self.halves += halves
                values["text"] = SURROGATE.sub("\ufffd", row.text)
        return values

    def _stream(self, key: str) -> str | None:
        """The image stream that a key means."""
        if key not in self._streams:
            stream = stream_of(key)
            image = stream is not None and MODALITIES[stream.partition(":")[0]].is_image
            self._streams[key] = stream if image else None
        return self._streams[key]

    def _one(self, value: Any) -> Any:
        """The same value, kept once."""
        return self._shared.setdefault(value, value)


@contextlib.contextmanager
def _no_cycles() -> Iterator[None]:
    """Python's search for cycles off: it goes through all that is kept, again and again, and nothing here is one."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Files:
    """What is in a folder. A listing a folder costs less than asking for each of its files: a thousand times so where
    the disk is another machine's."""

    def __init__(self, folder: Path, shards: Shards):
        self._folder, self._shards = folder, shards
        self._listed: dict[str, frozenset[str]] = {}
        self._counts: dict[str, int | str] = {}  # of a shard's records, or what is wrong with it

    def known(self, name: str) -> bool:
        """Whether an image of this name is there and of a known format, as far as a quick look tells."""
        shard, mark, number = name.rpartition("#")
        if mark:
            count = self._counts.get(shard)
            return type(count) is int and number.isdecimal() and number.isascii() and int(number) < count
        parent, slash, own = name.rpartition("/")
        listed = self._listed.get(parent + slash)
        return listed is not None and own in listed and own.endswith(".png")

    def wrong(self, name: str, packed: tuple[str, int] | None) -> str:
        """Why there is no such image, in words; "" where there is. packed: see `split_name`."""
        if packed is None:
            return "" if self._there(name) else f"no file {self._folder / name}"
        shard, number = packed
        if shard not in self._counts:
            self._counts[shard] = self._count(shard)
        count = self._counts[shard]
        if isinstance(count, str):
            return count
        return "" if number < count else f"{self._folder / shard}: no record {number}; it holds {count}, from 0"

    def _count(self, shard: str) -> int | str:
        if not self._there(shard):
            return f"no file {self._folder / shard}"
        try:
            return self._shards.count(self._folder / shard)
        except UserError as error:
            return str(error)

    def _there(self, name: str) -> bool:
        parent, slash, own = name.rpartition("/")
        if parent + slash not in self._listed:
            self._listed[parent + slash] = _listing(self._folder / (parent + slash))
        # What a listing spells in another way (a link, another case, other accents) the system may know all the same.
        return own in self._listed[parent + slash] or os.path.isfile(self._folder / name)


def _listing(folder: Path) -> frozenset[str]:
    """Names of the plain files in a folder; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except (OSError, ValueError):  # ValueError: a name that no folder can have
        return frozenset()
