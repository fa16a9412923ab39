"""Tiny models in the published layouts, random weights, written by diffusers, transformers and torch themselves."""

import json
import re
from pathlib import Path

import oracles
import torch

SIZES = dict(channels=(8, 16, 16), attention=(True, True, False), layers=1, heads=2, groups=4, width=32)
CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32)
VOCAB = 600


def unet(**changes):
    from benchmarks.originals import unet as torch_unet

    torch.manual_seed(0)
    return oracles.scramble(torch_unet(**(SIZES | changes)))


def vae():
    from test_image_vae import torch_vae

    torch.manual_seed(1)
    return oracles.scramble(torch_vae(channels=(8, 16), layers=1, groups=4), 1)


def clip_text(cls="CLIPTextModel", vocab=VOCAB):
    import transformers

    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(**CLIP, vocab_size=vocab, eos_token_id=vocab - 1, bos_token_id=vocab - 2)
    return oracles.scramble(getattr(transformers, cls)(config), 2)


def clip(vocab=VOCAB):
    import transformers

    text = CLIP | dict(vocab_size=vocab, eos_token_id=vocab - 1, bos_token_id=vocab - 2)
    torch.manual_seed(3)
    vision = CLIP | dict(image_size=16, patch_size=8)
    return oracles.scramble(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)), 3
    )


def scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def diffusers_folder(folder: Path, variant: str | None = None, safe: bool = True, dtype=None, **changes) -> dict:
    """A Stable Diffusion folder; returns its parts in torch."""
    parts = {"unet": unet(**changes), "vae": vae(), "text_encoder": clip_text()}
    for name, model in parts.items():
        if dtype is not None:
            model.to(dtype)
        options = {} if name == "text_encoder" else {"safe_serialization": safe}
        model.save_pretrained(folder / name, variant=variant, **options)
        if name == "text_encoder" and not safe:
            file = next((folder / name).glob("*.safetensors"))
            torch.save(model.state_dict(), file.with_name("pytorch_model.bin"))
            file.unlink()
    scheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline"} | {n: ["diffusers", type(m).__name__] for n, m in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return parts


# diffusers -> CompVis, by hand for these sizes: three levels of one block, transformers in the first two.
_RES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_PLACES = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op", "down_blocks.2.resnets.0": "input_blocks.5.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.3.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.4.0", "up_blocks.2.attentions.0": "output_blocks.4.1",
    "up_blocks.2.resnets.1": "output_blocks.5.0", "up_blocks.2.attentions.1": "output_blocks.5.1",
}  # fmt: skip


def compvis_unet(state: dict) -> dict:
    out = {}
    for key, value in state.items():
        place = next(p for p in sorted(_PLACES, key=len, reverse=True) if key.startswith(p + "."))
        rest = key[len(place) + 1 :]
        if ".resnets." in f".{place}":
            name, _, leaf = rest.rpartition(".")
            rest = f"{_RES[name]}.{leaf}"
        out[f"{_PLACES[place]}.{rest}"] = value
    return out


def compvis_vae(state: dict, levels: int = 2) -> dict:
    out = {}
    for key, value in state.items():
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
        for pattern, new in (
            (r"down_blocks\.(\d)", r"down.\1"), (r"mid_block\.resnets\.0", "mid.block_1"),
            (r"mid_block\.resnets\.1", "mid.block_2"), (r"resnets\.(\d)", r"block.\1"),
            (r"(down|up)samplers\.0", r"\1sample"), (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
            (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"),
            (r"attn_1\.to_([qkv])", r"attn_1.\1"),
        ):  # fmt: skip
            name = re.sub(pattern, new, name)
        if "attn_1" in name and value.ndim == 2:
            value = value[:, :, None, None]
        out[name] = value
    return out


FULL = dict(channels=(320, 640, 1280, 1280), attention=(True, True, True, False), layers=2, width=768, latent=4)


def random_file(path: Path, parts, suffix: str = "safetensors") -> None:
    """A file in a published layout with random weights, tensor by tensor: the model itself is never in memory.

    Args:
      parts: (prefix of the keys, table of rules, our names and shapes) of each network in it.
    """
    import numpy as np

    from medm2g_jax.convert import files, rules

    rng = np.random.default_rng(0)

    def draw(name, shape):
        """Values with which activations keep their size on the way through."""
        leaf, fan_in = name.rpartition("/")[2], np.prod(shape[:-1])
        spread = {"kernel": fan_in**-0.5, "scale": 0.1}.get(leaf, 0.02)
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(spread)
        return values + np.float32(1) if leaf == "scale" else values

    outputs = {}
    for front, table, expected in parts:
        ours = {
            n: files.Tensor(s, np.dtype("f4"), lambda n=n, s=s: draw(n, s), path) for n, s in expected.items()
        }
        outputs |= {front + step.name: step.output() for step in rules.back(table, ours, "random")}
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "pth":
        torch.save({name: torch.from_numpy(np.ascontiguousarray(out.make())) for name, out in outputs.items()}, path)
    else:
        files.write_safetensors(path, outputs, {"format": "pt"})


def random_single_file(path: Path, **changes) -> None:
    """A CompVis file of Stable Diffusion 1.5's size (or with other channels)."""
    from medm2g_jax.convert import clip, stable_diffusion, unet

    sizes = unet.Sizes(**(FULL | changes), positions=0)
    vae = dict(channels=(128, 256, 512, 512), layers=2, latent=4, colours=3)
    text = dict(width=768, layers=12, ff=3072, length=77, vocab=49408, heads=12)
    encoder = clip.table("text", 12, "text_model.", "text", projection=False)
    parts = (
        (stable_diffusion.UNET, unet.table(sizes, "compvis"), sizes.expected()),
        (stable_diffusion.VAE, stable_diffusion.vae_table(4, 2, "compvis"), stable_diffusion.vae_expected(vae)),
        (stable_diffusion.TEXT, encoder, clip.text_expected(text, "text", None)),
    )
    random_file(path, parts)


def _tokenizers(folder: Path, sizes: dict[str, int]) -> None:
    """The three tokenizers with vocabularies of exactly these sizes, of words that nobody says."""
    import shutil

    import numpy as np

    from medm2g_jax.data.text import Tokenizers

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, rng.integers(4, 10))) for _ in range(60_000)]
    texts = [" ".join(words[i : i + 50] * 2) for i in range(0, len(words), 50)]
    for name, size in sizes.items():
        made = Tokenizers.train(texts, folder / "all", size)
        if made.sizes[name] != size:
            raise ValueError(f"{name}: {made.sizes[name]} words, expected {size}")
        shutil.copytree(folder / "all" / name, folder / name)


def full_weights(folder: Path) -> None:
    """folder/weights: all four parts at the published size, converted by the command from random files in the
    published layouts. 15 GB, and 16 GB of sources beside it."""
    import shutil

    from medm2g_jax.convert import clip, optimus, rules, unet
    from medm2g_jax.convert.run import convert

    vocab = dict(clip=49408, bert=28996, gpt2=50260)
    _tokenizers(folder / "tokenizers", vocab)

    random_single_file(folder / "v1-5.safetensors")
    convert("sd15", str(folder / "v1-5.safetensors"), str(folder / "weights"))

    text = dict(width=768, layers=12, ff=3072, length=77, vocab=vocab["clip"], heads=12)
    vision = dict(width=1024, layers=24, ff=4096, patch=14, image=224, heads=16)
    parts = (
        ("", clip.table("text", 12, "text_model.", "text"), clip.text_expected(text, "text", 768)),
        ("", clip.table("vision", 24, "vision_model.", "vision"), clip.vision_expected(vision, "vision", 768)),
        ("", clip.LOGIT_SCALE, {"logit_scale": ()}),
    )
    shutil.copytree(folder / "tokenizers" / "clip", folder / "clip")
    random_file(folder / "clip" / "model.safetensors", parts)
    heads = {"text_config": {"num_attention_heads": 12}, "vision_config": {"num_attention_heads": 16}}
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip"} | heads))
    convert("clip", str(folder / "clip"), str(folder / "weights"))

    sizes = unet.Sizes(**FULL | dict(latent=768), positions=4)
    file = "diffusion_pytorch_model.safetensors"
    random_file(folder / "vd" / "text_unet" / file, [("", unet.table(sizes, "diffusers"), sizes.expected())])
    image = unet.Sizes(**FULL, positions=0)
    random_file(folder / "vd" / "image_unet" / file, [("", unet.table(image, "diffusers"), image.expected())])
    convert("vd", str(folder / "vd"), str(folder / "weights"))

    vae = dict(width=768, layers=12, ff=3072, latent=768, bert_positions=512, gpt2_positions=1024)
    vae |= {f"{name}_vocab": vocab[name] for name in ("bert", "gpt2")}
    module, args = optimus._vae(vae)
    parts = [("", optimus.table(12), rules.parameters(module, "vae", *args))]
    random_file(folder / "optimus-vae.pth", parts, "pth")
    names = {name: str(folder / "tokenizers" / name) for name in ("bert", "gpt2")}
    convert("optimus", str(folder / "optimus-vae.pth"), str(folder / "weights"), **names)


def compvis_state(parts: dict, ema: bool = False) -> dict:
    """One flat state dict as CompVis wrote them, buffers included; EMA weights differ from the plain ones."""
    unet_ = compvis_unet(parts["unet"].state_dict())
    state = {f"model.diffusion_model.{k}": v for k, v in unet_.items()}
    state |= {f"first_stage_model.{k}": v for k, v in compvis_vae(parts["vae"].state_dict()).items()}
    text = parts["text_encoder"].state_dict()
    state |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    state |= {k: torch.linspace(0, 1, 5) for k in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod")}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if ema:
        twins = {f"model_ema.diffusion_model{k.replace('.', '')}": v + 0.01 for k, v in unet_.items()}
        state |= twins | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {k: v.contiguous().clone() for k, v in state.items()}


if __name__ == "__main__":
    import sys

    full_weights(Path(sys.argv[1]))
