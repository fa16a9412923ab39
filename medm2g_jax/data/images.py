"""Image files and the square: read, pad, resize, undo (the paper does not say how its images became square).

Images are float32 in [-1, 1], -1 the lower end of the modality's window. An image is padded to a square with -1,
centred, then resized with antialiasing. The transform depends on height and width alone, so that images on one grid
(the CT and MRI of a slice) stay aligned, and `undo` needs only the old shape.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from medm2g_jax.errors import UserError


def read(path: str | Path) -> Float[np.ndarray, "h w"]:
    """A PNG or JPEG as grey in [-1, 1]: the file's whole range (8 or 16 bit) is taken as the window.

    Raises:
      UserError: the file is missing, truncated, or neither PNG nor JPEG.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as file:
            deep = file.mode.startswith("I")  # 16-bit grey; convert("L") would clip it at 255
            pixels = np.asarray(file if deep else file.convert("L"), np.float32)
    except (OSError, SyntaxError, ValueError) as error:  # PIL has all three for broken files
        raise UserError(f"{path}: not a whole PNG or JPEG file ({type(error).__name__}: {error})") from error
    return pixels / (32767.5 if deep else 127.5) - 1


def square(image: Float[np.ndarray, "h w"], size: int) -> Float[np.ndarray, "size size"]:
    """Pad to a square with -1 and resize to `size`, antialiased (bicubic; overshoot is cut off)."""
    height, width = image.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.full((side, side), -1, np.float32)
    padded[top : top + height, left : left + width] = image
    return _resize(padded, size)


def undo(image: Float[np.ndarray, "size size"], shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Bring a square image back onto the (height, width) grid that `square` was given."""
    height, width = shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return _resize(image, side)[top : top + height, left : left + width]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape == (size, size):
        return image
    resized = Image.fromarray(np.asarray(image, np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized), -1, 1)
