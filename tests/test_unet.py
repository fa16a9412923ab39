"""The image UNet against diffusers' UNet2DConditionModel, and what guides and streams may and may not change."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from flax.traverse_util import flatten_dict

from benchmarks.originals import unet as torch_unet
from medm2g_jax.errors import UserError
from medm2g_jax.nn.attention import MASKED, Context, context, mask
from medm2g_jax.nn.unet import UNet


def both(shape, tokens, sizes, seed=0, gradients=False):
    """{"eps"} of a UNet in torch, or of sum(eps**2) the gradients by our names; ours, its parameters and the input."""
    theirs = oracles.randomize(torch_unet(**sizes), seed)
    rng = np.random.default_rng(seed)
    z, prompt = (rng.normal(size=s).astype(np.float32) for s in (shape, (shape[0], tokens, sizes["width"])))
    t = np.array([871, 3])[: shape[0]]
    with torch.set_grad_enabled(gradients):
        eps = theirs(torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(prompt)).sample
    out = {"eps": eps.permute(0, 2, 3, 1)}
    if gradients:
        (eps**2).sum().backward()
        out = oracles.unet_params(oracles.gradients(theirs))
    flat = oracles.unet_params(theirs.state_dict())
    del theirs, eps
    return out, UNet(**sizes), oracles.variables(flat), (jnp.asarray(z), jnp.asarray(t), context(jnp.asarray(prompt)))


SD15 = dict(
    channels=(320, 640, 1280, 1280), attention=(True, True, True, False), layers=2, heads=8, groups=32, width=768
)
FULL = (1, 64, 64, 4), 77, SD15
TINY = (2, 8, 12, 4), 5, dict(
    channels=(24, 40, 56), attention=(True, True, False), layers=2, heads=4, groups=8, width=20
)
TINIER = (2, 8, 12, 4), 5, dict(channels=(16, 24), attention=(True, False), layers=1, heads=2, groups=8, width=12)


@oracles.at_both_sizes(TINY, FULL)
def test_names_shapes_and_eps_equal_diffusers(agree, size, seed):
    theirs, ours, params, inputs = both(*size, seed)
    initial = jax.eval_shape(ours.init, jax.random.key(0), *inputs)
    assert oracles.shapes(params) == oracles.shapes(initial)
    agree(ours, lambda net, *args: {"eps": net.apply(*args)}, theirs, params, *inputs)


@oracles.at_both_sizes(TINIER, FULL, seeds=1)
def test_gradients_equal_diffusers(agree, size, seed):
    theirs, ours, params, inputs = both(*size, seed, gradients=True)

    def run(net, params, *inputs):
        grads = jax.grad(lambda p: jnp.sum(net.apply(p, *inputs) ** 2))(params)
        return flatten_dict(grads["params"], sep="/")

    agree(ours.clone(remat=True), run, theirs, params, *inputs, limit=1e-4, half=0.3)


def test_full_size_is_stable_diffusion():
    prompt = context(jnp.zeros((1, 77, 768)))
    ours = jax.eval_shape(UNet().init, jax.random.key(0), jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), prompt)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 859_520_964
    with torch.device("meta"):
        theirs = torch_unet(**SD15)
    assert oracles.shapes(oracles.unet_params(theirs.state_dict())) == oracles.shapes(ours)


SMALL = dict(channels=(16,), attention=(False,), layers=1, heads=2, groups=4, width=12, streams=3)


@pytest.fixture(scope="module")
def small():
    """A small UNet as initialised and with random parameters, one input, `run(params, guide, stream)` and `grad`."""
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
    prompt, guide = (context(jnp.asarray(rng.normal(size=(2, n, 12)), jnp.float32)) for n in (5, 3))
    t = jnp.array([10, 900])
    net = UNet(**SMALL)
    params = oracles.random_variables(net, z, t, prompt, guide)["params"]
    params["stream"] = {"embedding": jnp.zeros((3, 64))}  # as at first

    def run(params, guide=None, stream=None):
        return net.apply({"params": params}, z, t, prompt, guide, stream)

    return SimpleNamespace(
        net=net,
        fresh=oracles.fast_jit(net.init)(jax.random.key(0), z, t, prompt, guide)["params"],
        params=params,
        inputs=(z, t, prompt),
        guide=guide,
        run=oracles.fast_jit(run),
        grad=oracles.fast_jit(jax.grad(lambda p: jnp.sum(run(p, guide) ** 2))),
    )


def test_no_guide_is_bit_equal_to_a_unet_without_guide_parameters(small):
    flat = flatten_dict(small.params, sep="/")
    without = {k: v for k, v in flat.items() if "/guide/" not in k}
    assert len(flat) - len(without) == 7  # of the middle's transformer: norm 2, q, k, v, out 2
    initial = jax.eval_shape(small.net.init, jax.random.key(0), *small.inputs)
    assert oracles.shapes(initial) == oracles.shapes(without)
    np.testing.assert_array_equal(small.run(small.params), small.run(oracles.nested(without)))


def test_a_new_guide_changes_nothing_but_has_a_gradient(small):
    out = small.fresh["mid"]["attn_0"]["guide"]["out"]
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), out)
    np.testing.assert_allclose(small.run(small.fresh, small.guide), small.run(small.fresh), atol=1e-5)
    # The gradient is there even where the flow itself was never trained.
    grad = small.grad(small.fresh)["mid"]["attn_0"]["guide"]["out"]["kernel"]
    assert float(jnp.max(jnp.abs(grad))) > 1e-4


def test_a_masked_guide_contributes_exactly_nothing(small):
    unguided, guided = small.run(small.params), small.run(small.params, small.guide)
    half = small.run(small.params, mask(small.guide, jnp.array([True, False])))
    assert np.abs(guided - unguided).min(axis=0).max() > 1e-2  # a trained guide matters in both rows
    np.testing.assert_array_equal(half[0], guided[0])
    np.testing.assert_allclose(half[1], unguided[1], atol=1e-5)
    nothing = Context(small.guide.tokens, jnp.full_like(small.guide.bias, MASKED))
    other = nothing._replace(tokens=small.guide.tokens + 7.0)
    np.testing.assert_array_equal(small.run(small.params, nothing), small.run(small.params, other))


def test_stream_embedding_is_zero_at_first_and_then_tells_streams_apart(small):
    np.testing.assert_array_equal(small.fresh["stream"]["embedding"], np.zeros((3, 64)))
    streams = jnp.array([1, 2])
    np.testing.assert_array_equal(small.run(small.params, None, streams), small.run(small.params))
    taught = small.params | {"stream": {"embedding": jnp.zeros((3, 64)).at[2].set(1.0)}}
    change = np.abs(small.run(taught, None, streams) - small.run(taught)).max(axis=(1, 2, 3))
    assert change[0] == 0 and change[1] > 1e-2
    # No stream given is stream 0; a modality with one stream has no table.
    said = small.params | {"stream": {"embedding": jnp.zeros((3, 64)).at[0].set(1.0)}}
    np.testing.assert_array_equal(small.run(said), small.run(said, None, jnp.zeros(2, jnp.int32)))
    single = jax.eval_shape(UNet(**SMALL | {"streams": 1}).init, jax.random.key(0), *small.inputs)
    assert "stream" not in single["params"]


def test_what_stands_beside_z_starts_at_nothing_and_is_local(small):
    rng = np.random.default_rng(3)
    near = jnp.asarray(rng.normal(size=(2, 4, 4, 10)), jnp.float32)
    initial = jax.eval_shape(small.net.init, jax.random.key(0), *small.inputs, small.guide, None, near)
    added = set(flatten_dict(initial["params"], sep="/")) - set(flatten_dict(small.fresh, sep="/"))
    assert added == {"guide/kernel"} and initial["params"]["guide"]["kernel"].shape == (3, 3, 10, 16)
    fresh = small.net.init(jax.random.key(0), *small.inputs, small.guide, None, near)["params"]["guide"]
    assert not np.any(fresh["kernel"])

    run = oracles.fast_jit(lambda p, near: small.net.apply({"params": p}, *small.inputs, None, None, near))
    np.testing.assert_allclose(run(small.params | {"guide": fresh}, near), small.run(small.params), atol=1e-5)
    kernel = jnp.zeros((3, 3, 10, 16)).at[1, 1, :4].set(small.params["conv_in"]["kernel"][1, 1])
    taught = small.params | {"guide": {"kernel": kernel}}
    np.testing.assert_array_equal(small.run(taught), small.run(small.params))  # none there: not read
    # Its first four channels through conv_in's own middle weights: as if they were added to z, one pixel at a time.
    point = small.params | {
        "conv_in": small.params["conv_in"]
        | {"kernel": jnp.zeros((3, 3, 4, 16)).at[1, 1].set(small.params["conv_in"]["kernel"][1, 1])}
    }
    z, t, prompt = small.inputs
    moved = small.net.apply({"params": point}, z + near[..., :4], t, prompt)
    np.testing.assert_allclose(run(point | {"guide": {"kernel": kernel}}, near), moved, atol=1e-4)


def test_remat_keeps_gradients(small):
    net = UNet(**SMALL, remat=True)
    again = oracles.fast_jit(
        jax.grad(lambda p: jnp.sum(net.apply({"params": p}, *small.inputs, small.guide, None) ** 2))
    )(small.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, again, small.grad(small.params))


def test_half_precision_computes_but_does_not_store_in_half(small):
    half = UNet(**SMALL, dtype=jnp.bfloat16)
    initial = jax.eval_shape(half.init, jax.random.key(0), *small.inputs, small.guide)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    eps = oracles.fast_jit(half.apply)({"params": small.params}, *small.inputs)
    assert eps.dtype == jnp.float32
    assert 1e-4 < oracles.relative_error(eps, small.run(small.params)) < 0.03


def test_wrong_sizes_are_told_in_one_line():
    net = UNet(channels=(8, 16), attention=(False, True), groups=4, width=12)
    with pytest.raises(UserError, match="multiples of 2, found 5 x 4"):
        net.init(jax.random.key(0), jnp.zeros((1, 5, 4, 4)), jnp.zeros(1), context(jnp.zeros((1, 2, 12))))
    with pytest.raises(UserError, match="width 12, found one of width 13"):
        net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), context(jnp.zeros((1, 2, 13))))
