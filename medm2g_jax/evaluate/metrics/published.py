"""What public evaluators compute, each as its own code has it, whatever one thinks of it: figures beside theirs.

    syndiff        github.com/icon-lab/SynDiff test.py: each image over its own maximum
    selfrdb        github.com/icon-lab/SelfRDB utils.py compute_metrics: each image over its own mean
    synthrad2025   github.com/SynthRAD2025/evaluation image_metrics.py: volumes in HU inside a mask

Images in [-1, 1], (n h w 1), as everywhere; volumes (i j k) in HU.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped
from scipy.ndimage import binary_fill_holes, label, uniform_filter

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics.image import SIDE, WEIGHTS, Images, inner, masked_mean, similarity, to_unit, uniform

Planes = Float[np.ndarray, "n _ _ c"]
Mask = Shaped[np.ndarray, "n _ _ 1"]
CROP = (256, 152)  # of SynDiff's slices of 256 x 256, their middle


def decibels(errors: Float[np.ndarray, "n"], peaks: Float[np.ndarray, "n"] | float) -> Float[np.ndarray, "n"]:
    """PSNR of each squared error; infinite where there is none."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(np.square(peaks) / errors)


def syndiff_psnr(real: Images, made: Images) -> Float[np.ndarray, "n"]:
    """dB of each image: brought to [0, 1], over its own maximum, cropped to the middle 256 x 152 where it is larger;
    the peak is the greatest value of the made one.

    Raises:
      UserError: an image that is -1 everywhere, whose maximum is 0.
    """
    x, y = (_middle(_over(to_unit(z), np.max, f"syndiff, {which}"), CROP) for z, which in _both(real, made))
    return decibels(((x - y) ** 2).mean((1, 2, 3)), y.max((1, 2, 3)))


def selfrdb_psnr(
    real: Images, made: Images, mask: Mask | None = None, subjects: Sequence | None = None
) -> Float[np.ndarray, "m"]:
    """dB of each image, or the mean of each subject's: see `_selfrdb`; the peak is the greatest value of the real
    one."""
    x, y = _selfrdb(real, made, mask)
    return by_subject(decibels(((x - y) ** 2).mean((1, 2, 3)), x.max((1, 2, 3))), subjects)


def selfrdb_ssim(
    real: Images, made: Images, mask: Mask | None = None, subjects: Sequence | None = None
) -> Float[np.ndarray, "m"]:
    """Percent of each image, or the mean of each subject's: see `_selfrdb`; uniform windows of 7 x 7, and the range is
    the greatest value of the real image."""
    x, y = _selfrdb(real, made, mask)
    peak = x.max((1, 2, 3), keepdims=True)
    return by_subject(100 * inner(similarity(x, y, peak)[0]).mean((1, 2, 3)), subjects)


def _selfrdb(real: Images, made: Images, mask: Mask | None) -> tuple[Planes, Planes]:
    """Brought to [0, 1] and cut off there, cropped to the middle of the mask's size and multiplied by it where there is
    one, over its own mean.

    Raises:
      UserError: an image of which nothing is left, whose mean is 0; a mask that is no even part of the images.
    """
    if mask is not None and any(m % 2 or m > side for m, side in zip(mask.shape[1:3], real.shape[1:3], strict=True)):
        raise UserError(f"selfrdb: images of {real.shape[1:3]}, masks of {mask.shape[1:3]}; expected even sides within")
    out = []
    for images, which in _both(real, made):
        x = np.clip(to_unit(images), 0, 1)
        x = x if mask is None else _cropped(x, mask.shape[1:3]) * mask
        out.append(_over(x, np.mean, f"selfrdb, {which}"))
    return out[0], out[1]


def by_subject(scores: Float[np.ndarray, "n"], subjects: Sequence | None) -> Float[np.ndarray, "m"]:
    """The mean of each subject's slices; the slices where no subjects are given."""
    if subjects is None:
        return scores
    _, of, counts = np.unique(np.asarray(subjects), return_inverse=True, return_counts=True)
    return np.bincount(of, weights=scores) / counts


def _both(real: Images, made: Images) -> tuple[tuple[Images, str], tuple[Images, str]]:
    return (real, "real"), (made, "made")


def _over(x: Planes, of: object, what: str) -> Planes:
    """Each image over its own maximum, or mean."""
    by = of(x, axis=(1, 2, 3), keepdims=True)
    if not by.all():
        raise UserError(
            f"{what} image {int(np.argmin(by))} is at the lower end of its window everywhere: nothing to divide by; "
            "leave it out"
        )
    return x / by


def _middle(x: Planes, size: tuple[int, int]) -> Planes:
    """As torchvision's CenterCrop, of an image that is larger."""
    (h, w), (rows, columns) = x.shape[1:3], size
    top, left = max(round((h - rows) / 2), 0), max(round((w - columns) / 2), 0)
    return x[:, top : top + rows, left : left + columns]


def _cropped(x: Planes, size: Sequence[int]) -> Planes:
    """Half of the size on either side of the middle."""
    (h, w), (rows, columns) = x.shape[1:3], size
    top, left = h // 2 - rows // 2, w // 2 - columns // 2
    return x[:, top : top + 2 * (rows // 2), left : left + 2 * (columns // 2)]


# --- SynthRAD2025 ----------------------------------------------------------------------------------------------------

LOW, HIGH = -1024.0, 3071.0  # HU
LEAST = 97  # voxels along each axis for five scales
SKIN = -500.0  # HU, between air and what is no air

Volumes = Sequence[Shaped[np.ndarray, "i j k"]]


def synthrad_mae(real: Volumes, made: Volumes, masks: Volumes) -> Float[np.ndarray, "n"]:
    """HU, of each volume inside its mask, without cutting off.

    Raises:
      UserError: a mask that holds nothing.
    """
    return _each(lambda x, y, m: _inside(np.abs(x - y), m), real, made, masks)


def synthrad_psnr(real: Volumes, made: Volumes, masks: Volumes) -> Float[np.ndarray, "n"]:
    """dB, of each volume inside its mask, cut off at -1024 and 3071 HU; the peak is 4095 HU.

    Raises:
      UserError: a mask that holds nothing.
    """
    error = lambda x, y, m: _inside((np.clip(x, LOW, HIGH) - np.clip(y, LOW, HIGH)) ** 2, m)  # noqa: E731
    return decibels(_each(error, real, made, masks), HIGH - LOW)


def synthrad_ms_ssim(real: Volumes, made: Volumes, masks: Volumes) -> Float[np.ndarray, "n"]:
    """Multi-scale SSIM of each volume, five scales: values cut off at -1024 and 3071 HU, -1024 outside the mask, edges
    repeated up to 97 voxels; uniform windows of 7 x 7 x 7.

    Of each scale the SSIM of a voxel, 0 where it is negative, is raised to the scale's weight, with its luminance, and
    averaged over the mask: so the challenge has it, while Wang et al. raise the average, and take the luminance of the
    last scale alone.

    Raises:
      UserError: a mask that holds nothing, or nothing at one of the scales.
    """
    return _each(_synthrad_ms_ssim, real, made, masks)


def _synthrad_ms_ssim(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> float:
    x, y = (np.where(mask, np.clip(z, LOW, HIGH), LOW) - LOW for z in (x, y))
    short = [max(LEAST - side, 0) for side in x.shape]
    x, y, mask = (np.pad(z, [(n // 2, n - n // 2) for n in short], mode="edge") for z in (x, y, mask))
    out, pad = 1.0, (slice(SIDE // 2, -(SIDE // 2)),) * 3
    for weight in WEIGHTS:
        each, _ = similarity(x, y, HIGH - LOW, uniform((0, 1, 2), 3), sample=SIDE**3 / (SIDE**3 - 1))
        out *= min(_inside(np.maximum(each[pad], 0) ** weight, mask[pad]), 1.0)
        # Means of the 2 x 2 x 2 voxels that end at every second one, zeros before the first.
        x, y = (uniform_filter(z, 2, mode="constant")[::2, ::2, ::2] for z in (x, y))
        mask = mask[::2, ::2, ::2]
    return out


def _inside(each: np.ndarray, mask: np.ndarray) -> float:
    return float(masked_mean(each[None], mask[None], "synthrad2025")[0])


def body(volume: Shaped[np.ndarray, "i j k"]) -> Shaped[np.ndarray, "i j k"]:
    """Where the body lies in each slice volume[i] of a CT in HU, for volumes that came without the challenge's mask:
    the largest region above -500 HU, its holes filled."""
    out = np.zeros(volume.shape, bool)
    for mask, one in zip(out, volume, strict=True):
        regions, count = label(one > SKIN)
        if count:
            mask[:] = binary_fill_holes(regions == 1 + np.bincount(regions.ravel())[1:].argmax())
    return out


def _each(score, real: Volumes, made: Volumes, masks: Volumes) -> Float[np.ndarray, "n"]:
    rows = zip(real, made, masks, strict=True)
    return np.asarray([score(np.asarray(x, np.float64), np.asarray(y, np.float64), m != 0) for x, y, m in rows])
