"""One case of a data set made into rows of a manifest: read, checked, brought onto one grid, cut, written as PNG.

Runs in processes of its own, one case at a time; nothing in it knows another case. Values are kept: HU and whole
numbers exactly, the rest to a 65535th of their range; "scale" and "span" in the row say what they mean.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Num
from PIL import Image as Pillow

from medm2g_jax.data import checks, formats, marks
from medm2g_jax.data.case import Case, Image, Root
from medm2g_jax.data.clean import clean
from medm2g_jax.data.formats import dicom, raster
from medm2g_jax.data.formats.content import DAMAGED, levels, written
from medm2g_jax.data.formats.dicom_grid import FILLED
from medm2g_jax.data.picture import MOST_PIXELS, Picture, Span
from medm2g_jax.data.registration import Registered, along, register
from medm2g_jax.data.source import key_of, stream_of
from medm2g_jax.data.volume import MOST_VOXELS, Volume, on_one_grid, ranged, shares, slices, squared, stack
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, Modality, split_stream

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How cases are cut; what of it is a set's own default stands in its `Adapter`.

    Attributes:
      root, out: the downloaded set, and where the prepared one goes.
      size: the longer side of a stored image has at most so many pixels.
      plane, first, last, every: which slices of volumes; numbers in `volume.stack`.
      share: slices are kept that hold at least this part of what the fullest slice of their volume holds, of its mask
        where the case has one, else of what is no background (`volume.shares`): whatever the field of view.
      square: mm of a volume's pixels in the plane; 0 for the finer of its own.
      register: see `registration.register`.
      preset: see `volume.PRESETS`.
      clean: see `clean.CLEANINGS`.
      ranges: (stream or modality, values that count as -1 and +1) of files whose values are in no unit.
      salt: what ids are hashed with; "" keeps them.
    """

    root: str
    out: str
    size: int = 512
    plane: str = "axial"
    first: int = 0
    last: int | None = None
    every: int = 1
    share: float = 0.1
    square: float = 0.0
    register: str = "none"
    preset: str = "mr.zero"
    clean: str = "none"
    ranges: tuple[tuple[str, Span], ...] = ()
    salt: str = ""

    def named(self, name: str) -> str:
        """An id as the prepared set has it: hashed with the salt, or itself, made a file's name where it is none."""
        if self.salt:
            return hashlib.sha256(f"{self.salt}/{name}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if _SAFE.fullmatch(name) and ".." not in name:
            return name
        mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-')[:60]}-{mark}".lstrip("-_.")


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
      rows: of the manifest; each with "_prints", stream -> (exact, likeness) of its stored pixels, for the whole set.
      rejected: (id, stream or "text" or "", reason).
      registered: (stream, mutual information before, after, mm moved, edge overlap before, after).
    """

    rows: list[dict[str, Any]]
    rejected: list[tuple[str, str, str]]
    registered: list[tuple[str, float, float, float, float, float]]


class Unwritten(OSError):
    """What is made cannot be written, as where the disk is full: no fault of the case's."""


def cut(case: Case, how: Cutting) -> Outcome:
    """Make a case into rows; whatever is wrong with it is in the outcome, never raised.

    Raises:
      Unwritten: see there.
    """
    root, name, rejected = Root(how.root), how.named(case.id), []
    images: dict[str, Picture | Volume] = {}
    made: set[str] = set()
    for stream, image in case.images.items():
        modality = MODALITIES[split_stream(stream)[0]]
        try:
            span = dict(how.ranges).get(stream, dict(how.ranges).get(modality.name, image.span))
            found = _read(root, image._replace(span=span), modality, how.preset)
            if _made(root.file(image.path), found):
                made.add(stream)
            images[stream] = found
        except UserError as error:
            rejected.append((name, stream, _said(error, how)))
        except DAMAGED as error:  # of a library that was given what it does not expect
            rejected.append((name, stream, f"unreadable ({type(error).__name__})"))
    text = clean(case.text, how.clean)
    if case.text.strip() and not text:
        rejected.append((name, "text", f"report empty after cleaning ({how.clean})"))
    work = _Case(case, how, root, name, text, rejected, made)
    pictures = {s: i for s, i in images.items() if isinstance(i, Picture)}
    volumes = {s: i for s, i in images.items() if isinstance(i, Volume)}
    if pictures:
        work.pictures(pictures)
    if volumes:
        try:
            work.volumes(volumes)
        except Unwritten:
            raise
        except UserError as error:
            rejected.append((name, "", _said(error, how)))
        except DAMAGED as error:
            rejected.append((name, "", f"cannot be cut ({type(error).__name__})"))
    if text and not case.images:
        work.row(name, {})
    return Outcome(work.rows, rejected, work.registered)


class _Case:
    """The rows of one case as they are made."""

    def __init__(self, case: Case, how: Cutting, root: Root, name: str, text: str, rejected: list, made: set[str]):
        self.case, self.how, self.root = case, how, root
        self.name, self.text, self.rejected, self.made = name, text, rejected, made
        self.rows: list[dict[str, Any]] = []
        self.registered: list[tuple[str, float, float, float, float, float]] = []

    def volumes(self, volumes: dict[str, Volume]) -> None:
        """Slices of volumes: rows of several streams where these share a grid, else of one each."""
        for stream in list(volumes):
            if any(FILLED in note for note in volumes[stream].notes):
                self.rejected.append((self.name, stream, "slices that are missing, filled in from those on both sides"))
            unit = MODALITIES[split_stream(stream)[0]].unit
            if unit == "HU" and volumes[stream].span is None and (wrong := checks.hounsfield(volumes[stream])):
                self.rejected.append((self.name, stream, wrong))
                del volumes[stream]
        if not volumes:
            return
        first, *others = volumes
        together, apart = {first: volumes[first]}, {}
        found: list[tuple[Volume, Registered]] = []  # grids that are not the first one's, and how they lie on it
        for stream in others:
            here = self._on(stream, volumes[stream], volumes[first], found)
            (apart if here is None else together)[stream] = volumes[stream] if here is None else here
        self._slices(together, self.name)
        for stream, volume in apart.items():
            self._slices({stream: volume}, f"{self.name}-{stream.replace(':', '-')}")

    def _on(self, stream: str, volume: Volume, first: Volume, found: list[tuple[Volume, Registered]]) -> Volume | None:
        """A volume on the first one's grid; None where it cannot be brought there. What shares a grid with one that was
        brought there goes the same way: two echoes of one scan stay on each other."""
        if on_one_grid(volume, first):
            return volume
        if self.how.register == "none":
            self.rejected.append((self.name, "", "a pair that is not on one grid is cut apart (see --register)"))
            return None
        done = next((done for grid, done in found if on_one_grid(volume, grid)), None)
        try:
            done = along(volume, first, done.transform) if done else register(volume, first, self.how.register)
        except UserError as error:
            why = re.sub(r" \([^)]*\)$", "", _said(error, self.how))  # without figures: reasons are counted
            self.rejected.append((self.name, stream, f"cut apart: {why}"))
            return None
        found.append((volume, done))
        self.registered.append((stream, *(round(x, 4) for x in (*done.information, done.moved, *done.edges))))
        return done.volume

    def pictures(self, pictures: dict[str, Picture]) -> None:
        """One row of pictures; of a set that says that they lie on each other, if they do."""
        if not (self.case.registered and len(pictures) > 1):
            self.row(self.name, pictures)
            return
        first, *others = pictures
        for stream in others:
            a, b = (pictures[s].pixels for s in (first, stream))
            wrong = checks.pair(a[None], b[None]) if a.shape == b.shape else "a pair of different shapes"
            if wrong:
                self.rejected.append((self.name, stream, wrong))
                del pictures[stream]
        self.row(self.name, pictures, True)

    def _slices(self, volumes: Mapping[str, Volume], name: str) -> None:
        how, (first, *others) = self.how, volumes
        mask = self._mask(volumes[first])
        held = shares(volumes[first], how.plane) if mask is None else (stack(mask, how.plane) > 0).mean((1, 2))
        enough = max(how.share * held.max(), 1e-9)
        numbers = range(how.first, len(held) if how.last is None else min(how.last, len(held)))
        chosen = [n for n in numbers if held[n] >= enough or (mask is None and not how.share)][:: how.every]
        if not chosen:
            self.rejected.append((name, first, "no slice is worth keeping (--share, --first, --last)"))
            return
        kept = {first: volumes[first]}
        looked = chosen[:: max(1, len(chosen) // 16)]
        for stream in others:
            if wrong := checks.pair(*(stack(volumes[s], how.plane)[looked] for s in (first, stream)), how.plane):
                self.rejected.append((name, stream, wrong))
            else:
                kept[stream] = volumes[stream]
        cuts = {s: slices(squared(v, how.plane, how.square), how.plane, chosen) for s, v in kept.items()}
        digits = max(3, len(str(chosen[-1])))
        for i, n in enumerate(chosen):
            alone = len(chosen) == 1 and min(volumes[first].values.shape) == 1
            self.row(name if alone else f"{name}-{n:0{digits}d}", {s: c[i] for s, c in cuts.items()}, len(cuts) > 1)

    def _mask(self, first: Volume) -> Volume | None:
        if not self.case.mask:
            return None
        mask = formats.read_volume(self.root.file(self.case.mask))
        if on_one_grid(mask, first):
            return mask
        # One of its image's voxels, whose origin some writers leave out.
        if not on_one_grid(dataclasses.replace(mask, affine=_at(mask.affine, first.affine)), first):
            raise UserError(f"{mask.path}: a mask that is not on the grid of its image")
        return dataclasses.replace(mask, affine=first.affine)

    def row(self, name: str, pictures: Mapping[str, Picture], grid: bool = False) -> None:
        """Write the images of one row and keep it, if anything is left of it."""
        row: dict[str, Any] = {"id": name, "subject": self.how.named(self.case.subject), "split": self.case.split}
        fields: dict[str, dict] = {k: {} for k in ("images", "scale", "span", "spacing", "orientation", "_prints")}
        for stream, picture in pictures.items():
            if wrong := checks.blank(picture.pixels):
                self.rejected.append((name, stream, wrong))
                continue
            key = key_of(stream)
            found = stored(picture, MODALITIES[split_stream(stream)[0]], self.how.size)
            place = f"images/{key}/{hashlib.sha256(name.encode()).hexdigest()[:2]}/{name}.png"
            _write(Path(self.how.out) / place, found.pixels)
            fields["images"][key] = place
            for field in ("scale", "span", "spacing", "orientation"):
                if value := getattr(found, field):
                    fields[field][key] = value
            fields["_prints"][key] = (checks.fingerprint(found.pixels), checks.likeness(found.pixels))
        if not (fields["images"] or (self.text and not pictures)):  # a text whose image is no good is no pair
            return
        row |= {k: v for k, v in fields.items() if v}
        if self.text:
            row |= {"text": self.text, "text_origin": self.case.origin}
        if grid and len(fields["images"]) > 1:
            row["registered"] = True
        if made := [key for key in fields["images"] if stream_of(key) in self.made]:
            row["synthetic"] = made
        if self.case.licence:
            row["license"] = self.case.licence
        burned = [key_of(s) for s, picture in pictures.items() if dicom.BURNED_IN in picture.notes]
        if self.case.info or burned:
            row["info"] = dict(self.case.info) | ({"burned_in_annotation": burned} if burned else {})
        self.rows.append(row)


class Stored(NamedTuple):
    """A picture as it is stored: value = scale[0] * pixel + scale[1], () where they are the pixels; span as in
    `Picture`, () where it is in the modality's unit or the set's own to find."""

    pixels: Num[np.ndarray, "h w"]
    scale: tuple[float, ...]
    span: tuple[float, ...]
    spacing: tuple[float, ...]
    orientation: str


def stored(picture: Picture, modality: Modality, size: int) -> Stored:
    """A picture as 8 or 16 bits, its longer side at most `size`; nothing is stretched, cut off or made larger."""
    values, spacing = picture.pixels, picture.spacing
    plain = values.dtype in (np.uint8, np.uint16)
    rate = size / max(values.shape)
    if rate < 1:
        shape = [max(1, round(n * rate)) for n in values.shape]
        low, high = values.min(), values.max()
        small = Pillow.fromarray(values.astype(np.float32)).resize(shape[::-1], Pillow.Resampling.BICUBIC)
        values = np.clip(np.asarray(small), low, high)
        values = np.round(values).astype(picture.pixels.dtype) if plain else values
        spacing = spacing and tuple(mm / rate for mm in spacing)
    mm = () if spacing is None else tuple(round(float(x), 4) for x in spacing)
    if plain and picture.span is not None and tuple(picture.span) in ((0, 255), _bits(values, picture)):
        return Stored(values, (), (), mm, picture.orientation)
    span = () if picture.span is None else tuple(float(x) for x in picture.span)
    if plain:
        return Stored(values, (1.0, 0.0), span, mm, picture.orientation)
    hounsfield = modality.unit == "HU" and not span
    pixels, scale = _sixteen(values, hounsfield or picture.pixels.dtype.kind in "iu", -1024 if hounsfield else 0)
    return Stored(pixels, scale, span, mm, picture.orientation)


def _bits(values: np.ndarray, picture: Picture) -> tuple[int, int]:
    """The whole range of as many bits as the picture counts over, whose use is the set's to find."""
    return (0, 2 ** max(8, int(picture.span[1]).bit_length()) - 1) if values.dtype == np.uint16 else (0, 255)


def _sixteen(values: np.ndarray, whole: bool, zero: int) -> tuple[np.ndarray, tuple[float, float]]:
    """(uint16 pixels, (slope, intercept)): whole numbers exactly where 16 bits hold them, pixel 0 being `zero` where
    nothing is lower."""
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if whole and round(high) - min(zero, round(low)) <= 65535:
        low = min(zero, round(low))
        return np.round(values - low).astype(np.uint16), (1.0, float(low))
    return levels(values)


def _read(root: Root, image: Image, modality: Modality, preset: str) -> Picture | Volume:
    path = root.file(image.path)
    if image.which and path.suffix == ".npy":
        found = _of_stack(path, int(image.which))
    elif image.which:
        series = [s for s in _series(path) if s.uid == image.which]
        if not series:
            raise UserError(f"{path}: the series is no longer in it")
        found = dicom.read_series(series[0], MOST_VOXELS)
    else:
        found = formats.load(epath.Path(path), MOST_VOXELS)
    if image.span is not None:
        return dataclasses.replace(found, span=image.span)
    if isinstance(found, Volume):
        found = ranged(found, modality, preset)
        taken = modality.unit == "HU" and not found.unit and found.modality != "CT"  # of DICOM that says otherwise, not
        return dataclasses.replace(found, unit="HU") if taken else found
    if found.modality == "CT" and found.span is None and (wrong := _no_volume(found)):
        raise UserError(f"{path}: {wrong}")
    return _windowed(found, modality)


def _windowed(picture: Picture, modality: Modality) -> Picture:
    """A picture of a modality that has no unit, with the values that count as -1 and +1: of whole numbers all that its
    bits hold, as of a PNG.

    Raises:
      UserError: other values, beyond the modality's window.
    """
    values, (low, high) = picture.pixels, modality.window
    if picture.span is not None or not modality.relative or low <= values.min() <= values.max() <= high:
        return picture
    if values.dtype in (np.uint8, np.uint16):
        return dataclasses.replace(picture, span=(0, np.iinfo(values.dtype).max))
    raise UserError(f"{picture.path}: values in no unit; --range STREAM=LOW:HIGH says which count as -1 and +1")


def _made(path: Path, found: Picture | Volume) -> bool:
    """Does a file say that a model made it?"""
    if path.is_dir() or formats.format_at(path).name == "DICOM":  # of which the header is read already
        return dicom.SYNTHETIC in found.notes
    return marks.mark_of(path) is not None


@functools.lru_cache(maxsize=1)  # of a case, whose images are often in one folder
def _series(folder: Path) -> list[dicom.Series]:
    return dicom.series(folder, MOST_VOXELS, broken=[])  # which the adapter has named


def _at(affine: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([affine[:, :3], other[:, 3:]], axis=1)


def _no_volume(picture: Picture) -> str:
    return checks.hounsfield(Volume(picture.pixels[..., None], np.eye(4), "HU"))


def _of_stack(path: Path, number: int) -> Picture:
    """Image number `number` of an array (n h w), of which no more is read."""
    try:
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
        pixels = np.asarray(whole[number])
    except DAMAGED as error:
        raise UserError(f"{path}: not a whole array of images ({type(error).__name__} in reading it)") from error
    if pixels.ndim != 2 or pixels.size > MOST_PIXELS or not np.isfinite(pixels).all():
        raise UserError(f"{path}: expected an array (n h w) of finite values")
    return Picture(pixels, None, path=str(path))


def _said(error: UserError, how: Cutting) -> str:
    """An error's words without the paths in them: these hold patients' ids, and reasons are counted."""
    text, root = str(error), how.root.rstrip("/")
    places = "|".join(re.escape(place) for place in dict.fromkeys((root, ascii(root)[1:-1])))
    begin = re.sub(rf"^'?(?:{places})(?:/.*?)?(?:: |$)", "", text)
    rest = ".*" if how.salt else r"(?:/[^\s:;,]*)*'?"  # names of folders hold blanks: where they hide, all goes
    return re.sub(rf"'?(?:{places}){rest}", "a file", begin).strip() or "cannot be used"


def _write(path: Path, pixels: Num[np.ndarray, "h w"]) -> None:
    """A PNG, whole or not at all, the same bytes whenever it is written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written(path, lambda part: raster.write_png(part, Picture(pixels, None), {}))
    except OSError as error:
        raise Unwritten(error.errno, error.strerror) from error
