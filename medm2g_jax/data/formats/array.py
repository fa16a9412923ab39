"""NumPy's .npy: an image (h w) as a viewer shows it, or a volume (i j k), in the modality's unit; no place, no words.

What `medm2g generate` writes beside each PNG is read back by it, exactly.
"""

import tokenize
from collections.abc import Mapping

import numpy as np
from etils import epath

from medm2g_jax.data.formats.content import check_count, opened, storable, values_of, whole, written
from medm2g_jax.data.picture import Picture
from medm2g_jax.data.volume import Volume, checked
from medm2g_jax.errors import UserError

_NOWHERE = "it does not say where it lies: taken as 1 mm voxels, to the patient's right, front and head"


def read(path: epath.PathLike, most_voxels: int) -> Picture | Volume:
    """The picture or volume in a file.

    Raises:
      UserError: the file is missing, damaged, too large, or holds no array of two or three dimensions of numbers.
    """
    name = str(path)
    with opened(path) as file:
        with whole(name, "NumPy", tokenize.TokenError):
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, by_column, dtype = header(file, max_header_size=10_000)
        if len(shape) not in (2, 3) or dtype.kind not in "biuf":
            raise UserError(f"{name}: {dtype} of shape {shape}; expected numbers (h w) or (i j k)")
        check_count(name, shape, most_voxels)
        with whole(name, "NumPy"):
            flat = values_of(name, file, int(np.prod(shape)), np.dtype(np.uint8) if dtype.kind == "b" else dtype)
    values = flat.reshape(shape, order="F" if by_column else "C")
    if len(shape) == 2:
        return Picture(values, None, path=name)
    return checked(Volume(values, np.eye(4), path=name, notes=(_NOWHERE,)))


def write(path: epath.PathLike, volume: Volume, notes: Mapping[str, str]) -> None:
    """The values (i j k) alone: HU as int16, whole numbers as they are, the rest float32."""
    del notes

    def save(part: epath.Path) -> None:
        with part.open("wb") as file:
            np.save(file, storable(volume))

    written(path, save)
