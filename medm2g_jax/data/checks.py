"""What is looked at before an image goes into a training set: faults that people find after weeks of training.

Each check gives what is wrong in words that can be counted, or "" where nothing is. The thresholds are for what no
scanner makes: doubtful images pass.
"""

import hashlib

import numpy as np
from jaxtyping import Float, Num
from PIL import Image
from scipy import ndimage

from medm2g_jax.data.volume import Volume

_BINS = 32  # of a joint histogram
_PIXELS = 2**18  # of a pair that are looked at
FLIPPED = 1.5  # times as much in common after a left-right flip
RELATED = 0.02  # nats: two images of one head have 0.3 and more in common, of noise 0.005


def blank(pixels: Num[np.ndarray, "h w"]) -> str:
    """Is there nothing to see?"""
    low, high = float(pixels.min()), float(pixels.max())
    if low == high:
        return "blank (one value everywhere)"
    if (pixels != pixels.flat[0]).mean() < 1e-3 and (pixels != low).mean() < 1e-3:
        return "blank (fewer than one pixel in a thousand differs)"
    return ""


def hounsfield(volume: Volume) -> str:
    """Is a CT in HU as a scanner gives it? Air is near -1000 HU, tissue between -200 and 200; what was written with its
    offset of 1024 twice, or without it, is neither."""
    values = volume.values.reshape(-1)[:: max(1, volume.values.size // 2**20)].astype(np.float32)
    # Nothing is measured near -2000 HU; what fills an image up around a scanner's circle is one value.
    if _share(values[values != values.min()], -2300, -1850) > 0.05 and _share(values, -1224, -824) > 0.1:
        return "HU offset applied twice (tissue near -1000 HU)"
    tissue = _share(values, 824, 1224)
    if float(values.min()) >= 0 and float(values.max()) > 1100 and tissue > max(0.05, _share(values, 200, 800)):
        return "HU offset missing (tissue near 1000, no value below 0)"
    if float(values.max()) < -500 and _share(values, -1200, -850):
        return "no tissue (no value above -500 HU)"
    if float(values.min()) >= 0:
        return "not in HU (no value below 0; --range ct=LOW:HIGH says which values count as -1 and +1)"
    return ""


def _share(values: np.ndarray, low: int, high: int) -> float:
    return float(((values >= low) & (values <= high)).mean()) if values.size else 0.0


def mutual_information(a: Num[np.ndarray, "*shape"], b: Num[np.ndarray, "*shape"]) -> float:
    """What two images on one grid tell of each other, nats: of a joint histogram of 32 x 32 levels between their 1st
    and 99th percentiles (Wells et al. 1996), less the bias that its free cells have on so many pixels."""
    flat = [x.reshape(-1)[:: max(1, x.size // _PIXELS)].astype(np.float32) for x in (a, b)]
    levels = []
    for x in flat:
        low, high = np.percentile(x, (1, 99))
        levels.append(np.clip((x - low) / max(high - low, 1e-6) * _BINS, 0, _BINS - 1).astype(int))
    joint = np.bincount(levels[0] * _BINS + levels[1], minlength=_BINS**2).reshape(_BINS, _BINS) / len(levels[0])
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    rows, columns = int((joint.sum(1) > 0).sum()), int((joint.sum(0) > 0).sum())
    bias = (rows - 1) * (columns - 1) / (2 * len(levels[0]))
    return max(0.0, float((joint[seen] * np.log(joint[seen] / apart[seen])).sum()) - bias)


def edge_overlap(a: Num[np.ndarray, "*shape"], b: Num[np.ndarray, "*shape"]) -> float:
    """How much of the strongest edges (a twentieth of the voxels) of each of two images on one grid has one of the
    other's within a voxel, from 0 to 1: where they do not lie on each other about a third, by chance."""
    edges = [_edges(x) for x in (a, b)]
    if not all(x.any() for x in edges):
        return 0.0
    near = [ndimage.binary_dilation(x, iterations=1) for x in edges]
    return float((near[1][edges[0]].mean() + near[0][edges[1]].mean()) / 2)


def _edges(values: np.ndarray) -> np.ndarray:
    step = max(1, values.shape[-1] // 48) if values.size > 2**22 else 1
    values = np.clip(values, *np.percentile(values.reshape(-1)[:: max(1, values.size // _PIXELS)], (0.5, 99.5)))
    values = ndimage.gaussian_filter(values[..., ::step].astype(np.float32), 1)
    steep = sum(np.gradient(values, axis=n) ** 2 for n in range(values.ndim) if values.shape[n] > 1)
    return steep > max(float(np.quantile(steep, 0.95)), 1e-12)


def pair(a: Num[np.ndarray, "n h w"], b: Num[np.ndarray, "n h w"], plane: str = "axial") -> str:
    """Do slices of two images that are said to lie on each other do so? Says where they have nothing in common, and
    where they have more in common after left and right of one are exchanged."""
    straight = mutual_information(a, b)
    flipped = mutual_information(a, b[::-1] if plane == "sagittal" else b[..., ::-1])
    if flipped > FLIPPED * straight and flipped > RELATED:
        return "a pair whose left and right are exchanged between its images"
    if straight < RELATED:
        return "a pair that has nothing in common (mutual information)"
    return ""


def fingerprint(pixels: Num[np.ndarray, "h w"]) -> str:
    """Of an image's exact pixels."""
    head = f"{pixels.dtype.str} {pixels.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:24]


def likeness(pixels: Num[np.ndarray, "h w"]) -> str:
    """A fingerprint that survives resizing and another compression: whether each of 16 x 16 patches is brighter than
    the next to its right ("difference hash")."""
    values = pixels.astype(np.float32)
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    small: Float[np.ndarray, "16 17"] = np.asarray(Image.fromarray(values).resize((17, 16), Image.Resampling.BOX))
    return np.packbits(small[:, 1:] > small[:, :-1] + 1e-3).tobytes().hex()
