"""The two CLIP towers against transformers, and the preparation of pixels against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from oracles_vae import CLIP, convert, fill

from medm2g_jax.nn.clip import CLIPText, CLIPVision, clip_pixels

transformers = pytest.importorskip("transformers")


def text_config(vocab, width, layers, heads, ff, length, projection):
    return transformers.CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ff,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        eos_token_id=vocab - 1,
    )


TEXT_L = dict(vocab=49408, width=768, layers=12, heads=12, ff=3072, length=77, projection=768)
VISION_L = dict(width=1024, layers=24, heads=16, ff=4096, patch=14, image=224, projection=768)


def outputs(tower, params, x):
    return tower.apply(params, x)._asdict()


@oracles.at_both_sizes(dict(vocab=60, width=32, layers=3, heads=4, ff=64, length=11, projection=24), TEXT_L)
def test_text_equals_transformers(agree, size, seed):
    oracle = oracles.randomize(transformers.CLIPTextModelWithProjection(text_config(**size)), seed)
    tower, end = CLIPText(**size), size["vocab"] - 1
    # CLIP pads with its end token: pooled is the first of them.
    ids = np.random.default_rng(seed).integers(0, end, (2, size["length"]), np.int32)
    ids[:, -1], ids[0, 3:] = end, end
    params = fill(tower, convert(oracle.state_dict(), CLIP), ids)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(ids).long())
        tokens = oracle.text_projection(expected.last_hidden_state)
        tokens = tokens / expected.text_embeds.norm(dim=1)[:, None, None]
    theirs = dict(hidden=expected.last_hidden_state, pooled=expected.text_embeds, tokens=tokens)
    np.testing.assert_allclose(tokens[0, 3].norm(), 1, rtol=1e-5)
    agree(tower, outputs, theirs, params, ids)


@oracles.at_both_sizes(dict(width=32, layers=3, heads=4, ff=64, patch=5, image=20, projection=24), VISION_L)
def test_vision_equals_transformers(agree, size, seed):
    oracle = oracles.randomize(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=size["width"],
                intermediate_size=size["ff"],
                projection_dim=size["projection"],
                num_hidden_layers=size["layers"],
                num_attention_heads=size["heads"],
                image_size=size["image"],
                patch_size=size["patch"],
            )
        ),
        seed,
    )
    tower = CLIPVision(**size)
    x = np.random.default_rng(seed).normal(size=(2, size["image"], size["image"], 3)).astype(np.float32)
    params = fill(tower, convert(oracle.state_dict(), CLIP), x)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        hidden = oracle.vision_model.post_layernorm(expected.last_hidden_state)
        tokens = oracle.visual_projection(hidden) / expected.image_embeds.norm(dim=1)[:, None, None]
    agree(tower, outputs, dict(hidden=hidden, pooled=expected.image_embeds, tokens=tokens), params, x)


def test_default_is_the_published_size():
    text = jax.eval_shape(CLIPText(vocab=49408).init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    vision = jax.eval_shape(CLIPVision().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    # openai/clip-vit-large-patch14 has 427,616,513 parameters: these two towers and the logit scale.
    assert sum(v.size for v in jax.tree.leaves((text, vision))) + 1 == 427_616_513


@pytest.mark.parametrize("side, size", [(64, 28), (20, 28), (28, 28)])
def test_clip_pixels_equals_torch(side, size):
    x = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    resized = torch.nn.functional.interpolate(nchw, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.48145466, 0.4578275, 0.40821073],
                                                         [0.26862954, 0.26130258, 0.27577711]))
    expected = ((resized + 1) / 2 - mean) / std
    assert oracles.relative_error(clip_pixels(jnp.asarray(x), size), expected.permute(0, 2, 3, 1)) < 1e-5


def test_clip_pixels_of_grey_images():
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1), minval=-1)
    np.testing.assert_allclose(clip_pixels(x, 8), clip_pixels(jnp.repeat(x, 3, -1), 8), atol=1e-6)


def test_half_precision_keeps_float32_outputs():
    """bfloat16 activations; the projections that alignment reads stay float32."""
    tower = CLIPVision(width=32, layers=1, heads=4, ff=64, patch=4, image=8, projection=24, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = jax.jit(tower.init)(jax.random.key(1), x)
    ours, exact = (jax.jit(t.apply)(params, x) for t in (tower, tower.clone(dtype=jnp.float32)))
    assert {v.dtype for v in ours} == {jnp.dtype("float32")}
    assert float(jnp.abs(ours.pooled - exact.pooled).max() / jnp.abs(exact.pooled).max()) < 0.05
