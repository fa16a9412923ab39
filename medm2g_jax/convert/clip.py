"""CLIP's two towers (prompt encoders C, section 3.2) from a transformers folder, at any size its config.json names.

The text tower without its projection is Stable Diffusion's text encoder as well. Keys come with and without
`text_model.` in front of them (transformers 5 saves a fresh text encoder without).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medm2g_jax.convert import converted, fields
from medm2g_jax.convert.files import Tensor, open_published, read_json, weights_in
from medm2g_jax.convert.rules import SAME, Rule, layer, match, parameters
from medm2g_jax.errors import UserError
from medm2g_jax.nn.clip import MEAN, STD, CLIPText, CLIPVision

LOGIT_SCALE = [Rule("logit_scale", "logit_scale", SAME)]
BUFFERS = r"position_ids$"
TOKEN = "embeddings.token_embedding.weight"
ANCHORS = (f"text_model.{TOKEN}", TOKEN)  # of a text tower, nested or not
_LAYER = (
    *((f"self_attn.{x}_proj", f"attn/{x}", "dense") for x in "qkv"),
    ("self_attn.out_proj", "attn/out", "dense"),
    ("layer_norm1", "norm_1", "norm"),
    ("layer_norm2", "norm_2", "norm"),
    ("mlp.fc1", "fc_1", "dense"),
    ("mlp.fc2", "fc_2", "dense"),
)
_TEXT = (
    ("embeddings.token_embedding", "token", "embedding"),
    ("embeddings.position_embedding", "position", "embedding"),
    ("final_layer_norm", "norm", "norm"),
)
_VISION = (
    ("embeddings.patch_embedding", "patch", "filter"),
    ("embeddings.position_embedding", "position", "embedding"),
    ("pre_layrnorm", "pre_norm", "norm"),  # so spelled
    ("post_layernorm", "norm", "norm"),
)


def table(tower: str, layers: int, front: str, prefix: str, projection: bool = True) -> list[Rule]:
    """The rules of one tower.

    Args:
      tower: "text" or "vision".
      front: before their keys: "text_model.", "vision_model." or "".
      prefix: of our names.
    """
    rules = []
    for theirs, ours, kind in _TEXT if tower == "text" else _VISION:
        rules += layer(front + theirs, f"{prefix}/{ours}", kind)
    if tower == "vision":
        rules.append(Rule(f"{front}embeddings.class_embedding", f"{prefix}/class_embedding", SAME))
    for i in range(layers):
        for theirs, ours, kind in _LAYER:
            rules += layer(f"{front}encoder.layers.{i}.{theirs}", f"{prefix}/layer_{i}/{ours}", kind)
    if projection:
        rules += layer("text_projection" if tower == "text" else "visual_projection", f"{prefix}/projection", "matrix")
    return rules


def text_front(found: Mapping[str, Tensor]) -> str:
    return "text_model." if any(k.startswith("text_model.") for k in found) else ""


def text_sizes(found: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """config.net.clip_text, without heads, of the text tower in these tensors, and its vocabulary."""
    front = text_front(found)
    sizes = _common(found, front, what)
    token, position = (_shape(found, f"{front}embeddings.{x}_embedding.weight", what) for x in ("token", "position"))
    return dict(sizes, length=position[0], vocab=token[0])


def vision_sizes(found: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """config.net.clip_image, without heads, of the vision tower in these tensors."""
    front = "vision_model."
    patch = _shape(found, f"{front}embeddings.patch_embedding.weight", what)[-1]
    positions = _shape(found, f"{front}embeddings.position_embedding.weight", what)[0]
    side = round((positions - 1) ** 0.5)
    return dict(_common(found, front, what), patch=patch, image=patch * side)


def _common(found: Mapping[str, Tensor], front: str, what: str) -> dict[str, int]:
    start = f"{front}encoder.layers."
    layers = len({k[len(start) :].split(".")[0] for k in found if k.startswith(start)})
    ff, width = _shape(found, f"{start}0.mlp.fc1.weight", what)
    return dict(width=width, layers=layers, ff=ff)


def _shape(found: Mapping[str, Tensor], key: str, what: str) -> tuple[int, ...]:
    if key not in found:
        raise UserError(f"{what}: 1 missing: {key}; expected a CLIP model in transformers' layout")
    return found[key].shape


def text_expected(sizes: Mapping[str, Any], prefix: str, projection: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our text tower; projection None: without one, as Stable Diffusion has it."""
    tower = CLIPText(**{**sizes, "heads": 1}, projection=projection or 1)
    names = parameters(tower, prefix, jnp.zeros((1, 2), jnp.int32))
    return {n: s for n, s in names.items() if projection or not n.startswith(f"{prefix}/projection/")}


def vision_expected(sizes: Mapping[str, Any], prefix: str, projection: int) -> dict[str, tuple[int, ...]]:
    side = sizes["image"]
    tower = CLIPVision(**{**sizes, "heads": 1}, projection=projection)
    return parameters(tower, prefix, jnp.zeros((1, side, side, 3)))


def tower_told(sizes: Mapping[str, Any]) -> dict[str, tuple]:
    """What a config has to say of a tower of these sizes."""
    return dict(hidden_size=(sizes["width"],), intermediate_size=(sizes["ff"],), num_hidden_layers=(sizes["layers"],))


def text_config(config: Mapping[str, Any], sizes: Mapping[str, Any], what: str, notes: list[str]) -> dict[str, Any]:
    """What is taken from the config of a text tower of these sizes.

    Raises:
      UserError: it is another network's.
    """
    told = tower_told(sizes) | dict(max_position_embeddings=(sizes["length"],), vocab_size=(sizes["vocab"],))
    fields.compare(config, told, what)
    return fields.read(config, fields.CLIP_TEXT, what, notes)


def convert(source: Path, to: Path) -> converted.Summary:
    """A transformers CLIPModel folder -> to/clip.

    Raises:
      UserError: another kind of model, or files that are not whole; nothing is written then.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    file = weights_in(source, "model", "pytorch_model") if source.is_dir() else source
    if file is None:
        raise UserError(f"{source}: expected model.safetensors or pytorch_model.bin of a CLIP model")
    path, notes = folder / "config.json", []
    config = read_json(path)
    if config.get("model_type") != "clip":
        raise UserError(f"{path}: model_type {config.get('model_type')!r}, expected 'clip'")
    found = open_published(file, *ANCHORS)
    sizes, image = text_sizes(found, str(file)), vision_sizes(found, str(file))
    width = _shape(found, "text_projection.weight", str(file))[0]
    fields.read(config, fields.CLIP, str(path), notes)
    fields.compare(config, dict(projection_dim=(width,)), str(path))
    text, vision = tower_config(config, "text_config"), tower_config(config, "vision_config")
    taken = text_config(text, sizes, f"{path}: text_config", notes)
    sizes["heads"] = fields.count(taken, "num_attention_heads", f"{path}: text_config", sizes["width"])
    # C_T pools where the highest id stands; 2 is what the oldest files say and means just that.
    fields.compare(text, dict(eos_token_id=(sizes["vocab"] - 1, 2)), f"{path}: text_config")
    what = f"{path}: vision_config"
    taken = fields.read(vision, fields.CLIP_VISION, what, notes)
    fields.compare(vision, tower_told(image) | dict(image_size=(image["image"],), patch_size=(image["patch"],)), what)
    image["heads"] = fields.count(taken, "num_attention_heads", what, image["width"])
    _check_pixels(folder / "preprocessor_config.json")
    expected = text_expected(sizes, "text", width) | vision_expected(image, "vision", width) | {"logit_scale": ()}
    rules = table("text", sizes["layers"], text_front(found), "text")
    rules += table("vision", image["layers"], "vision_model.", "vision")
    steps = match(rules + LOGIT_SCALE, found, expected, str(file), BUFFERS)
    vocab = sizes.pop("vocab")
    meta = dict(
        source="CLIP",
        licence=converted.LICENCES["clip"],
        net=dict(width=width, clip_text=sizes, clip_image=image),
        vocab=dict(clip=vocab),
    )
    return converted.write(to, "clip", steps, meta, {"clip": folder}, notes)


def tower_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tower's own config; the oldest files write it a second time as NAME_dict, which transformers lets win."""
    return {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}


def _check_pixels(path: Path) -> None:
    """Were the vision tower's images normalised as `clip_pixels` does it?"""
    if not path.is_file():
        return
    config = read_json(path)
    for field, ours in (("image_mean", MEAN), ("image_std", STD)):
        value = config[field] if field in config and config[field] is not None else ours
        if not np.allclose(value, ours, atol=1e-3):
            raise UserError(f"{path}: {field} {value}, expected {list(ours)} (OpenAI's); bring CLIP's own weights")
