"""Blocks against torch's and diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch

from medm2g_jax.nn import layers


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("shape", [(2, 4, 6, 24), (2, 9, 24), (2, 24)])
def test_group_norm_equals_torch(shape, eps):
    """On images, tokens and flat vectors; a small spread makes eps matter, a large mean the two passes."""
    x, scale, bias = 1e-3 * draw(*shape) + 0.1, draw(24, seed=1), draw(24, seed=2)
    channels_first, *affine = (torch.tensor(a).double() for a in (np.moveaxis(x, -1, 1), scale, bias))
    expected = torch.nn.functional.group_norm(channels_first, 8, *affine, eps)
    out = layers.GroupNorm(8, eps).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    assert oracles.relative_error(out, expected.movedim(1, -1)) < 1e-4


def test_sinusoid_equals_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.array([0, 1, 500, 999])
    expected = get_timestep_embedding(torch.tensor(t), 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(layers.sinusoid(jnp.asarray(t), 32), expected, atol=2e-4)
    np.testing.assert_allclose(layers.sinusoid(jnp.asarray(t, jnp.float32), 32), expected, atol=2e-4)


def test_feed_forward_equals_diffusers():
    from diffusers.models.attention import FeedForward

    theirs = oracles.scramble(FeedForward(12, activation_fn="geglu"))
    state = theirs.state_dict()
    names = {"proj": "net.0.proj", "out": "net.2"}
    params = {
        ours: {"kernel": state[f"{n}.weight"].T.numpy(), "bias": state[f"{n}.bias"].numpy()}
        for ours, n in names.items()
    }
    x = draw(2, 5, 12)
    out = layers.FeedForward().apply({"params": params}, jnp.asarray(x))
    assert oracles.relative_error(out, theirs(torch.tensor(x))) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(1, 1), (2, 2), (2, 5), (4, 4)])
def test_a_convolution_and_its_gradients_equal_torch(side, stride):
    """On maps smaller than the kernel as well, which take another way."""
    x, kernel, bias = draw(3, *side, 6), draw(3, 3, 6, 5, seed=1), draw(5, seed=2)
    theirs = [torch.tensor(a, requires_grad=True) for a in (np.moveaxis(x, -1, 1), kernel.transpose(3, 2, 0, 1), bias)]
    expected = torch.nn.functional.conv2d(*theirs, stride=stride, padding=1)
    net = layers.conv(5, "conv", jnp.float32, stride)
    out, back = jax.vjp(lambda x, k, b: net.apply({"params": {"kernel": k, "bias": b}}, x), x, kernel, bias)
    assert oracles.relative_error(out, expected.movedim(1, -1)) < 1e-6
    (expected**2).sum().backward()
    for ours, x, axes in zip(back(2 * out), theirs, ((0, 2, 3, 1), (2, 3, 1, 0), (0,)), strict=True):
        assert oracles.relative_error(ours, x.grad.permute(axes)) < 1e-5


def test_upsample_equals_torch():
    x = draw(2, 3, 4, 5)
    expected = torch.nn.functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    np.testing.assert_array_equal(layers.upsample(jnp.asarray(x)), expected.permute(0, 2, 3, 1))


def test_attention_leaves():
    """Stable Diffusion's has no biases on q, k, v; a tower's has; theta_c's norm lives in its own scope."""
    x, source = jnp.ones((1, 3, 8)), jnp.ones((1, 2, 6))

    def leaves(**kwargs):
        init = layers.Attention(heads=2, **kwargs).init
        return {n: s for n, s in oracles.shapes(jax.eval_shape(init, jax.random.key(0), x, source)).items()}

    plain = {"q/kernel": (8, 8), "k/kernel": (6, 8), "v/kernel": (6, 8), "out/kernel": (8, 8), "out/bias": (8,)}
    assert leaves() == plain
    assert leaves(qkv_bias=True) == plain | {"q/bias": (8,), "k/bias": (8,), "v/bias": (8,)}
    assert leaves(norm=True) == plain | {"norm/scale": (8,), "norm/bias": (8,)}


def test_attention_with_biases_equals_torch():
    theirs = oracles.scramble(torch.nn.MultiheadAttention(8, 2, batch_first=True))
    x = draw(2, 5, 8)
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    kernels, biases = np.split(state["in_proj_weight"], 3), np.split(state["in_proj_bias"], 3)
    params = {n: {"kernel": k.T, "bias": b} for n, k, b in zip("qkv", kernels, biases, strict=True)}
    params["out"] = {"kernel": state["out_proj.weight"].T, "bias": state["out_proj.bias"]}
    out = layers.Attention(2, qkv_bias=True).apply({"params": params}, jnp.asarray(x), causal=True)
    hidden = torch.full((5, 5), -torch.inf).triu(1)
    expected, _ = theirs(*[torch.tensor(x)] * 3, attn_mask=hidden)
    assert oracles.relative_error(out, expected) < 1e-6


def test_a_residual_block_without_time_has_no_time_layer():
    x, time = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 12))
    block = layers.ResBlock(16, groups=4, eps=1e-6)
    without = oracles.shapes(jax.eval_shape(block.init, jax.random.key(0), x))
    timed = oracles.shapes(jax.eval_shape(block.init, jax.random.key(0), x, time))
    assert timed == without | {"time/kernel": (12, 16), "time/bias": (16,)}
    assert without["skip/kernel"] == (8, 16)
    same = layers.ResBlock(8, groups=4)
    assert "skip/kernel" not in oracles.shapes(jax.eval_shape(same.init, jax.random.key(0), x))


def test_bfloat16_keeps_the_time_in_float32():
    """999 f needs more than 8 bits: neighbours at t = 998 and 999 must stay apart, and near the float32 result."""
    mlp = layers.TimeMLP(16, 64)
    t = jnp.array([998, 999])
    params = oracles.random_variables(mlp, t)
    exact = mlp.apply(params, t)
    half = layers.TimeMLP(16, 64, jnp.bfloat16).apply(params, t)
    assert half.dtype == jnp.bfloat16
    assert oracles.relative_error(half.astype(jnp.float32), exact) < 0.01
