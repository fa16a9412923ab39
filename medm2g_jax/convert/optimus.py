"""The text flow's start (section 4): Versatile Diffusion's text UNet and the Optimus autoencoder, or BERT and GPT-2.

In Versatile Diffusion transformers belong to the modality of the *context*. A report generator reads images, so its
transformers come from the image-context blocks (`context="image"`), its other layers from the text part and its time
embedding from the one that both share. Taking all of the text part would give a network that reads text.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medm2g_jax.convert import converted, unet
from medm2g_jax.convert.files import Tensor, open_tensors, read_json, some, weights_in
from medm2g_jax.convert.rules import Rule, layer, match, parameters, part
from medm2g_jax.errors import UserError
from medm2g_jax.model import init
from medm2g_jax.nn.text_vae import TextVAE

# --- Versatile Diffusion's text UNet --------------------------------------------------------------------------------

# Parts of a Versatile Diffusion or CoDi file that the text flow does not use: prompt encoders, autoencoders, schedules,
# the image diffuser's own layers, CoDi's connectors.
OTHERS = (
    r"^(ctx|vae|clip|optimus|autokl|diffuser\.image|model\.diffusion_model\.unet_(image|audio|video))\."
    r"|connecters|^(betas|alphas_.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar)$"
    r"|^(image|text)_(logvar|scale_factor)|^model_ema\."
)


def vd_parts(source: Path, context: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The text flow's UNet in one of `unet.LAYOUTS`, transformers of the context asked for, and its config.

    Raises:
      UserError: not Versatile Diffusion, or a part is missing.
    """
    if context not in ("image", "text"):
        raise UserError(f"--context {context!r}: expected image or text")
    config: dict[str, Any] = {}
    if source.is_dir():
        found = {}
        for name in ("text", "image"):
            folder = source / f"{name}_unet"
            file = weights_in(folder, "diffusion_pytorch_model") if folder.is_dir() else None
            if file is None and (name == "text" or context == "image"):
                raise UserError(f"{source}: no {name}_unet/ with weights in it; expected Versatile Diffusion's folder")
            found[name] = open_tensors(file) if file else {}
        if (source / "text_unet" / "config.json").is_file():
            config = read_json(source / "text_unet" / "config.json")
        time = {}
    else:
        everything = open_tensors(source)
        front, shared = "diffuser.{}.", "diffuser.image.time_embed."
        if not part(everything, front.format("text")):
            front, shared = "model.diffusion_model.unet_{}.", "model.diffusion_model.time_embed."
        found = {name: part(everything, front.format(name)) for name in ("text", "image")}
        if not found["text"]:
            raise UserError(
                f"{source}: no text UNet in it; expected keys diffuser.text... or model.diffusion_model.unet_text..."
            )
        time = {f"time_embed.{k}": v for k, v in part(everything, shared).items()}
        taken = (front.format("text"), shared)
        left = [k for k in everything if not k.startswith(taken) and not re.search(OTHERS, k)]
        if left:
            raise UserError(f"{source}: {len(left)} left over: {some(left)}; expected Versatile Diffusion")
        found = {name: {k: v for k, v in f.items() if not re.search("connecters", k)} for name, f in found.items()}
    text = found["text"] | time
    sizes = unet.sizes_of(text, f"{source} (text UNet)")
    if sizes.kind != "text":
        raise UserError(f"{source}: its text part is an image UNet; expected Versatile Diffusion's text UNet")
    if context == "image":
        if not found["image"]:
            raise UserError(
                f"{source}: no image-context transformers in it, which a report generator starts from; bring the "
                "four-flow file, or take the text-context ones with --context text"
            )
        at = unet.transformers(sizes, unet.layout_of(text))
        image = {k: v for k, v in found["image"].items() if k.startswith(at)}
        text = {k: v for k, v in text.items() if not k.startswith(at)} | image
    return text, config


def convert_vd(source: Path, to: Path, context: str = "image") -> converted.Summary:
    """Versatile Diffusion (a .pth of either layout, or the diffusers folder) -> to/vd: the text flow's UNet."""
    found, config = vd_parts(Path(source), context)
    what = f"{source} (text UNet, {context} context)"
    sizes = unet.sizes_of(found, what)
    steps = match(unet.table(sizes, unet.layout_of(found)), found, sizes.expected(), what)
    heads, groups = config.get("attention_head_dim", 8), config.get("norm_num_groups", 32)
    meta = dict(
        source="Versatile Diffusion",
        licence=converted.LICENCES["vd"],
        context=context,
        net=dict(width=sizes.width, text_unet=sizes.net(heads, groups)),
    )
    return converted.write(to, "vd", steps, meta)


# --- Optimus --------------------------------------------------------------------------------------------------------

BUFFERS = r"position_ids$|\.attn\.(bias|masked_bias)$|^(encoder\.)?cls\."
_BERT_EMBEDDINGS = ("word", "position", "token_type")
_BERT_LAYER = (
    *((f"attention.self.{name}", f"attn/{name[0]}", "dense") for name in ("query", "key", "value")),
    ("attention.output.dense", "attn/out", "dense"),
    ("attention.output.LayerNorm", "attn_norm", "norm"),
    ("intermediate.dense", "fc_1", "dense"),
    ("output.dense", "fc_2", "dense"),
    ("output.LayerNorm", "ff_norm", "norm"),
)
_GPT2_LAYER = (("ln_1", "norm"), ("attn.c_attn", "in_out"), ("attn.c_proj", "in_out"), ("ln_2", "norm"))
_GPT2_LAYER += (("mlp.c_fc", "in_out"), ("mlp.c_proj", "in_out"))
# Optimus's own layers: theirs, ours
_EXTRA = (
    ("encoder.linear", "encoder/latent"),
    ("decoder.transformer.linear", "decoder/memory"),
    ("decoder.transformer.linear_emb", "decoder/embed"),
)
WTE = "decoder.transformer.wte.weight"


def bert_table(layers: int, front: str, prefix: str) -> list[Rule]:
    """BERT without heads. Norms are spelled gamma and beta in the oldest files."""
    rules = []
    for name in _BERT_EMBEDDINGS:
        rules += layer(f"{front}embeddings.{name}_embeddings", f"{prefix}/embeddings/{name}", "embedding")
    norms = [(f"{front}embeddings.LayerNorm", f"{prefix}/embeddings/norm")]
    for i in range(layers):
        for theirs, ours, kind in _BERT_LAYER:
            theirs, ours = f"{front}encoder.layer.{i}.{theirs}", f"{prefix}/layer_{i}/{ours}"
            rules += layer(theirs, ours, kind)
            norms += [(theirs, ours)] if kind == "norm" else []
    rules += layer(*norms[0], "norm") + [rule for norm in norms for rule in layer(*norm, "old_norm")]
    return rules + layer(f"{front}pooler.dense", f"{prefix}/pooler", "dense")


def gpt2_table(layers: int, front: str, prefix: str) -> list[Rule]:
    """GPT-2 without its tied output layer."""
    rules = [rule for name in ("wte", "wpe") for rule in layer(f"{front}{name}", f"{prefix}/{name}", "embedding")]
    rules += layer(f"{front}ln_f", f"{prefix}/ln_f", "norm")
    for i in range(layers):
        for name, kind in _GPT2_LAYER:
            rules += layer(f"{front}h.{i}.{name}", f"{prefix}/h_{i}/{name.replace('.', '/')}", kind)
    return rules


def table(layers: int, prefix: str = "vae") -> list[Rule]:
    """Optimus in its own layout."""
    rules = bert_table(layers, "encoder.", f"{prefix}/encoder")
    rules += gpt2_table(layers, "decoder.transformer.", f"{prefix}/decoder")
    return rules + [rule for theirs, ours in _EXTRA for rule in layer(theirs, f"{prefix}/{ours}", "matrix")]


def sizes_of(found: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """config.net.text_vae without heads, and both vocabularies, of the networks in these tensors (Optimus's layout)."""

    def shape(key):
        if key not in found:
            raise UserError(f"{what}: 1 missing: {key}")
        return found[key].shape

    def count(pattern):
        return len({m[1] for m in (re.match(pattern, key) for key in found) if m})

    bert = shape("encoder.embeddings.word_embeddings.weight")
    gpt2 = shape(WTE)
    layers = count(r"encoder\.encoder\.layer\.(\d+)\."), count(r"decoder\.transformer\.h\.(\d+)\.")
    ff = (
        shape("encoder.encoder.layer.0.intermediate.dense.weight")[0],
        shape("decoder.transformer.h.0.mlp.c_fc.weight")[1],
    )
    for name, (a, b) in (("layers", layers), ("width", (bert[1], gpt2[1])), ("feed-forward width", ff)):
        if a != b:
            raise UserError(f"{what}: {name} {a} in BERT and {b} in GPT-2; expected two networks of one size")
    return dict(
        width=bert[1],
        layers=layers[0],
        ff=ff[0],
        latent=shape("encoder.linear.weight")[0] // 2,
        bert_positions=shape("encoder.embeddings.position_embeddings.weight")[0],
        gpt2_positions=shape("decoder.transformer.wpe.weight")[0],
        bert_vocab=bert[0],
        gpt2_vocab=gpt2[0],
    )


def _vae(sizes: Mapping[str, Any]) -> tuple[TextVAE, tuple]:
    return TextVAE(**sizes, heads=1), (jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32))


def convert_optimus(source: Path, to: Path, bert: str | None = None, gpt2: str | None = None) -> converted.Summary:
    """optimus-vae.pth, or the file of Versatile Diffusion or CoDi that holds it -> to/optimus.

    Args:
      bert, gpt2: folders of the two tokenizers, which the file does not hold.
    """
    everything = open_tensors(Path(source))
    for front in ("", "optimus.", "vae.text."):
        if f"{front}encoder.embeddings.word_embeddings.weight" in everything:
            break
    else:
        raise UserError(f"{source}: no Optimus in it; expected encoder.embeddings.word_embeddings.weight")
    tokenizers = {name: Path(path) for name, path in (("bert", bert), ("gpt2", gpt2)) if path}
    for name, path in tokenizers.items():
        if not path.is_dir():
            raise UserError(f"--{name} {path}: no such folder; expected that of the {name} tokenizer")
    licence = converted.LICENCES["optimus"]
    return _write(part(everything, front), to, f"{source}", "Optimus", licence, tokenizers, heads=12)


def convert_bert_gpt2(bert: Path, to: Path, gpt2: str | None = None, latent: int | None = None) -> converted.Summary:
    """BERT and GPT-2 from transformers folders -> to/optimus, Optimus's extra layers and special words initialised.

    Args:
      latent: features of z; default the networks' width.
    """
    if gpt2 is None:
        raise UserError("medm2g convert bert-gpt2 needs --from BERT_FOLDER and --gpt2 GPT2_FOLDER")
    found: dict[str, Tensor] = {}
    heads = []
    for name, folder, prefix, fronts, activation in (
        ("bert", Path(bert), "encoder.", ("bert.", ""), "gelu"),
        ("gpt2", Path(gpt2), "decoder.transformer.", ("transformer.", ""), "gelu_new"),
    ):
        config = read_json(folder / "config.json")
        if config.get("model_type") != name:
            raise UserError(f"{folder / 'config.json'}: model_type {config.get('model_type')!r}, expected {name!r}")
        act = config.get("hidden_act" if name == "bert" else "activation_function", activation)
        if act != activation:
            raise UserError(f"{folder / 'config.json'}: activation {act!r}, expected {activation!r}")
        heads.append(config.get("num_attention_heads" if name == "bert" else "n_head", 12))
        file = weights_in(folder, "model", "pytorch_model")
        if file is None:
            raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin in it")
        tensors = open_tensors(file)
        front = next(f for f in fronts if any(k.startswith(f) for k in tensors))
        for key, tensor in tensors.items():
            own = key.startswith(front)
            found[prefix + key.removeprefix(front) if own else f"{prefix.split('.')[0]}.{key}"] = tensor
    if len(set(heads)) > 1:
        raise UserError(f"BERT has {heads[0]} heads and GPT-2 {heads[1]}; expected two networks of one size")
    if WTE not in found:
        raise UserError(f"{gpt2}: 1 missing: wte.weight")
    new = 0 if _has_specials(Path(gpt2)) else 3  # <PAD>, <BOS>, <EOS>
    found |= _fresh(found, new, latent)
    licence = converted.LICENCES["bert-gpt2"]
    what = f"{bert} and {gpt2}"
    return _write(found, to, what, "BERT and GPT-2", licence, {"bert": Path(bert), "gpt2": Path(gpt2)}, heads[0])


def _write(found, to, what, source, licence, tokenizers, heads) -> converted.Summary:
    sizes = sizes_of(found, what)
    vae, args = _vae(sizes)
    tied = {key: WTE for key in ("decoder.lm_head.weight",) if key in found}
    steps = match(table(sizes["layers"]), found, parameters(vae, "vae", *args), what, BUFFERS, tied)
    vocab = {name: sizes.pop(f"{name}_vocab") for name in ("bert", "gpt2")}
    net = dict(text_vae=dict(sizes, heads=heads))
    meta = dict(source=source, licence=licence, net=net, vocab=vocab, scales=dict(text=1.0))
    return converted.write(to, "optimus", steps, meta, tokenizers)


def _has_specials(folder: Path) -> bool:
    """Does the tokenizer there know Optimus's three special words already?"""
    file = folder / "tokenizer.json"
    return file.is_file() and "<PAD>" in file.read_text(encoding="utf-8")


def _fresh(found: Mapping[str, Tensor], new: int, latent: int | None) -> dict[str, Tensor]:
    """Optimus's own layers as our network initialises them, and the token embedding with `new` more rows."""
    wte = found[WTE]
    words, width = wte.shape
    grown = {WTE: Tensor((words + new, width), wte.dtype, lambda: None, wte.file)}
    features = latent or width
    blank = {
        f"{theirs}.weight": Tensor(shape, wte.dtype, lambda: None, wte.file)
        for (theirs, _), shape in zip(
            _EXTRA,
            ((2 * features, width), (_layers(found) * width, features), (width, features)),
            strict=True,
        )
    }
    vae, args = _vae(sizes_of({**found, **blank, **grown}, "BERT and GPT-2"))

    def some_of(key):
        fresh = init(vae, "vae", key, *args)
        rows = fresh["vae/decoder/wte/embedding"][words:]
        return {f"{theirs}.weight": fresh[f"vae/{ours}/kernel"].T for theirs, ours in _EXTRA}, rows

    extra, rows = jax.jit(some_of)(jax.random.key(0))  # all else is dropped by the compiler
    out = {
        key: Tensor(value.shape, wte.dtype, lambda value=value: np.asarray(value).astype(wte.dtype), wte.file)
        for key, value in extra.items()
    }
    rows = np.asarray(rows).astype(wte.dtype)
    out[WTE] = Tensor((words + new, width), wte.dtype, lambda: np.concatenate([wte.read(), rows]), wte.file)
    return out


def _layers(found: Mapping[str, Tensor]) -> int:
    return len({m[1] for m in (re.match(r"decoder\.transformer\.h\.(\d+)\.", key) for key in found) if m})
