"""The text flow's start (section 4): Versatile Diffusion's text UNet and the Optimus autoencoder, or BERT and GPT-2.

In Versatile Diffusion transformers belong to the modality of the *context*. A report generator reads images, so its
transformers come from the image-context blocks (`context="image"`), its other layers from the text part and its time
embedding from the one that both share. Taking all of the text part would give a network that reads text.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from medm2g_jax.convert import converted, fields, stable_diffusion, unet
from medm2g_jax.convert.files import Tensor, open_published, read_json, some, weights_in
from medm2g_jax.convert.rules import Rule, layer, match, parameters, part
from medm2g_jax.data import text as tokenization
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
# A key of its text UNet in each layout, whatever a training program wrote in front of it.
ANCHORS = (
    "diffuser.text.data_blocks.0.0.weight",
    "diffuser.text.input_blocks.0.0.weight",
    "model.diffusion_model.unet_text.input_blocks.0.0.weight",
    "model.diffusion_model.unet_text.data_blocks.0.0.weight",
)
SCALE = "text_scale_factor"


def vd_parts(
    source: Path, context: str, notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, stable_diffusion.Config]]:
    """The text flow's UNet in one of `unet.LAYOUTS`, transformers of the context asked for, and the configs of both.

    Raises:
      UserError: not Versatile Diffusion, or a part is missing.
    """
    if context not in ("image", "text"):
        raise UserError(f"--context {context!r}: expected image or text")
    configs: dict[str, stable_diffusion.Config] = {"text": ({}, str(source))}
    if source.is_dir():
        found = {}
        for name in ("text", "image"):
            folder = source / f"{name}_unet"
            file = weights_in(folder, "diffusion_pytorch_model") if folder.is_dir() else None
            if file is None and (name == "text" or context == "image"):
                raise UserError(f"{source}: no {name}_unet/ with weights in it; expected Versatile Diffusion's folder")
            found[name] = open_published(file, *stable_diffusion.ANCHORS["unet"]) if file else {}
            if name == "text" or context == "image":
                configs[name] = stable_diffusion.config_of(folder, notes)
        fields.scheduler(source / "scheduler" / "scheduler_config.json", notes)
        time = {}
    else:
        everything = open_published(source, *ANCHORS)
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
        if SCALE in everything and not np.allclose(scale := everything[SCALE].read(), 1.0):
            raise UserError(f"{source}: {SCALE} {scale}, expected 1: text latents have no scale of their own here")
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
    return text, configs


def convert_vd(source: Path, to: Path, context: str = "image") -> converted.Summary:
    """Versatile Diffusion (a .pth of either layout, or the diffusers folder) -> to/vd: the text flow's UNet."""
    notes: list[str] = []
    found, configs = vd_parts(Path(source), context, notes)
    what = f"{source} (text UNet, {context} context)"
    sizes = unet.sizes_of(found, what)
    heads, groups, _ = unet.read_config(*configs["text"], sizes, notes)
    if "image" in configs:  # whose transformers they are
        config, path = configs["image"]
        taken = fields.read(config, fields.UNET, path, notes)
        own = tuple(fields.count(taken, f, path) for f in ("attention_head_dim", "norm_num_groups"))
        if own != (heads, groups):
            raise UserError(
                f"{path}: attention_head_dim and norm_num_groups {own}, in {configs['text'][1]} {(heads, groups)}; "
                "not one model"
            )
    steps = match(unet.table(sizes, unet.layout_of(found)), found, sizes.expected(), what)
    meta = dict(
        source="Versatile Diffusion",
        licence=converted.LICENCES["vd"],
        context=context,
        net=dict(width=sizes.width, text_unet=sizes.net(heads, groups)),
    )
    return converted.write(to, "vd", steps, meta, notes=notes)


# --- Optimus --------------------------------------------------------------------------------------------------------

BUFFERS = r"position_ids$|\.attn\.(bias|masked_bias)$|^(encoder\.)?cls\."
# Heads of what BERT and GPT-2 were trained or tuned for; nothing of ours has one.
HEADS = ("cls.", "classifier.", "qa_outputs.", "score.", "multiple_choice_head.")
POOLER = "encoder.pooler.dense"
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
WTE, OUTPUT = "decoder.transformer.wte.weight", "lm_head.weight"


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
    anchor = "encoder.embeddings.word_embeddings.weight"
    everything = open_published(Path(source), anchor)
    if anchor not in everything:
        raise UserError(f"{source}: no Optimus in it; expected {anchor}, found {some(everything, 3)}")
    found = {k: v for k, v in everything.items() if k.startswith(("encoder.", "decoder."))}
    others = rf"{OTHERS}|^(diffuser|model\.diffusion_model)\."  # of a file that holds more than Optimus
    left = [k for k in everything if k not in found and not re.search(others, k)]
    if left:
        raise UserError(f"{source}: {len(left)} left over: {some(left)}; expected Optimus, or Versatile Diffusion")
    tokenizers = {name: Path(path) for name, path in (("bert", bert), ("gpt2", gpt2)) if path}
    for name, path in tokenizers.items():
        if not path.is_dir():
            raise UserError(f"--{name} {path}: no such folder; expected that of the {name} tokenizer")
    licence = converted.LICENCES["optimus"]
    return _write(found, to, f"{source}", "Optimus", licence, tokenizers, heads=12)


def convert_bert_gpt2(bert: Path, to: Path, gpt2: str | None = None, latent: int | None = None) -> converted.Summary:
    """BERT and GPT-2 from transformers folders -> to/optimus, Optimus's extra layers and special words initialised.

    Args:
      latent: features of z; default the networks' width.
    """
    if gpt2 is None:
        raise UserError("medm2g convert bert-gpt2 needs --from BERT_FOLDER and --gpt2 GPT2_FOLDER")
    notes: list[str] = []
    found, *bert_config = _bert(Path(bert))
    more, *gpt2_config = _gpt2(Path(gpt2))
    found |= more
    if f"{POOLER}.weight" not in found:
        notes.append(f"{bert}: a BERT without pooler (of a masked language model): ours starts afresh")
    heads = _check_configs(found, bert_config, gpt2_config, notes)
    new = _new_words(Path(gpt2), found[WTE].shape[0])
    found |= _fresh(found, new, latent)
    licence = converted.LICENCES["bert-gpt2"]
    what, tokenizers = f"{bert} and {gpt2}", {"bert": Path(bert), "gpt2": Path(gpt2)}
    return _write(found, to, what, "BERT and GPT-2", licence, tokenizers, heads, notes)


def _bert(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """BERT's tensors as Optimus names them, without heads; its config, and where that stands."""
    words = "embeddings.word_embeddings.weight"
    tensors, config, path = _transformers(folder, "bert", f"bert.{words}", words)
    front = "bert." if f"bert.{words}" in tensors else ""
    return {f"encoder.{k.removeprefix(front)}": v for k, v in tensors.items()}, config, path


def _gpt2(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """GPT-2's tensors as Optimus names them, without its output layer; its config, and where that stands."""
    tensors, config, path = _transformers(folder, "gpt2", "transformer.wte.weight", "wte.weight")
    front = "transformer." if "transformer.wte.weight" in tensors else ""
    found = {f"decoder.transformer.{k.removeprefix(front)}": v for k, v in tensors.items() if k != OUTPUT}
    if OUTPUT in tensors:  # compared here, since the embedding grows later
        output, words = tensors[OUTPUT], found[WTE]
        if output.shape != words.shape or not np.array_equal(output.read(), words.read()):
            raise UserError(
                f"{folder}: {OUTPUT} should repeat wte.weight, and differs; such a network is not one of ours"
            )
    return found, config, path


def _transformers(folder: Path, kind: str, *anchors: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, without heads, of a transformers folder; its config, and where that stands."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != kind:
        raise UserError(f"{path}: model_type {config.get('model_type')!r}, expected {kind!r}")
    file = weights_in(folder, "model", "pytorch_model")
    if file is None:
        raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin in it")
    tensors = open_published(file, *anchors)
    if not any(anchor in tensors for anchor in anchors):
        raise UserError(f"{file}: 1 missing: {anchors[-1]}; its keys are {some(tensors, 3)}. Expected {kind}")
    return {k: v for k, v in tensors.items() if not k.startswith(HEADS)}, config, str(path)


def _check_configs(found: Mapping[str, Tensor], bert, gpt2, notes: list[str]) -> int:
    """Heads of both networks; bert, gpt2: (config, where it stands).

    Raises:
      UserError: a config is another network's, or they have other heads.
    """
    blank = Tensor((2, 1), np.dtype(np.float32), lambda: None, Path())  # a layer of Optimus's, which neither has
    sizes = sizes_of({**found, "encoder.linear.weight": blank}, f"{bert[1]} and {gpt2[1]}")
    heads = []
    for (config, path), kind, field in ((bert, fields.BERT, "num_attention_heads"), (gpt2, fields.GPT2, "n_head")):
        taken = fields.read(config, kind, path, notes)
        heads.append(fields.count(taken, field, path, sizes["width"]))
    if len(set(heads)) > 1:
        raise UserError(f"BERT has {heads[0]} heads and GPT-2 {heads[1]}; expected two networks of one size")
    width, layers, ff = ((sizes[name],) for name in ("width", "layers", "ff"))
    told = dict(hidden_size=width, num_hidden_layers=layers, intermediate_size=ff, vocab_size=(sizes["bert_vocab"],))
    fields.compare(bert[0], told | dict(max_position_embeddings=(sizes["bert_positions"],)), bert[1])
    length = (sizes["gpt2_positions"],)
    told = dict(n_embd=width, n_layer=layers, n_inner=ff, n_positions=length, n_ctx=length)
    told |= dict(hidden_size=width, num_hidden_layers=layers, max_position_embeddings=length)
    fields.compare(gpt2[0], told | dict(num_attention_heads=(heads[0],), vocab_size=(sizes["gpt2_vocab"],)), gpt2[1])
    return heads[0]


def _write(found, to, what, source, licence, tokenizers, heads, notes: Sequence[str] = ()) -> converted.Summary:
    sizes = sizes_of(found, what)
    vae, args = _vae(sizes)
    tied = {key: WTE for key in ("decoder.lm_head.weight",) if key in found}
    steps = match(table(sizes["layers"]), found, parameters(vae, "vae", *args), what, BUFFERS, tied)
    vocab = {name: sizes.pop(f"{name}_vocab") for name in ("bert", "gpt2")}
    net = dict(text_vae=dict(sizes, heads=heads))
    meta = dict(source=source, licence=licence, net=net, vocab=vocab, scales=dict(text=1.0))
    return converted.write(to, "optimus", steps, meta, tokenizers, notes)


def _new_words(folder: Path, words: int) -> int:
    """Ids of the tokenizer there that the token embedding, with rows for `words`, has none for: Optimus's three special
    words, which the tokenizer gets where it has none, and what else was added to it.

    Raises:
      UserError: the tokenizer does not load, or has fewer ids.
    """
    if not converted.tokenizer_files(folder):
        return len(tokenization.GPT2_SPECIAL)
    size = tokenization.load_one(epath.Path(folder), "gpt2").get_vocab_size()
    if size < words:
        raise UserError(
            f"{folder}: its tokenizer has {size} ids, with {', '.join(tokenization.GPT2_SPECIAL)}, and wte.weight rows "
            f"for {words}; bring the tokenizer that the network was trained with"
        )
    return size - words


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

    pooler = f"{POOLER}.weight" not in found

    def some_of(key):
        fresh = init(vae, "vae", key, *args)
        layers = {f"{theirs}.weight": fresh[f"vae/{ours}/kernel"].T for theirs, ours in _EXTRA}
        if pooler:
            kernel, bias = (fresh[f"vae/encoder/pooler/{leaf}"] for leaf in ("kernel", "bias"))
            layers |= {f"{POOLER}.weight": kernel.T, f"{POOLER}.bias": bias}
        return layers, fresh["vae/decoder/wte/embedding"][words:]

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
