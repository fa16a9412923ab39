"""PNG, JPEG and TIFF, from files and from bytes: grey, upright as a viewer shows it, all levels kept.

These carry no physical values: they are windowed already, over all that their bits hold, 0 .. 255 or 0 .. 65535. A
16-bit file seldom uses that whole range; what a data set's files do use is found over all of it (`data.check`).
"""

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from medm2g_jax.data.formats.content import DAMAGED, taken
from medm2g_jax.data.picture import Picture
from medm2g_jax.errors import UserError

_LARGEST = 2**30  # bytes of a file
# By content, not by name; and not Image.open, whose limit of pixels is one for the whole process.
_KINDS = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}


def read(path: epath.PathLike, most_pixels: int) -> Picture:
    """The picture in a file.

    Raises:
      UserError: the file is missing, damaged, too large, or of another kind than these.
    """
    return decode(taken(path, _LARGEST), str(path), most_pixels)


def said(path: epath.PathLike) -> str:
    """What a file's text fields say: PNG's chunks, JPEG's comment, TIFF's description. Not for people: others' files
    may name a patient.

    Raises:
      UserError: it is missing, damaged, or of another kind than these.
    """
    content, name = taken(path, _LARGEST), str(path)
    kind = _kind(content, name)
    try:
        with kind(io.BytesIO(content)) as file:
            words = dict(file.info)
            if kind is TiffImageFile:
                words["description"] = file.tag_v2.get(ExifTags.Base.ImageDescription, "")
    except DAMAGED as error:
        raise UserError(f"{name}: not a whole {kind.format} file ({type(error).__name__} in reading it)") from error
    texts = {key: x.decode("utf-8", "replace") if isinstance(x, bytes) else x for key, x in words.items()}
    return "\n".join(f"{key}: {text}" for key, text in texts.items() if isinstance(text, str))


def _kind(content: bytes, name: str) -> type[Image.Image]:
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
    if kind is None:
        expected = ", ".join(dict.fromkeys(kind.format for kind in _KINDS.values()))
        raise UserError(f"{name}: {'begins as none of' if content else 'empty, not one of'} {expected}")
    return kind


def decode(content: bytes, name: str, most_pixels: int) -> Picture:
    """The picture in the bytes of a file; `name` says in messages which.

    Raises:
      UserError: see `read`.
    """
    kind = _kind(content, name)
    try:
        if kind is PngImageFile:
            _check_crc(content)
        with kind(io.BytesIO(content)) as file:
            width, height = file.size
            if width * height > most_pixels:
                raise UserError(
                    f"{name}: {width} x {height} pixels, more than the {most_pixels} that are read; make it smaller, "
                    "or, if it is what it says, raise --config.data.most_pixels"
                )
            if kind is TiffImageFile:
                _check_tiff(file, name)
            if _deep(file) and not file.mode.startswith("I"):
                raise UserError(f"{name}: 16 bits of colour, of which 8 would be lost; save it as 16-bit grey")
            deep = file.mode.startswith("I")
            upright = ImageOps.exif_transpose(file)
            pixels = np.asarray(upright if deep else upright.convert("L"))
    except DAMAGED as error:
        what = " ".join(str(error).split()) or "nothing more is known"
        raise UserError(f"{name}: not a whole {kind.format} file ({type(error).__name__}: {what})") from error
    pixels = pixels.astype(np.uint16 if deep else np.uint8)  # "I;16B" is big-endian
    return Picture(pixels, (0, np.iinfo(pixels.dtype).max), path=name)


def _deep(file: Image.Image) -> bool:
    return any(";16" in str(tile.args) for tile in file.tile)


def _check_tiff(file: TiffImageFile, name: str) -> None:
    """TIFF holds more than pictures that are windowed already."""
    if file.n_frames > 1:
        raise UserError(f"{name}: {file.n_frames} pages; a picture is one, save each as a file of its own")
    if file.mode in ("I", "F"):
        raise UserError(f"{name}: signed or 32-bit values; expected grey of 8 or 16 bits, from 0 up")
    if file.mode.startswith("I;16") and file.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0:  # PIL turns 8-bit ones only
        raise UserError(f"{name}: 0 means white in it; save it with 0 as black")


def _check_crc(content: bytes) -> None:
    """Hold each chunk of a PNG to its CRC: PIL decodes pixels without, and a changed one would pass unseen."""
    at = 8
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        (stored,) = struct.unpack_from(">I", content, at + 8 + length)
        if zlib.crc32(content[at + 4 : at + 8 + length]) != stored:
            raise ValueError(f"the CRC of chunk {kind.decode('latin-1')!r} differs")
        at += 12 + length
        if kind == b"IEND":
            return
    raise ValueError("it ends before its last chunk")


def write_png(path: epath.PathLike, picture: Picture, notes: Mapping[str, str]) -> None:
    """8- or 16-bit grey PNG; notes become its text chunks."""
    text = PngInfo()
    for name, note in notes.items():
        text.add_text(name, note)
    _save(path, picture, format="PNG", pnginfo=text)


def write_jpeg(path: epath.PathLike, picture: Picture, notes: Mapping[str, str]) -> None:
    """8-bit grey JPEG; notes become its comment."""
    if picture.pixels.dtype != np.uint8:
        raise ValueError(f"JPEG holds 8 bits, not {picture.pixels.dtype}")
    comment = "\n".join(f"{name}: {note}" for name, note in notes.items())
    _save(path, picture, format="JPEG", quality=95, comment=comment.encode())


def write_tiff(path: epath.PathLike, picture: Picture, notes: Mapping[str, str]) -> None:
    """8- or 16-bit grey TIFF; notes become its description."""
    description = "\n".join(f"{name}: {note}" for name, note in notes.items())
    _save(path, picture, format="TIFF", tiffinfo={ExifTags.Base.ImageDescription: description})


def _save(path: epath.PathLike, picture: Picture, **options) -> None:
    if picture.pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels to be written are uint8 or uint16, not {picture.pixels.dtype}")
    with epath.Path(path).open("wb") as file:
        Image.fromarray(picture.pixels).save(file, **options)
