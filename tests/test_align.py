import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medm2g_jax.align import LOG_SCALE_INIT, LOG_SCALE_MAX, info_nce, unit
from medm2g_jax.train.sharding import batch_sharding, make_mesh


def pairs(b=9, d=16, seed=0):
    """Paired rows of unequal lengths, related but not equal."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(b, d)) * rng.uniform(0.1, 30, size=(b, 1))
    return np.float32(a), np.float32(a + 2 * rng.normal(size=(b, d)))


def torch_loss(a, b, log_scale):
    """CLIP's loss, both ways, from torch's cross-entropy."""
    a, b = (F.normalize(torch.from_numpy(x).double(), dim=1) for x in (a, b))
    logits = np.exp(log_scale) * a @ b.T
    target = torch.arange(len(a))
    return float(F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def test_unit_is_torch_normalize():
    a, _ = pairs()
    np.testing.assert_allclose(unit(jnp.asarray(a)), F.normalize(torch.from_numpy(a)), rtol=1e-6)
    half = unit(jnp.asarray(a, jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(half, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("log_scale", (0.0, LOG_SCALE_INIT, LOG_SCALE_MAX))
def test_info_nce_is_torch_cross_entropy_both_ways(log_scale):
    a, b = pairs()
    ours = info_nce(jnp.asarray(a), jnp.asarray(b), log_scale)
    assert float(ours) == pytest.approx(torch_loss(a, b, log_scale), rel=1e-5)
    # Unrelated rows know nothing of each other: about ln b nats; the same rows everything.
    assert float(info_nce(jnp.asarray(a), jnp.asarray(a), LOG_SCALE_MAX)) < 1e-3


def test_gradients_are_torch_s():
    a, b = pairs()
    ours = jax.grad(info_nce, argnums=(0, 1, 2))(jnp.asarray(a), jnp.asarray(b), jnp.float32(2.0))
    x, y, s = (torch.tensor(v, requires_grad=True) for v in (a, b, 2.0))
    logits = s.exp() * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(a))
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    for grad, expected in zip(ours, (x.grad, y.grad, s.grad), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=1e-6)


def test_a_masked_loss_is_that_of_the_rows_alone():
    a, b = pairs()
    keep = np.array([True, False, True, True, False, True, False, True, True])
    ours = info_nce(jnp.asarray(a), jnp.asarray(b), 2.0, jnp.asarray(keep))
    assert float(ours) == pytest.approx(torch_loss(a[keep], b[keep], 2.0), rel=1e-5)
    # Rows left out neither matter nor learn.
    noise = np.where(keep[:, None], 0, 100).astype(np.float32)
    assert float(info_nce(jnp.asarray(a + noise), jnp.asarray(b - noise), 2.0, jnp.asarray(keep))) == float(ours)
    grad = jax.grad(info_nce)(jnp.asarray(a), jnp.asarray(b), 2.0, jnp.asarray(keep))
    assert not np.any(np.asarray(grad)[~keep]) and np.all(np.abs(np.asarray(grad)[keep]).sum(1) > 0)


@pytest.mark.parametrize("count", (0, 1))
def test_below_two_rows_there_is_nothing_to_tell_apart(count):
    a, b = map(jnp.asarray, pairs())
    rows = jnp.arange(len(a)) < count
    value, grads = jax.value_and_grad(info_nce, argnums=(0, 1, 2))(a, b, jnp.float32(2.0), rows)
    assert float(value) == 0
    assert all(np.all(np.asarray(g) == 0) for g in grads)
    one = jax.value_and_grad(info_nce)(a[:1], b[:1], 2.0)
    assert float(one[0]) == 0 and np.all(np.asarray(one[1]) == 0)


def test_a_row_of_zeros_has_a_finite_gradient():
    a, b = map(jnp.asarray, pairs())
    a = a.at[2].set(0.0)
    value, grads = jax.value_and_grad(info_nce, argnums=(0, 1))(a, b, 2.0)
    assert np.isfinite(float(value)) and all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize(("asked", "used"), ((-3.0, 0.0), (9.0, float(np.log(100.0)))))
def test_log_scale_is_clamped(asked, used):
    a, b = pairs()
    ours = float(info_nce(jnp.asarray(a), jnp.asarray(b), jnp.float32(asked)))
    assert ours == pytest.approx(torch_loss(a, b, used), rel=1e-4)
    assert LOG_SCALE_INIT == pytest.approx(np.log(1 / 0.07)) and LOG_SCALE_MAX == pytest.approx(np.log(100))


def test_negatives_are_the_global_batch_on_a_mesh():
    a, b = pairs(b=16)
    rows = batch_sharding(make_mesh(dict(data=-1, fsdp=1, tensor=1)))
    ours = jax.jit(info_nce)(jax.device_put(a, rows), jax.device_put(b, rows), 2.0)
    assert float(ours) == pytest.approx(torch_loss(a, b, 2.0), rel=1e-5)
