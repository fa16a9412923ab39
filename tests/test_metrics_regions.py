"""Metrics of regions: beside scipy's and scikit-image's own, or closed forms."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial import distance
from skimage.segmentation import find_boundaries

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics import METRICS, regions


def pair(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Blobs that do not touch the border, and others like them."""
    rng = np.random.default_rng(seed)
    smooth = lambda: gaussian_filter(rng.normal(size=shape), (0, *(2,) * (len(shape) - 1)))  # noqa: E731
    one = smooth()
    inside = np.zeros(shape, bool)
    inside[(slice(None), *(slice(2, -2),) * (len(shape) - 1))] = True
    return (one > 0) & inside, (one + 0.4 * smooth() > 0) & inside


@pytest.mark.parametrize(("shape", "spacing"), [((4, 30, 26), None), ((2, 14, 12, 16), (3.0, 1.0, 0.5))])
def test_beside_scipy_and_scikit_image(shape, spacing):
    real, made = pair(shape, 0)
    expected = [1 - distance.dice(a.ravel(), b.ravel()) for a, b in zip(real, made, strict=True)]
    np.testing.assert_allclose(regions.dice(real, made), expected, atol=1e-9)
    expected = []
    for one in zip(real, made, strict=True):
        edges = [np.argwhere(find_boundaries(z, connectivity=1, mode="inner")) * (spacing or 1) for z in one]
        apart = distance.cdist(*edges)
        expected.append(max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95)))
    np.testing.assert_allclose(regions.hd95(real, made, spacing), expected, atol=1e-9)


def test_a_square_that_has_moved():
    a = np.zeros((1, 20, 20), np.uint8)
    a[0, 5:15, 5:15] = 3
    b = np.roll(a, 4, axis=2)
    assert METRICS["Dice"](a, b) == pytest.approx(0.6)
    # Of 36 pixels of a boundary the 10 of one side are 4 away, more than a twentieth.
    assert METRICS["HD95 px"](a, b) == 4 and METRICS["HD95 mm"](a, b, (1.0, 2.5)) == 10
    assert METRICS["HD95 px"](a, a) == 0
    # One pixel far away is less than a twentieth, and its Hausdorff distance is not seen.
    far = a.copy()
    far[0, 0, 19] = 1
    assert METRICS["HD95 px"](a, far) == 0
    # A region up to the border has a boundary there.
    np.testing.assert_array_equal(regions.boundary(np.ones((3, 3), bool)).sum(), 8)


def test_empty_regions():
    none, one = np.zeros((1, 4, 4)), np.ones((1, 4, 4))
    np.testing.assert_array_equal(
        regions.dice(np.concatenate([none, none, one]), np.concatenate([none, one, one])), [1, 0, 1]
    )
    figure = METRICS["Dice"].figure(
        "T1 -> CT", "Dice, liver", np.concatenate([one, none]), np.concatenate([one, one]), seed=0
    )
    assert (figure.value, figure.n, figure.protocol) == (0.5, 2, "regions")
    with pytest.raises(UserError, match="HD95: the made region of row 1 is empty"):
        regions.hd95(np.concatenate([one, one]), np.concatenate([one, none]), None)
