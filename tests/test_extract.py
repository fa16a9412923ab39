import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from medm2g_jax.extract import invariant_loss, view


def barlow(z1, z2, lambda_1):
    """Barlow twins' loss as its authors' code has it (batch norm without affine, eps 1e-5), times Eq. 4's 1/d."""
    n, d = z1.shape
    norm = torch.nn.BatchNorm1d(d, affine=False).double()
    c = norm(torch.from_numpy(z1).double()).T @ norm(torch.from_numpy(z2).double()) / n
    on = (torch.diagonal(c) - 1).pow(2).sum()
    off = c[~torch.eye(d, dtype=torch.bool)].pow(2).sum()
    return float(on + lambda_1 * off) / d


def test_invariant_loss_is_barlow_twins():
    rng = np.random.default_rng(0)
    z1 = rng.normal(size=(32, 12)).astype(np.float32) * 3 + 5
    z2 = z1 + rng.normal(size=(32, 12)).astype(np.float32)
    for lambda_1 in (0.0051, 1.0):
        ours = float(invariant_loss(jnp.asarray(z1), jnp.asarray(z2), lambda_1))
        assert ours == pytest.approx(barlow(z1, z2, lambda_1), rel=1e-4)
    assert float(invariant_loss(jnp.asarray(z1), jnp.asarray(z2))) == pytest.approx(barlow(z1, z2, 0.0051), rel=1e-4)


def test_identical_decorrelated_views_have_no_loss():
    z, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 9)))  # column 0 made constant: out goes the mean
    z = np.linalg.qr(np.c_[np.ones(64), z[:, 1:]])[0][:, 1:].astype(np.float32)
    z = jnp.asarray(8 * z)  # orthogonal columns of mean 0 and variance 1
    assert abs(float(invariant_loss(z, z, 1.0))) < 1e-6
    # The diagonal alone: (1 - (-1))^2 for views of opposite sign; redundant features: d - 1 ones beside each.
    assert float(invariant_loss(z, -z, 0.0)) == pytest.approx(4, rel=1e-4)
    same = jnp.tile(z[:, :1], (1, 8))
    assert float(invariant_loss(same, same, 0.5)) == pytest.approx(0.5 * 7, rel=1e-4)


def test_invariant_loss_survives_a_dead_feature():
    z = np.random.default_rng(2).normal(size=(16, 4)).astype(np.float32)
    z[:, 1] = 0
    value, grad = jax.value_and_grad(invariant_loss)(jnp.asarray(z), jnp.asarray(z))
    assert np.isfinite(float(value)) and np.isfinite(np.asarray(grad)).all()


def phantom(rows, size=32):
    """A bright disc in the middle and a brighter mark on the left of it."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    image = np.where(x**2 + y**2 < 0.5, 0.2, -1.0)
    image = np.where((x + 0.45) ** 2 + y**2 < 0.02, 1.0, image)
    return jnp.asarray(np.tile(image[None, :, :, None], (rows, 1, 1, 1)), jnp.float32)


@pytest.fixture(scope="module")
def views():
    return np.asarray(jax.jit(view)(jax.random.key(0), phantom(200)))


def test_views_never_flip_left_and_right(views):
    size = views.shape[2]
    mark = np.where(views[..., 0] >= np.quantile(views[..., 0], 0.99, axis=(1, 2), keepdims=True), 1.0, 0.0)
    across = (mark * np.arange(size)).sum((1, 2)) / mark.sum((1, 2))
    down = (mark * np.arange(size)[:, None]).sum((1, 2)) / mark.sum((1, 2))
    middle = (size - 1) / 2
    assert (across < middle).all(), across.max()
    # And it stays at about the middle height: no quarter turns either.
    assert (np.abs(down - middle) < size / 4).all()


def test_views_stay_in_range_and_keep_shape(views):
    assert views.dtype == np.float32 and views.shape == (200, 32, 32, 1)
    assert views.min() >= -1 and views.max() <= 1 and np.isfinite(views).all()


def test_views_are_moderate(views):
    original = np.asarray(phantom(1))
    change = np.abs(views - original).mean((1, 2, 3))
    assert change.min() > 0.01 and change.mean() < 0.35 and change.max() < 0.7, change
    # No view is the picture of nothing.
    correlation = [np.corrcoef(v.ravel(), original.ravel())[0, 1] for v in views]
    assert min(correlation) > 0.3, min(correlation)


def test_views_are_a_function_of_key_and_row(views):
    small = jax.jit(view)
    again = np.asarray(small(jax.random.key(0), phantom(3)))
    np.testing.assert_allclose(again, views[:3], atol=1e-5)
    other = np.asarray(small(jax.random.key(1), phantom(3)))
    assert (np.abs(other - again).mean((1, 2, 3)) > 0.02).all()
    assert np.abs(again[0] - again[1]).mean() > 0.02


def test_a_view_moves_the_centre_no_further_than_its_crop_allows():
    """The centre of the image lands at -shift / side, |shift| <= 1 - side and side >= sqrt(crop)."""
    g = np.linspace(-1, 1, 64)
    blob = np.exp(-(g[:, None] ** 2 + g[None, :] ** 2) / 0.02)
    images = jnp.asarray(np.repeat((2 * blob - 1)[None, ..., None], 256, 0), jnp.float32)
    furthest = {}
    for crop in (1.0, 0.9, 0.6):
        light = np.asarray(view(jax.random.key(0), images, crop))[..., 0]
        light = np.where(light > light.max((1, 2), keepdims=True) - 0.5, 1.0, 0.0)  # its brightest part
        mass = light.sum((1, 2))
        at = np.stack([(light * g[:, None]).sum((1, 2)) / mass, (light * g[None, :]).sum((1, 2)) / mass], -1)
        furthest[crop] = np.abs(at).max()
    pixel = 2 / 63
    for crop, far in furthest.items():
        most = (1 - crop**0.5) / crop**0.5
        assert 0.6 * most - pixel / 2 <= far <= most + pixel
