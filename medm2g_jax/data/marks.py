"""Marks: what is written into every file that was made here, and what a file says of itself when it is asked.

A file is asked for its own text fields (PNG, TIFF, JPEG, NIfTI, MetaImage, NRRD, DICOM); what has none (text, NumPy) is
looked up in the generated.json beside it. Of what a file says nothing but our own words leaves this module: other
people's files name their patients there. A file without a mark may be synthetic all the same: a mark is easily lost.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from medm2g_jax.data import formats
from medm2g_jax.errors import UserError

NOTE = "Synthetic, made by medm2g_jax. Not for clinical use."
LISTING, PROVENANCE = "generated.json", "provenance.json"

_OURS = "made by medm2g_jax"
_BY = re.compile(r"Provenance\W+(?:model (?P<model>[0-9a-f]{8})\b)?\W*(?:seed (?P<seed>\d+)\b)?")
_ABOVE = 3  # folders in which the provenance of a filled data set is looked for
_UNMARKED = (".txt", ".npy")  # hold nothing but their values
_MOST = 2**26  # bytes of a listing


def notes(record: Mapping[str, Any], which: str = "") -> dict[str, str]:
    """What a file of ours says of itself, for its text fields.

    Args:
      record: what made it, of which "fingerprint" and "seed" are said (`Model.provenance`).
      which: of what it shows.
    """
    said = [f"{word} {record[key]}" for word, key in (("model", "fingerprint"), ("seed", "seed")) if key in record]
    return {"Description": NOTE, "Provenance": ", ".join([*said, *([which] if which else [])])}


@dataclasses.dataclass(frozen=True)
class Mark:
    """That a file was made here.

    Attributes:
      model: the fingerprint of the model; "" where it is not known.
      seed: None where it is not known.
      by: where that stands: "the file itself", or the name of a listing.
    """

    model: str
    seed: int | None
    by: str

    def __str__(self) -> str:
        model = f"model {self.model}" if self.model else "an unknown model"
        seed = "an unknown seed" if self.seed is None else f"seed {self.seed}"
        return f"made by medm2g_jax, {model}, {seed} (says {self.by})"


def mark_of(path: epath.PathLike) -> Mark | None:
    """The mark of one file; None where it carries none of ours.

    Raises:
      UserError: it is missing, damaged, or of no format that is known here; names it.
    """
    path = Path(path)
    if path.name.lower().endswith(_UNMARKED):
        if not path.is_file():
            raise UserError(f"{str(path)!a}: cannot be read (no such file)")
        return _listed(path)
    found = formats.format_at(path)
    text = found.said(path) if found.said is not None else ""
    if _OURS not in text:
        return _listed(path)
    said = _BY.search(text)
    model, seed = (said["model"] or "", said["seed"]) if said else ("", None)
    own = Mark(model, None if seed is None else int(seed), "the file itself")
    return own if own.model else _listed(path) or _filled(path) or own


def _listed(path: Path) -> Mark | None:
    """What the generated.json beside a file says of it: a list of calls, or one of them as earlier versions wrote."""
    found = _json(path.with_name(LISTING))
    for record in found if isinstance(found, list) else [found]:
        files = record.get("files", ()) if isinstance(record, dict) else ()
        names = {Path(name).stem if path.suffix == ".npy" else name for name in files if isinstance(name, str)}
        if (path.stem if path.suffix == ".npy" else path.name) in names:
            return _of(record, LISTING)
    return None


def _filled(path: Path) -> Mark | None:
    """What the provenance of the data set that a marked file was made for says."""
    records = (_json(folder / PROVENANCE) for folder in path.resolve().parents[:_ABOVE])
    return next((_of(record, PROVENANCE) for record in records if isinstance(record, dict)), None)


def _of(record: Mapping[str, Any], by: str) -> Mark:
    model, seed = record.get("fingerprint"), record.get("seed")
    known = isinstance(model, str) and re.fullmatch("[0-9a-f]{8}", model)
    return Mark(model if known else "", seed if isinstance(seed, int) else None, by)


def _json(path: Path) -> Any:
    """What is in a listing; None where there is none, or it is none of ours."""
    try:
        return json.loads(path.read_text()) if path.is_file() and path.stat().st_size <= _MOST else None
    except (OSError, ValueError, RecursionError):
        return None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of a file, or of several of one folder of which the same was found.

    Attributes:
      path: the file; the folder of several.
      files: how many.
      mark: None where they carry none of ours.
      error: why they could not be read; "" where they were.
    """

    path: str
    files: int
    mark: Mark | None
    error: str = ""

    def __str__(self) -> str:
        name = self.path if self.files == 1 else f"{self.path} ({self.files} files)"
        return f"{name}: {self.mark or 'carries no mark of ours'}" if not self.error else self.error

    def record(self) -> dict[str, Any]:
        """For a line of JSON."""
        told = dataclasses.asdict(self.mark) if self.mark else dict(model=None, seed=None, by=None)
        out = dict(path=self.path, files=self.files, marked=None if self.error else self.mark is not None, **told)
        return out | (dict(error=self.error) if self.error else {})


def verify(paths: Sequence[epath.PathLike]) -> Iterator[Verdict]:
    """What each file says; of a folder the files in it and in the folders in it, one verdict for all that agree."""
    for path in map(Path, paths):
        if not path.is_dir():
            yield _verdict(path)
            continue
        found: dict[tuple[Mark | None, str], list[str]] = {}
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in (LISTING, PROVENANCE))
        for one in map(_verdict, inside):
            found.setdefault((one.mark, one.error), []).append(one.path)
        if not found:
            yield Verdict(str(path), 1, None, f"{str(path)!a}: no file in it")
        for (mark, error), names in found.items():
            yield Verdict(names[0] if len(names) == 1 else str(path), len(names), mark, error)


def _verdict(path: Path) -> Verdict:
    try:
        return Verdict(str(path), 1, mark_of(path))
    except UserError as error:
        return Verdict(str(path), 1, None, str(error))
