"""The text UNet against Versatile Diffusion's, as diffusers has it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from flax.traverse_util import flatten_dict

from medm2g_jax.nn.attention import context
from medm2g_jax.nn.text_unet import TextUNet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers, about itself


def torch_text_unet(channels, attention, layers, heads, groups, width, latent):
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

    return UNetFlatConditionModel(
        in_channels=[latent, 1, 1],
        out_channels=[latent, 1, 1],
        down_block_types=["CrossAttnDownBlockFlat" if a else "DownBlockFlat" for a in attention],
        up_block_types=["CrossAttnUpBlockFlat" if a else "UpBlockFlat" for a in reversed(attention)],
        block_out_channels=channels,
        layers_per_block=layers,
        attention_head_dim=heads,
        norm_num_groups=groups,
        cross_attention_dim=width,
    )


def both(**sizes):
    """A text UNet in torch, ours with its parameters, and one input."""
    theirs = oracles.scramble(torch_text_unet(**sizes))
    rng = np.random.default_rng(0)
    z, prompt = (rng.normal(size=s).astype(np.float32) for s in ((2, sizes["latent"]), (2, 5, sizes["width"])))
    t = np.array([3, 871])
    out = theirs(torch.tensor(z)[:, :, None, None], torch.tensor(t), torch.tensor(prompt)).sample[:, :, 0, 0]
    params = oracles.variables(oracles.text_unet_params(theirs.state_dict()))
    return theirs, out, TextUNet(**sizes), params, (jnp.asarray(z), jnp.asarray(t), context(jnp.asarray(prompt)))


def test_names_shapes_and_eps_equal_diffusers():
    theirs, out, ours, params, inputs = both(
        channels=(24, 40, 56), attention=(True, True, False), layers=2, heads=4, groups=8, width=20, latent=36
    )
    converted = oracles.text_unet_params(theirs.state_dict())
    assert len(converted) == len(theirs.state_dict())
    initial = jax.eval_shape(ours.init, jax.random.key(0), *inputs)
    assert oracles.shapes(converted) == oracles.shapes(initial)
    assert oracles.relative_error(oracles.fast_jit(ours.apply)(params, *inputs), out) <= 1e-5


def test_gradients_equal_diffusers():
    theirs, out, ours, params, inputs = both(
        channels=(16, 24), attention=(True, False), layers=1, heads=2, groups=8, width=12, latent=10
    )
    weight = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    (out * torch.tensor(weight)).sum().backward()
    grads = oracles.fast_jit(jax.grad(lambda p: jnp.sum(ours.apply(p, *inputs) * weight)))(params)
    expected = oracles.text_unet_params(oracles.gradients(theirs))
    for name, grad in flatten_dict(grads["params"], sep="/").items():
        assert oracles.relative_error(grad, expected[name]) <= 1e-4, name


def test_full_size_is_versatile_diffusion():
    prompt = context(jnp.zeros((1, 77, 768)))
    ours = jax.eval_shape(TextUNet().init, jax.random.key(0), jnp.zeros((1, 768)), jnp.zeros(1), prompt)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 1_708_848_448
    with torch.device("meta"):
        theirs = torch_text_unet((320, 640, 1280, 1280), (True, True, True, False), 2, 8, 32, 768, 768)
    assert oracles.shapes(oracles.text_unet_params(theirs.state_dict())) == oracles.shapes(ours)


def test_guide_and_positions():
    """theta_c works on the text UNet's few tokens as well; their number is free."""
    net = TextUNet(channels=(8,), attention=(False,), layers=1, heads=2, groups=4, positions=3, width=12, latent=10)
    rng = np.random.default_rng(0)
    z, tokens = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 10), (2, 5, 12)))
    inputs = z, jnp.array([1, 500]), context(tokens)
    params = oracles.random_variables(net, *inputs, context(tokens))
    assert params["params"]["linear_in"]["kernel"].shape == (10, 24)
    guided, unguided = (oracles.fast_jit(net.apply)(params, *inputs, g) for g in (context(tokens), None))
    assert np.abs(guided - unguided).max(axis=1).min() > 1e-2
