import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from medm2g_jax.autoencode import kl_per_dimension, token_cross_entropy


@pytest.mark.parametrize("shape", ((3, 8), (2, 4, 4, 5)))
def test_kl_is_torch_s(shape):
    mean, logvar = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    q = Normal(torch.from_numpy(mean), torch.from_numpy(logvar).mul(0.5).exp())
    expected = float(kl_divergence(q, Normal(0.0, 1.0)).mean())
    assert float(kl_per_dimension(jnp.asarray(mean), jnp.asarray(logvar))) == pytest.approx(expected, rel=1e-5)


def test_kl_of_the_prior_is_zero():
    zeros = jnp.zeros((2, 4))
    assert float(kl_per_dimension(zeros, zeros)) == 0
    assert kl_per_dimension(zeros.astype(jnp.bfloat16), zeros.astype(jnp.bfloat16)).dtype == jnp.float32


def test_cross_entropy_is_torch_s_on_the_next_token():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 6, 11)).astype(np.float32)
    pad = 8
    ids = np.array([[9, 1, 2, 3, 10, 8], [9, 4, 10, 8, 8, 8], [9, 10, 8, 8, 8, 8]], np.int32)
    ours = float(token_cross_entropy(jnp.asarray(logits), jnp.asarray(ids), pad))
    target = torch.from_numpy(ids[:, 1:]).reshape(-1).long()
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).reshape(-1, 11), target, ignore_index=pad
    )
    assert ours == pytest.approx(float(expected), rel=1e-6)
    # The last position predicts nothing that is there.
    logits[:, -1] = 100
    assert float(token_cross_entropy(jnp.asarray(logits), jnp.asarray(ids), pad)) == ours
    # Nothing but padding is no loss, not a division by zero.
    assert float(token_cross_entropy(jnp.asarray(logits), jnp.full((3, 6), pad), pad)) == 0
