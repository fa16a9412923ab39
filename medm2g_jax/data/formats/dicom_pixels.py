"""Values out of a DICOM header's pixel data: decoded by pydicom and its plug-ins, once the header's word is checked."""

import contextlib
import functools
import importlib.util
import logging
import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Num

from medm2g_jax.data.formats.content import check_count, whole
from medm2g_jax.data.picture import Span
from medm2g_jax.errors import UserError

PLUG_INS = "pip install 'medm2g-jax[dicom]'"
_DECODERS = ("pylibjpeg", "libjpeg", "openjpeg", "jpeg_ls")  # what these install
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes without compression
_RLE = "1.2.840.10008.1.2.5"
_GREY = ("MONOCHROME1", "MONOCHROME2")


def readable(name: str) -> contextlib.AbstractContextManager[None]:
    """Whatever pydicom raises of a damaged file becomes one line; see `content.whole`."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    _hush()
    return whole(name, "DICOM", BytesLengthException, InvalidDicomError)


@functools.cache
def _hush() -> None:
    """pydicom's warnings quote the values that they are about, which may name a patient: they are for nobody's log."""
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pydicom")


def get(name: str, header: Any, keyword: str, default: Any = None) -> Any:
    """The value of a tag; the default where it is absent or empty.

    Raises:
      UserError: it is not what its kind may be.
    """
    with readable(name):
        value = header.get(keyword)
        return default if value is None or (hasattr(value, "__len__") and not len(value)) else value


def numbers(name: str, header: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The numbers of a tag; None where it is absent or empty.

    Raises:
      UserError: they are not so many, or not finite.
    """
    with readable(name):
        if (value := get(name, header, keyword)) is None:
            return None
        values = np.atleast_1d(np.asarray(value, np.float64))
    if values.shape != (count,) or not np.isfinite(values).all():
        raise UserError(f"{name}: {keyword}: expected {count} finite number{'s' * (count > 1)}")
    return tuple(float(x) for x in values)


def shape_of(name: str, header: Any) -> tuple[int, int, int]:
    """(frames, rows, columns), of a header that holds an image of grey values.

    Raises:
      UserError: it does not.
    """
    if "Rows" not in header or "Columns" not in header:
        raise UserError(f"{name}: DICOM without an image (no Rows or Columns)")
    with readable(name):
        shape = tuple(int(get(name, header, tag, 1)) for tag in ("NumberOfFrames", "Rows", "Columns"))
        channels = int(get(name, header, "SamplesPerPixel", 1))
        kind = str(get(name, header, "PhotometricInterpretation", _GREY[1]))
    if channels != 1 or kind not in _GREY:
        raise UserError(f"{name}: an image in colour ({kind[:16]!a}); expected grey values, {' or '.join(_GREY)}")
    return shape


def stored(name: str, header: Any, most: int) -> Num[np.ndarray, "n h w"]:
    """The stored values of all frames.

    Raises:
      UserError: too many, compressed in a way that nothing here can undo, or damaged.
    """
    shape = shape_of(name, header)
    check_count(name, shape, most, "pixels")
    if not any(tag in header for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UserError(f"{name}: a header without its image (no PixelData)")
    from pydicom.pixels import pixel_array
    from pydicom.uid import UID

    if get(name, header.file_meta, "TransferSyntaxUID") is None:  # what files without it were read as
        implicit, little = header.original_encoding
        header.file_meta.TransferSyntaxUID = UID(_NATIVE[0 if implicit else 1 if little else 2])
    syntax = UID(str(header.file_meta.TransferSyntaxUID))
    missing = "" if syntax in _NATIVE else _missing(name, header, syntax, shape)
    # RLE by pydicom itself: pylibjpeg-rle, where it is installed, panics on damaged files, past every `except`.
    plug_in = "pydicom" if syntax == _RLE else ""
    try:
        with readable(name):
            values = np.asarray(pixel_array(header, raw=True, decoding_plugin=plug_in)).reshape(shape)
    except UserError as error:
        raise UserError(f"{error}{missing}") from error
    return values


def _missing(name: str, header: Any, syntax: Any, shape: tuple[int, int, int]) -> str:
    """What to say where decoding then fails; holds each compressed frame to the header's size, since a decoder takes
    the memory that the frame asks for."""
    from pydicom.encaps import generate_frames
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(f"{name}: compressed as {syntax.name}, which is not read here") from None
    if not decoder.is_available:
        raise UserError(f"{name}: compressed as {syntax.name}, for which a decoder is missing: {PLUG_INS}")
    with readable(name):
        for frame in generate_frames(header.PixelData, number_of_frames=shape[0]):
            size = frame_size(frame)
            if syntax != _RLE and size != shape[1:]:
                found = " x ".join(map(str, size)) if size else "no JPEG codestream"
                raise UserError(
                    f"{name}: its compressed image is {found}, its header says {shape[1]} x {shape[2]} pixels"
                )
    lacking = [module for module in _DECODERS if importlib.util.find_spec(module) is None]
    return f"; or its compression ({syntax.name}) needs another decoder: {PLUG_INS}" if lacking else ""


def frame_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream states; None of anything else."""
    if frame[4:8] == b"jP  ":  # a JP2 file around it
        frame = frame[max(0, frame.find(b"\xff\x4f\xff\x51", 0, 4096)) :]
    if frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: the extent of the image less its offset
        right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
        return bottom - top, right - left
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        alone = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8
        at += 1 if marker == 0xFF else 2 if alone else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def padding(name: str, header: Any, values: Num[np.ndarray, "*n h w"]) -> Bool[np.ndarray, "*n h w"] | None:
    """Which stored values fill the image up and are no measurement; None where the header names no such value."""
    if values.dtype.kind not in "iu" or (low := _padding(name, header, "PixelPaddingValue", values)) is None:
        return None
    high = _padding(name, header, "PixelPaddingRangeLimit", values)
    low, high = sorted((low, low if high is None else high))
    found = (values >= low) & (values <= high)
    return found if found.any() and not found.all() else None


def _padding(name: str, header: Any, keyword: str, values: np.ndarray) -> int | None:
    """The value of a tag as the stored values are signed; files write the bits of one as the other."""
    if (found := numbers(name, header, keyword, 1)) is None:
        return None
    bits, value = 8 * values.dtype.itemsize, int(found[0])
    if not -(2 ** (bits - 1)) <= value < 2**bits:
        return None
    value &= 2**bits - 1
    return value - 2**bits if values.dtype.kind == "i" and value >= 2 ** (bits - 1) else value


def in_unit(name: str, header: Any, values: Num[np.ndarray, "*n h w"]) -> Num[np.ndarray, "*n h w"]:
    """Stored values by the header's modality LUT, or its slope and intercept; whole numbers as narrow as they fit.

    Raises:
      UserError: these are no numbers.
    """
    if get(name, header, "ModalityLUTSequence") is not None:
        from pydicom.pixels import apply_modality_lut

        with readable(name):
            return apply_modality_lut(values, header)
    slope, inter = rescale(name, header)
    if values.dtype.kind not in "iu" or slope != int(slope) or inter != int(inter) or max(abs(slope), abs(inter)) > 1e6:
        return (values.astype(np.float64) * slope + inter).astype(np.float32)
    exact = values if (slope, inter) == (1, 0) else values.astype(np.int64) * int(slope) + int(inter)
    ends = int(exact.min()), int(exact.max())
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= ends[0] and ends[1] <= np.iinfo(kind).max:
            return exact.astype(kind, copy=False)
    return exact.astype(np.float32)


def rescale(name: str, header: Any) -> tuple[float, float]:
    """(slope, intercept), 1 and 0 where the header states none."""
    slope, inter = (numbers(name, header, tag, 1) for tag in ("RescaleSlope", "RescaleIntercept"))
    return (1.0 if slope is None else slope[0]), (0.0 if inter is None else inter[0])


def window(name: str, header: Any) -> Span | None:
    """The values that the header's first linear window shows as black and white; None where it has none."""
    with readable(name):
        found = (get(name, header, tag, []) for tag in ("WindowCenter", "WindowWidth"))
        ends = [np.atleast_1d(np.asarray(value, np.float64)) for value in found]
        exact = str(get(name, header, "VOILUTFunction", "LINEAR")) != "LINEAR"
    if not (len(ends[0]) and len(ends[1])):
        return None
    (centre, *_), (width, *_) = ends
    if not (np.isfinite([centre, width]).all() and width > 0):
        return None
    # PS3.3 C.11.2.1.2: LINEAR counts from the middle of a pixel's value and over one less than the width.
    low, high = (centre - width / 2, centre + width / 2) if exact else (centre - width / 2, centre + width / 2 - 1)
    return (float(low), float(high)) if high > low else None
