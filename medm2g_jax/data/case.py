"""What an adapter finds in a downloaded data set: cases, each the images and the text that belong together.

An adapter (`data.adapters`, one file a set) knows where a set's files lie, which belong together, whose they are, what
its official split is and under which licence it stands. It opens lists and tables, never an image: reading, checking,
cutting and writing is the same for all sets (`prepare`).
"""

import csv
import dataclasses
import io
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medm2g_jax.data.formats.content import opened, unreadable
from medm2g_jax.data.picture import Span
from medm2g_jax.data.source import is_open
from medm2g_jax.errors import UserError

REPORT = 2**20  # bytes of one report that are read
OUTSIDE = "lies outside of the root (a link, or a path with ..)"
_LARGEST = 2**30  # of a table


class Image(NamedTuple):
    """Where one image of a case is.

    Attributes:
      path: a file, or a folder of DICOM, below the root, "/" between its words.
      which: of a folder of several series its SeriesInstanceUID; of an array of several images (n h w) the number.
      span: the values that count as -1 and +1, where the set says so and the file does not.
    """

    path: str
    which: str = ""
    span: Span | None = None


class Case(NamedTuple):
    """Images that belong together, and what is written about them.

    Attributes:
      id: unique in the set.
      subject: whose they are: splits are by subject.
      images: stream -> image; pictures, or volumes that are cut into slices. The first is the one whose grid counts.
      split: train, val or test where the set has an official split, else "".
      text: the report or caption as it is found.
      origin: of the text: "report", "caption", or "template" for what the adapter wrote from labels.
      mask: a volume on the first image's grid that is above 0 where it matters; "" for none.
      licence: its own, where it differs from the set's.
      info: what else is known of it, for people (view, labels, spacing of the scanner ...).
      registered: its pictures lie on each other, pixel by pixel (volumes say themselves where they lie).
    """

    id: str
    subject: str
    images: Mapping[str, Image]
    split: str = ""
    text: str = ""
    origin: str = "report"
    mask: str = ""
    licence: str = ""
    info: Mapping[str, Any] = {}
    registered: bool = False


class Left(NamedTuple):
    """What an adapter leaves out, and why, in words that can be counted: the same for all of a kind.

    Attributes:
      part: what of the case it is, "text" or a stream; "" for all of it.
    """

    id: str
    reason: str
    part: str = ""


class Root:
    """A downloaded set's folder. Nothing outside of it is read, whatever a table in it or a link says."""

    def __init__(
        self,
        path: str | Path,
        patterns: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ):
        """patterns: stream -> pattern, what a user said of folders that no set describes; options: see
        `Adapter.options`, each with its value.

        Raises:
          UserError: there is no such folder, or it may not be read.
        """
        self.path = Path(path).expanduser()
        self.patterns, self.options = dict(patterns or {}), dict(options or {})
        if not self.path.is_dir():
            found = "a file" if self.path.exists() else "nothing"
            raise UserError(f"--root {path}: expected the folder of a downloaded set, found {found}")
        if not _enterable(self.path):
            raise UserError(f"--root {path}: a folder that may not be read; give yourself the right, chmod u+rx {path}")
        self._real = os.path.realpath(self.path)
        self.closed: set[str] = set()  # folders that were found and may not be read
        self.outside: set[str] = set()  # what was found and lies elsewhere

    def files(self, pattern: str) -> list[str]:
        """Files, and folders, whose path below the root fits a glob pattern, sorted, "/" between their words. Folders
        that may not be read are noted in `closed`, and nothing in them is found; links that lead out in `outside`.
        Hidden ones are passed over: macOS puts a "._t1.nii.gz" beside each file that it copies."""
        found = []
        for path in self.path.glob(pattern):
            below = path.relative_to(self.path)
            if any(word.startswith(".") for word in below.parts):
                continue
            if self._inside(path):
                found.append(path)
            else:
                self.outside.add(below.as_posix())
        self.closed |= {path.relative_to(self.path).as_posix() for path in found if not _enterable(path)}
        closed = {self.path / name for name in self.closed}
        names = (path for path in found if not closed or closed.isdisjoint(path.parents))
        return sorted(path.relative_to(self.path).as_posix() for path in names)

    def _inside(self, path: Path) -> bool:
        """Does a path truly lie below the root? A link to itself does: what is wrong with it shows when it is read."""
        return Path(os.path.realpath(path)).is_relative_to(self._real)

    def kinds(self) -> str:
        """What is in it, in words without names: "3 files .csv, 2 folders"."""
        kinds = Counter("folders" if os.path.isdir(path) else f"files {path.suffix}" for path in self.path.iterdir())
        return ", ".join(f"{n} {kind.strip()}" for kind, n in kinds.most_common(5)) or "nothing"

    def has(self, name: str) -> bool:
        """Is there such a file or folder, truly below the root? Of a name with ".." in it never."""
        if ".." in name.split("/"):
            return False
        try:
            return self._inside(self.path / name) and (self.path / name).exists()
        except (OSError, ValueError):  # names that no file can have
            return False

    def lacks(self, name: str) -> str:
        """Why a file that a table names cannot be read, in words that can be counted; "" where it can."""
        if self.has(name):
            return ""
        try:
            there = os.path.lexists(self.path / name)
        except ValueError:
            return "has a name that no file can have"
        if not there:
            return "is missing"
        astray = ".." in name.split("/") or not self._inside(self.path / name)
        return OUTSIDE if astray else "is a link to a file that is not there"

    def file(self, name: str) -> Path:
        """The path of a file below the root.

        Raises:
          UserError: it is missing, or lies outside.
        """
        if why := self.lacks(name):
            raise UserError(f"{self.path / name}: {why}")
        return self.path / name

    def one(self, *names: str) -> str:
        """The first of several names, or patterns, that is there.

        Raises:
          UserError: none is; lists them.
        """
        for name in names:
            if found := self.files(name):
                return found[0]
        raise UserError(f"{self.path}: expected {' or '.join(names)} in it, found {_listing(self.path)}")

    def text(self, name: str, most: int = _LARGEST) -> str:
        """A text file, through gzip where it is packed; bytes that are no UTF-8 are taken as Latin-1.

        Raises:
          UserError: it is missing, damaged, or of more than `most` bytes.
        """
        content = self._bytes(name, most)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return content.decode("latin-1")

    def lines(self, name: str) -> Iterator[str]:
        """Lines of a text file of any length, one at a time, through gzip where it is packed; a line that is longer
        than a mebibyte comes in pieces, empty ones not at all.

        Raises:
          UserError: it is missing or damaged.
        """
        path = self.file(name)
        try:
            with opened(path) as file:
                while line := file.readline(2**20):
                    if text := line.decode("utf-8", "replace").strip():
                        yield text
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(path, error) from error

    def _bytes(self, name: str, most: int) -> bytes:
        path = self.file(name)
        try:
            with opened(path) as file:
                content = file.read(most + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(path, error) from error
        if len(content) > most:
            raise UserError(f"{path}: more than {most} bytes, more than a table or a text has")
        return content

    def table(self, *names: str, columns: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
        """Rows of the first of several tables that is there: comma-separated (.csv), tab-separated (.tsv), each also
        packed (.csv.gz). Names of columns and values lose blanks at both ends; a row that is cut off has "" for the
        rest.

        Args:
          columns: of which there must be all.

        Raises:
          UserError: no such table, or a column is missing.
        """
        name = self.one(*(n for name in names for n in (name, f"{name}.gz")))
        lines = io.StringIO(self.text(name), newline="")
        tabs = name.removesuffix(".gz").endswith(".tsv")
        rows = csv.reader(lines, delimiter="\t" if tabs else ",")
        try:
            head = [word.strip() for word in next(rows, [])]
            if missing := [column for column in columns if column not in head]:
                raise UserError(f"{self.path / name}: no column {missing[0]!r}; its columns are {', '.join(head)}")
            for row in rows:
                if row:
                    yield dict(itertools.zip_longest(head, (value.strip() for value in row[: len(head)]), fillvalue=""))
        except csv.Error as error:
            raise UserError(f"{self.path / name}: line {rows.line_num}: not comma-separated ({error})") from error


def _enterable(path: Path) -> bool:
    """May a folder be looked through? Of anything else: yes."""
    return os.access(path, os.R_OK | os.X_OK) or not os.path.isdir(path)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A data set as people download it.

    Attributes:
      name: what one types.
      title: its name, and whose it is.
      licence: under which it stands, as a manifest has it.
      access: how one comes by it, and what one may do with it: printed before anything is read.
      find: gives its cases, and what it leaves out.
      clean: how its reports are cleaned, see `data.clean`.
      share: slices of volumes are kept that hold at least this part of what the fullest one holds of its mask, or of
        what is no background.
      every: of those, every so many-th.
      register: what is done where the images of a case lie on different grids, see `data.registration`.
      streams: what it holds, for the list of sets.
      preset: of `volume.PRESETS`: which values of an MRI count as -1 and +1.
      square: to what its volumes' pixels are resampled in the plane, mm; 0 for the finer of both sides.
      options: what else one chooses of it (`--option NAME=VALUE`): name -> the values there are, its default first.
    """

    name: str
    title: str
    licence: str
    access: str
    find: Callable[[Root], Iterator[Case | Left]]
    streams: tuple[str, ...]
    clean: str = "none"
    share: float = 0.1
    every: int = 1
    register: str = "none"
    preset: str = "mr.zero"
    square: float = 0.0
    options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def chosen(self, asked: Mapping[str, str]) -> dict[str, str]:
        """All of its options, each with the value that was asked for or its default.

        Raises:
          UserError: it has no such option, or the option no such value; lists those there are.
        """
        for name, value in asked.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise UserError(f"--option {name}={value}: {self.name} has no such option; its options: {known}")
            if value not in self.options[name]:
                raise UserError(f"--option {name}={value}: expected one of {', '.join(self.options[name])}")
        return {name: asked.get(name, values[0]) for name, values in self.options.items()}

    @property
    def open(self) -> bool:
        """May its images, texts and ids be shown in logs and pictures?"""
        return is_open(self.licence)


def matched(pattern: str, name: str) -> dict[str, str] | None:
    """What the {words} of a pattern stand for in a path, as in "{subject}/anat/{subject}_T1w.nii.gz"; None where it
    does not fit. "*" fits what is in one folder's name, a word the same wherever it stands."""
    parts = re.split(r"(\{\w+\}|\*)", pattern)
    seen: set[str] = set()
    expression = ""
    for part in parts:
        if part == "*":
            expression += "[^/]*"
        elif re.fullmatch(r"\{\w+\}", part):
            word = part[1:-1]
            expression += f"(?P={word})" if word in seen else f"(?P<{word}>[^/]+?)"
            seen.add(word)
        else:
            expression += re.escape(part)
    found = re.fullmatch(expression, name)
    return found.groupdict() if found else None


def glob_of(pattern: str) -> str:
    """The glob pattern that a pattern with {words} is."""
    return re.sub(r"\{\w+\}", "*", pattern)
