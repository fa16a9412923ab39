"""Stable Diffusion 1.5 (the image flows' start, section 4): UNet, autoencoder and text encoder, from a diffusers folder
or from the single file of CompVis, plain or EMA weights.

The text encoder has no projection and is kept as `text/`: it says what the UNet reads (`prompt_in`), and goes back out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from medm2g_jax.convert import clip, converted, unet
from medm2g_jax.convert.files import Tensor, open_tensors, read_json, some, weights_in
from medm2g_jax.convert.rules import Rule, layer, match, parameters, part
from medm2g_jax.errors import UserError
from medm2g_jax.nn.image_vae import ImageVAE

SCALE = 0.18215  # of the autoencoder's latents
UNET, VAE, TEXT, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "model_ema."
# Of a CompVis file: the schedule, the counters of its EMA, the autoencoder's discriminator.
BUFFERS = (
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor)$"
    r"|^model_ema\.(decay|num_updates)$|^first_stage_model\.loss\.|position_ids$"
)
# (compvis, diffusers, ours)
_VAE_RES = (
    ("norm1", "norm1", "norm_1", "norm"),
    ("conv1", "conv1", "conv_1", "conv"),
    ("norm2", "norm2", "norm_2", "norm"),
    ("conv2", "conv2", "conv_2", "conv"),
    ("nin_shortcut", "conv_shortcut", "skip", "point"),
)
# ours -> spellings: (compvis, diffusers, diffusers before 0.14)
_VAE_ATTENTION = {
    "q": ("q", "to_q", "query"),
    "k": ("k", "to_k", "key"),
    "v": ("v", "to_v", "value"),
    "out": ("proj_out", "to_out.0", "proj_attn"),
}


def vae_table(levels: int, layers: int, layout: str, prefix: str = "vae") -> list[Rule]:
    """Every tensor of the autoencoder; layout "compvis" or "diffusers". Attention as 1x1 convolutions or linear."""
    column = 0 if layout == "compvis" else 1
    rules = []

    def res(theirs, ours):
        for *names, name, kind in _VAE_RES:
            rules.extend(layer(f"{theirs}.{names[column]}", f"{prefix}/{ours}/{name}", kind))

    for half, direction, blocks in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        for name, kind in (("conv_in", "conv"), ("conv_out", "conv")):
            rules += layer(f"{half}.{name}", f"{prefix}/{half}/{name}", kind)
        rules += layer(f"{half}.{('norm_out', 'conv_norm_out')[column]}", f"{prefix}/{half}/norm_out", "norm")
        for i in range(levels):
            at = levels - 1 - i if direction == "up" else i  # CompVis counts the decoder's levels from the finest
            theirs = (f"{half}.{direction}.{at}", f"{half}.{direction}_blocks.{i}")[column]
            for j in range(blocks):
                res(f"{theirs}.{('block', 'resnets')[column]}.{j}", f"{half}/{direction}_{i}/res_{j}")
            if i < levels - 1:
                sampler = (f"{direction}sample.conv", f"{direction}samplers.0.conv")[column]
                rules += layer(f"{theirs}.{sampler}", f"{prefix}/{half}/{direction}_{i}/{direction}sample", "conv")
        for j in range(2):
            res((f"{half}.mid.block_{j + 1}", f"{half}.mid_block.resnets.{j}")[column], f"{half}/mid/res_{j}")
        theirs = (f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")[column]
        ours = f"{prefix}/{half}/mid/attn"
        rules += layer(f"{theirs}.{('norm', 'group_norm')[column]}", f"{ours}/norm", "norm")
        for name, (compvis, new, old) in _VAE_ATTENTION.items():
            for spelling in (compvis,) if layout == "compvis" else (new, old):
                for kind in ("point", "dense") if layout == "compvis" else ("dense", "point"):
                    rules += layer(f"{theirs}.{spelling}", f"{ours}/{name}", kind)
    for name in ("quant", "post_quant"):
        rules += layer(f"{name}_conv", f"{prefix}/{name}", "point")
    return rules


def vae_sizes(found: Mapping[str, Tensor], what: str) -> tuple[str, dict[str, Any]]:
    """(layout, config.net.image_vae without groups) of the autoencoder in these tensors."""
    for layout, level, block in (("compvis", "encoder.down", "block"), ("diffusers", "encoder.down_blocks", "resnets")):
        pattern = re.compile(rf"{re.escape(level)}\.(\d+)\.{block}\.(\d+)\.conv1\.weight$")
        at = {(int(m[1]), int(m[2])): found[k].shape[0] for k in found if (m := pattern.match(k))}
        if at:
            levels = 1 + max(i for i, _ in at)
            if any((i, 0) not in at for i in range(levels)) or "post_quant_conv.weight" not in found:
                raise UserError(f"{what}: an autoencoder that is not whole (a level, or post_quant_conv.weight)")
            return layout, dict(
                channels=tuple(at[i, 0] for i in range(levels)),
                layers=sum(i == 0 for i, _ in at),
                latent=found["post_quant_conv.weight"].shape[0],
                colours=found["encoder.conv_in.weight"].shape[1] if "encoder.conv_in.weight" in found else 3,
            )
    raise UserError(f"{what}: no autoencoder in it; expected encoder.down... or encoder.down_blocks...")


def vae_expected(sizes: Mapping[str, Any], prefix: str = "vae") -> dict[str, tuple[int, ...]]:
    side = 2 ** (len(sizes["channels"]) - 1)
    return parameters(ImageVAE(**sizes, groups=1), prefix, jnp.zeros((1, side, side, sizes["colours"])))


def vae_steps(found: Mapping[str, Tensor], what: str) -> tuple[list, dict[str, Any]]:
    layout, sizes = vae_sizes(found, what)
    rules = vae_table(len(sizes["channels"]), sizes["layers"], layout)
    return match(rules, found, vae_expected(sizes), what, r"^loss\."), sizes


# --- sources --------------------------------------------------------------------------------------------------------


def convert(source: Path, to: Path, weights: str = "") -> converted.Summary:
    """Stable Diffusion 1.5 -> to/sd15.

    Args:
      source: a diffusers folder, or a single .safetensors or .ckpt file.
      weights: of a single file that has both: "ema" (default where there) or "plain".

    Raises:
      UserError: another model, or files that are not whole; nothing is written then.
    """
    source = Path(source)
    info, tokenizers = dict(heads=8, groups=(32, 32), text_heads=12), {}
    if source.is_dir():
        parts, info = _folder(source, weights)
        tokenizers = {"clip": source / "tokenizer"} if (source / "tokenizer").is_dir() else {}
        what = {name: str(source / name) for name in parts}
    else:
        parts = _single_file(source, weights)
        what = {name: f"{source} ({name})" for name in parts}
    found = parts["unet"]
    sizes = unet.sizes_of(found, what["unet"])
    if sizes.kind != "image":
        raise UserError(f"{what['unet']}: a text UNet; convert it with medm2g convert vd")
    hint = "Expected Stable Diffusion 1.5"
    steps = match(unet.table(sizes, unet.layout_of(found)), found, sizes.expected(), what["unet"], hint=hint)
    vae, vae_net = vae_steps(parts["vae"], what["vae"])
    text = clip.text_sizes(parts["text_encoder"], what["text_encoder"], info["text_heads"])
    if text["width"] != sizes.width:
        raise UserError(
            f"{source}: its UNet reads prompts of width {sizes.width}, its text encoder makes {text['width']}; "
            "not one model"
        )
    front = clip.text_front(parts["text_encoder"])
    rules = clip.table("text", text["layers"], front, "text", projection=False)
    encoder = match(
        rules, parts["text_encoder"], clip.text_expected(text, "text", None), what["text_encoder"], clip.BUFFERS
    )
    vocab = text.pop("vocab")
    net = dict(
        width=sizes.width,
        image_unet=sizes.net(info["heads"], info["groups"][0]),
        image_vae=dict(vae_net, groups=info["groups"][1], patch=1, mid_attention=True),
        clip_text=text,
    )
    meta = dict(
        source="Stable Diffusion 1.5",
        licence=converted.LICENCES["sd15"],
        net=net,
        vocab=dict(clip=vocab),
        scales=dict(image=SCALE),
    )
    return converted.write(to, "sd15", [*steps, *vae, *encoder], meta, tokenizers)


def _folder(source: Path, weights: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors of a diffusers folder by part, and what its configs say that shapes do not."""
    if weights:
        raise UserError(f"{source}: --weights {weights} is for single files; a folder has one set of weights")
    index = source / "model_index.json"
    name = read_json(index).get("_class_name", "") if index.is_file() else ""
    if "XL" in name or (source / "text_encoder_2").exists():
        raise UserError(f"{source}: a Stable Diffusion XL folder ({name or 'it has text_encoder_2/'}); expected 1.5")
    stems = {
        "unet": ("diffusion_pytorch_model",),
        "vae": ("diffusion_pytorch_model",),
        "text_encoder": ("model", "pytorch_model"),
    }
    parts = {}
    for folder, names in stems.items():
        file = weights_in(source / folder, *names)
        if file is None:
            raise UserError(f"{source}: no {folder}/{names[0]}.safetensors (or .fp16.safetensors, .bin) in it")
        parts[folder] = open_tensors(file)
    scheduler = source / "scheduler" / "scheduler_config.json"
    kind = read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else "epsilon"
    if kind != "epsilon":
        raise UserError(f"{scheduler}: prediction_type {kind!r}: a Stable Diffusion 2.x model; expected 'epsilon'")
    paths = {f: source / f / "config.json" for f in stems}
    configs = {f: read_json(path) if path.is_file() else {} for f, path in paths.items()}
    heads = configs["unet"].get("num_attention_heads") or configs["unet"].get("attention_head_dim", 8)
    if isinstance(heads, list):
        if len(set(heads)) > 1:
            raise UserError(f"{paths['unet']}: heads {heads} differ by level: a 2.x model; expected 1.5")
        heads = heads[0]
    if configs["unet"].get("use_linear_projection"):
        raise UserError(f"{paths['unet']}: use_linear_projection: a 2.x model; expected 1.5")
    act = configs["text_encoder"].get("hidden_act", "quick_gelu")
    if act != "quick_gelu":
        raise UserError(f"{paths['text_encoder']}: hidden_act {act!r}, expected 'quick_gelu' (1.5)")
    groups = tuple(configs[f].get("norm_num_groups", 32) for f in ("unet", "vae"))
    text_heads = configs["text_encoder"].get("num_attention_heads", 12)
    return parts, dict(heads=heads, groups=groups, text_heads=text_heads)


def _single_file(source: Path, weights: str) -> dict[str, dict[str, Tensor]]:
    """Tensors of a CompVis file by part, the UNet's from its EMA where asked for and there."""
    found = open_tensors(source)
    other = next((k for k in found if k.startswith(("cond_stage_model.model.", "conditioner."))), None)
    if other is not None:
        version = "XL" if other.startswith("conditioner.") else "2.x"
        raise UserError(f"{source}: {other}: a Stable Diffusion {version} file; expected version 1.5")
    plain = part(found, UNET)
    averaged = {
        key: found[name] for key in plain if (name := f"{EMA}diffusion_model{key.replace('.', '')}") in found
    }
    has_ema = any(k.startswith(f"{EMA}diffusion_model") for k in found)
    if weights not in ("", "ema", "plain"):
        raise UserError(f"--weights {weights!r}: expected ema or plain")
    if weights == "ema" and not has_ema:
        raise UserError(f"{source}: no EMA weights in it (model_ema...); leave --weights out")
    parts = {"unet": plain, "vae": part(found, VAE), "text_encoder": part(found, TEXT)}
    for name, prefix in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        if not parts[name]:
            raise UserError(f"{source}: no {name} in it (keys {prefix}...); expected Stable Diffusion 1.5 in one file")
    if has_ema and weights != "plain":
        lost = [key for key in plain if key not in averaged]
        if lost:
            raise UserError(f"{source}: {len(lost)} missing: the EMA of {some(lost)}; try --weights plain")
        parts["unet"] = averaged
    taken = (UNET, VAE, TEXT)
    twins = {f"{EMA}diffusion_model{key.replace('.', '')}" for key in plain}
    left = [k for k in found if not k.startswith(taken) and k not in twins and not re.search(BUFFERS, k)]
    if left:
        raise UserError(f"{source}: {len(left)} left over: {some(left)}; expected Stable Diffusion 1.5")
    parts["vae"] = {k: v for k, v in parts["vae"].items() if not k.startswith("loss.")}
    return parts
