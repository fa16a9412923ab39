"""NIQE (Mittal et al. 2013): how far the statistics of an image's blocks are from those of images that are taken for
good, without looking at any true one. Less is better, of the same good images alone.

    published(FILE)         125 photographs, as the authors published them: not validated on CT, MRI or X-rays
    fitted(real images)     real images of the same kind, which makes another number: name it so

Of blocks of 96 x 96 pixels, so images that hold two of them or more. What is measured of a block, at full and at half
size: the shape and width of its pixels over the mean and deviation around each, and of products of neighbours.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.ndimage import convolve1d, correlate1d
from scipy.special import gamma

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics.image import Images

BLOCK = 96
LEVELS = 255.0
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
WINDOW = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
# Cubic convolution stretched to twice its width, as MATLAB's imresize halves an image: at 0.5, 1.5, 2.5, 3.5 pixels.
HALF = np.asarray([-0.01171875, -0.03515625, 0.11328125, 0.43359375])


class Pristine(NamedTuple):
    """Mean and covariance of the 36 features of blocks of good images."""

    mean: Float[np.ndarray, "36"]
    covariance: Float[np.ndarray, "36 36"]


def published(file: str) -> Pristine:
    """niqe_pris_params.npz of BasicSR (Apache-2.0), which has the authors' numbers.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        with np.load(Path(file)) as held:
            mean, covariance = np.ravel(held["mu_pris_param"]), held["cov_pris_param"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"NIQE: {file}: {getattr(error, 'strerror', '') or 'something else'}; expected niqe_pris_params.npz, as "
            "pip download --no-deps basicsr==1.4.2 brings it in basicsr/metrics"
        ) from None
    if (mean.shape, covariance.shape) != ((36,), (36, 36)):
        raise UserError(f"NIQE: {file}: {mean.shape} and {covariance.shape}; expected (36,) and (36, 36)")
    return Pristine(mean, covariance)


def fitted(images: Images) -> Pristine:
    """Of real images (n h w 1) in [-1, 1]: all of their blocks.

    Raises:
      UserError: fewer blocks than features, or images smaller than two blocks.
    """
    rows = np.concatenate([_features(one) for one in images])
    rows = rows[np.isfinite(rows).all(1)]
    if len(rows) <= rows.shape[1]:
        raise UserError(f"NIQE of {len(rows)} blocks: expected more than {rows.shape[1]} to know their covariance by")
    return Pristine(rows.mean(0), np.cov(rows, rowvar=False))


def niqe(real: Images, made: Images, pristine: Pristine) -> Float[np.ndarray, "n"]:
    """NIQE of each made image; `real` is not looked at.

    Raises:
      UserError: images smaller than two blocks.
    """
    out = []
    for one in made:
        rows = _features(one)
        mean, rows = np.nanmean(rows, 0), rows[np.isfinite(rows).all(1)]
        away = pristine.mean - mean
        out.append(np.sqrt(away @ np.linalg.pinv((pristine.covariance + np.cov(rows, rowvar=False)) / 2) @ away))
    return np.asarray(out, np.float64)


def _features(image: Float[np.ndarray, "h w 1"]) -> Float[np.ndarray, "blocks 36"]:
    down, right = (side // BLOCK for side in image.shape[:2])
    if down * right < 2:
        raise UserError(f"NIQE of {image.shape[0]} x {image.shape[1]} pixels: expected two blocks of {BLOCK} x {BLOCK}")
    x = np.round((np.asarray(image[..., 0], np.float64) + 1) * LEVELS / 2)[: down * BLOCK, : right * BLOCK]
    scales = []
    for side in (BLOCK, BLOCK // 2):
        mean = _smooth(x)
        even = (x - mean) / (np.sqrt(np.abs(_smooth(x * x) - mean**2)) + 1)
        blocks = even.reshape(down, side, right, side).swapaxes(1, 2).reshape(-1, side, side)
        scales.append([_of_block(block) for block in blocks])
        x = _halved(x)
    return np.concatenate(scales, axis=1)


def _smooth(x: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        x = convolve1d(x, WINDOW / WINDOW.sum(), axis=axis, mode="nearest")
    return x


def _halved(x: np.ndarray) -> np.ndarray:
    kernel = np.concatenate([HALF, HALF[::-1]])
    for axis in (0, 1):
        x = correlate1d(x, kernel, axis=axis, mode="reflect", origin=-1).take(range(0, x.shape[axis], 2), axis)
    return x


def _of_block(block: np.ndarray) -> list[float]:
    shape, left, right = asymmetric(block)
    out = [shape, (left + right) / 2]
    for shift in NEIGHBOURS:
        shape, left, right = asymmetric(block * np.roll(block, shift, (0, 1)))
        out += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return out


_SHAPES = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))


def asymmetric(x: np.ndarray) -> tuple[float, float, float]:
    """(shape, left and right width) of the generalised normal distribution, unlike on both sides of 0, that has the
    moments of x (Lasmar et al. 2009)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        left, right = (np.sqrt(np.square(side).mean()) if side.size else np.nan for side in (x[x < 0], x[x > 0]))
        skew = left / right
        ratio = np.abs(x).mean() ** 2 / np.square(x).mean() * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    if not np.isfinite(ratio):
        return np.nan, np.nan, np.nan
    shape = float(_SHAPES[np.argmin((_RATIOS - ratio) ** 2)])
    width = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, float(left * width), float(right * width)
