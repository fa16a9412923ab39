"""The two CLIP towers against transformers, and the preparation of pixels against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles_vae import CLIP, convert, fill, randomize, relative_error

from medm2g_jax.nn.clip import CLIPText, CLIPVision, clip_pixels

transformers = pytest.importorskip("transformers")


def test_text_equals_transformers():
    oracle = randomize(
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=60,
                hidden_size=32,
                intermediate_size=64,
                projection_dim=24,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=11,
                eos_token_id=59,
            )
        )
    )
    tower = CLIPText(vocab=60, width=32, layers=3, heads=4, ff=64, length=11, projection=24)
    # CLIP pads with its end token: pooled is the first of them.
    ids = np.array([[58, 4, 9, 59, 59, 59, 59, 59, 59], [58, 7, 3, 2, 1, 9, 30, 31, 59]], np.int32)
    params = fill(tower, convert(oracle.state_dict(), CLIP), ids)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(ids).long())
        tokens = oracle.text_projection(expected.last_hidden_state)
        tokens = tokens / expected.text_embeds.norm(dim=1)[:, None, None]
    ours = jax.jit(tower.apply)(params, ids)
    assert relative_error(ours.hidden, expected.last_hidden_state) < 1e-5
    assert relative_error(ours.pooled, expected.text_embeds) < 1e-5
    assert relative_error(ours.tokens, tokens) < 1e-5
    np.testing.assert_allclose(jnp.linalg.norm(ours.tokens[0, 3]), 1, rtol=1e-5)


def test_vision_equals_transformers():
    oracle = randomize(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                projection_dim=24,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=20,
                patch_size=5,
            )
        )
    )
    tower = CLIPVision(width=32, layers=3, heads=4, ff=64, patch=5, image=20, projection=24)
    x = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    params = fill(tower, convert(oracle.state_dict(), CLIP), x)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        hidden = oracle.vision_model.post_layernorm(expected.last_hidden_state)
        tokens = oracle.visual_projection(hidden) / expected.image_embeds.norm(dim=1)[:, None, None]
    ours = jax.jit(tower.apply)(params, x)
    assert ours.tokens.shape == (2, 17, 24)
    assert relative_error(ours.hidden, hidden) < 1e-5
    assert relative_error(ours.pooled, expected.image_embeds) < 1e-5
    assert relative_error(ours.tokens, tokens) < 1e-5


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
    assert relative_error(clip_pixels(jnp.asarray(x), size), expected.permute(0, 2, 3, 1)) < 1e-5


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
