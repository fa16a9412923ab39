"""Metrics of sets of features: beside scipy, torch, values of the reference libraries, or closed forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics import METRICS, distribution, feature_figures
from medm2g_jax.evaluate.metrics.intervals import wilson


def sets(seed: int, n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 1.2 * rng.normal(size=(m, d)) + 0.3


def test_fid_is_scipy_s_root():
    real, made = sets(0, 300, 200, 12)
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (real, made))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert METRICS["FID"](real, made) == pytest.approx(expected, abs=1e-8)
    assert distribution.fid(real, real) == pytest.approx(0, abs=1e-8)
    # A shift of all by 1 in each of 12 dimensions changes the means alone.
    assert distribution.fid(real, real + 1) == pytest.approx(12, abs=1e-8)
    assert distribution.fid(real.astype(np.float32), made) == pytest.approx(expected, abs=1e-4)


def test_moments_batch_by_batch_without_padding():
    real, made = sets(1, 101, 90, 5)
    moments = distribution.Moments()
    for batch in np.split(1e3 + real, [40, 40, 41]):
        padded = np.concatenate([batch, np.full((3, 5), np.nan)])
        moments.add(padded, np.arange(len(padded)) < len(batch))
    np.testing.assert_allclose(moments.covariance, np.cov(real.T), atol=1e-9)
    assert len(moments) == 101
    whole = distribution.fid(real, made)
    assert distribution.fid(moments, distribution.Moments(1e3 + made)) == pytest.approx(whole, abs=1e-8)


def test_kid_is_torch_s_double_sum():
    real, made = (torch.from_numpy(x) for x in sets(2, 30, 23, 7))
    kernel = lambda x, y: (x @ y.T / 7 + 1) ** 3  # noqa: E731
    apart = lambda x: kernel(x, x)[~torch.eye(len(x), dtype=bool)].mean()  # noqa: E731
    expected = apart(real) + apart(made) - 2 * kernel(real, made).mean()
    assert METRICS["KID"](real.numpy(), made.numpy()) == pytest.approx(float(expected), abs=1e-10)
    # By hand: 0 and 1 beside 2 and 3, one feature: 1 + 343 - 2 (1 + 1 + 27 + 64) / 4.
    by_hand = distribution.kid(np.array([[0.0], [1]]), np.array([[2.0], [3]]))
    assert by_hand == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # precision, recall, density, coverage by prdc 0.2
        ((0, 60, 60, 8), (0.8166666666666667, 0.9333333333333333, 0.88, 0.95)),
        ((1, 1500, 1300, 32), (0.29, 0.9626666666666667, 0.12907692307692306, 0.37133333333333335)),
        ((2, 300, 500, 4), (0.914, 0.9833333333333333, 0.7836, 0.9766666666666667)),
    ],
)
def test_precision_recall_density_coverage_are_prdc_s(shape, expected):
    real, made = sets(*shape)
    names = ("precision", "recall", "density", "coverage")
    assert [METRICS[name](real, made) for name in names] == pytest.approx(expected, abs=1e-9)


def test_balls_of_rows_that_are_drawn_twice():
    """Equal rows leave each other no ball, whatever rounding says; scipy's distances are exact there."""
    real, made = (x + 100 for x in sets(3, 67, 53, 131))
    same = [0, 3, 17, 30, 45, 50, 66]
    real[same] = made[[1, 52]] = real[0]
    radii = np.sort(cdist(real, real))[:, 5]
    assert (radii[same] == 0).all()
    expected = (cdist(made, real) < radii).sum(1)
    np.testing.assert_array_equal(5 * distribution.density(real, made), expected)
    np.testing.assert_array_equal(distribution.precision(real, made), expected > 0)


def test_figures_name_their_extractor():
    real, made = sets(4, 40, 30, 3)
    figures = {f.metric: f for f in feature_figures("report -> CT", real, made, "ours", seed=0)}
    assert list(figures) == [f"{m} @ours" for m in ("FID", "KID", "precision", "recall", "density", "coverage")]
    assert figures["FID @ours"].n == 30 and figures["FID @ours"].interval is None
    hits = int(distribution.recall(real, made).sum())
    assert figures["recall @ours"].interval == wilson(hits, 40) and figures["recall @ours"].n == 40
    low, high = figures["density @ours"].interval
    assert low < figures["density @ours"].value < high


def test_what_cannot_be_measured_is_said(capsys):
    real, made = sets(5, 20, 20, 20)
    figures = feature_figures("t", real, made, "big", seed=0)
    assert [f.metric for f in figures][0] == "KID @big" and len(figures) == 5
    assert "FID @big is left out: FID of 20 real rows with 20 features" in capsys.readouterr().out
    with pytest.raises(UserError, match="real features are all alike"):
        distribution.fid(np.ones((9, 2)), sets(0, 9, 9, 2)[1])
    for metric in (distribution.kid, distribution.precision, distribution.recall, distribution.coverage):
        with pytest.raises(UserError, match="real features are all alike"):
            metric(np.ones((9, 2)), sets(0, 9, 9, 2)[1])
        with pytest.raises(UserError, match="1 made rows? of features"):
            metric(real, made[:1])
        with pytest.raises(UserError, match="rows of .* features; expected those of one"):
            metric(real, made[:, :3])
    broken = made.copy()
    broken[4, 2] = np.nan
    for metric in (distribution.fid, distribution.kid, distribution.precision):
        with pytest.raises(UserError, match="features: row 4 is not finite"):
            metric(real, broken)
    # All made alike is no mistake of the user's: nothing is recalled.
    assert distribution.recall(real, made * 0).sum() == 0 and distribution.fid(*sets(6, 30, 30, 3)) > 0
