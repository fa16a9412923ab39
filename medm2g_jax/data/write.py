"""Generated samples onto disk, marked as synthetic in name, file and list.

DIR/ct_000.png       8-bit, the modality's window, "synthetic" in the file's text fields, and what made it
DIR/ct_000.npy       float32 (h w) in the modality's unit
DIR/text_000.txt
DIR/ct-mean_000.png  of several draws, with the number of the first, and .npy; ct-std_000 likewise, black 0 and white a
                     quarter of the window
DIR/generated.json   a list with one record a call: what was made, the texts themselves among it, from what, by which
                     model, with which seed, through which pairs

In another form, in place of .png and .npy:

DIR/ct_000.dcm       DICOM: a picture that lies nowhere; DIR/text_000.dcm, a Basic Text SR, beside the .txt
DIR/ct_000.nii.gz    of slices of a volume the whole of it on its own grid, one a draw; in DICOM a folder DIR/ct_000

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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float

from medm2g_jax.data.formats import dicom_sr, format_of, write_volume
from medm2g_jax.data.marks import LISTING, NOTE, notes
from medm2g_jax.data.picture import Picture, Span
from medm2g_jax.data.volume import Volume
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, Modality, split_stream

# Names of forms -> suffixes of a file of one picture or volume.
FORMS = {"png": ".png", "dicom": ".dcm", "nifti": ".nii.gz", "mha": ".mha", "nrrd": ".nrrd"}
PICTURES = ("png", "dicom")  # forms of what lies nowhere


def check_writable(folder: epath.PathLike) -> None:
    """Can samples be written into `folder`, which need not exist yet? Leaves nothing behind.

    Raises:
      UserError: it is a file or cannot be written, or holds a generated.json that is not ours; says which.
    """
    folder = epath.Path(folder)
    probe(folder, "--out")
    _records(folder)


def probe(folder: epath.Path, option: str) -> None:
    """Can files be written into `folder`, which need not exist yet? Leaves nothing behind.

    Args:
      option: of the command line, for messages.

    Raises:
      UserError: it is a file, or cannot be written.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir():
        raise UserError(f"{option} {folder}: expected a folder, found the file {there}; name another {option}")
    file = there / f".medm2g-{uuid.uuid4().hex}"
    try:
        try:
            file.write_text(NOTE)
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder, error, option) from error


def check_form(form: str, is_volume: bool, option: str = "--as") -> None:
    """Can samples, slices of a volume or not, be written in this form?

    Raises:
      UserError: no; names the forms they can be written in.
    """
    if form not in FORMS:
        raise UserError(f"{option} {form}: expected one of {', '.join(FORMS)}")
    if not is_volume and form not in PICTURES:
        raise UserError(
            f"{option} {form}: a volume's, and none is given: what is made lies nowhere; expected one of "
            + ", ".join(PICTURES)
        )


@runtime_checkable
class Made(Protocol):
    """What `Model.generate` returns, as far as it is written here."""

    samples: Mapping[str, Any]  # stream -> list of str, or float32 (n h w) in the modality's unit
    pairs: Mapping[str, str]
    notes: Sequence[str]
    draws: int
    best_of: int
    agreement: Any
    kept: Any

    def mean(self, stream: str) -> np.ndarray: ...
    def std(self, stream: str) -> np.ndarray: ...


@runtime_checkable
class Grid(Protocol):
    """Where samples that are the slices of a volume lie."""

    def holds(self, stream: str) -> bool:
        """Do samples of this stream lie there?"""

    def volume(self, stream: str, values: Float[np.ndarray, "n h w"]) -> Volume:
        """The volume that slices, in the modality's unit, make up."""


def write_samples(
    folder: epath.PathLike, made: Made, record: Mapping[str, Any], form: str = "png", grid: Grid | None = None
) -> list[epath.Path]:
    """Write what was made and return the files' paths, but for those of arrays.

    Args:
      record: what made it (`Model.provenance`), and from what.
      form: of FORMS.
      grid: of samples that are the slices of a volume.

    Raises:
      UserError: they cannot be written; names the folder and the cause.
    """
    check_form(form, grid is not None)
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            return _write(folder, made, record, form, grid)
    except OSError as error:
        raise unwritable(folder, error) from error


def _write(folder: epath.Path, made: Made, record: Mapping[str, Any], form: str, grid: Grid | None) -> list[epath.Path]:
    records, first, written = _records(folder), _next_number(folder), []
    texts = {}
    for stream, values in made.samples.items():
        name = stream.replace(":", "-")
        if not _modality(stream).is_image:
            texts[stream] = list(values)
            for i, value in enumerate(values):
                stem, about = folder / f"{name}_{first + i:03d}", notes(record, _which(made, i))
                written += _text(stem, value, about, form)
        elif form != "png" and grid is not None and grid.holds(stream):
            suffix = "" if form == "dicom" else FORMS[form]  # of DICOM a folder of slices
            for stem, volume, which in _volumes(name, stream, made, first, grid):
                written.append(folder / f"{stem}{suffix}")
                write_volume(written[-1], volume, notes(record, which))
        else:
            write = _dicom if form == "dicom" else _png  # of a volume's form: what lies not on its grid
            for one in _pictures(name, stream, made, first):
                about = notes(record, one.which) | {"Window": f"{one.window[0]} {one.window[1]}"}
                written.append(write(folder, one, about))
    units = {s: dict(unit=m.unit, window=m.window) for s in made.samples if (m := _modality(s)).window}
    own = dict(make=tuple(made.samples), pairs=made.pairs, notes=made.notes, units=units)
    if made.agreement is not None:
        own |= dict(best_of=made.best_of, kept=[int(x) for x in made.kept])
        own |= dict(agreement=[round(float(x), 4) for x in made.agreement])
    own |= dict(texts=texts) if texts else {}
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


def _text(stem: epath.Path, value: str, about: Mapping[str, str], form: str) -> list[epath.Path]:
    """Write a text, in DICOM also as a report there; returns the paths."""
    plain = stem.with_name(f"{stem.name}.txt")
    plain.write_text(value + "\n")
    if form != "dicom":
        return [plain]
    report = stem.with_name(f"{stem.name}.dcm")
    dicom_sr.write(report, value, about)
    return [plain, report]


class _Shown(NamedTuple):
    """One image that is to be written: the file's stem, its values in the modality's unit, the window that it is shown
    over, and which sample it is."""

    stem: str
    values: Float[np.ndarray, "h w"]
    modality: Modality
    window: Span
    which: str


def _pictures(name: str, stream: str, made: Made, first: int) -> Iterator[_Shown]:
    """Each sample of a stream, and of several draws their mean and deviation."""
    modality = _modality(stream)
    low, high = window = modality.window
    for i, value in enumerate(made.samples[stream]):
        yield _Shown(f"{name}_{first + i:03d}", value, modality, window, _which(made, i))
    if made.draws == 1:
        return
    for what, maps, over in ("mean", made.mean(stream), window), ("std", made.std(stream), (0.0, (high - low) / 4)):
        for i, value in enumerate(maps):
            stem = f"{name}-{what}_{first + i * made.draws:03d}"
            yield _Shown(stem, value, modality, over, f"sample {i}, {what} of {made.draws} draws")


def _png(folder: epath.Path, one: _Shown, about: Mapping[str, str]) -> epath.Path:
    """Write an image and its values; returns the image's path."""
    path = folder / f"{one.stem}.png"
    format_of(path.name).write(path, shown(one.values, dataclasses.replace(one.modality, window=one.window)), about)
    with (folder / f"{one.stem}.npy").open("wb") as f:
        np.save(f, np.asarray(one.values, np.float32))
    return path


def _dicom(folder: epath.Path, one: _Shown, about: Mapping[str, str]) -> epath.Path:
    """Write an image's values; a deviation, whose window is another, is none of the modality to its reader."""
    own = one.window == one.modality.window
    path = folder / f"{one.stem}.dcm"
    picture = Picture(one.values, None if own else one.window, modality=one.modality.dicom if own else "")
    format_of(path.name).write(path, picture, about)
    return path


def _volumes(name: str, stream: str, made: Made, first: int, grid: Grid) -> Iterator[tuple[str, Volume, str]]:
    """(stem of the file, volume, which it is) of each draw of a stream, and of several of their mean and deviation."""
    for j in range(made.draws):
        yield f"{name}_{first + j:03d}", grid.volume(stream, made.samples[stream][j :: made.draws]), f"draw {j}"
    if made.draws > 1:
        mean, std = (grid.volume(stream, maps) for maps in (made.mean(stream), made.std(stream)))
        yield f"{name}-mean_{first:03d}", mean, f"mean of {made.draws} draws"
        yield f"{name}-std_{first:03d}", deviation(std), f"std of {made.draws} draws"


def deviation(volume: Volume) -> Volume:
    """A volume of standard deviations, which are no values of the modality, to a file's reader."""
    return dataclasses.replace(volume, unit="", modality="", span=_quiet(volume.values))


def _quiet(values: Float[np.ndarray, "i j k"]) -> Span:
    return 0.0, float(max(values.max(), 1e-6))


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
    suffixes = "|".join(map(re.escape, (*FORMS.values(), ".npy", ".txt")))
    names = (re.fullmatch(rf"(\w[\w-]*)_(\d{{3,}})({suffixes})?", path.name) for path in folder.iterdir())
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


def unwritable(folder: epath.PathLike, error: OSError, option: str = "--out") -> UserError:
    """What is said of a place where nothing can be written."""
    return UserError(f"{option} {folder}: cannot be written: {error.strerror or error}; name another or mend it")


def shown(values: Float[np.ndarray, "h w"], modality: Modality) -> Picture:
    """Values in the modality's unit as an 8-bit picture over its window."""
    levels = np.round((modality.normalise(values) + 1) * 127.5).astype(np.uint8)
    return Picture(levels, span=(0, 255))
