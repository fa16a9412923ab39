"""Back out: exports load in diffusers and transformers, say the same, and come back in with every bit."""

import numpy as np
import oracles
import published
import pytest
import torch
from safetensors.torch import load_file
from test_convert_sd import values
from test_convert_text import IDS, bert_gpt2, optimus_state  # noqa: F401  a fixture

from medm2g_jax import export
from medm2g_jax.cli import main
from medm2g_jax.convert import clip, converted, optimus, stable_diffusion
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.errors import UserError


def same(a, b, part):
    a, b = values(a, part), values(b, part)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_stable_diffusion_comes_back_whole(tmp_path, capsys):
    """In, out, in: bit-equal; StableDiffusionPipeline loads it and paints what the original paints."""
    from diffusers import StableDiffusionPipeline

    tokenizers = Tokenizers.train(["no mass . heart size is normal ."], tmp_path / "tok", 600)
    assert tokenizers.sizes["clip"] <= published.VOCAB
    parts = published.diffusers_folder(tmp_path / "published")
    (tmp_path / "tok" / "clip").rename(tmp_path / "published" / "tokenizer")
    stable_diffusion.convert(tmp_path / "published", tmp_path / "a")
    main(["convert", "export", "--from", str(tmp_path / "a"), "--to", str(tmp_path / "out"), "--as", "diffusers"])
    assert "medical advice" in capsys.readouterr().out
    assert "medical advice" in (tmp_path / "out" / "README.md").read_text()
    stable_diffusion.convert(tmp_path / "out", tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b", "sd15")
    for name in ("unet", "vae"):
        before, after = (next((tmp_path / f / name).glob("*.safetensors")) for f in ("published", "out"))
        before, after = load_file(before), load_file(after)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = StableDiffusionPipeline(
        vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=pipe.tokenizer, unet=parts["unet"],
        scheduler=published.scheduler(), safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    images = [
        p("no mass", num_inference_steps=2, height=16, width=16, output_type="np",
          latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))).images
        for p in (pipe, theirs)
    ]  # fmt: skip
    assert images[0].std() > 0
    np.testing.assert_allclose(images[0], images[1], atol=1e-6)


def test_half_precision_and_single_file_round_trip(tmp_path):
    from safetensors.torch import save_file

    parts = published.diffusers_folder(tmp_path / "published", dtype=torch.float16)
    save_file(published.compvis_state(parts), tmp_path / "v1.safetensors")
    stable_diffusion.convert(tmp_path / "v1.safetensors", tmp_path / "a")
    export.export(tmp_path / "a" / "sd15", tmp_path / "out", "diffusers")
    stable_diffusion.convert(tmp_path / "out", tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b", "sd15")


def test_clip_comes_back(tmp_path):
    import transformers

    theirs = published.clip()
    theirs.save_pretrained(tmp_path / "published")
    clip.convert(tmp_path / "published", tmp_path / "a")
    export.export(tmp_path / "a", tmp_path / "out", "clip")
    clip.convert(tmp_path / "out", tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b", "clip")
    loaded, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[598, 4, 9, 599, 599]])
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (m.eval()(ids, x) for m in (theirs, loaded))
    assert oracles.relative_error(a.text_embeds, b.text_embeds) < 1e-6
    assert oracles.relative_error(a.image_embeds, b.image_embeds) < 1e-6


def test_bert_and_gpt2_come_back(bert_gpt2, tmp_path):  # noqa: F811
    import transformers

    path, bert, gpt2 = bert_gpt2
    torch.save(optimus_state(bert, gpt2), tmp_path / "optimus-vae.pth")
    optimus.convert_optimus(tmp_path / "optimus-vae.pth", tmp_path / "a")
    record = converted.read(tmp_path / "a", "optimus")
    record.meta["net"]["text_vae"]["heads"] = 4  # the file does not tell; 12 are published
    import json

    (record.folder / "convert.json").write_text(json.dumps(record.meta))
    ids = torch.from_numpy(IDS).long()
    for name, model, cls in (("bert", bert, "BertModel"), ("gpt2", gpt2, "GPT2LMHeadModel")):
        export.export(tmp_path / "a", tmp_path / name, name)
        loaded, info = getattr(transformers, cls).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            a, b = (m.eval()(ids) for m in (model, loaded))
        assert torch.equal(a[0], b[0])
    # BERT and GPT-2 from here come in again; Optimus's own layers start afresh then.
    optimus.convert_bert_gpt2(tmp_path / "bert", tmp_path / "b", str(tmp_path / "gpt2"))
    before, after = values(tmp_path / "a", "optimus"), values(tmp_path / "b", "optimus")
    own = ("vae/encoder/latent", "vae/decoder/memory", "vae/decoder/embed", "vae/decoder/wte")
    shared = [n for n in before if not n.startswith(own)]
    assert all(np.array_equal(before[n], after[n]) for n in shared) and len(shared) == len(before) - 4
    assert oracles.relative_error(after["vae/decoder/wte/embedding"][:40], before["vae/decoder/wte/embedding"]) == 0


def test_what_cannot_be_exported_is_told(tmp_path):
    with pytest.raises(UserError, match="--as png: expected one of diffusers, clip"):
        export.export(tmp_path, tmp_path / "x", "png")
    with pytest.raises(UserError, match="needs --flow, one of"):
        export.export(tmp_path, tmp_path / "x", "diffusers")
    published.clip().save_pretrained(tmp_path / "published")
    clip.convert(tmp_path / "published", tmp_path / "a")
    with pytest.raises(UserError, match="no converted weights there"):
        export.export(tmp_path / "a", tmp_path / "x", "diffusers")
    with pytest.raises(UserError, match=r"--as bert is made from optimus/"):
        export.export(tmp_path / "a" / "clip", tmp_path / "x", "bert")
    with pytest.raises(UserError, match="no finished round"):
        export.export(tmp_path, tmp_path / "x", "safetensors")
    assert not (tmp_path / "x").exists()
