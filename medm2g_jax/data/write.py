"""Generated samples onto disk, marked as synthetic in name, file and list.

DIR/ct_000.png       8-bit, the modality's window, "synthetic" in the file's text fields, and what made it
DIR/ct_000.npy       float32 (h w) in the modality's unit
DIR/text_000.txt
DIR/ct-mean_000.png  of several draws, with the number of the first, and .npy; ct-std_000 likewise, black 0 and white a
                     quarter of the window
DIR/generated.json   a list with one record a call: what was made, from what, by which model, with which seed, through
                     which pairs

A second call into the same folder numbers its files on from those there and adds a record: nothing is overwritten.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float

from medm2g_jax.data.formats import format_of
from medm2g_jax.data.picture import Picture
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, Modality, split_stream

NOTE = "Synthetic, made by medm2g_jax. Not for clinical use."
LISTING = "generated.json"


def check_writable(folder: epath.PathLike) -> None:
    """Can samples be written into `folder`, which need not exist yet? Leaves nothing behind.

    Raises:
      UserError: it is a file or cannot be written, or holds a generated.json that is not ours; says which.
    """
    folder = epath.Path(folder)
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir():
        raise UserError(f"--out {folder}: expected a folder, found the file {there}; name another --out")
    _records(folder)
    probe = there / f".medm2g-{uuid.uuid4().hex}"
    try:
        try:
            probe.write_text(NOTE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


@runtime_checkable
class Made(Protocol):
    """What `Model.generate` returns, as far as it is written here."""

    samples: Mapping[str, Any]  # stream -> list of str, or float32 (n h w) in the modality's unit
    pairs: Mapping[str, str]
    notes: Sequence[str]
    draws: int
    agreement: Any
    kept: Any

    def mean(self, stream: str) -> np.ndarray: ...
    def std(self, stream: str) -> np.ndarray: ...


def write_samples(folder: epath.PathLike, made: Made, record: Mapping[str, Any]) -> list[epath.Path]:
    """Write what was made and return the files' paths, but for those of arrays.

    Args:
      record: what made it (`Model.provenance`), and from what.

    Raises:
      UserError: they cannot be written; names the folder and the cause.
    """
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            return _write(folder, made, record)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _write(folder: epath.Path, made: Made, record: Mapping[str, Any]) -> list[epath.Path]:
    records, first, written = _records(folder), _next_number(folder), []
    for stream, values in made.samples.items():
        modality, name = _modality(stream), stream.replace(":", "-")
        for i, value in enumerate(values, first):
            if modality.is_image:
                stem, which = f"{name}_{i:03d}", _which(made, i - first)
                written.append(_image(folder, stem, value, modality, modality.window, record, which))
            else:
                written.append(folder / f"{name}_{i:03d}.txt")
                written[-1].write_text(value + "\n")
        if modality.is_image and made.draws > 1:
            low, high = modality.window
            for what, maps, window in (
                ("mean", made.mean(stream), modality.window),
                ("std", made.std(stream), (0.0, (high - low) / 4)),
            ):
                for i, value in enumerate(maps):
                    stem = f"{name}-{what}_{first + i * made.draws:03d}"
                    which = f"sample {i}, {what} of {made.draws} draws"
                    written.append(_image(folder, stem, value, modality, window, record, which))
    units = {s: dict(unit=m.unit, window=m.window) for s in made.samples if (m := _modality(s)).window}
    own = dict(make=tuple(made.samples), pairs=made.pairs, notes=made.notes, units=units)
    if made.agreement is not None:
        own |= dict(agreement=[round(float(x), 4) for x in made.agreement], kept=[int(x) for x in made.kept])
    records.append({"note": NOTE, **record, **own, "files": [p.name for p in written]})
    part = folder / f"{LISTING}.part"
    part.write_text(json.dumps(records, indent=1))
    part.replace(folder / LISTING)
    return written


def _which(made: Made, number: int) -> str:
    """Of which sample, and which draw of it, what is written is."""
    if made.kept is not None:
        return f"sample {number}, draw {int(made.kept[number])}"
    sample, draw = divmod(number, made.draws)
    return f"sample {sample}, draw {draw}" if made.draws > 1 else f"sample {sample}"


def _modality(stream: str) -> Modality:
    return MODALITIES[split_stream(stream)[0]]


def _image(
    folder: epath.Path,
    stem: str,
    value: Float[np.ndarray, "h w"],
    modality: Modality,
    window: tuple[float, float],
    record: Mapping[str, Any],
    which: str,
) -> epath.Path:
    """Write an image and its values; returns the image's path."""
    said = [f"{word} {record[key]}" for word, key in (("model", "fingerprint"), ("seed", "seed")) if key in record]
    notes = {"Description": NOTE, "Window": f"{window[0]} {window[1]}", "Provenance": ", ".join([*said, which])}
    path = folder / f"{stem}.png"
    format_of(path.name).write(path, shown(value, dataclasses.replace(modality, window=window)), notes)
    with (folder / f"{stem}.npy").open("wb") as f:
        np.save(f, np.asarray(value, np.float32))
    return path


def _records(folder: epath.Path) -> list[dict[str, Any]]:
    """The records of earlier calls; a single one, as earlier versions wrote it, is a list of one."""
    path = folder / LISTING
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {type(error).__name__} in reading it; move it away, or name another --out") from error
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) for one in found):
        raise UserError(f"{path}: expected records of earlier calls; move it away, or name another --out")
    return found


def _next_number(folder: epath.Path) -> int:
    """The first number that no sample in the folder has, whatever its stream: files of one number belong together."""
    names = (re.fullmatch(r"(\w[\w-]*)_(\d{3,})\.(png|npy|txt)", path.name) for path in folder.iterdir())
    return max((int(name[2]) + 1 for name in names if name), default=0)


@contextlib.contextmanager
def alone_in(folder: epath.Path) -> Iterator[None]:
    """Have a folder's lock for as long as the block lasts, where its file system has some: two at once take turns."""
    if "://" in os.fspath(folder):
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _unwritable(folder: epath.Path, error: OSError) -> UserError:
    return UserError(f"--out {folder}: cannot be written: {error.strerror or error}; name another --out or mend it")


def shown(values: Float[np.ndarray, "h w"], modality: Modality) -> Picture:
    """Values in the modality's unit as an 8-bit picture over its window."""
    levels = np.round((modality.normalise(values) + 1) * 127.5).astype(np.uint8)
    return Picture(levels, span=(0, 255))
