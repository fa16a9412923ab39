"""DICOM in: a file of one slice or of many, and the series in a folder; values as they are, in the unit they state.

A file that says where it lies gives a volume, one that does not (every CR and DX) a picture. Slices of a series are
those of one SeriesInstanceUID with one geometry, sorted by where they lie along their normal; names and instance
numbers decide nothing. Of a header only TAGS are read: no patient's data come into memory, nor into a message. Of a
series' description, in which people write anything, nothing is kept but which of a few words is in it (`Series`).

A CT is in HU, exactly as slope and intercept say; its windows are not used. All else has no unit: a picture counts over
the window that its file asks for or, without one, over the bits it stores (`data.check` then finds the range over a
set), and is bright where a film is, also where the file stores it the other way round (MONOCHROME1); an MRI counts over
its volume's own range (`volume.ranged`).
"""

import dataclasses
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from medm2g_jax.data.formats.content import check_count, opened, taken, unreadable
from medm2g_jax.data.formats.dicom_grid import Slab, stacked
from medm2g_jax.data.formats.dicom_pixels import get, in_unit, numbers, padding, readable, stored, window
from medm2g_jax.data.picture import Picture
from medm2g_jax.data.volume import MOST_VOXELS, Volume
from medm2g_jax.errors import UserError

TAGS = """SOPInstanceUID SeriesInstanceUID SeriesNumber FrameOfReferenceUID Modality ImageType ImagePositionPatient
    ImageOrientationPatient PatientOrientation PixelSpacing ImagerPixelSpacing SliceThickness SamplesPerPixel
    PhotometricInterpretation NumberOfFrames Rows Columns PlanarConfiguration BitsAllocated BitsStored HighBit
    PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept RescaleType
    BurnedInAnnotation SyntheticData ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction PixelData
    FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths SharedFunctionalGroupsSequence
    PerFrameFunctionalGroupsSequence""".split()

BURNED_IN = "says that text is burned into it (BurnedInAnnotation)"
SYNTHETIC = "says that a model made it (SyntheticData)"
# What tells series apart beside their grids; read in looking for them, and let go of at once.
_TELLING = ["SeriesDescription", "ProtocolName", "ScanningSequence", "RepetitionTime", "EchoTime", "InversionTime"]
_WORDS = {
    "flair": re.compile(r"flair|dark[ _-]?fluid", re.I),
    "pd": re.compile(r"(?<![A-Z])PD|(?<![A-Za-z])pd|(?i:proton[ _-]?dens)"),
    "t2": re.compile(r"(?<![A-Z0-9])T2(?!\d)|(?<![A-Za-z0-9])t2(?!\d)"),
    "t1": re.compile(r"(?<![A-Z0-9])T1(?!\d)|(?<![A-Za-z0-9])t1(?!\d)|(?i:mp-?rage)"),
}
_ENHANCED = re.compile(r"(?<![a-z])(gd|gad\w*|ce|post\w*|enhanced)(?![a-z])|\+ ?c\b", re.I)
_DEFORMED = re.compile(r"deform|warp|regist|(?<![a-z])d?reg(?![a-z])", re.I)
_SAID = "DerivationDescription ImageComments ContributingEquipmentSequence".split()  # where marks of ours may be

_PER_FRAME = """ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness RescaleSlope RescaleIntercept
    RescaleType""".split()  # in an enhanced file
_ITEM, _ITEMS = b"\xfe\xff\x00\xe0", 200_000  # of sequences and fragments: a real file has some dozens a frame
_READS = 750_000  # of a file, one or two an element, in all its sequences: an enhanced file has some hundreds a frame
_FILES = 100_000  # looked at in one folder
_INFLATED = 2**28  # bytes that a deflated file may become, whatever an image may have: a small file asks for them
_DEFLATED, _PLAIN = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1"


class Series(NamedTuple):
    """Slices that lie on one grid: one SeriesInstanceUID, one geometry.

    Attributes:
      modality: DICOM's code.
      shape: rows and columns.
      files: in no order.
      notes: what was passed over in looking for it.
      uid: its SeriesInstanceUID, "/2" after that of a second grid of the same.
      frame: its frame of reference; "" where it has none.
      contrast: of an MRI: t1, t2, pd, flair, t1ce by a word of its description, else by a spin echo's times; else "".
      deformed: does its description say that it was registered to another?
      localizer: is it a scout?
      grid: equal of series that lie on one grid: direction, spacing, the places of the outermost slices (mm).
    """

    modality: str
    shape: tuple[int, int]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    uid: str = ""
    frame: str = ""
    contrast: str = ""
    deformed: bool = False
    localizer: bool = False
    grid: tuple[float, ...] = ()

    def __str__(self) -> str:
        count, (rows, columns) = len(self.files), self.shape
        return f"{self.modality or 'no modality'}, {count} file{'s' * (count > 1)} of {rows} x {columns}"


def is_dicom(path: epath.PathLike) -> bool:
    """Does it begin as a DICOM file does? A folder may hold some."""
    try:
        if (path := epath.Path(path)).is_dir():
            return True
        with opened(path, unpack=False) as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError, UserError):
        return False


def read(path: epath.PathLike, most_pixels: int) -> Picture | Volume:
    """The volume, or picture, in a file; of a folder the volume of the one series in it.

    Raises:
      UserError: missing, damaged, too large, of no grey image, or a folder of several series, which it lists.
    """
    if not epath.Path(path).is_dir():
        header = _parsed(path, most_pixels)
        if _placed(header):
            return _volume(str(path), header, _slabs(str(path), header, most_pixels), most_pixels)
        return _picture(str(path), header, most_pixels)
    found = series(path, most_pixels)
    if len(found) != 1:
        listed = "; ".join(f"{n}: {one}" for n, one in enumerate(found))
        raise UserError(
            f"{path}: {len(found) or 'no'} series of images{f' ({listed})' if found else ''}; expected one: name a "
            "folder that holds it alone, or, in Python, read_series(series(FOLDER, MOST)[NUMBER], MOST) of "
            "medm2g_jax.data.formats.dicom"
        )
    return read_series(found[0], most_pixels)


def series(folder: epath.PathLike, most_pixels: int, broken: list[Path] | None = None) -> list[Series]:
    """The series of images in a folder and the folders in it, in the order of their numbers. Links that lead out of the
    folder, other files and DICOM without an image are passed over.

    Args:
      broken: takes up damaged files, which are then passed over as well; None: the first one is an error.

    Raises:
      UserError: a damaged file; names it.
    """
    groups: dict[tuple, list[Path]] = {}
    places: dict[tuple, list[tuple[float, ...]]] = {}
    told: dict[tuple, tuple[str, bool]] = {}
    seen: set[str] = set()
    out = again = 0
    for path, inside in _files(Path(folder)):
        if not inside:
            out += 1
            continue
        try:
            if not (is_dicom(path) and _is_image(str(path), header := _parsed(path, most_pixels, _TELLING))):
                continue
            uid, group = str(get(str(path), header, "SOPInstanceUID", "")), _group(str(path), header)
            place = numbers(str(path), header, "ImagePositionPatient", 3) or ()
            about = told.get(group) or _told(str(path), header)
        except UserError:
            if broken is None:
                raise
            broken.append(path)
            continue
        if uid and uid in seen:
            again += 1
            continue
        groups.setdefault(group, []).append(path)
        places.setdefault(group, []).append(place)
        seen.add(uid)
        told[group] = about
    times: dict[str, int] = {}
    notes = (f"{out} links that lead out of the folder were passed over",) if out else ()
    notes += (f"{again} files that hold the same image as another were passed over",) if again else ()
    found = []
    for key in sorted(groups):
        times[key[1]] = times.get(key[1], 0) + 1
        uid = key[1] if times[key[1]] == 1 else f"{key[1]}/{times[key[1]]}"
        ends = min(places[key]), max(places[key])
        grid = (*key[4], *(round(x, 1) + 0.0 for end in ends for x in end))
        found.append(Series(*key[2:4], tuple(groups[key]), notes, uid, key[5], *told[key], key[6], grid))
    return found


def _told(name: str, header: Any) -> tuple[str, bool]:
    """(contrast, whether it was registered to another), of what a header says of its series."""
    with readable(name):
        words = " ".join(str(get(name, header, tag, "")) for tag in ("SeriesDescription", "ProtocolName"))
        sequence = [str(word) for word in np.atleast_1d(np.asarray(get(name, header, "ScanningSequence", []), object))]
    tr, te, ti = (_time(name, header, tag) for tag in ("RepetitionTime", "EchoTime", "InversionTime"))
    contrast = next((word for word, says in _WORDS.items() if says.search(words)), "")
    if not contrast and te and "SE" in sequence and "GR" not in sequence:
        if tr >= 1800 and te >= 60:
            contrast = "flair" if ti > 1500 else "t2"
        elif ti <= 1500:
            contrast = "pd" if tr >= 1800 and te < 45 else "t1" if 0 < tr < 1200 and te < 30 else ""
    if contrast == "t1" and _ENHANCED.search(words):
        contrast = "t1ce"
    return contrast, bool(_DEFORMED.search(words))


def _time(name: str, header: Any, tag: str) -> float:
    """Milliseconds; 0 where it states none, or several."""
    try:
        return (numbers(name, header, tag, 1) or (0.0,))[0]
    except UserError:
        return 0.0


def _is_image(name: str, header: Any) -> bool:
    """Does it hold an image? One that is cut off before it, left out, would be a gap in its series."""
    with readable(name):
        said = "Image Storage" in getattr(header.file_meta.get("MediaStorageSOPClassUID"), "name", "")
    if said and "Rows" not in header:
        raise UserError(f"{name}: says that it is an image and ends before it")
    return "Rows" in header


def _group(name: str, header: Any) -> tuple:
    """What files of one series have in common: its number and identifier, what it is of, its shape, then the rest."""
    number, uid, modality, frame = (
        str(get(name, header, tag, ""))
        for tag in ("SeriesNumber", "SeriesInstanceUID", "Modality", "FrameOfReferenceUID")
    )
    with readable(name):
        shape = int(get(name, header, "Rows", 0)), int(get(name, header, "Columns", 0))
    tags = (("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    geometry = tuple(round(x, 3) + 0.0 for tag, count in tags for x in numbers(name, header, tag, count) or ())
    return number.zfill(12), uid, modality, shape, geometry, frame, _is_localizer(name, header)


def _is_localizer(name: str, header: Any) -> bool:
    words = np.atleast_1d(np.asarray(get(name, header, "ImageType", []), object))
    return "LOCALIZER" in [str(word).upper() for word in words]


def read_series(one: Series, most_voxels: int) -> Volume:
    """The volume of a series.

    Raises:
      UserError: it does not say where its slices lie, or they make no grid.
    """
    name = str(one.files[0].parent if len(one.files) > 1 else one.files[0])
    check_count(name, (len(one.files), *one.shape), most_voxels)
    slabs: list[Slab] = []
    for path in one.files:
        header = _parsed(path, most_voxels)
        if not _placed(header):
            raise UserError(f"{path}: does not say where it lies (ImagePositionPatient); expected slices of a volume")
        slabs += _slabs(str(path), header, most_voxels)
    return _volume(name, header, slabs, most_voxels, one.notes)


def _files(root: Path) -> Iterator[tuple[Path, bool]]:
    """(file, whether it truly lies in the folder), in the order of names."""
    def stop(error: OSError) -> None:  # what is not looked at could be half of a series
        raise unreadable(error.filename, error)

    real, count = root.resolve(), 0
    for folder, folders, names in os.walk(root, onerror=stop):
        folders.sort()
        for name in sorted(names):
            path, count = Path(folder, name), count + 1
            if count > _FILES:
                raise UserError(f"{root}: more than {_FILES} files; name the folder of one patient or series")
            try:
                regular, inside = stat.S_ISREG(path.stat().st_mode), path.resolve().is_relative_to(real)
            except (OSError, RuntimeError):  # a link to nowhere, or to itself
                continue
            if regular:
                yield path, inside


def said(path: epath.PathLike) -> str:
    """What a file, an image or a report, says of how it was made. Not for people: others' files may name a patient.

    Raises:
      UserError: it is missing, damaged or no DICOM.
    """
    name, header = str(path), _parsed(path, MOST_VOXELS, instead=_SAID)
    with readable(name):
        equipment = get(name, header, "ContributingEquipmentSequence", [])
        words = [get(name, item, "ContributionDescription", "") for item in equipment]
    return "\n".join(map(str, (*(get(name, header, tag, "") for tag in _SAID[:2]), *words)))


def _parsed(path: epath.PathLike, most_pixels: int, instead: Sequence[str] = ()) -> Any:
    """The header of a file, TAGS alone, and its pixel data, still packed, or other tags in their place.

    Raises:
      UserError: it is no DICOM, damaged, or of more than a file of so many pixels can have.
    """
    import pydicom

    name, limit = str(path), 2**26 + 4 * most_pixels
    content = taken(path, limit)
    bare = content[:2] in (b"\2\0", b"\x08\0") and content[3:4] == b"\0" or content[:3] == b"\0\x08\0"  # no preamble
    if content[128:132] != b"DICM" and not bare:
        raise UserError(f"{name}: {'does not begin as DICOM does' if content else 'empty, not DICOM'}")
    if _DEFLATED in content:
        content = _inflated(name, content, min(limit, _INFLATED))
    if content.count(_ITEM) > _ITEMS:
        raise UserError(f"{name}: more than {_ITEMS} items in its sequences, more than an image has")
    with readable(name):
        tags = [*TAGS, *instead]
        file = _Counted(name, content)
        return pydicom.dcmread(file, force=True, specific_tags=tags, stop_before_pixels=bool(instead))


class _Counted(io.BytesIO):
    """A file's bytes, read a limited number of times: pydicom takes seconds for a mebibyte of empty elements."""

    def __init__(self, name: str, content: bytes):
        super().__init__(content)
        self._name, self._left = name, _READS

    def read(self, *size: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"{self._name}: more than {_READS} elements, more than an image has")
        return super().read(*size)


def _inflated(name: str, content: bytes, limit: int) -> bytes:
    """A file whose data set is deflated as it is without that; pydicom would take whatever memory it asks for.

    Raises:
      UserError: it is damaged, or of more than `limit` bytes.
    """
    end = 144 + int.from_bytes(content[140:144], "little")  # of the meta group, by the length that it begins with
    head, plain = content[:end], b""
    if content[132:138] == b"\2\0\0\0UL" and _DEFLATED in head:
        with readable(name):
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            plain = inflater.decompress(content[end:], limit + 1)
            if len(plain) > limit:
                raise UserError(f"{name}: more than {limit} bytes inflated, more than an image that is read here has")
            plain = plain if inflater.eof else b""
    if not plain or _DEFLATED in plain:  # which pydicom would inflate once more
        raise UserError(f"{name}: not a whole deflated DICOM file")
    return head.replace(_DEFLATED, _PLAIN.ljust(len(_DEFLATED), b"\0")) + plain


def _placed(header: Any) -> bool:
    """Does it say where it lies in the patient?"""
    return "ImagePositionPatient" in header or "PerFrameFunctionalGroupsSequence" in header


def _slabs(name: str, header: Any, most_pixels: int) -> list[Slab]:
    """The slices of a file: one, or the frames of an enhanced one, each with its own place and scale."""
    values = stored(name, header, most_pixels)
    frames = _frames(name, header, len(values))
    return [_slab(name, frame, header, one) for frame, one in zip(frames, values, strict=True)]


def _frames(name: str, header: Any, count: int) -> list[dict[str, Any]]:
    """What each frame says in place of the header: the items of its functional groups, tag by tag."""
    with readable(name):
        own = get(name, header, "PerFrameFunctionalGroupsSequence", [])
        if not len(own) and count == 1:
            return [{}]
        if len(own) != count:
            raise UserError(f"{name}: {count} frames, {len(own)} of which say where they lie; expected all")
        shared = [item for group in get(name, header, "SharedFunctionalGroupsSequence", []) for item in _items(group)]
        return [
            {tag: item.get(tag) for item in (*shared, *_items(group)) for tag in _PER_FRAME if tag in item}
            for group in own
        ]


def _items(group: Any) -> list[Any]:
    """The single items of the sequences in a functional group."""
    return [element.value[0] for element in group if element.VR == "SQ" and len(element.value) == 1]


def _slab(name: str, frame: dict[str, Any], header: Any, values: np.ndarray) -> Slab:
    own = {tag: get(name, header, tag) for tag in _PER_FRAME} | frame
    found = {
        tag: numbers(name, own, tag, count)
        for tag, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    }
    if missing := [tag for tag, value in found.items() if value is None]:
        raise UserError(f"{name}: no {' and no '.join(missing)}; a slice needs them to lie in a volume")
    thickness = numbers(name, own, "SliceThickness", 1)
    in_units = in_unit(name, own | {"ModalityLUTSequence": get(name, header, "ModalityLUTSequence")}, values)
    where = found["ImagePositionPatient"], found["ImageOrientationPatient"], found["PixelSpacing"]
    alone = thickness[0] if thickness and thickness[0] > 0 else 1.0
    return Slab(name, in_units, padding(name, header, values), *where, alone)


def _volume(name: str, header: Any, slabs: list[Slab], most_voxels: int, notes: tuple[str, ...] = ()) -> Volume:
    volume = stacked(name, slabs, most_voxels)
    modality, frame = (str(get(name, header, tag, "")) for tag in ("Modality", "FrameOfReferenceUID"))
    frames = get(name, header, "PerFrameFunctionalGroupsSequence", [None])
    own = {"RescaleType": get(name, header, "RescaleType")} | _frames(name, header, len(frames))[0]
    unit, said = _unit(modality, str(get(name, own, "RescaleType", "HU")), _is_localizer(name, header))
    notes += said + _warned(name, header)
    return dataclasses.replace(volume, unit=unit, modality=modality, frame=frame, notes=notes + volume.notes)


def _warned(name: str, header: Any) -> tuple[str, ...]:
    """What its header says YES to that its user should know."""
    tags = {"BurnedInAnnotation": BURNED_IN, "SyntheticData": SYNTHETIC}
    return tuple(note for tag, note in tags.items() if str(get(name, header, tag, "")).strip().upper() == "YES")


def _unit(modality: str, kind: str, localizer: bool) -> tuple[str, tuple[str, ...]]:
    """("HU" or "", what is to say of it); DICOM's type of a CT's values is HU where a file states none."""
    if modality == "CT" and localizer:
        return "", ("a localizer (scout), the projection of a body and no slice of it",)
    if modality != "CT" or kind == "HU":
        return ("HU" if modality == "CT" else ""), ()
    return "", (f"its values are not said to be Hounsfield units (RescaleType {kind[:16]!a})",)


def _picture(name: str, header: Any, most_pixels: int) -> Picture:
    """An image that does not say where it lies, as a film is shown: dark where little was absorbed."""
    values = stored(name, header, most_pixels)
    if len(values) > 1:
        raise UserError(f"{name}: {len(values)} frames that do not say where they lie; expected one image")
    empty, pixels = padding(name, header, values), in_unit(name, header, values)[0]
    modality = str(get(name, header, "Modality", ""))
    unit, notes = _unit(modality, str(get(name, header, "RescaleType", "HU")), _is_localizer(name, header))
    notes += _warned(name, header)
    shown = None if unit else window(name, header)
    bits = int((numbers(name, header, "BitsStored", 1) or (64,))[0])  # absent of floats
    if unit:
        span = None
    elif shown:
        span, notes = shown, (*notes, "counts over the window that the file asks for")
    elif values.dtype.kind == "u" and bits <= 16 and np.array_equal(pixels, values[0]):
        span, pixels = (0, 2**bits - 1), pixels.astype(np.uint8 if bits <= 8 else np.uint16)
    else:
        span = (float(pixels.min()), float(max(pixels.max(), pixels.min() + 1)))
    if span and str(get(name, header, "PhotometricInterpretation", "")) == "MONOCHROME1":
        kept = pixels.dtype if pixels.dtype.kind == "u" else np.float32
        pixels = (span[0] + span[1] - pixels.astype(np.float64)).astype(kept)
    if empty is not None:
        pixels = np.where(empty[0], pixels[~empty[0]].min(), pixels)
    stated = (numbers(name, header, tag, 2) for tag in ("PixelSpacing", "ImagerPixelSpacing"))
    spacing = next((mm for mm in stated if mm and min(mm) > 0), None)  # some films state 0
    orientation = _orientation(name, header)
    if orientation[1:] == "R":
        notes += ("the file shows the patient's right on the right",)
    return Picture(pixels, span, spacing, orientation, name, modality, notes)


def _orientation(name: str, header: Any) -> str:
    """Where rows and columns go; DICOM names the way along a row first."""
    with readable(name):
        words = [str(word)[:1] for word in get(name, header, "PatientOrientation", [])]
    return words[1] + words[0] if len(words) == 2 and all(word in "LRAPHF" for word in words) else ""
