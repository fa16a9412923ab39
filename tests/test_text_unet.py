"""The text UNet against Versatile Diffusion's, as diffusers has it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from flax.traverse_util import flatten_dict
from test_unet import SD15

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


def both(rows, tokens, sizes, seed=0, gradients=False):
    """{"eps"} of a text UNet in torch, or of sum(eps**2) the gradients by our names; ours, its parameters and the
    input."""
    theirs = oracles.randomize(torch_text_unet(**sizes), seed)
    rng = np.random.default_rng(seed)
    shapes = (rows, sizes["latent"]), (rows, tokens, sizes["width"])
    z, prompt = (rng.normal(size=s).astype(np.float32) for s in shapes)
    t = np.array([871, 3])[:rows]
    with torch.set_grad_enabled(gradients):
        eps = theirs(torch.tensor(z)[:, :, None, None], torch.tensor(t), torch.tensor(prompt)).sample[:, :, 0, 0]
    out = {"eps": eps}
    if gradients:
        (eps**2).sum().backward()
        out = oracles.text_unet_params(oracles.gradients(theirs))
    flat = oracles.text_unet_params(theirs.state_dict())
    del theirs
    inputs = jnp.asarray(z), jnp.asarray(t), context(jnp.asarray(prompt))
    return out, TextUNet(**sizes), oracles.variables(flat), inputs


VERSATILE = SD15 | dict(latent=768)
TINY = dict(channels=(24, 40, 56), attention=(True, True, False), layers=2, heads=4, groups=8, width=20, latent=36)


@oracles.at_both_sizes((2, 5, TINY), (2, 77, VERSATILE))
def test_names_shapes_and_eps_equal_diffusers(agree, size, seed):
    theirs, ours, params, inputs = both(*size, seed)
    initial = jax.eval_shape(ours.init, jax.random.key(0), *inputs)
    assert oracles.shapes(params) == oracles.shapes(initial)
    agree(ours, lambda net, *args: {"eps": net.apply(*args)}, theirs, params, *inputs)


def test_gradients_equal_diffusers(agree):
    sizes = dict(channels=(16, 24), attention=(True, False), layers=1, heads=2, groups=8, width=12, latent=10)
    theirs, ours, params, inputs = both(2, 5, sizes, gradients=True)

    def run(net, params, *inputs):
        grads = jax.grad(lambda p: jnp.sum(net.apply(p, *inputs) ** 2))(params)
        return flatten_dict(grads["params"], sep="/")

    agree(ours, run, theirs, params, *inputs, limit=1e-4)


def test_full_size_is_versatile_diffusion():
    prompt = context(jnp.zeros((1, 77, 768)))
    ours = jax.eval_shape(TextUNet().init, jax.random.key(0), jnp.zeros((1, 768)), jnp.zeros(1), prompt)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 1_708_848_448
    with torch.device("meta"):
        theirs = torch_text_unet(**VERSATILE)
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
