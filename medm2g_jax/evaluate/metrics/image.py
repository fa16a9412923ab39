"""How near one image is to another. Images in [-1, 1], (n h w c), the modality's window: the data range is 2."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.ndimage import gaussian_filter, uniform_filter

from medm2g_jax.errors import UserError

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


def absolute_error(real: Images, made: Images) -> Float[np.ndarray, "n"]:
    """Mean over the pixels of each image, as a share of the data range."""
    return np.abs(np.asarray(real, np.float64) - np.asarray(made, np.float64)).mean((1, 2, 3)) / RANGE


def ssim(real: Images, made: Images) -> Float[np.ndarray, "n"]:
    """Structural similarity of each image: scikit-image's, uniform windows of 7 x 7 and sample covariance, over the
    pixels whose window lies within; k1 0.01, k2 0.03."""
    return inner(similarity(real, made, RANGE)[0]).mean((1, 2, 3))


def to_unit(images: Images) -> Float[np.ndarray, "n h w c"]:
    """Images of [-1, 1] in [0, 1], where the SSIM of the literature is measured: its first factor depends on where 0
    is."""
    return (np.asarray(images, np.float64) + 1) / 2


def unit_ssim(real: Images, made: Images) -> Float[np.ndarray, "n"]:
    """`ssim` of images in [0, 1], data range 1."""
    return inner(similarity(to_unit(real), to_unit(made), 1.0)[0]).mean((1, 2, 3))


SIDE = 7  # of a uniform window
Mean = Callable[[np.ndarray], np.ndarray]  # over the window of each pixel


def uniform(axes: Sequence[int], ndim: int) -> Mean:
    """Means in uniform windows of 7 along `axes`."""
    size = [SIDE if axis in axes else 1 for axis in range(ndim)]
    return lambda z: uniform_filter(z, size)


def similarity(
    real: Shaped[np.ndarray, "..."],
    made: Shaped[np.ndarray, "..."],
    data_range: Any,
    mean: Mean | None = None,
    sample: float = SIDE**2 / (SIDE**2 - 1),
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """SSIM at every pixel, and its second factor alone, contrast and structure (Wang et al. 2004); k1 0.01, k2 0.03.

    Args:
      data_range: one number, or one an image that broadcasts over it.
      mean: of a window, by default 7 x 7 along axes 1 and 2.
      sample: what the variance of a window is multiplied by: n / (n - 1) of n pixels is that of a sample.
    """
    x, y = np.asarray(real, np.float64), np.asarray(made, np.float64)
    mean = mean or uniform((1, 2), x.ndim)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = (
        sample * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    both = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return both, (2 * vxy + c2) / (vx + vy + c2)


def inner(each: Shaped[np.ndarray, "n h w c"], pad: int = SIDE // 2) -> Shaped[np.ndarray, "n _ _ c"]:
    """The pixels whose window lies within the image.

    Raises:
      UserError: an image smaller than a window.
    """
    if min(each.shape[1:3]) <= 2 * pad:
        size = f"{2 * pad + 1} x {2 * pad + 1}"
        raise UserError(f"SSIM: images of {each.shape[1]} x {each.shape[2]} are smaller than its window of {size}")
    return each[:, pad:-pad, pad:-pad]


WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first (Wang et al. 2003)
GAUSSIAN = 11  # pixels of its window, sigma 1.5


def scales_in(height: int, width: int) -> int:
    """How many scales of `ms_ssim` images of this size have: at the coarsest a window still fits; 0: none."""
    return next((k for k in range(5, 0, -1) if min(height, width) > (GAUSSIAN - 1) * 2 ** (k - 1)), 0)


def ms_ssim(real: Images, made: Images, scales: int = 5) -> Float[np.ndarray, "n"]:
    """Multi-scale SSIM of each image in [0, 1] (Wang et al. 2003): Gaussian windows of 11 x 11, sigma 1.5, over the
    pixels whose window lies within; from scale to scale means of 2 x 2 pixels. Of fewer scales than 5, the finest ones,
    their weights brought to a sum of 1; those of all five are as published, of sum 1.0001.

    Raises:
      UserError: an image too small for so many scales.
    """
    fit = scales_in(*real.shape[1:3])
    if scales > fit:
        raise UserError(
            f"MS-SSIM of {scales} scales: an image of {real.shape[1]} x {real.shape[2]} has {fit or 'none'}: every "
            f"scale halves it, and the last must hold a window of {GAUSSIAN} x {GAUSSIAN}"
        )
    x, y = to_unit(real), to_unit(made)
    gaussian = lambda z: gaussian_filter(z, (0, 1.5, 1.5, 0), truncate=3.5)  # noqa: E731
    weights = np.asarray(WEIGHTS[:scales]) / (1 if scales == len(WEIGHTS) else sum(WEIGHTS[:scales]))
    out: Any = 1.0
    for scale, weight in enumerate(weights, start=1):
        whole, structure = (inner(z, GAUSSIAN // 2).mean((1, 2)) for z in similarity(x, y, 1.0, gaussian, sample=1.0))
        out = out * np.maximum(whole if scale == scales else structure, 0) ** weight
        x, y = halved(x), halved(y)
    return out.mean(-1)


def halved(x: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n _ _ c"]:
    """Means of 2 x 2 pixels; a side that is odd has a zero before its first."""
    rows, columns = (1 - side % 2 for side in x.shape[1:3])
    return uniform_filter(x, (1, 2, 2, 1), mode="constant")[:, rows::2, columns::2]


def diversity(draws: Float[np.ndarray, "k n h w c"], scales: int = 5) -> Float[np.ndarray, "n"]:
    """Of each row, the mean `ms_ssim` over all pairs of its k draws: less is more diverse. Real images beside it say
    how diverse the truth is.

    Raises:
      UserError: a single draw; images too small.
    """
    pairs = list(itertools.combinations(range(len(draws)), 2))
    if not pairs:
        raise UserError("MS-SSIM among draws: one draw has no other to be compared with; expected two or more")
    return np.mean([ms_ssim(draws[a], draws[b], scales) for a, b in pairs], axis=0)


# --- inside a mask: the body, the brain, a lesion --------------------------------------------------------------------

Masks = Shaped[np.ndarray, "n h w c"]  # what is not 0 counts


def masked_mean(each: Shaped[np.ndarray, "n ..."], mask: Shaped[np.ndarray, "n ..."], what: str) -> np.ndarray:
    """Mean of each row over what its mask holds.

    Raises:
      UserError: a mask that holds nothing.
    """
    inside = mask != 0
    count = inside.reshape(len(inside), -1).sum(1)
    if not count.all():
        raise UserError(f"{what}: the mask of row {int(np.argmin(count))} holds no pixel; leave the row out")
    return np.where(inside, each, 0).reshape(len(each), -1).sum(1) / count


def masked_squared_error(real: Images, made: Images, mask: Masks) -> Float[np.ndarray, "n"]:
    """`squared_error` of the pixels in the mask."""
    return masked_mean((np.asarray(real, np.float64) - np.asarray(made, np.float64)) ** 2, mask, "PSNR")


def masked_absolute_error(real: Images, made: Images, mask: Masks) -> Float[np.ndarray, "n"]:
    """`absolute_error` of the pixels in the mask; of a lesion's mask, how wrong the lesion is."""
    return masked_mean(np.abs(np.asarray(real, np.float64) - np.asarray(made, np.float64)), mask, "MAE") / RANGE


def masked_bias(real: Images, made: Images, mask: Masks) -> Float[np.ndarray, "n"]:
    """Mean of made - real in the mask, as a share of the data range: below 0 the lesion is too dark."""
    return masked_mean(np.asarray(made, np.float64) - np.asarray(real, np.float64), mask, "bias") / RANGE


def masked_ssim(real: Images, made: Images, mask: Masks) -> Float[np.ndarray, "n"]:
    """`unit_ssim` over the pixels in the mask whose window lies within the image; windows see what is around them."""
    return masked_mean(inner(similarity(to_unit(real), to_unit(made), 1.0)[0]), inner(mask), "SSIM")


def perceptual(
    real: Images, made: Images, maps: Callable[[Images], Sequence[Images]], rows: int = 16
) -> Float[np.ndarray, "n"]:
    """How far two images are apart in the maps of a network, after LPIPS (Zhang et al. 2018) without its learnt
    weights: at each pixel of each map the channels as a unit vector, the squared distance of the two, averaged over
    pixels, summed over maps.

    Args:
      maps: images -> maps (n h w c), as `extractors.load(NAME).maps`; asked for so many rows at a time.
    """

    def unit(z: np.ndarray) -> np.ndarray:
        z = np.asarray(z, np.float64)
        return z / (np.sqrt((z**2).sum(-1, keepdims=True)) + 1e-10)

    out = []
    for at in range(0, len(real), rows):
        pairs = zip(*(maps(x[at : at + rows]) for x in (real, made)), strict=True)
        out.append(sum(((unit(a) - unit(b)) ** 2).sum(-1).mean((1, 2)) for a, b in pairs))
    return np.concatenate(out)
