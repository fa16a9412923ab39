"""CLIP, Versatile Diffusion, Optimus, BERT and GPT-2: converted, our networks say what torch's say."""

import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_sd import nested, values
from test_text_unet import torch_text_unet

from medm2g_jax.cli import main
from medm2g_jax.convert import clip, converted, optimus
from medm2g_jax.errors import UserError
from medm2g_jax.nn.attention import context
from medm2g_jax.nn.clip import CLIPText, CLIPVision
from medm2g_jax.nn.text_unet import TextUNet
from medm2g_jax.nn.text_vae import TextVAE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXT = published.SIZES | dict(latent=12)
VAE = dict(width=32, layers=2, heads=4, ff=64, bert_positions=16, gpt2_positions=20)


def test_clip_both_towers(tmp_path):
    theirs = published.clip()
    theirs.save_pretrained(tmp_path / "published")
    main(["convert", "clip", "--from", str(tmp_path / "published"), "--to", str(tmp_path)])
    flat = values(tmp_path, "clip")
    net = converted.read(tmp_path, "clip").meta["net"]
    assert net == dict(
        width=32,
        clip_text=dict(width=32, layers=2, ff=64, heads=2, length=77),
        clip_image=dict(width=32, layers=2, ff=64, heads=2, patch=8, image=16),
    )
    ids = np.array([[598, 4, 9, 599, 599], [598, 7, 3, 2, 599]], np.int32)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids).long(), torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        hidden = theirs.vision_model.post_layernorm(out.vision_model_output.last_hidden_state)
        image = theirs.visual_projection(hidden)
    tower = CLIPText(vocab=published.VOCAB, **net["clip_text"], projection=32)
    ours = oracles.fast_jit(tower.apply)(nested(flat, "text"), ids)
    pooled = ours.pooled / np.linalg.norm(ours.pooled, axis=1, keepdims=True)
    assert oracles.relative_error(pooled, out.text_embeds) <= 1e-4
    assert oracles.relative_error(ours.hidden, out.text_model_output.last_hidden_state) <= 1e-4
    tower = CLIPVision(**net["clip_image"], projection=32)
    ours = oracles.fast_jit(tower.apply)(nested(flat, "vision"), x)
    assert oracles.relative_error(ours.pooled, image[:, 0]) <= 1e-4
    assert oracles.relative_error(ours.tokens, image / image[:, :1].norm(dim=-1, keepdim=True)) <= 1e-4


def test_other_clips_are_refused(tmp_path):
    import transformers

    published.clip_text().save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="model_type 'clip_text_model', expected 'clip'"):
        clip.convert(tmp_path / "text", tmp_path)
    theirs = published.clip()
    theirs.config.text_config.hidden_act = "gelu"
    theirs.save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="hidden_act 'gelu', expected 'quick_gelu'"):
        clip.convert(tmp_path / "clip", tmp_path)
    assert transformers and not (tmp_path / "clip" / "weights.safetensors").exists()


@pytest.fixture(scope="module")
def versatile(tmp_path_factory):
    """Versatile Diffusion's folder; its text and image UNets in torch."""
    path = tmp_path_factory.mktemp("vd") / "published"
    text = oracles.scramble(torch_text_unet(**TEXT), 5)
    image = published.unet()
    text.save_pretrained(path / "text_unet")
    image.save_pretrained(path / "image_unet")
    return path, text, image


def text_eps(weights, context_tokens):
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(2, 12)).astype(np.float32), np.array([3, 871])
    unet = TextUNet(**TEXT)
    params = nested(values(weights, "vd"), "unet")
    return z, t, oracles.fast_jit(unet.apply)(params, z, t, context(jnp.asarray(context_tokens)))


def test_report_generators_take_image_context_transformers(versatile, tmp_path):
    """Facts 2.2: the transformers come from the image-context blocks; swapping contexts changes what is said."""
    path, text, image = versatile
    prompt = np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)
    main(["convert", "vd", "--from", str(path), "--to", str(tmp_path / "image")])
    optimus.convert_vd(path, tmp_path / "text", "text")

    def theirs(model, z, t):
        with torch.no_grad():
            return model(torch.tensor(z)[:, :, None, None], torch.tensor(t), torch.tensor(prompt)).sample[:, :, 0, 0]

    z, t, plain = text_eps(tmp_path / "text", prompt)
    assert oracles.relative_error(plain, theirs(text, z, t)) <= 1e-4
    mixed = torch_text_unet(**TEXT).eval()
    at = {k: v for k, v in image.state_dict().items() if ".attentions." in k}
    assert set(at) == {k for k in mixed.state_dict() if ".attentions." in k}
    mixed.load_state_dict(text.state_dict() | at)
    _, _, swapped = text_eps(tmp_path / "image", prompt)
    assert oracles.relative_error(swapped, theirs(mixed, z, t)) <= 1e-4
    assert oracles.relative_error(swapped, plain) > 1e-2
    assert converted.read(tmp_path / "image", "vd").meta["context"] == "image"


def compvis(model, kind: str) -> dict:
    """The UNet of a first-layout file: CompVis numbering, the text part's samplers without .op and .conv."""
    state = model.state_dict()
    if kind == "text":
        state = {k.replace("samplers.0.", "samplers.0.conv."): v for k, v in state.items()}
    out = published.compvis_unet(state)
    if kind == "text":
        out = {k.replace(".op.", ".").replace(".1.conv.", ".1.").replace(".2.conv.", ".2."): v for k, v in out.items()}
    return out


def numbered(state: dict) -> dict:
    """CompVis numbering -> the layout of 2023: data blocks and context blocks numbered on their own."""
    out, data, ctx = {}, {}, {}
    order = [f"input_blocks.{i}" for i in range(6)] + [f"middle_block.{i}" for i in range(3)]
    order += [f"output_blocks.{i}" for i in range(6)] + ["out"]
    for block in order:
        keys = [k for k in state if k.startswith(block + ".")]
        numbers = sorted({k[len(block) + 1 :].split(".")[0] for k in keys})
        inner = [""] if block == "out" or block.startswith("mid") else numbers
        for i in inner:
            front = f"{block}.{i}." if i else f"{block}."
            mine = [k for k in keys if k.startswith(front)]
            is_ctx = any("transformer_blocks" in k for k in mine)
            book, name = (ctx, "context_blocks") if is_ctx else (data, "data_blocks")
            place = book.setdefault(front, len(book))
            for k in mine:
                out[f"{name}.{place}.0.{k[len(front) :]}"] = state[k]
    return out


@pytest.mark.parametrize("layout", ["2022", "2023"])
def test_both_pth_layouts(versatile, tmp_path, layout):
    path, text, image = versatile
    parts = {"text": compvis(text, "text"), "image": compvis(image, "image")}
    time = {k: v for k, v in parts["text"].items() if k.startswith("time_embed.")}
    parts = {n: {k: v for k, v in p.items() if not k.startswith("time_embed.")} for n, p in parts.items()}
    if layout == "2022":
        state = {f"model.diffusion_model.unet_{n}.{k}": v for n, p in parts.items() for k, v in p.items()}
        state |= {f"model.diffusion_model.{k}": v for k, v in time.items()}
    else:
        state = {f"diffuser.{n}.{k}": v for n, p in parts.items() for k, v in numbered(p).items()}
        state |= {f"diffuser.image.{k}": v for k, v in time.items()}
        state |= {"ctx.text.model.logit_scale": torch.ones(()), "vae.image.quant_conv.bias": torch.ones(8)}
    state["betas"] = torch.zeros(3)
    torch.save(state, tmp_path / "vd.pth")
    for which in ("image", "text"):
        optimus.convert_vd(path, tmp_path / f"folder_{which}", which)
        optimus.convert_vd(tmp_path / "vd.pth", tmp_path / which, which)
        folder, file = (values(tmp_path / n, "vd") for n in (f"folder_{which}", which))
        assert folder.keys() == file.keys()
        assert all(np.array_equal(folder[n], file[n]) for n in folder if not n.startswith("unet/time/"))
    # CoDi: the text UNet alone, with its own time embedding and connectors that are not ours.
    state = {f"model.diffusion_model.unet_text.{k}": v for k, v in (parts["text"] | time).items()}
    state["model.diffusion_model.unet_text.connecters_out.0.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "codi.pth")
    optimus.convert_vd(tmp_path / "codi.pth", tmp_path / "codi", "text")
    codi, folder = values(tmp_path / "codi", "vd"), values(tmp_path / "folder_text", "vd")
    assert codi.keys() == folder.keys() and all(np.array_equal(codi[n], folder[n]) for n in folder)
    with pytest.raises(UserError, match="no image-context transformers.*--context text"):
        optimus.convert_vd(tmp_path / "codi.pth", tmp_path / "out")
    torch.save(state | {"surprise": torch.zeros(1)}, tmp_path / "vd.pth")
    with pytest.raises(UserError, match="1 left over: surprise"):
        optimus.convert_vd(tmp_path / "vd.pth", tmp_path / "out")


@pytest.fixture(scope="module")
def bert_gpt2(tmp_path_factory):
    """transformers folders of BERT and GPT-2; both in torch."""
    import transformers

    path = tmp_path_factory.mktemp("lm")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=20)
    )
    for i, (name, model) in enumerate((("bert", bert), ("gpt2", gpt2))):
        oracles.scramble(model, 7 + i).save_pretrained(path / name)
    return path, bert, gpt2


IDS = np.array([[2, 7, 9, 13, 3, 0, 0], [2, 11, 5, 6, 8, 39, 3]], np.int32)


def optimus_state(bert, gpt2, latent=24) -> dict:
    """optimus-vae.pth: no prefix, tied output layer and causal masks included."""
    generator = torch.Generator().manual_seed(0)
    state = {f"encoder.{k}": v for k, v in bert.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in gpt2.state_dict().items()}
    for key, shape in (
        ("encoder.linear.weight", (2 * latent, 32)),
        ("decoder.transformer.linear.weight", (64, latent)),
        ("decoder.transformer.linear_emb.weight", (32, latent)),
    ):
        state[key] = 0.2 * torch.randn(shape, generator=generator)
    return state | {f"decoder.transformer.h.{i}.attn.bias": torch.ones(1, 1, 20, 20) for i in range(2)}


@pytest.mark.parametrize("front", ["", "optimus.", "vae.text."])
def test_optimus(bert_gpt2, tmp_path, front):
    import transformers

    path, bert, gpt2 = bert_gpt2
    state = optimus_state(bert, gpt2)
    torch.save({front + k: v for k, v in state.items()}, tmp_path / "optimus-vae.pth")
    optimus.convert_optimus(tmp_path / "optimus-vae.pth", tmp_path)
    if front:
        assert len(values(tmp_path, "optimus")) == len(state) - 3
        return
    params = nested(values(tmp_path, "optimus"), "vae")
    vae = TextVAE(bert_vocab=50, gpt2_vocab=40, latent=24, **VAE)
    z = np.random.default_rng(3).normal(size=(2, 24)).astype(np.float32)
    past = transformers.DynamicCache()
    with torch.no_grad():
        ids, zt = torch.from_numpy(IDS).long(), torch.from_numpy(z)
        moments = bert(ids, attention_mask=(ids > 0).long()).pooler_output @ state["encoder.linear.weight"].T
        memory = zt @ state["decoder.transformer.linear.weight"].T
        for i, chunk in enumerate(memory.chunk(2, dim=1)):
            slot = chunk.reshape(2, 1, 4, 8).transpose(1, 2)
            past.update(slot, slot, i)
        embedded = gpt2.transformer.wte(ids) + (zt @ state["decoder.transformer.linear_emb.weight"].T)[:, None]
        logits = gpt2(inputs_embeds=embedded, past_key_values=past, position_ids=torch.arange(1, 8)[None]).logits
    mean, logvar = oracles.fast_jit(lambda p, i: vae.apply(p, i, method="encode"))(params, IDS)
    assert oracles.relative_error(np.concatenate([mean, logvar], 1), moments) <= 1e-4
    ours = oracles.fast_jit(lambda p, z, i: vae.apply(p, z, i, method="logits"))(params, z, IDS)
    assert oracles.relative_error(ours, logits) <= 1e-4


def test_an_untied_output_layer_is_refused(bert_gpt2, tmp_path):
    state = optimus_state(*bert_gpt2[1:])
    state["decoder.lm_head.weight"] = state["decoder.lm_head.weight"] + 1
    torch.save(state, tmp_path / "optimus-vae.pth")
    with pytest.raises(UserError, match="decoder.lm_head.weight should repeat decoder.transformer.wte.weight"):
        optimus.convert_optimus(tmp_path / "optimus-vae.pth", tmp_path)


def test_bert_and_gpt2(bert_gpt2, tmp_path):
    """Extra layers are initialised, three special words added; old spellings of keys give the same weights."""
    path, bert, gpt2 = bert_gpt2
    arguments = ["--from", str(path / "bert"), "--gpt2", str(path / "gpt2"), "--to", str(tmp_path / "optimus")]
    main(["convert", "bert-gpt2", *arguments])
    flat = values(tmp_path, "optimus")
    wte = gpt2.transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(flat["vae/decoder/wte/embedding"][:40], wte)
    assert flat["vae/decoder/wte/embedding"].shape == (43, 32) and flat["vae/decoder/wte/embedding"][40:].std() > 0
    assert flat["vae/encoder/latent/kernel"].shape == (32, 64) and flat["vae/decoder/memory/kernel"].shape == (32, 64)
    assert np.all(flat["vae/encoder/latent/kernel"][:, 32:] == 0)  # logvar starts at 0
    vae = TextVAE(bert_vocab=50, gpt2_vocab=43, latent=32, **VAE)
    with torch.no_grad():
        ids = torch.from_numpy(IDS).long()
        pooled = bert(ids, attention_mask=(ids > 0).long()).pooler_output.numpy()
    mean, _ = oracles.fast_jit(lambda p, i: vae.apply(p, i, method="encode"))(nested(flat, "vae"), IDS)
    assert oracles.relative_error(mean, pooled @ flat["vae/encoder/latent/kernel"][:, :32]) <= 1e-4
    # As published long ago: bert. in front, gamma and beta, heads of pre-training; GPT-2 without transformer.
    import shutil

    shutil.copytree(path, tmp_path / "old")
    file = tmp_path / "old" / "bert" / "model.safetensors"
    state = {f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
             for k, v in load_file(file).items()}  # fmt: skip
    save_file(state | {"cls.predictions.bias": torch.zeros(50)}, file)
    file = tmp_path / "old" / "gpt2" / "model.safetensors"
    state = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 20, 20)}, file)
    optimus.convert_bert_gpt2(tmp_path / "old" / "bert", tmp_path / "again", str(tmp_path / "old" / "gpt2"))
    old = values(tmp_path / "again", "optimus")
    assert old.keys() == flat.keys() and all(np.array_equal(old[n], flat[n]) for n in flat)


def test_language_models_with_heads_buffers_and_wrappers(bert_gpt2, tmp_path, capsys):
    """A masked BERT has no pooler: ours starts afresh, and that is said. GPT-2 with its output layer and masks."""
    import shutil

    path, _, gpt2 = bert_gpt2
    optimus.convert_bert_gpt2(path / "bert", tmp_path / "plain", str(path / "gpt2"))
    plain = values(tmp_path / "plain", "optimus")
    shutil.copytree(path, tmp_path / "lm")
    file = tmp_path / "lm" / "bert" / "model.safetensors"
    state = {f"module.bert.{k}": v for k, v in load_file(file).items() if not k.startswith("pooler.")}
    heads = {"bias": torch.ones(50), "decoder.weight": torch.ones(50, 32), "transform.dense.bias": torch.ones(32)}
    save_file(state | {f"module.cls.predictions.{k}": v for k, v in heads.items()}, file)
    file = tmp_path / "lm" / "gpt2" / "model.safetensors"
    state = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 20, 20), "h.1.attn.masked_bias": torch.ones(())}
    wte = state["wte.weight"]
    save_file({f"_orig_mod.transformer.{k}": v for k, v in state.items()} | {"_orig_mod.lm_head.weight": wte + 0}, file)
    arguments = ["--from", str(tmp_path / "lm" / "bert"), "--gpt2", str(tmp_path / "lm" / "gpt2")]
    main(["convert", "bert-gpt2", *arguments, "--to", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "without pooler" in out and "no gpt2 tokenizer in" in out and "read back: " in out
    found = values(tmp_path / "out", "optimus")
    assert found.keys() == plain.keys()
    assert {n for n in found if not np.array_equal(found[n], plain[n])} <= {
        "vae/encoder/pooler/kernel", "vae/encoder/pooler/bias"
    }  # fmt: skip
    assert found["vae/encoder/pooler/kernel"].std() > 0.01 and not found["vae/encoder/pooler/bias"].any()
    save_file(state | {"lm_head.weight": wte + 1}, file)
    with pytest.raises(UserError, match="gpt2: lm_head.weight should repeat wte.weight"):
        optimus.convert_bert_gpt2(path / "bert", tmp_path / "x", str(tmp_path / "lm" / "gpt2"))
    save_file({"body.weight": wte + 0}, file)
    with pytest.raises(UserError, match="1 missing: wte.weight; its keys are body.weight. Expected gpt2"):
        optimus.convert_bert_gpt2(path / "bert", tmp_path / "x", str(tmp_path / "lm" / "gpt2"))
    assert gpt2 is not None and not (tmp_path / "x").exists()


def test_clip_in_wrappers(tmp_path):
    published.clip().save_pretrained(tmp_path / "clip")
    clip.convert(tmp_path / "clip", tmp_path / "plain")
    prints = converted.read(tmp_path / "plain", "clip").meta["crc32"]
    file = tmp_path / "clip" / "model.safetensors"
    state = load_file(file)
    for i, form in enumerate((
        {f"module.{k}": v for k, v in state.items()},
        {f"clip.{k}": v for k, v in state.items()},
        {k.removeprefix("text_model."): v for k, v in state.items()},
        state | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    )):  # fmt: skip
        save_file(form, file)
        clip.convert(tmp_path / "clip", tmp_path / str(i))
        assert converted.read(tmp_path / str(i), "clip").meta["crc32"] == prints


def classic(folder, made, added: dict[str, int]) -> int:
    """vocab.json, merges.txt and added_tokens.json of a GPT-2 tokenizer without Optimus's words; its size."""
    import json

    model = json.loads((made / "tokenizer.json").read_text())["model"]
    vocab = {w: i for w, i in model["vocab"].items() if w not in ("<PAD>", "<BOS>", "<EOS>")}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "added_tokens.json").write_text(json.dumps({w: len(vocab) + i for w, i in added.items()}))
    return len(vocab)


@pytest.mark.parametrize("added, more", [
    ({"<PAD>": 0, "<BOS>": 1, "<EOS>": 2}, 0),  # Optimus's own folder
    ({"<|pad|>": 0}, 3),
    ({"<PAD>": 0}, 2),
])  # fmt: skip
def test_a_gpt2_folder_with_added_tokens(bert_gpt2, tmp_path, added, more):
    """What was added is copied, the embedding has a row for every id, and the result loads."""
    import shutil

    import transformers

    from medm2g_jax.data.text import Tokenizers

    path, _, _ = bert_gpt2
    Tokenizers.train(["no mass . heart size is normal ."], tmp_path / "tok", 600)
    folder = tmp_path / "gpt2"
    folder.mkdir()
    words = classic(folder, tmp_path / "tok" / "gpt2", added) + len(added)
    config = transformers.GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    optimus.convert_bert_gpt2(path / "bert", tmp_path / "w", str(folder))
    there = tmp_path / "w" / "optimus" / "tokenizers" / "gpt2"
    assert (there / "added_tokens.json").is_file()
    assert values(tmp_path / "w", "optimus")["vae/decoder/wte/embedding"].shape == (words + more, 32)
    # With the other two beside it a run loads it, at the size of the network.
    for name in ("clip", "bert"):
        shutil.copytree(tmp_path / "tok" / name, there.parent / name)
    found = Tokenizers.load(there.parent)
    assert found.sizes["gpt2"] == words + more
    ids = found.encode("no mass", {"gpt2": 16})["gpt2"]
    assert ids[0] == words + more - 2 and ids[-1] == words + more - 3 and found.decode(ids[1:]) == "no mass"
    # A tokenizer of which a file is missing, and one with fewer words than the network: nothing is written.
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="gpt2: no tokenizer there"):
        optimus.convert_bert_gpt2(path / "bert", tmp_path / "x", str(folder))
    shutil.copytree(path / "gpt2", tmp_path / "small")
    shutil.copy(tmp_path / "tok" / "gpt2" / "tokenizer.json", tmp_path / "small")
    big = transformers.GPT2Config(vocab_size=700, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=20)
    transformers.GPT2LMHeadModel(big).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="small: its tokenizer has .* and wte.weight rows for 700"):
        optimus.convert_bert_gpt2(path / "bert", tmp_path / "x", str(tmp_path / "small"))
    assert not (tmp_path / "x").exists()
