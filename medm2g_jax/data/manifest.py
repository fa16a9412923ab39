"""Data that a user brings: manifest folders.

A manifest folder holds `manifest.jsonl`, one JSON object a line:

    {"id": "s1", "subject": "p1", "split": "train", "images": {"ct": "ct/s1.png", "mri_t2": "mri/s1.png"},
     "text": "findings : ...", "text_origin": "report", "license": "CC BY 4.0"}

`split` is train, val or test; the last four fields may be missing. Image keys are streams with "_" in place of ":"
("mri_t1ce" is "mri:t1ce", also spelt "mri_t1gd"), files are PNG or JPEG. 8-bit files carry no Hounsfield units: they
are taken as windowed already, 0 as -1 and 255 as +1.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from medm2g_jax.data import images
from medm2g_jax.data.source import SPLITS, Record, check_subjects, is_open, stream_of
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

FORMATS = (".png", ".jpg", ".jpeg")
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


class Manifest:
    """A `Source` over one manifest folder, or over the manifest folders in one folder."""

    def __init__(self, path: str | Path, size: int, template_text: bool = False):
        """Open `path`; images are padded to a square and resized to `size`.

        Images of other formats and keys that are no stream are left out and counted in one log line.

        Args:
          template_text: also take texts written from metadata (`text_origin` "template"), which are no reports.

        Raises:
          UserError: no manifest, a bad line, a missing image, a subject in two splits, or nothing that can be used.
        """
        path = Path(path).expanduser()
        self.name = path.resolve().name
        rows = [row for folder in _folders(path) for row in _read_manifest(folder)]
        check_subjects(str(path), ((row.subject, row.split, row.where) for row in rows))
        left_out: Counter[str] = Counter()
        values = [_values(row, template_text, left_out) for row in rows]
        kept = [(row, value) for row, value in zip(rows, values, strict=True) if value]
        counts = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
        if not kept:
            raise UserError(f"{path}: {len(rows)} rows hold nothing that can be used (left out: {counts or 'nothing'})")
        if counts:
            logging.warning("data %s: %d of %d rows used; left out: %s", self.name, len(kept), len(rows), counts)
        times = Counter(row.id for row, _ in kept)
        self.records: Sequence[Record] = [
            Record(
                row.id if times[row.id] == 1 else f"{row.folder.name}/{row.id}",
                row.subject,
                row.split,
                tuple(value),
                row.licence,
            )
            for row, value in kept
        ]
        self.open = all(is_open(record.licence) for record in self.records)
        self._values = [value for _, value in kept]
        self._folders = [row.folder for row, _ in kept]
        self._size = size
        self._memory: dict[Path, np.ndarray] = {}

    def identity(self) -> Iterator[str]:
        """What each record holds, image by image and text by text, wherever the folder stands: names and sizes."""
        for folder, values in zip(self._folders, self._values, strict=True):
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
        small = self._memory.get(value)
        if small is None:
            try:
                image = images.square(images.read(value), self._size)
            except UserError as error:
                raise UserError(f"row {self.records[index].id!r}: {error}") from error
            small = np.round((image + 1) * 127.5).astype(np.uint8)  # a quarter of the memory; the files have 8 bits
            if len(self._memory) * small.nbytes < MEMORY:
                self._memory[value] = small
        return (small.astype(np.float32) / 127.5 - 1)[..., None]


def _folders(path: Path) -> list[Path]:
    if (path / "manifest.jsonl").is_file():
        return [path]
    folders = sorted(file.parent for file in path.glob("*/manifest.jsonl"))
    if not folders:
        raise UserError(f"{path}: no manifest.jsonl there, nor in a folder in it (`medm2g prepare` writes one)")
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
    if row["split"] not in SPLITS:
        raise UserError(f"{where}: split {row['split']!r}; expected one of {', '.join(SPLITS)}")
    files, text = row.get("images") or {}, row.get("text") or ""
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{where}: 'images' must map stream keys to file names")
    if not isinstance(text, str):
        raise UserError(f"{where}: 'text' must be a string, found {type(text).__name__}")
    origin, licence = str(row.get("text_origin") or ""), str(row.get("license") or "")
    return _Row(where, folder, str(row["id"]), str(row["subject"]), row["split"], files, text.strip(), origin, licence)


def _values(row: _Row, template_text: bool, left_out: Counter) -> dict[str, Path | str]:
    values: dict[str, Path | str] = {}
    for key, name in row.images.items():
        stream = stream_of(key)
        if stream is None or MODALITIES[stream.partition(":")[0]].kind != "image":
            left_out[f"of unknown key {key!r}"] += 1
        elif not name.lower().endswith(FORMATS):
            left_out["images not PNG or JPEG"] += 1
        elif stream in values:
            raise UserError(f"{row.where}: row {row.id!r} has two images for stream {stream!r}")
        elif not (file := row.folder / name).is_file():
            raise UserError(f"{row.where}: row {row.id!r}: no file {file}")
        else:
            values[stream] = file
    if row.text and row.origin == "template" and not template_text:
        left_out["template texts (they are no reports)"] += 1
    elif row.text:
        values["text"] = row.text
    return values
