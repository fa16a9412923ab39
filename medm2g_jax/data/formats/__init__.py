"""Files of pictures: one table, suffix -> how it is read and written. A new format is one file here and one row."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from etils import epath

from medm2g_jax.data.formats import raster
from medm2g_jax.data.picture import Picture
from medm2g_jax.errors import UserError


class Format(NamedTuple):
    """How files of one suffix are read and written.

    Attributes:
      name: what people call it.
      read: (path, most pixels) -> picture. Raises UserError, which names the file, for whatever is wrong with it.
      write: (path, picture, notes); its pixels as they are, notes (name -> text) in the file's own text fields.
    """

    name: str
    read: Callable[[epath.PathLike, int], Picture]
    write: Callable[[epath.PathLike, Picture, Mapping[str, str]], None]


FORMATS: dict[str, Format] = {
    ".png": Format("PNG", raster.read, raster.write_png),
    ".jpg": Format("JPEG", raster.read, raster.write_jpeg),
    ".jpeg": Format("JPEG", raster.read, raster.write_jpeg),
    ".tif": Format("TIFF", raster.read, raster.write_tiff),
    ".tiff": Format("TIFF", raster.read, raster.write_tiff),
}
NAMES = " or ".join(dict.fromkeys(f.name for f in FORMATS.values()))  # for messages


def format_of(name: str) -> Format | None:
    """The format of a file of this name; None where there is none. The longest suffix decides, in any case."""
    fits = [suffix for suffix in FORMATS if name.lower().endswith(suffix)]
    return FORMATS[max(fits, key=len)] if fits else None


def read(path: epath.PathLike, most_pixels: int) -> Picture:
    """The picture in a file.

    Raises:
      UserError: of no known format, missing, broken, or of more than `most_pixels` pixels; names the file.
    """
    found = format_of(str(path))
    if found is None:
        raise UserError(f"{path}: of no format that is read here; expected a name that ends in {', '.join(FORMATS)}")
    return found.read(path, most_pixels)
