"""From ours to what other tools read: a converted folder, or one flow of a trained run.

    diffusers      what StableDiffusionPipeline loads: one image flow's UNet, the autoencoder, SD's text encoder
    clip           a transformers CLIPModel: C_T and one imaging modality's C
    bert, gpt2     the two halves of the text autoencoder, without Optimus's own layers
    safetensors    a whole trained model in one folder that needs nothing else; `medm2g_jax.load` reads it
    hub            the same, as a model hub takes it: model.safetensors, and a README.md with YAML before the card

What other tools have no place for stays behind (guides, contexts, streams, prompt_in, Optimus's layers), and the model
card says so.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medm2g_jax.convert import clip, converted, fields, optimus, stable_diffusion, unet
from medm2g_jax.convert.converted import RESTRICTIONS, WEIGHTS, Summary
from medm2g_jax.convert.files import Output, Tensor, new_folder, some, write_safetensors
from medm2g_jax.convert.packed import pack
from medm2g_jax.convert.rules import Step, back, outputs
from medm2g_jax.errors import UserError
from medm2g_jax.loading import in_the_box, load, locate
from medm2g_jax.modality import MODALITIES, centre, of_kind

FORMATS = ("diffusers", "clip", "bert", "gpt2", "safetensors", "hub")
WHOLE = {"safetensors": WEIGHTS, "hub": "model.safetensors"}  # formats of a whole model, and the weights' file
FRONT_ENDS = "\n---\n\n"
VERSION = "0.42.0"  # of diffusers, whose configs these are
# Of what the process is, what DDIM's config has.
DDIM = ("beta_end", "beta_schedule", "beta_start", "clip_sample", "num_train_timesteps", "prediction_type")


@dataclass(frozen=True)
class Source:
    """What is exported: tensors under a converted folder's names, sizes as config.net, and what the card tells."""

    tensors: dict[str, Tensor]
    net: dict[str, Any]
    vocab: dict[str, int]
    scale: float
    licences: tuple[str, ...]
    tokenizers: dict[str, Path]
    title: str
    left: tuple[str, ...] = ()  # what has no place in the format
    latent_side: int | None = None  # of the images that the UNet was trained on
    scheduler: Mapping[str, Any] | None = None  # the config that came with Stable Diffusion's weights


def export(
    source: str | Path | None, to: str | Path, format: str | None, flow: str | None = None, dtype: str = "float32"
) -> Summary:
    """Write `to` in one of FORMATS.

    Args:
      source: a folder of converted weights, or a run root, or a round's folder in it.
      flow: the modality whose UNet or prompt encoder is wanted; of a run only.
      dtype: in which a whole model is stored, one of packed.PRECISIONS; the other formats are float32.

    Raises:
      UserError: nothing there, or the format needs what it does not have; nothing is written then.
    """
    if source is None:
        raise UserError("medm2g convert export needs --from PATH, a run or a folder of converted weights")
    source, to = Path(source), Path(to)
    if not source.exists() and str(source) not in in_the_box():
        raise UserError(f"--from {source}: no such file or folder")
    if format is None:
        raise UserError(f"medm2g convert export needs --as, one of {', '.join(FORMATS)}")
    if format not in FORMATS:
        raise UserError(f"--as {format}: expected one of {', '.join(FORMATS)}")
    if format not in WHOLE and dtype != "float32":
        raise UserError(f"--dtype {dtype}: of --as {' and '.join(WHOLE)} alone; --as {format} is float32")
    began = time.time()
    if format in WHOLE:
        count, size, licences = _whole(source, to, dtype, format)
    else:
        given = _of_converted(source, format) if _is_converted(source) else _of_run(source, format, flow)
        write = {"diffusers": _diffusers, "clip": _clip, "bert": _bert, "gpt2": _gpt2}[format]
        with new_folder(to) as folder:
            count, size = write(given, folder)
            (folder / "README.md").write_text(card(given.title, given.licences, given.left), encoding="utf-8")
        licences = given.licences
    return Summary(to, count, size, time.time() - began, "; ".join(licences))


def card(title: str, licences: tuple[str, ...], left: tuple[str, ...] = (), more: str = "") -> str:
    """README.md of an export: what it is, what it is not, licences and what they forbid."""
    lines = [f"# {title}", "", "Made by `medm2g convert export`. Research software; all it generates is synthetic."]
    lines += ["**Not for clinical use.**", "", "Licences of the weights and data it stands on:", ""]
    lines += [f"- {licence}" for licence in licences] or ["- none recorded"]
    if left:
        lines += ["", f"Not in this format, and left out: {', '.join(left)}."]
    if more:
        lines += ["", more]
    if any("OpenRAIL" in licence for licence in licences):
        lines += ["", "## Use restrictions", "", RESTRICTIONS]
    return "\n".join(lines) + "\n"


# --- where it comes from --------------------------------------------------------------------------------------------

_PARTS = {"diffusers": "sd15", "clip": "clip", "bert": "optimus", "gpt2": "optimus"}


def _is_converted(source: Path) -> bool:
    return (source / converted.META).is_file() or any(converted.exists(source, p) for p in _PARTS.values())


def _of_converted(source: Path, format: str) -> Source:
    part = _PARTS[format]
    if (source / converted.META).is_file():
        source, own = source.parent, source.name
        if own != part:
            raise UserError(f"{source / own}: --as {format} is made from {part}/; give --from {source / part}")
    found = converted.read(source, part)
    tokenizers = _tokenizers(source, part)
    return Source(
        found.tensors,
        found.meta["net"],
        found.meta["vocab"] if "vocab" in found.meta else {},
        found.meta.get("scales", {}).get("image", 1.0),
        (found.meta["licence"],),
        tokenizers,
        f"{found.meta['source']}, as medm2g_jax has it",
        ("Optimus's latent layers",) if part == "optimus" else (),
        found.meta.get("latent_side"),
        found.meta.get("scheduler"),
    )


def _tokenizers(weights: Path, *parts: str) -> dict[str, Path]:
    out = {}
    for part in (*parts, "clip"):
        for folder in (weights / part / "tokenizers").glob("*"):
            out.setdefault(folder.name, folder)
    return out


def _of_run(source: Path, format: str, flow: str | None) -> Source:
    images = of_kind("image")
    if format in ("diffusers", "clip") and flow not in images:
        raise UserError(f"--as {format} of a run needs --flow, one of {', '.join(images)}; found {flow!r}")
    model = load(str(source), [flow] if flow else [])
    params, meta = model.params, model.meta
    net, text = meta["shared"]["net"], centre().name
    take = {
        "diffusers": {f"{flow}/unet": "unet", "image/vae": "vae"},
        "clip": {f"{text}/clip": "text", f"{flow}/clip": "vision"},
        "bert": {"text/vae": "vae"},
        "gpt2": {"text/vae": "vae"},
    }[format]
    tensors = {}
    for name, value in params.items():
        owner, module, rest = name.split("/", 2)
        if f"{owner}/{module}" in take and "/guide/" not in name and not rest.startswith("stream/"):
            tensors[f"{take[f'{owner}/{module}']}/{rest}"] = _of_array(value, Path(source))
    missing = [m for m in take.values() if not any(n.startswith(f"{m}/") for n in tensors)]
    if missing:
        raise UserError(f"{source}: this model has no {some(missing)} of {flow or text}; give another --flow")
    vocab, left = meta["vocab"], ("Optimus's latent layers",)
    side = scheduler = None
    if format == "diffusers":
        weights = Path(meta["shared"]["weights"] or ".")
        if not converted.exists(weights, "sd15"):
            raise UserError(
                f"{source}: a diffusers folder needs Stable Diffusion's own text encoder, and this run was not started "
                "from converted weights; export it --as safetensors"
            )
        own = converted.read(weights, "sd15")
        tensors |= {n: t for n, t in own.tensors.items() if n.startswith("text/")}
        scheduler = own.meta.get("scheduler")
        side = meta["shared"]["image_size"] // 2 ** (len(net["image_vae"]["channels"]) - 1)
        net, vocab = {**net, "clip_text": own.meta["net"]["clip_text"]}, own.meta["vocab"]
        left = ("guides, contexts and adaptation", "the embedding of contrasts", "prompt_in (prompts are SD's own)")
    if format == "clip":
        tensors["logit_scale"] = _of_array(np.float32(np.log(1 / 0.07)), Path(source))
        left = ("the other prompt encoders",)
    root = Path(source) if (Path(source) / "tokenizers").is_dir() else Path(source).parent
    folders = {p.name: p for p in (root / "tokenizers").glob("*") if p.is_dir()}
    title = f"{MODALITIES[flow or text].word} flow of {meta['stage']} (MedM2G)"
    licences = tuple(meta["licences"])
    return Source(tensors, net, vocab, meta["scales"]["image"], licences, folders, title, left, side, scheduler)


def _of_array(value: Any, source: Path) -> Tensor:
    return Tensor(tuple(value.shape), np.dtype(value.dtype), lambda: np.asarray(value), source)


# --- what it becomes ------------------------------------------------------------------------------------------------


def _write(folder: Path, file: str, steps: list[Step], config: Mapping[str, Any]) -> tuple[int, int]:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / file, outputs(steps), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return len(steps), sum(step.tensor.nbytes for step in steps)


def _under(given: Source, prefix: str) -> dict[str, Tensor]:
    out = {n: t for n, t in given.tensors.items() if n.startswith(f"{prefix}/")}
    if not out:
        raise UserError(f"{given.title}: no {prefix}/ in it")
    return out


def _diffusers(given: Source, folder: Path) -> tuple[int, int]:
    net, width = given.net, given.net["width"]
    u, v, text = net["image_unet"], net["image_vae"], net["clip_text"]
    if v["patch"] != 1 or v["colours"] != 3 or not v["mid_attention"]:
        raise UserError(f"{given.title}: its autoencoder is not Stable Diffusion's; diffusers has none like it")
    latent, side = v["latent"], given.latent_side or 64
    sizes = unet.Sizes(tuple(u["channels"]), tuple(u["attention"]), u["layers"], width, latent, 0)
    attention = ["CrossAttn" if a else "" for a in u["attention"]]
    common = dict(_diffusers_version=VERSION, act_fn="silu")
    configs = {
        "unet": dict(
            common,
            _class_name="UNet2DConditionModel",
            attention_head_dim=u["heads"],
            block_out_channels=u["channels"],
            center_input_sample=False,
            cross_attention_dim=width,
            down_block_types=[f"{a}DownBlock2D" for a in attention],
            downsample_padding=1,
            flip_sin_to_cos=True,
            freq_shift=0,
            in_channels=latent,
            layers_per_block=u["layers"],
            mid_block_scale_factor=1,
            norm_eps=1e-5,
            norm_num_groups=u["groups"],
            out_channels=latent,
            sample_size=side,
            up_block_types=[f"{a}UpBlock2D" for a in reversed(attention)],
        ),
        "vae": dict(
            common,
            _class_name="AutoencoderKL",
            block_out_channels=v["channels"],
            down_block_types=["DownEncoderBlock2D"] * len(v["channels"]),
            in_channels=3,
            latent_channels=latent,
            layers_per_block=v["layers"],
            norm_num_groups=v["groups"],
            out_channels=3,
            sample_size=side * 2 ** (len(v["channels"]) - 1),
            scaling_factor=given.scale,
            up_block_types=["UpDecoderBlock2D"] * len(v["channels"]),
        ),
        "text_encoder": dict(_clip_text_config(text, given.vocab["clip"], width), architectures=["CLIPTextModel"]),
    }
    rules = {
        "unet": unet.table(sizes, "diffusers"),
        "vae": stable_diffusion.vae_table(len(v["channels"]), v["layers"], "diffusers"),
        "text_encoder": clip.table("text", text["layers"], "text_model.", "text", projection=False),
    }
    count = size = 0
    for name, prefix in (("unet", "unet"), ("vae", "vae"), ("text_encoder", "text")):
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        steps = back(rules[name], _under(given, prefix), f"{given.title}: {name}")
        n, bytes_ = _write(folder / name, file, steps, configs[name])
        count, size = count + n, size + bytes_
    scheduler = given.scheduler or dict(
        _class_name=fields.SCHEDULER.library,
        _diffusers_version=VERSION,
        **{name: ours[0] for name, (_, ours) in fields.SCHEDULER.fixed.items() if name in DDIM},
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler.get("_class_name") or fields.SCHEDULER.library],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if "clip" in given.tokenizers and converted.copy_tokenizer(given.tokenizers["clip"], folder / "tokenizer"):
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return count, size


def _clip_text_config(text: Mapping[str, Any], vocab: int, projection: int) -> dict[str, Any]:
    return dict(
        model_type="clip_text_model",
        hidden_act="quick_gelu",
        hidden_size=text["width"],
        intermediate_size=text["ff"],
        num_attention_heads=text["heads"],
        num_hidden_layers=text["layers"],
        max_position_embeddings=text["length"],
        layer_norm_eps=1e-5,
        vocab_size=vocab,
        projection_dim=projection,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )


def _clip(given: Source, folder: Path) -> tuple[int, int]:
    net, text, image = given.net, given.net["clip_text"], given.net["clip_image"]
    vision = dict(
        model_type="clip_vision_model",
        hidden_act="quick_gelu",
        hidden_size=image["width"],
        intermediate_size=image["ff"],
        num_attention_heads=image["heads"],
        num_hidden_layers=image["layers"],
        image_size=image["image"],
        patch_size=image["patch"],
        layer_norm_eps=1e-5,
        projection_dim=net["width"],
    )
    config = dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=net["width"],
        text_config=_clip_text_config(text, given.vocab["clip"], net["width"]),
        vision_config=vision,
    )
    rules = clip.table("text", text["layers"], "text_model.", "text")
    rules += clip.table("vision", image["layers"], "vision_model.", "vision") + clip.LOGIT_SCALE
    done = _write(folder, "model.safetensors", back(rules, given.tensors, given.title), config)
    if "clip" in given.tokenizers:
        converted.copy_tokenizer(given.tokenizers["clip"], folder)
    return done


def _bert(given: Source, folder: Path) -> tuple[int, int]:
    t = given.net["text_vae"]
    ours = {n: x for n, x in _under(given, "vae/encoder").items() if not n.startswith("vae/encoder/latent/")}
    config = dict(
        architectures=["BertModel"],
        model_type="bert",
        hidden_act="gelu",
        hidden_size=t["width"],
        intermediate_size=t["ff"],
        layer_norm_eps=1e-12,
        max_position_embeddings=t["bert_positions"],
        num_attention_heads=t["heads"],
        num_hidden_layers=t["layers"],
        pad_token_id=0,
        type_vocab_size=2,
        vocab_size=given.vocab["bert"],
    )
    steps = back(optimus.bert_table(t["layers"], "", "vae/encoder"), ours, given.title)
    done = _write(folder, "model.safetensors", steps, config)
    if "bert" in given.tokenizers:
        converted.copy_tokenizer(given.tokenizers["bert"], folder)
    return done


def _gpt2(given: Source, folder: Path) -> tuple[int, int]:
    t, words = given.net["text_vae"], given.vocab["gpt2"]
    own = ("vae/decoder/memory/", "vae/decoder/embed/")
    ours = {n: x for n, x in _under(given, "vae/decoder").items() if not n.startswith(own)}
    config = dict(
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        n_embd=t["width"],
        n_head=t["heads"],
        n_inner=t["ff"],
        n_layer=t["layers"],
        n_positions=t["gpt2_positions"],
        vocab_size=words,
        pad_token_id=words - 3,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        tie_word_embeddings=True,
    )
    steps = back(optimus.gpt2_table(t["layers"], "transformer.", "vae/decoder"), ours, given.title)
    done = _write(folder, "model.safetensors", steps, config)
    if "gpt2" in given.tokenizers:
        converted.copy_tokenizer(given.tokenizers["gpt2"], folder)
    return done


# --- a whole model --------------------------------------------------------------------------------------------------


def _whole(source: Path, to: Path, dtype: str, format: str) -> tuple[int, int, tuple[str, ...]]:
    """One folder with the weights, model.json, config.json, tokenizers and a card."""
    root = Path(locate(str(source)))
    model = load(str(root))
    params = {n: v for n, v in model.params.items() if not n.startswith("null/")}
    stored = pack({n: np.asarray(v) for n, v in sorted(params.items())}, dtype)
    made = {n: Output(v.shape, v.dtype, lambda v=v: v) for n, v in stored.items()}
    meta = json.loads(json.dumps(model.meta))
    meta["shared"]["weights"] = ""  # it needs none
    for origin in meta["from"].values():
        origin.pop("run", None)  # nor the folders that it was trained in
    config = json.loads((root / "config.json").read_text()) | {"weights": "", "upstream_dirs": []}
    licences = tuple(meta["licences"])
    tokenizers = root / "tokenizers" if (root / "tokenizers").is_dir() else root.parent / "tokenizers"
    told = _described(model, sum(v.size for v in params.values()), dtype)
    told = card(f"MedM2G: {meta['stage']}", licences, (), told)
    if (root / "README.md").is_file():  # of an export that is exported again: what was measured of it
        told = (root / "README.md").read_text(encoding="utf-8")
        told = told.partition(FRONT_ENDS)[2] if told.startswith("---\n") else told
    front = _front_matter(model.modalities, licences) if format == "hub" else ""
    with new_folder(to) as folder:
        prints = write_safetensors(folder / WHOLE[format], made, {"format": "pt", "medm2g": "model"})
        if model.tokenizers:
            shutil.copytree(tokenizers, folder / "tokenizers")
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        (folder / "README.md").write_text(front + told, encoding="utf-8")
        kept = meta | {"storage": "safetensors", "file": WHOLE[format], "crc32": prints}
        (folder / "model.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return len(params), sum(v.nbytes for v in stored.values()), licences


def _described(model: Any, count: int, dtype: str) -> str:
    """The part of a whole model's card that says what it does, on what it was trained, and how it is used."""
    meta = model.meta
    data, pairs = meta["shared"]["data"], meta["pairs"]
    trained = {kind: ", ".join(f"{a} -> {b}" for a, b in some_) for kind, some_ in pairs.items()}
    rows = {
        "makes": ", ".join(model.modalities),
        "takes": ", ".join(model.givable),
        "images": f"{model.size} x {model.size} pixels",
        "parameters": f"{count / 1e6:.4g} M, stored as {dtype}",
        "data": f"{data['source'].partition(':')[0]}; its licences are above",
        "rounds": ", ".join(meta["rounds"]) or "none",
        **{f"trained pairs, {kind}": said or "none" for kind, said in trained.items()},
        "fingerprint of the model it was made of": f"`{model.fingerprint}`",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {said} |" for name, said in rows.items()), ""]
    first = next(iter(model.modalities))
    given = next((m for m in model.givable if m != first), None)
    value = "'...'" if given == centre().name else "'image.png'"
    lines += ["```python", "import medm2g_jax", "", 'model = medm2g_jax.load("FOLDER")']
    lines += [f"made = model.generate({{{f'{given!r}: {value}' if given else ''}}}, [{first!r}])", "```", ""]
    lines += ["Pairs that were not trained go through the aligned space alone: they are emergent, and worse."]
    if meta["standing_in"]:
        lines += ["", f"Never trained, initialised instead: {', '.join(meta['standing_in'])}."]
    lines += ["", "What it does has to be measured before it is used for anything: `medm2g evaluate --model FOLDER`, "]
    lines[-1] += "and whether it gives back the people it was trained on: `medm2g audit --model FOLDER`."
    return "\n".join(lines)


def _front_matter(modalities: Sequence[str], licences: Sequence[str]) -> str:
    """What a model hub reads of a card: YAML between two lines of ---."""
    names = " ".join(licences).lower()
    if any("openrail" in one.lower() for one in licences):
        licence = "creativeml-openrail-m"
    else:
        licence = "apache-2.0" if licences and names.count("apache-2.0") == len(licences) else "other"
    lines = ["---", f"license: {licence}"]
    if licence == "other":  # the hub asks for a name then; the card lists what each part is under
        lines += ["license_name: several", "license_link: README.md"]
    tags = ("medical", "medical-imaging", "jax", "flax", "latent-diffusion", "medm2g", *modalities)
    lines += ["library_name: medm2g_jax", "pipeline_tag: any-to-any", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(lines) + FRONT_ENDS
