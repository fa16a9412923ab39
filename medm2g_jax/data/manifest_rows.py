"""Lines of a `manifest.jsonl`, one at a time, each held to its form. `data.manifest` says what the form is.

There may be millions: what most rows are (ASCII names, no half characters) is asked first, and cheaply.
"""

import dataclasses
import functools
import json
import marshal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medm2g_jax.data import formats, said
from medm2g_jax.data.formats import raster
from medm2g_jax.data.said import Said
from medm2g_jax.data.shards import split_name
from medm2g_jax.data.source import PLAIN, SPLITS, SURROGATE, identity
from medm2g_jax.errors import UserError

NAME = "manifest.jsonl"
_scan = json.JSONDecoder().scan_once  # `json.loads` without what it looks for before and behind


class Place(NamedTuple):
    """Where a row stands; messages print it."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True, eq=False)
class About:
    """What a line says beside whose it is, its files and its text. Millions of lines say what few say: they share one.

    Attributes:
      keys: of its images.
      registered: image keys, or all or none of them; None: not said.
      synthetic: keys of what a model made.
      said: image key -> what is said of it.
    """

    split: str
    keys: tuple[str, ...]
    origin: str
    licence: str
    registered: bool | tuple[str, ...] | None
    synthetic: tuple[str, ...]
    said: Mapping[str, Said]

    @functools.cached_property
    def scaled(self) -> tuple[str, ...]:
        """Keys of images that have a scale."""
        return tuple(key for key, said in self.said.items() if said.scale is not None)


class Row(NamedTuple):
    """One line.

    Attributes:
      where: its place; messages print it.
      images: image key -> the name of its file, as it stands in the line.
    """

    where: Any
    id: str
    subject: str
    images: Mapping[str, str]
    text: str
    about: About


def folders(path: Path) -> list[Path]:
    """`path`, or those in it, that hold a manifest.

    Raises:
      UserError: none does.
    """
    if (path / NAME).is_file():
        return [path]
    found = sorted(file.parent for file in path.glob(f"*/{NAME}"))
    if not found:
        raise UserError(f"{path}: no {NAME} there, nor in a folder in it")
    return found


def read(folder: Path) -> Iterator[Row]:
    """The rows of a folder's manifest.

    Raises:
      UserError: a line that is not of the form, an id that is there twice, or no line at all; names file and line.
    """
    file, lines = folder / NAME, {}
    try:
        with open(file, encoding="utf-8-sig") as content:
            for number, line in enumerate(content, 1):
                if line.isspace():
                    continue
                where = Place(file, number)
                row = checked(where, _json(where, line))
                if (first := lines.setdefault(row.id, number)) != number:
                    raise UserError(f"{where}: id {row.id!r} is taken by line {first}; ids are unique in a manifest")
                yield row
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 ({_not_utf8(file)})") from None
    if not lines:
        raise UserError(f"{file}: empty; expected one JSON object a line")


def infos(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(id, "info") of the rows of a manifest that has been read."""
    file = folder / NAME
    with open(file, encoding="utf-8-sig") as content:
        for number, line in enumerate(content, 1):
            if not line.isspace():
                row = _json(Place(file, number), line)
                yield identity(row["id"]), row.get("info") or {}


def _not_utf8(file: Path) -> str:
    """What is wrong, and where in the whole file: a decoder of a stream counts from where it stands."""
    try:
        file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{error.reason} at byte {error.start}"
    return "it changed while it was read"


def _json(where: Place, line: str) -> Any:
    try:
        row, end = _scan(line, 0)
        if line[end:].isspace() or end == len(line):
            return row
    except (StopIteration, ValueError, RecursionError):
        pass  # whatever it is, it is said below
    try:
        return json.loads(line.rstrip("\n"))  # columns are counted in this line
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{where}: not JSON that can be read ({type(error).__name__})") from None


def checked(where: Any, row: Any) -> Row:
    """A line's object as a row. where: what messages print before what is wrong with it.

    Raises:
      UserError: it is not of the form.
    """
    if type(row) is not dict:
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    own, subject = _own(where, row, "id"), _own(where, row, "subject")
    files, text = row.get("images") or {}, row.get("text") or ""
    if type(files) is not dict:
        raise UserError(f"{where}: 'images' must map stream keys to file names")
    for name in files.values():
        if type(name) is not str:
            raise UserError(f"{where}: 'images' must map stream keys to file names")
        if not name.isascii():
            _check_whole(where, name)
    if type(text) is not str:
        raise UserError(f"{where}: 'text' must be a string, found {type(text).__name__}")
    if type(info := row.get("info") or {}) is not dict:
        raise UserError(f"{where}: 'info' must be a JSON object, found {type(info).__name__}")
    about = _shared(where, row, files)
    for key in about.scaled:
        name = files[key]
        format = None if name.endswith(".png") or split_name(name) else formats.format_of(name)
        if format is not None and format.read is not raster.read:
            raise UserError(
                f"{where}: 'scale' of {key!r}: {format.name} files say themselves what their values are; it is for "
                "PNG, JPEG and TIFF"
            )
    return Row(where, own, subject, files, text.strip(), about)


_FIELDS = ("split", "text_origin", "license", "registered", "synthetic", *said.FIELDS)
_REMEMBERED = 10_000
_ABOUT: dict[bytes, About] = {}


def _shared(where: Any, row: Mapping[str, Any], files: Mapping[str, str]) -> About:
    """What a row says, held to its form where no row has said the very same before."""
    words = marshal.dumps((*files, *map(row.get, _FIELDS)), 2)  # it tells 1, 1.0 and True apart
    if (about := _ABOUT.get(words)) is None:
        about = _about(where, row, files)
        if len(_ABOUT) >= _REMEMBERED:
            _ABOUT.clear()
        _ABOUT[words] = about
    return about


def _about(where: Any, row: Mapping[str, Any], files: Mapping[str, str]) -> About:
    _check_whole(where, "\n".join(files))
    if row.get("split") in (None, ""):
        raise _absent(where, "split")
    if row["split"] not in SPLITS:
        raise UserError(f"{where}: split {row['split']!r}; expected one of {', '.join(SPLITS)}")
    registered = row.get("registered")
    if isinstance(registered, list):
        unknown = [key for key in registered if not isinstance(key, str) or key not in files]
        if unknown:
            found = repr(unknown[0]) if isinstance(unknown[0], str) else f"a {type(unknown[0]).__name__}"
            raise UserError(f"{where}: 'registered' names {found}, which is no key of 'images'")
        registered = tuple(registered)
    elif registered is not None and not isinstance(registered, bool):
        raise UserError(
            f"{where}: 'registered' must be true, false or a list of keys of 'images', found "
            f"{type(registered).__name__}"
        )
    synthetic = row.get("synthetic") or []
    if not isinstance(synthetic, list) or not all(isinstance(key, str) for key in synthetic):
        raise UserError(f"{where}: 'synthetic' must be a list of keys of 'images', and \"text\"")
    try:
        found = said.parse(row, files.keys())
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    origin, licence = (_whole(str(row.get(field) or "")) for field in ("text_origin", "license"))
    return About(row["split"], tuple(files), origin, licence, registered, tuple(synthetic), found)


def _own(where: Any, row: Mapping[str, Any], field: str) -> str:
    """A row's id or subject, in one spelling."""
    value = row.get(field)
    if type(value) is str and PLAIN(value):
        return value
    if value is None or value == "":
        raise _absent(where, field)
    try:
        return identity(value)
    except UserError as error:
        raise UserError(f"{where}: {field!r}: {error}") from None


def _absent(where: Any, field: str) -> UserError:
    return UserError(f"{where}: no {field!r}; a row needs id, subject, split, and images or text or both")


def _check_whole(where: Any, names: str) -> None:
    if SURROGATE.search(names):
        raise UserError(f"{where}: 'images' holds half a character (a lone surrogate), which no file name can")


def _whole(text: str) -> str:
    """Half characters become U+FFFD."""
    return text if text.isascii() else SURROGATE.sub("\ufffd", text)
