"""How near one image is to another. Images in [-1, 1], (n h w c), the modality's window: the data range is 2."""

import numpy as np
from jaxtyping import Float

Images = Float[np.ndarray, "n h w c"]
RANGE = 2.0


def squared_error(real: Images, made: Images) -> Float[np.ndarray, "n"]:
    """Mean over the pixels of each image."""
    return np.mean((np.asarray(real, np.float64) - np.asarray(made, np.float64)) ** 2, axis=(1, 2, 3))


def decibel(errors: Float[np.ndarray, "n"]) -> float:
    """PSNR of squared errors, 10 log10(range^2 / mean); infinite where there is no error."""
    mean = float(np.mean(errors))
    return float(10 * np.log10(RANGE**2 / mean)) if mean else float("inf")


def psnr(real: Images, made: Images) -> float:
    """Peak signal-to-noise ratio in dB, of the squared error over the whole batch."""
    return decibel(squared_error(real, made))
