"""MRI as from a faster acquisition: k-space undersampled, the rest left at zero, the magnitude taken.

Lines of one direction (columns of the image's k-space) are kept, one in `factor` of them:

    block     the lowest frequencies alone: a low-resolution image
    density   a third of them the lowest, the others drawn with a density that falls with the square of the distance
              (Lustig et al. 2007)
"""

import numpy as np
from jaxtyping import Bool, Float

LINES = ("block", "density")


def mask(side: int, factor: int, lines: str, rng: np.random.Generator) -> Bool[np.ndarray, "side"]:
    """Which lines of k-space are kept, lowest frequency in the middle; round(side / factor) of them, at least two."""
    count = max(2, round(side / factor))
    distance = np.abs(np.arange(side) - side // 2)
    lowest = count if lines == "block" else max(2, count // 3)
    kept = np.zeros(side, bool)
    kept[np.argsort(distance, kind="stable")[:lowest]] = True
    if lowest < count:
        odds = np.where(kept, 0.0, (1 - distance / distance.max() + 1e-3) ** 2)
        kept[rng.choice(side, count - lowest, replace=False, p=odds / odds.sum())] = True
    return kept


def undersampled(
    x: Float[np.ndarray, "h w 1"], factor: int, lines: str, rng: np.random.Generator
) -> Float[np.ndarray, "h w 1"]:
    """An image in [-1, 1] as it comes from one line in `factor` of its k-space; factor 1 gives it back.

    lines: a name in LINES.
    """
    space = np.fft.fftshift(np.fft.fft2((np.asarray(x[..., 0], np.float64) + 1) / 2))
    space *= mask(x.shape[1], factor, lines, rng)
    image = np.abs(np.fft.ifft2(np.fft.ifftshift(space)))
    return np.clip(2 * image - 1, -1, 1).astype(np.float32)[..., None]
