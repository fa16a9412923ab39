"""prompt_in: SD's hidden states out of shared tokens, by ridge regression; what a prompt does to eps survives."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
from safetensors import safe_open

from medm2g_jax.cli import main
from medm2g_jax.convert import captions, converted, prompt_in, weights
from medm2g_jax.data.text import Tokenizers, clip_ids
from medm2g_jax.errors import UserError

WORDS = captions.captions(300)


def test_captions_are_different_and_of_both_kinds():
    assert WORDS[0] == "" and len(set(WORDS)) == 300
    chest = [w for w in WORDS if "findings" in w or "impression" in w or "chest" in w]
    assert 60 < len(chest) < 200 and captions.captions(300) == WORDS
    with pytest.raises(ValueError, match="the grammar has"):
        captions.captions(10**6)


def test_ridge_finds_a_linear_map_and_holds_noise_down():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 6))
    x = rng.normal(size=(40, 5, 8))
    found, told = prompt_in.ridge(x[:30], x[:30] @ kernel, x[30:], x[30:] @ kernel)
    np.testing.assert_allclose(found, kernel, atol=1e-5)
    assert told["residual"] < 1e-6 and told["lambda"] == min(prompt_in.LAMBDAS)
    few, y = x[:2, :3], rng.normal(size=(2, 3, 6))  # 6 tokens, 8 features: noise is learnt by heart without lambda
    _, told = prompt_in.ridge(few, y, x[30:], np.zeros((10, 5, 6)) + 1e-3)
    assert told["lambda"] >= 1


def test_clip_ids_are_the_pipelines(tmp_path):
    tokenizers = Tokenizers.train(WORDS, tmp_path, 600)
    texts = ["", "a mass . no effusion .", "x " * 90]
    ids = clip_ids(tmp_path / "clip", texts, 20)
    for row, text in zip(ids, texts, strict=True):
        np.testing.assert_array_equal(row, tokenizers.encode(text, {"clip": 20})["clip"])
    with pytest.raises(UserError, match="no tokenizer there"):
        clip_ids(tmp_path / "nothing", texts, 20)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Published SD and CLIP with one text tower, as they are, and a projection of condition below 100."""
    path = tmp_path_factory.mktemp("prompt_in")
    tokenizers = Tokenizers.train(WORDS, path / "tok", 600)
    parts = published.diffusers_folder(path / "sd")
    theirs = published.clip(published.VOCAB)
    with torch.no_grad():
        tower = {k.removeprefix("text_model."): v for k, v in parts["text_encoder"].state_dict().items()}
        missing, _ = theirs.text_model.load_state_dict(tower, strict=False)
        assert not missing
        q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))
        theirs.text_projection.weight.copy_(torch.from_numpy(q * np.geomspace(1, 20, 32)))
    theirs.save_pretrained(path / "clip")
    assert tokenizers.sizes["clip"] == published.VOCAB
    shutil.copytree(path / "tok" / "clip", path / "clip", dirs_exist_ok=True)
    return path


def test_converted_sd_answers_shared_prompts(both, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompt_in, "COUNT", 96)
    monkeypatch.setattr(prompt_in, "HELD_OUT", 16)
    main(["convert", "sd15", "--from", str(both / "sd"), "--to", str(tmp_path)])
    assert "prompt_in" not in capsys.readouterr().out
    main(["convert", "clip", "--from", str(both / "clip"), "--to", str(tmp_path)])
    out = capsys.readouterr().out
    assert "prompt_in: residual 0." in out and "survives at step 0" in out
    found = weights.folder_of(str(tmp_path), "ct/flow", {"image_unet": {}, "image_vae": {}, "clip_text": {}})
    kernel = found.tensors["prompt_in/kernel"].read()
    assert kernel.shape == (32, 32) and not np.allclose(kernel, np.eye(32), atol=0.1)
    with safe_open(tmp_path / "sd15" / weights.PROMPT_IN, "numpy") as file:
        told = json.loads(file.metadata()["fit"])
    assert told["condition"] < 100 and told["residual"] < 0.2 and told["surviving"] > 0.8
    shapes = {"ct/prompt_in/kernel": (32, 32)}
    net = found.meta["net"]
    device = lambda name, shape: jnp.zeros(1).sharding  # noqa: E731
    params, origin = weights.load(str(tmp_path), "ct/flow", shapes, net, device)
    np.testing.assert_array_equal(params["ct/prompt_in/kernel"], kernel)
    assert origin["weights"] == "sd15"


def test_what_is_missing_is_told(both, tmp_path):
    with pytest.raises(UserError, match="medm2g convert sd15"):
        prompt_in.fit(tmp_path)
    assert not prompt_in.ready(tmp_path) and not converted.exists(tmp_path, "sd15")
