"""Stable Diffusion 1.5 (the image flows' start, section 4): UNet, autoencoder and text encoder, from a diffusers folder
or from the single file of CompVis, plain or EMA weights.

The text encoder has no projection and is kept as `text/`: it says what the UNet reads (`prompt_in`), and goes back out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medm2g_jax.convert import clip, converted, fields, unet
from medm2g_jax.convert.files import Tensor, open_published, read_json, some, weights_in
from medm2g_jax.convert.rules import Rule, layer, match, parameters, part
from medm2g_jax.diffusion import BETAS
from medm2g_jax.errors import UserError
from medm2g_jax.nn.image_vae import ImageVAE

UNET, VAE, TEXT, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "model_ema."
SCALE = "scale_factor"  # of a CompVis file that was trained with its own
# Of a CompVis file: the schedule, the counters of its EMA, the autoencoder's discriminator and EMA, and what the text
# encoder has of CLIP besides (its UNet reads hidden states).
BUFFERS = (
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor)$"
    r"|^model_ema\.(decay|num_updates)$|^first_stage_model\.(loss|model_ema)\.|position_ids$"
    r"|^cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)$"
)
TEXT_BUFFERS = rf"{clip.BUFFERS}|^logit_scale$|^text_projection(\.weight)?$"
# Keys that every network of these kinds has, in the layouts of a folder.
ANCHORS = {
    "unet": ("time_embedding.linear_1.weight",),
    "vae": ("decoder.conv_in.weight",),
    "text_encoder": clip.ANCHORS,
}
# Stable Diffusion 1.5's own, where a single file, or a folder without configs, does not tell; all else that is not told
# is the library's default.
VAE_SCALE, TEXT_HEADS = 0.18215, 12
PIXELS = 512  # a side of the images that it was trained on
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
    source, notes = Path(source), []
    tokenizers: dict[str, Path] = {}
    if source.is_dir():
        parts, configs, schedule = _folder(source, weights, notes)
        tokenizers = {"clip": source / "tokenizer"} if (source / "tokenizer").is_dir() else {}
        what = {name: str(source / name) for name in parts}
    else:
        parts, scale = _single_file(source, weights, notes)
        configs, schedule = {name: ({}, str(source)) for name in parts}, None
        configs["vae"] = ({"scaling_factor": scale}, str(source))
        what = {name: f"{source} ({name})" for name in parts}
    found = parts["unet"]
    sizes = unet.sizes_of(found, what["unet"])
    if sizes.kind != "image":
        raise UserError(f"{what['unet']}: a text UNet; convert it with medm2g convert vd")
    _, vae_net = vae_sizes(parts["vae"], what["vae"])
    text = clip.text_sizes(parts["text_encoder"], what["text_encoder"])
    for name, ours, theirs in (
        ("its text encoder makes prompts of width", text["width"], sizes.width),
        ("its autoencoder makes latents of channels", vae_net["latent"], sizes.latent),
    ):
        if ours != theirs:
            raise UserError(f"{source}: {name} {ours}, its UNet reads {theirs}; not one model")
    heads, groups, side = unet.read_config(*configs["unet"], sizes, notes)
    pixels = PIXELS if side is None else side * 2 ** (len(vae_net["channels"]) - 1)
    if pixels != PIXELS:
        notes.append(f"its UNet was trained on images of {pixels} pixels: --config.image_size={pixels}")
    vae_groups, scale = _vae_config(*configs["vae"], vae_net, notes)
    config, path = configs["text_encoder"]
    if "text_config" in config:  # of a whole CLIP
        config, path = clip.tower_config(config, "text_config"), f"{path}: text_config"
    taken = clip.text_config(config, text, path, notes)
    text["heads"] = fields.count(taken, "num_attention_heads", path) if config else TEXT_HEADS

    hint = "Expected Stable Diffusion 1.5"
    steps = match(unet.table(sizes, unet.layout_of(found)), found, sizes.expected(), what["unet"], hint=hint)
    vae, _ = vae_steps(parts["vae"], what["vae"])
    front = clip.text_front(parts["text_encoder"])
    rules = clip.table("text", text["layers"], front, "text", projection=False)
    encoder = match(
        rules, parts["text_encoder"], clip.text_expected(text, "text", None), what["text_encoder"], TEXT_BUFFERS
    )
    vocab = text.pop("vocab")
    net = dict(
        width=sizes.width,
        image_unet=sizes.net(heads, groups),
        image_vae=dict(vae_net, groups=vae_groups, patch=1, mid_attention=True),
        clip_text=text,
    )
    meta = dict(
        source="Stable Diffusion 1.5",
        licence=converted.LICENCES["sd15"],
        net=net,
        vocab=dict(clip=vocab),
        scales=dict(image=scale),
        latent_side=side,
        scheduler=schedule,
    )
    return converted.write(to, "sd15", [*steps, *vae, *encoder], meta, tokenizers, notes)


# A part's config, and where it stands, as errors say it.
Config = tuple[dict[str, Any], str]


def _folder(
    source: Path, weights: str, notes: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Config], dict[str, Any] | None]:
    """Tensors of a diffusers folder by part, the parts' configs, and the scheduler's."""
    if weights:
        raise UserError(f"{source}: --weights {weights} is for single files; a folder has one set of weights")
    index = source / "model_index.json"
    name = (read_json(index).get("_class_name") or "") if index.is_file() else ""
    if "XL" in name or (source / "text_encoder_2").exists():
        raise UserError(f"{source}: a Stable Diffusion XL folder ({name or 'it has text_encoder_2/'}); expected 1.5")
    stems = {
        "unet": ("diffusion_pytorch_model",),
        "vae": ("diffusion_pytorch_model",),
        "text_encoder": ("model", "pytorch_model"),
    }
    parts, configs = {}, {}
    for folder, names in stems.items():
        file = weights_in(source / folder, *names)
        if file is None:
            raise UserError(f"{source}: no {folder}/{names[0]}.safetensors (or .fp16.safetensors, .bin) in it")
        parts[folder] = open_published(file, *ANCHORS[folder])
        configs[folder] = config_of(source / folder, notes)
    schedule = fields.scheduler(source / "scheduler" / "scheduler_config.json", notes)
    kinds = {"unet": "_class_name", "vae": "_class_name", "text_encoder": "model_type"}
    fits = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("clip_text_model", "clip")}
    for folder, field in kinds.items():
        config, path = configs[folder]
        if field in config and config[field] not in fits[folder]:
            raise UserError(f"{path}: {field} {config[field]!r}, expected {fits[folder][0]!r}: Stable Diffusion 1.5's")
    return parts, configs, schedule


def config_of(folder: Path, notes: list[str]) -> Config:
    """The config of a part; empty where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        notes.append(f"{path}: not there; all that it would say is assumed to be as published")
        return {}, str(path)
    return read_json(path), str(path)


def _vae_config(config: Mapping[str, Any], what: str, sizes: Mapping[str, Any], notes: list[str]) -> tuple[int, float]:
    """(groups, scale of the latents) of an autoencoder whose config is checked."""
    taken = fields.read(config, fields.VAE, what, notes)
    levels = len(sizes["channels"])
    told = dict(
        block_out_channels=(sizes["channels"],),
        down_block_types=(["DownEncoderBlock2D"] * levels,),
        up_block_types=(["UpDecoderBlock2D"] * levels,),
        layers_per_block=(sizes["layers"],),
        latent_channels=(sizes["latent"],),
        in_channels=(sizes["colours"],),
        out_channels=(sizes["colours"],),
    )
    fields.compare(config, told, what)
    scale = taken["scaling_factor"]
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):
        raise UserError(f"{what}: scaling_factor {scale!r}, expected a number above 0, as 0.18215")
    return fields.count(taken, "norm_num_groups", what), float(scale)


def _single_file(source: Path, weights: str, notes: list[str]) -> tuple[dict[str, dict[str, Tensor]], float]:
    """(tensors by part, the scale of latents) of a CompVis file; the UNet's from its EMA where asked for and there."""
    found = open_published(source, f"{UNET}input_blocks.0.0.weight")
    other = next((k for k in found if k.startswith(("cond_stage_model.model.", "conditioner."))), None)
    if other is not None:
        version = "XL" if other.startswith("conditioner.") else "2.x"
        raise UserError(f"{source}: {other}: a Stable Diffusion {version} file; expected version 1.5")
    if (extra := next((k for k in found if k.startswith("control_model.")), None)) is not None:
        raise UserError(f"{source}: {extra}: a ControlNet file; bring the Stable Diffusion 1.5 that it steers")
    plain = part(found, UNET)
    averaged = {key: found[name] for key in plain if (name := f"{EMA}diffusion_model{key.replace('.', '')}") in found}
    has_ema = any(k.startswith(f"{EMA}diffusion_model") for k in found)
    if weights not in ("", "ema", "plain"):
        raise UserError(f"--weights {weights!r}: expected ema or plain")
    if weights == "ema" and not has_ema:
        raise UserError(f"{source}: no EMA weights in it (model_ema...); leave --weights out")
    parts = {"unet": plain, "vae": part(found, VAE), "text_encoder": part(found, TEXT)}
    for name, prefix in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        if not parts[name]:
            raise UserError(
                f"{source}: no {name} in it (keys {prefix}...); its keys are {some(found, 3)}. Expected Stable "
                "Diffusion 1.5 in one file; a part alone goes into a diffusers folder with the others"
            )
    if has_ema and weights != "plain":
        lost = [key for key in plain if key not in averaged]
        if lost:
            raise UserError(f"{source}: {len(lost)} missing: the EMA of {some(lost)}; try --weights plain")
        parts["unet"] = averaged
    taken = (UNET, VAE, TEXT)
    twins = {f"{EMA}diffusion_model{key.replace('.', '')}" for key in plain}
    left = [k for k in found if not k.startswith(taken) and k not in twins and not re.search(BUFFERS, k)]
    if left:
        raise UserError(
            f"{source}: {len(left)} left over: {some(left)}; expected Stable Diffusion 1.5 and nothing else: save it "
            "without them"
        )
    parts["vae"] = {k: v for k, v in parts["vae"].items() if not k.startswith(("loss.", "model_ema."))}
    # The inner text tower's keys may stand behind text_model. or not, as in a folder.
    parts["text_encoder"] = {k: v for k, v in parts["text_encoder"].items() if not re.search(TEXT_BUFFERS, k)}
    _check_schedule(found, source, notes)
    if SCALE not in found:
        return parts, VAE_SCALE
    scale = float(np.asarray(found[SCALE].read(), np.float64).reshape(-1)[0])
    return parts, round(scale, 7)  # as it was before it became a float32


def _check_schedule(found: Mapping[str, Tensor], source: Path, notes: list[str]) -> None:
    """The noise schedule that a CompVis file carries is ours."""
    if "betas" not in found:
        return
    betas = np.asarray(found["betas"].read(), np.float64)
    if betas.shape != BETAS.shape:
        notes.append(f"{source}: betas of {betas.size} steps, which are not read; ours are {len(BETAS)}")
    elif not np.allclose(betas, BETAS, rtol=1e-3, atol=1e-7):
        raise UserError(
            f"{source}: betas from {betas[0]:.6g} to {betas[-1]:.6g}: another noise schedule than Stable Diffusion "
            f"1.5's ({BETAS[0]:.6g} to {BETAS[-1]:.6g}, linear in their square roots)"
        )
