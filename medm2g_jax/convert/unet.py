"""Tables of the two UNets: Stable Diffusion's (images) and Versatile Diffusion's (text), which is the same way with
fully connected operators, in the three layouts they are published in.

    compvis     input_blocks.4.1...                single-file SD-1.5, first Versatile Diffusion, CoDi
    diffusers   down_blocks.1.attentions.0...      folders
    vd          data_blocks.4.0..., context_blocks.2.0...    Versatile Diffusion of 2023; in it transformers belong to
                the context's modality, all other layers to the output's, the time embedding to both

Tables are spelled out for `Sizes`, which `sizes_of` reads off the keys.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

from medm2g_jax.convert import fields
from medm2g_jax.convert.files import Tensor
from medm2g_jax.convert.rules import Rule, layer, parameters
from medm2g_jax.errors import UserError
from medm2g_jax.nn.attention import context
from medm2g_jax.nn.text_unet import TextUNet
from medm2g_jax.nn.unet import UNet

LAYOUTS = ("compvis", "diffusers", "vd")
# (compvis and vd, diffusers, ours, kind of layer); "layer": conv or fc by the kind of UNet
_RES = (
    ("in_layers.0", "norm1", "norm_1", "norm"),
    ("in_layers.2", "conv1", "layer_1", "layer"),
    ("emb_layers.1", "time_emb_proj", "time", "dense"),
    ("out_layers.0", "norm2", "norm_2", "norm"),
    ("out_layers.3", "conv2", "layer_2", "layer"),
    ("skip_connection", "conv_shortcut", "skip", "point"),
)
# (theirs in all layouts, ours, kind)
_TRANSFORMER = (
    ("norm", "norm", "norm"),
    ("proj_in", "proj_in", "point"),
    *(
        (f"transformer_blocks.0.{theirs}.{a}", f"{ours}/{b}", kind)
        for theirs, ours in (("attn1", "self"), ("attn2", "prompt"))
        for a, b, kind in (
            ("to_q", "q", "matrix"),
            ("to_k", "k", "matrix"),
            ("to_v", "v", "matrix"),
            ("to_out.0", "out", "dense"),
        )
    ),
    ("transformer_blocks.0.norm1", "self_norm", "norm"),
    ("transformer_blocks.0.norm2", "prompt_norm", "norm"),
    ("transformer_blocks.0.norm3", "ff_norm", "norm"),
    ("transformer_blocks.0.ff.net.0.proj", "ff/proj", "dense"),
    ("transformer_blocks.0.ff.net.2", "ff/out", "dense"),
    ("proj_out", "proj_out", "point"),
)


@dataclass(frozen=True)
class Sizes:
    """What the keys and shapes of a UNet tell of it. `positions`: of the text UNet, 0 for images."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int
    width: int  # of the prompt's tokens
    latent: int
    positions: int

    @property
    def kind(self) -> str:
        return "text" if self.positions else "image"

    def net(self, heads: int, groups: int) -> dict[str, Any]:
        """As `config.net` has it."""
        out = asdict(self) | dict(heads=heads, groups=groups)
        del out["width"]
        if self.kind == "image":
            del out["positions"], out["latent"]
        return out

    @functools.lru_cache(maxsize=8)  # noqa: B019  a frozen value, and tracing takes a second
    def expected(self, prefix: str = "unet") -> dict[str, tuple[int, ...]]:
        """Names and shapes of our UNet of this size, without guide and stream."""
        own = dict(channels=self.channels, attention=self.attention, layers=self.layers, heads=1, groups=1)
        args = jnp.zeros(1), context(jnp.zeros((1, 1, self.width)))
        if self.kind == "text":
            unet = TextUNet(**own, positions=self.positions, width=self.width, latent=self.latent)
            return parameters(unet, prefix, jnp.zeros((1, self.latent)), *args)
        unet = UNet(**own, out_channels=self.latent, width=self.width)
        side = 2 ** (len(self.channels) - 1)
        return parameters(unet, prefix, jnp.zeros((1, side, side, self.latent)), *args)


@dataclass(frozen=True)
class _Site:
    """A place in the UNet: what stands there, its name with them and with us."""

    part: str  # "res", "attn", "down", "up"
    theirs: str
    ours: str


def _sites(sizes: Sizes, layout: str) -> Iterator[_Site]:
    """All residual blocks, transformers and changes of resolution, in the order of the computation."""
    last, n = len(sizes.channels) - 1, sizes.layers
    data, ctx = 1, 0  # of vd: 0 is the first layer
    k = 1
    for i in range(last + 1):
        for j in range(n):
            theirs = {"compvis": f"input_blocks.{k}.0", "diffusers": f"down_blocks.{i}.resnets.{j}"}
            yield _Site("res", theirs.get(layout, f"data_blocks.{data}.0"), f"down_{i}/res_{j}")
            data += 1
            if sizes.attention[i]:
                theirs = {"compvis": f"input_blocks.{k}.1", "diffusers": f"down_blocks.{i}.attentions.{j}"}
                yield _Site("attn", theirs.get(layout, f"context_blocks.{ctx}.0"), f"down_{i}/attn_{j}")
                ctx += 1
            k += 1
        if i < last:
            theirs = {"compvis": f"input_blocks.{k}.0", "diffusers": f"down_blocks.{i}.downsamplers.0"}
            yield _Site("down", theirs.get(layout, f"data_blocks.{data}.0"), f"down_{i}/downsample")
            data, k = data + 1, k + 1
    for part, k, name in (("res", 0, "res_0"), ("attn", 1, "attn_0"), ("res", 2, "res_1")):
        folder = "attentions" if part == "attn" else "resnets"
        theirs = {"compvis": f"middle_block.{k}", "diffusers": f"mid_block.{folder}.{name[-1]}"}
        vd = f"context_blocks.{ctx}.0" if part == "attn" else f"data_blocks.{data}.0"
        yield _Site(part, theirs.get(layout, vd), f"mid/{name}")
        data, ctx = data + (part == "res"), ctx + (part == "attn")
    k = 0
    for i, attention in enumerate(reversed(sizes.attention)):
        for j in range(n + 1):
            theirs = {"compvis": f"output_blocks.{k}.0", "diffusers": f"up_blocks.{i}.resnets.{j}"}
            yield _Site("res", theirs.get(layout, f"data_blocks.{data}.0"), f"up_{i}/res_{j}")
            data += 1
            if attention:
                theirs = {"compvis": f"output_blocks.{k}.1", "diffusers": f"up_blocks.{i}.attentions.{j}"}
                yield _Site("attn", theirs.get(layout, f"context_blocks.{ctx}.0"), f"up_{i}/attn_{j}")
                ctx += 1
            if j == n and i < last:
                at = 2 if attention else 1  # behind the transformer, where there is one
                theirs = {"compvis": f"output_blocks.{k}.{at}", "diffusers": f"up_blocks.{i}.upsamplers.0"}
                yield _Site("up", theirs.get(layout, f"data_blocks.{data}.0"), f"up_{i}/upsample")
                data += 1
            k += 1


def table(sizes: Sizes, layout: str, prefix: str = "unet") -> list[Rule]:
    """Every tensor of a UNet of these sizes in one layout."""
    text, column = sizes.kind == "text", 1 if layout == "diffusers" else 0
    final = len([s for s in _sites(sizes, layout) if s.part != "attn"]) + 1
    ends = {  # first layer, last norm, last layer, the time embedding's two
        "compvis": ("input_blocks.0.0", "out.0", "out.2", "time_embed.0", "time_embed.2"),
        "diffusers": ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
        "vd": ("data_blocks.0.0", *(f"data_blocks.{final}.0.{k}" for k in (0, 2)), "time_embed.0", "time_embed.2"),
    }[layout]
    names = ("linear_in", "norm_out", "linear_out") if text else ("conv_in", "norm_out", "conv_out")
    kinds = ("dense" if text else "conv", "norm", "dense" if text else "conv", "dense", "dense")
    rules = []
    for theirs, ours, kind in zip(ends, (*names, "time/linear_1", "time/linear_2"), kinds, strict=True):
        rules += layer(theirs, f"{prefix}/{ours}", kind)
    own = ("fc", "point") if text else ("conv", "conv")
    for site in _sites(sizes, layout):
        ours = f"{prefix}/{site.ours}"
        if site.part == "res":
            for *theirs, name, kind in _RES:
                name = name.replace("layer", own[0])
                rules += layer(f"{site.theirs}.{theirs[column]}", f"{ours}/{name}", own[1] if kind == "layer" else kind)
        elif site.part == "attn":
            for theirs, name, kind in _TRANSFORMER:
                rules += layer(f"{site.theirs}.{theirs}", f"{ours}/{name}", kind)
        elif text:
            rules += layer(site.theirs, ours, "dense")
        else:
            inner = "op" if site.part == "down" and layout != "diffusers" else "conv"
            rules += layer(f"{site.theirs}.{inner}", ours, "conv")
    return rules


def transformers(sizes: Sizes, layout: str) -> tuple[str, ...]:
    """What the keys of transformers start with."""
    return tuple(f"{site.theirs}." for site in _sites(sizes, layout) if site.part == "attn")


def layout_of(found: Mapping[str, Tensor]) -> str | None:
    """Which layout these keys are in, their prefix taken off; None where they are no UNet."""
    for key, layout in (("input_blocks.0.0", "compvis"), ("conv_in", "diffusers"), ("data_blocks.0.0", "vd")):
        if f"{key}.weight" in found:
            return layout
    return None


def sizes_of(found: Mapping[str, Tensor], what: str) -> Sizes:
    """Sizes of the UNet in these tensors.

    Raises:
      UserError: no UNet, one that is cut short, or one of another family (SD-2.x, SDXL, in-painting).
    """
    layout = layout_of(found)
    if layout is None:
        raise UserError(f"{what}: no UNet in it; expected input_blocks.0.0.weight or conv_in.weight")
    refuse_others(found, what)
    final = max(_numbers(found, r"data_blocks\.(\d+)\."), default=0)
    first, norm, last = {
        "compvis": ("input_blocks.0.0", "out.0", "out.2"),
        "diffusers": ("conv_in", "conv_norm_out", "conv_out"),
        "vd": ("data_blocks.0.0", f"data_blocks.{final}.0.0", f"data_blocks.{final}.0.2"),
    }[layout]
    for name in (first, norm, last):
        if f"{name}.weight" not in found:
            raise UserError(f"{what}: 1 missing: {name}.weight; the file is not whole, or of another network")
    text = len(found[f"{first}.weight"].shape) == 2
    latent, width = found[f"{last}.weight"].shape[0], found[f"{norm}.weight"].shape[0]
    taken = found[f"{first}.weight"].shape[1]
    if taken != latent:
        raise UserError(
            f"{what}: {first}.weight takes {taken} channels, expected {latent}: an in-painting or depth variant; "
            "bring the plain v1-5 weights"
        )
    positions = found[f"{first}.weight"].shape[0] // width if text else 0
    blocks = _down(found, layout, text)
    keys = [k for k in found if k.endswith("attn2.to_k.weight")]
    if not blocks or not keys:
        raise UserError(f"{what}: no residual block or no cross-attention in it; the file is not whole")
    return Sizes(
        channels=tuple(c // (positions or 1) for c, _, _ in blocks),
        attention=tuple(a for _, _, a in blocks),
        layers=blocks[0][1],
        width=found[keys[0]].shape[1],
        latent=latent,
        positions=positions,
    )


def read_config(config: Mapping[str, Any], what: str, sizes: Sizes, notes: list[str]) -> tuple[int, int, int | None]:
    """(heads, groups, side of the latents it was trained on, where that is said) of a UNet of these sizes.

    Raises:
      UserError: the config is another network's; names the field.
    """
    taken = fields.read(config, fields.UNET, what, notes)
    flat = sizes.kind == "text"
    kind = "Flat" if flat else "2D"
    down = [f"{'CrossAttn' * a}DownBlock{kind}" for a in sizes.attention]
    up = [f"{'CrossAttn' * a}UpBlock{kind}" for a in reversed(sizes.attention)]
    channels = (sizes.latent, [sizes.latent, 1, 1]) if flat else (sizes.latent,)
    told = dict(
        block_out_channels=(sizes.channels,),
        layers_per_block=(sizes.layers,),
        down_block_types=(down,),
        up_block_types=(up,),
        cross_attention_dim=(sizes.width,),
        in_channels=channels,
        out_channels=channels,
        time_embedding_dim=(4 * sizes.channels[0],),
    )
    fields.compare(config, told, what)
    heads = "num_attention_heads" if taken["num_attention_heads"] is not None else "attention_head_dim"
    groups = fields.count(taken, "norm_num_groups", what)
    side = taken["sample_size"]
    side = side[0] if isinstance(side, list) and len(set(map(repr, side))) == 1 else side
    if side is not None and (type(side) is not int or side < 1):
        raise UserError(f"{what}: sample_size {side!r}, expected a whole number, the side of its latents")
    return fields.count(taken, heads, what), groups, side


def refuse_others(found: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError for Stable Diffusion 2.x and XL, which are other networks."""
    if any(k.startswith(("add_embedding.", "label_emb.")) for k in found):
        raise UserError(f"{what}: a Stable Diffusion XL UNet (it embeds more than the time); expected version 1.5")
    flat = next((k for k, t in found.items() if k.endswith("proj_in.weight") and len(t.shape) == 2), None)
    if flat is not None:
        raise UserError(f"{what}: {flat} is a linear layer: a Stable Diffusion 2.x or XL UNet; expected version 1.5")
    deep = next((k for k in found if "transformer_blocks.1." in k), None)
    if deep is not None:
        raise UserError(f"{what}: {deep}: more than one transformer block a site; expected Stable Diffusion 1.5")


def _numbers(found: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(m[1]) for m in (re.match(pattern, key) for key in found) if m})


def _down(found: Mapping[str, Tensor], layout: str, text: bool) -> list[tuple[int, int, bool]]:
    """(features, residual blocks, has transformers) of each level on the way down."""
    if layout == "diffusers":
        out = []
        for i in _numbers(found, r"down_blocks\.(\d+)\.resnets"):
            weight = found.get(f"down_blocks.{i}.resnets.0.conv1.weight")
            blocks = len(_numbers(found, rf"down_blocks\.{i}\.resnets\.(\d+)\."))
            attention = any(k.startswith(f"down_blocks.{i}.attentions.") for k in found)
            out.append((weight.shape[0] if weight else 0, blocks, attention))
        return out
    name = "input_blocks" if layout == "compvis" else "data_blocks"
    out, features, blocks, attention = [], 0, 0, False
    for k in _numbers(found, rf"{name}\.(\d+)\.")[1:]:
        sampler = f"{name}.{k}.0.weight" if text else f"{name}.{k}.0.op.weight"
        if f"{name}.{k}.0.in_layers.2.weight" in found:
            here = found[f"{name}.{k}.0.in_layers.2.weight"].shape[0]
            if layout == "vd" and out and blocks == out[0][1]:
                break  # the last level has no sampler: what follows is the middle
            features, blocks = here, blocks + 1
            attention |= any(key.startswith(f"{name}.{k}.1.") for key in found)
        elif sampler in found:
            out.append((features, blocks, attention))
            blocks, attention = 0, False
    out.append((features, blocks, attention))
    if layout == "vd":
        # Context blocks are numbered on their own; the first levels have them, and the middle has one.
        contexts = len(_numbers(found, r"context_blocks\.(\d+)\."))
        levels = (contexts - 1) // (2 * out[0][1] + 1)
        out = [(c, n, i < levels) for i, (c, n, _) in enumerate(out)]
    return out
