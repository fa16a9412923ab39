"""Many images in few files: ArrayRecord shards, a record the bytes of one PNG, JPEG or TIFF.

A manifest names record 17 of a shard "shards/train-00003.array_record#17". Two million small files are slow to list, to
copy and to open, on object stores most of all; a few thousand shards are not. The bytes are those that the file would
have, so that packing changes no pixel. ArrayRecord keeps a checksum of each record: bytes that differ are an error.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from medm2g_jax.errors import UserError

SUFFIX = ".array_record"
PER_SHARD = 2**28  # bytes: large enough to be copied fast, small enough to be copied again
OPEN = 256  # shards at once: a process may have some thousand files

# One record a group, so that reading one unpacks no other; images are compressed already, and whole bytes of PNG do not
# shrink. Both make the file a function of the records alone.
_WRITER = "group_size:1,uncompressed"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # records are read one at a time, in no order


def split_name(name: str) -> tuple[str, int] | None:
    """The shard and the number of the record that an image's name means; None where it is a file of its own."""
    shard, mark, number = name.rpartition("#")
    if mark and shard.endswith(SUFFIX) and len(shard) > len(SUFFIX) and number.isascii() and number.isdecimal():
        return shard, int(number)
    return None


class Shards:
    """Reads records of shards, which stay open. Threads may share it: a reader has no position that they could move."""

    def __init__(self) -> None:
        self._readers: OrderedDict[str, Any] = OrderedDict()  # the last used last
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, path: Path | str) -> int:
        """How many records a shard holds.

        Raises:
          UserError: it is missing, or no whole ArrayRecord file.
        """
        path = str(path)
        if path not in self._counts:
            self._counts[path] = self._reader(path).num_records()
        return self._counts[path]

    def read(self, path: Path | str, number: int) -> bytes:
        """A record.

        Raises:
          UserError: its shard is missing or broken, or has no such record; names both.
        """
        path = str(path)
        reader = self._reader(path)
        if number >= self.count(path):
            raise UserError(f"{path}: no record {number}; it holds {self.count(path)}, from 0")
        try:
            return reader.read([number])[0]
        except RuntimeError as error:
            raise UserError(f"{path}: record {number} is damaged ({_words(error)}); copy the file again") from error

    def _reader(self, path: str) -> Any:
        with self._lock:
            if path in self._readers:
                self._readers.move_to_end(path)
                return self._readers[path]
            from array_record.python.array_record_module import ArrayRecordReader  # only where there are shards

            if not Path(path).is_file():  # the reader's own answer is that it holds nothing
                raise UserError(f"{path}: no such file")
            try:
                reader = ArrayRecordReader(path, _READER, file_reader_buffer_size=2**15)
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"{path}: not a whole ArrayRecord file ({_words(error)}); copy it again") from error
            if not reader.ok():
                raise UserError(f"{path}: not a whole ArrayRecord file; copy it again")
            self._readers[path] = reader
            if len(self._readers) > OPEN:  # closes when the last thread that reads it is done
                self._readers.popitem(last=False)
            return reader


class Writer:
    """Writes the records of one split, in shards of about `per_shard` bytes.

        with Writer(folder, "train") as writer:
            name = writer.add(png_bytes)  # "shards/train-00000.array_record#0"

    The same records in the same order make the same bytes. A shard has its name only when it is whole: what a killed
    process leaves is a `.part`, which the next one overwrites.
    """

    def __init__(self, folder: Path | str, split: str, per_shard: int = PER_SHARD):
        self._folder, self._split, self._most = Path(folder), split, per_shard
        self._shard, self._record, self._bytes = -1, 0, 0
        self._writer: Any = None

    def add(self, content: bytes) -> str:
        """Write one record; returns the name that a manifest in the folder has for it.

        Raises:
          UserError: it cannot be written.
        """
        if self._writer is None or self._bytes and self._bytes + len(content) > self._most:
            self._next()
        with _writing(self._path):
            self._writer.write(content)
        self._bytes += len(content)
        self._record += 1
        return f"{self._name}#{self._record - 1}"

    def close(self) -> None:
        """Give the last shard its name."""
        if self._writer is not None:
            with _writing(self._path):
                self._writer.close()
                if Shards().count(self._part) != self._record:  # on a full disk the library says nothing
                    raise OSError("not all records are in it; is the disk full?")
                self._part.replace(self._path)
            self._writer = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.close()
        elif self._writer is not None:  # half a shard keeps its .part
            self._writer.close()
            self._writer = None

    def _next(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.close()
        self._shard, self._record, self._bytes = self._shard + 1, 0, 0
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._part.unlink(missing_ok=True)
            self._writer = ArrayRecordWriter(str(self._part), _WRITER)

    @property
    def _name(self) -> str:
        return f"shards/{self._split}-{self._shard:05d}{SUFFIX}"

    @property
    def _path(self) -> Path:
        return self._folder / self._name

    @property
    def _part(self) -> Path:
        return self._path.with_name(f"{self._path.name}.part")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Whatever goes wrong in writing a file becomes one line that names it."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({_words(error)})") from error


def _words(error: Exception) -> str:
    """Why, on one line."""
    words = getattr(error, "strerror", None) or str(error)
    return " ".join(words.split())[:200] or type(error).__name__
