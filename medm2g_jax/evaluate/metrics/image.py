"""How near one image is to another. Images in [-1, 1], (n h w c), the modality's window: the data range is 2."""

import numpy as np
from jaxtyping import Float
from scipy.ndimage import uniform_filter

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


def ssim(real: Images, made: Images) -> Float[np.ndarray, "n"]:
    """Structural similarity of each image: scikit-image's, uniform windows of 7 x 7 and sample covariance, over the
    pixels whose window lies within; k1 0.01, k2 0.03."""
    x, y = np.asarray(real, np.float64), np.asarray(made, np.float64)
    size = 7
    mean = lambda z: uniform_filter(z, (1, size, size, 1))  # noqa: E731
    mx, my = mean(x), mean(y)
    sample = size**2 / (size**2 - 1)
    vx, vy, vxy = (
        sample * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    each = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    pad = size // 2
    return each[:, pad:-pad, pad:-pad].mean((1, 2, 3))
