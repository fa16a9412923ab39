"""The square: pad, resize, undo (the paper does not say how its images became square).

Images are float32 in [-1, 1], -1 the lower end of the modality's window. An image is padded to a square with -1,
centred, then resized with antialiasing. The transform depends on height and width alone, so that images on one grid
(the CT and MRI of a slice) stay aligned, and `undo` needs only the old shape.
"""

import numpy as np
from jaxtyping import Float
from PIL import Image


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
