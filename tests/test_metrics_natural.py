"""NIQE beside BasicSR's, and its fit beside scipy's distributions."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import gennorm

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics import METRICS, natural


def image(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Noise, the smoother the higher its seed."""
    x = np.random.default_rng(seed).normal(size=shape)
    x = gaussian_filter(x, seed) if seed else x
    return np.clip(x / np.abs(x).max() * 1.2, -1, 1)[None, ..., None]


@pytest.mark.parametrize(
    ("seed", "shape", "expected"), [(2, (200, 300), 8.733741947931708), (0, (96, 192), 9.829625590493116)]
)
def test_basicsr_s_values(seed, shape, expected):
    """Of BasicSR 1.4.2's `niqe`, beside made-up good images; its halving is in float32."""
    pristine = natural.Pristine(np.linspace(0.1, 2, 36), np.diag(np.linspace(0.5, 1.5, 36)))
    x = image(seed, shape)
    assert METRICS["NIQE"](x, x, pristine) == pytest.approx(expected, rel=1e-6)


def test_the_shape_is_that_of_the_distribution_it_was_drawn_from():
    """Twice as wide on the right, and so twice as often there."""
    x = np.abs(gennorm.rvs(1.5, size=300_000, random_state=0))
    right = np.random.default_rng(0).random(len(x)) < 2 / 3
    found = natural.asymmetric(np.where(right, 2 * x, -x))
    assert found == pytest.approx((1.5, 1, 2), rel=0.02)


def test_images_are_nearer_to_their_own_kind():
    own = np.concatenate([image(s, (192, 192)) for s in (1,) * 12])
    own = own * np.linspace(0.5, 1, 12)[:, None, None, None]
    pristine = natural.fitted(own)
    alike, noise = (METRICS["NIQE"](x, x, pristine) for x in (own[5:6], image(0, (192, 192))))
    assert alike < 0.5 * noise


def test_what_cannot_be_measured_is_said(tmp_path):
    with pytest.raises(UserError, match="NIQE of 64 x 64 pixels: expected two blocks of 96 x 96"):
        natural.fitted(np.zeros((1, 64, 64, 1)))
    with pytest.raises(UserError, match="NIQE of 0 blocks: expected more than 36"):
        natural.fitted(np.zeros((3, 192, 192, 1)))
    with pytest.raises(UserError, match=r"expected niqe_pris_params.npz, as pip download"):
        natural.published(str(tmp_path / "niqe_pris_params.npz"))
