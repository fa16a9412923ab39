"""How near one region is to another: of a lesion or an organ that somebody, or a network, has outlined in both."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.ndimage import binary_erosion, distance_transform_edt

from medm2g_jax.errors import UserError

Regions = Shaped[np.ndarray, "n *space"]  # (n h w) or (n i j k); what is not 0 is in the region


def dice(real: Regions, made: Regions) -> Float[np.ndarray, "n"]:
    """2 |A and B| / (|A| + |B|) of each row; 1 where both are empty, 0 where one is."""
    a, b = (np.asarray(z).reshape(len(z), -1) != 0 for z in (real, made))
    both, sizes = (a & b).sum(1), a.sum(1) + b.sum(1)
    return np.where(sizes, 2 * both / np.maximum(sizes, 1), 1.0)


def hd95(real: Regions, made: Regions, spacing: Sequence[float] | None) -> Float[np.ndarray, "n"]:
    """Hausdorff distance of each row, its 95th percentile: of the distances of one boundary's pixels to the other
    boundary the 95th percentile, both ways, the greater. The boundary is of the pixels with a side outside the region;
    the border of the image is outside.

    Args:
      spacing: of pixels along each axis, in the unit of the result: mm; None for pixels.

    Raises:
      UserError: a region that is empty: nothing is far from it, or near.
    """
    out = []
    for row, pair in enumerate(zip(np.asarray(real) != 0, np.asarray(made) != 0, strict=True)):
        for which, region in zip(("real", "made"), pair, strict=True):
            if not region.any():
                raise UserError(
                    f"HD95: the {which} region of row {row} is empty, which no distance tells; leave such rows out, "
                    "and say how many"
                )
        a, b = map(boundary, pair)
        far = [np.percentile(_distance(y, spacing)[x], 95) for x, y in ((a, b), (b, a))]
        out.append(max(far))
    return np.asarray(out, np.float64)


def boundary(region: Bool[np.ndarray, "*space"]) -> Bool[np.ndarray, "*space"]:
    """Its pixels that have a side outside."""
    return region & ~binary_erosion(region)


def _distance(of: Bool[np.ndarray, "*space"], spacing: Sequence[float] | None) -> Float[np.ndarray, "*space"]:
    """Of each pixel to the nearest one in a region."""
    return distance_transform_edt(~of, sampling=spacing)
