"""What a reader gives, whatever the format: a picture; and the one way from a picture to a network's input.

A format knows files and no modality, a modality knows its unit and no files. A file that carries physical values (HU)
gives them as they are, `span` None, and the modality's window is applied to them. A file that somebody has windowed
already (every PNG and JPEG) says in `span` which of its values count as -1 and +1.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from medm2g_jax.data.images import square
from medm2g_jax.errors import UserError
from medm2g_jax.modality import Modality

Span = tuple[int | float, int | float]
MOST_PIXELS = 2**26  # read of one image where nothing else is said: 8192 x 8192, more than any film has


@dataclass(frozen=True, eq=False)
class Picture:
    """One grey image.

    Attributes:
      pixels: as stored; row 0 is the top, column 0 the left of what a viewer shows.
      span: the stored values that count as -1 and +1, of a picture that is windowed already; None: pixels are in the
        modality's unit.
      spacing: mm from one row to the next and from one column to the next; None where unknown.
      orientation: where rows and columns go, each one of L R A P H F (patient's left, right, front, back, head, feet):
        "PL" of an axial slice as radiologists see it; "" where unknown.
      path: the file; "" of an array.
      modality: DICOM's code for what the file says it is (CT, MR, DX); "" where it says nothing.
      notes: what its user should know, in words.
    """

    pixels: Num[np.ndarray, "h w"]
    span: Span | None
    spacing: tuple[float, float] | None = None
    orientation: str = ""
    path: str = ""
    modality: str = ""
    notes: tuple[str, ...] = ()


def normalised(picture: Picture, modality: Modality) -> Float[np.ndarray, "h w"]:
    """The picture in [-1, 1].

    Raises:
      UserError: it has no pixels, or values that are no numbers.
    """
    pixels = np.asarray(picture.pixels, np.float32)
    if not pixels.size or not np.isfinite(pixels).all():
        found = "NaN or infinite values" if pixels.size else f"shape {pixels.shape}"
        raise UserError(f"{picture.path or 'the image'}: expected an image of finite values, found {found}")
    if picture.span is None:
        return modality.normalise(pixels)
    low, high = picture.span
    return np.clip((pixels - low) / ((high - low) / 2) - 1, -1, 1)


def network_input(picture: Picture, modality: Modality, size: int) -> Float[np.ndarray, "size size 1"]:
    """What the networks read of a picture: windowed, padded to a square, resized to `size`; float32 in [-1, 1].

    Raises:
      UserError: it has no pixels, or values that are no numbers.
    """
    return square(normalised(picture, modality), size)[..., None]
