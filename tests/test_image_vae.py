"""The image autoencoder against diffusers' AutoencoderKL."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from oracles_vae import IMAGE_VAE, convert, fill

from medm2g_jax.nn.image_vae import ImageVAE, _depth_to_space, _space_to_depth

diffusers = pytest.importorskip("diffusers")


def torch_vae(channels, layers, groups):
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=groups,
        latent_channels=4,
    )


KL_F8 = dict(channels=(128, 256, 512, 512), layers=2, groups=32)
TINY = dict(channels=(8, 16, 24, 24), layers=1, groups=8)


@oracles.at_both_sizes(((2, 32, 48, 3), TINY), ((1, 512, 512, 3), KL_F8))  # 32 x 48: no swapped axes
def test_equals_diffusers(agree, size, seed):
    shape, sizes = size
    oracle, vae = oracles.randomize(torch_vae(**sizes), seed), ImageVAE(**sizes)
    x = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    params = fill(vae, convert(oracle.state_dict(), IMAGE_VAE), x)
    with torch.no_grad():
        posterior = oracle.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).latent_dist
        image = oracle.decode(posterior.mean).sample
    mean, logvar, image = (y.permute(0, 2, 3, 1) for y in (posterior.mean, posterior.logvar, image))

    def encode(net, params, x):
        return dict(zip(("mean", "logvar"), net.apply(params, x, method="encode"), strict=True))

    agree(vae, encode, {"mean": mean, "logvar": logvar}, params, x)
    z = mean.numpy()
    agree(vae, lambda net, *args: {"image": net.apply(*args, method="decode")}, {"image": image}, params, z)


def test_default_is_the_published_size():
    shapes = jax.eval_shape(ImageVAE().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(v.size for v in jax.tree.leaves(shapes)) == 83_653_863


def test_logvar_is_clipped():
    vae = ImageVAE(channels=(8,), layers=1, groups=4, mid_attention=False)
    x = jnp.zeros((1, 4, 4, 3))
    shapes = jax.eval_shape(vae.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), shapes)
    params["quant"]["bias"] = np.array([0, 0, 0, 0, -100, 100, 1, 2], np.float32)
    _, logvar = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))(params, x)
    np.testing.assert_array_equal(logvar[0, 0, 0], [-30, 20, 1, 2])


def test_patch_folds_space():
    """A folded pixel holds the p x p pixels at its own place, and unfolding is the inverse."""
    x = np.random.default_rng(0).normal(size=(2, 8, 16, 3)).astype(np.float32)
    folded = _space_to_depth(jnp.asarray(x), 4)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 4:8, 8:12].ravel())
    np.testing.assert_array_equal(_depth_to_space(folded, 4), x)
    vae = ImageVAE(channels=(8, 8), layers=1, groups=4, patch=4, mid_attention=False)
    params = jax.eval_shape(vae.init, jax.random.key(0), x)
    mean, _ = jax.eval_shape(lambda p, x: vae.apply(p, x, method="encode"), params, jnp.zeros((1, 16, 24, 3)))
    assert mean.shape == (1, 2, 3, 4)
    assert jax.eval_shape(lambda p, z: vae.apply(p, z, method="decode"), params, mean).shape == (1, 16, 24, 3)


def test_mid_attention_is_optional():
    x = jnp.zeros((1, 8, 8, 3))
    for on, names in ((True, {"res_0", "attn", "res_1"}), (False, {"res_0", "res_1"})):
        params = jax.eval_shape(ImageVAE((8,), 1, 4, mid_attention=on).init, jax.random.key(0), x)["params"]
        assert set(params["encoder"]["mid"]) == set(params["decoder"]["mid"]) == names


def test_half_precision_keeps_float32_moments():
    vae = ImageVAE(channels=(8,), layers=1, groups=4, dtype=jnp.bfloat16)
    x = jax.random.uniform(jax.random.key(1), (1, 4, 4, 3), minval=-1)
    shapes = jax.eval_shape(vae.init, jax.random.key(0), x)
    assert {v.dtype for v in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda v: rng.normal(0, 0.2, v.shape).astype(np.float32), shapes)
    mean, logvar = jax.jit(lambda p, x: vae.apply(p, x, method="encode"))(params, x)
    exact, _ = jax.jit(lambda p, x: vae.clone(dtype=jnp.float32).apply(p, x, method="encode"))(params, x)
    assert mean.dtype == logvar.dtype == jnp.float32
    assert 0 < float(jnp.abs(mean - exact).max() / jnp.abs(exact).max()) < 0.05
