"""The whole chain from a text to an image: Stable Diffusion's weights in our generator against its own pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import published
import torch
from test_clip import TEXT_L, text_config
from test_convert_sd import values
from test_image_vae import KL_F8, torch_vae
from test_unet import SD15

from benchmarks import originals
from medm2g_jax.config import get_config
from medm2g_jax.convert import converted, stable_diffusion
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.generate import Request
from medm2g_jax.inference import Model
from medm2g_jax.keys import row_normal, salt
from medm2g_jax.model import apply, build
from medm2g_jax.nn.clip import CLIPText
from medm2g_jax.train.results import tuples

TEXT, STEPS, GUIDANCE = "heart size is normal .", 20, 7.5
TINY = dict(
    side=8,
    unet=published.SIZES,
    vae=dict(channels=(8, 16, 16, 16), layers=1, groups=4),
    text=dict(vocab=published.VOCAB, width=32, layers=2, heads=2, ff=64, length=77, projection=32),
)
FULL = dict(side=64, unet=SD15, vae=KL_F8, text=TEXT_L)


class Unprojected(CLIPText):
    """Stable Diffusion's prompt: the hidden states as they are."""

    def __call__(self, ids):
        encoded = super().__call__(ids)
        return encoded._replace(tokens=encoded.hidden)


def torch_pipeline(size, tokenizer, seed):
    import transformers
    from diffusers import StableDiffusionPipeline

    parts = dict(
        unet=originals.unet(**size["unet"]),
        vae=torch_vae(**size["vae"]),
        text_encoder=transformers.CLIPTextModel(text_config(**size["text"])),
    )
    pipeline = StableDiffusionPipeline(
        **{name: oracles.randomize(part, seed) for name, part in parts.items()},
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=published.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_generator(folder, size, tokenizers, dtype):
    """Stable Diffusion's converted weights as the CT flow; prompts go to its UNet unprojected."""
    meta, width = converted.read(folder, "sd15").meta, size["text"]["width"]
    net = get_config("ldm", "ct,tiny").net.to_dict() | tuples(meta["net"])
    model = build(net, ("text", "ct"), dict(bert=1, gpt2=1) | meta["vocab"], meta["scales"], 8 * size["side"], dtype)
    text = model.flows["text"]
    model.flows["text"] = dataclasses.replace(text, clip=Unprojected(**size["text"], dtype=dtype))
    owners = {"unet": "ct/unet", "vae": "image/vae", "text": "text/clip"}
    params = {"ct/prompt_in/kernel": jnp.eye(width), "text/clip/projection/kernel": jnp.eye(width)}
    for name, value in values(folder).items():
        part, _, rest = name.partition("/")
        params[f"{owners[part]}/{rest}"] = jnp.asarray(value)
    return Model(model, params, tokenizers, {"lengths": {"clip": size["text"]["length"]}}, {})


@oracles.at_both_sizes(TINY, FULL, seeds=1)
def test_equals_stable_diffusion_pipeline(jit, record_property, tmp_path, size, seed):
    """DDIM with guidance from the same noise: every step's UNet, the sampler, and the decoder on what they made."""
    side = size["side"]
    tokenizers = Tokenizers.train([TEXT], tmp_path / "tokenizers", 600)
    start = row_normal(jax.random.key(seed)[None], (side, side, 4), salt("start ct"))
    pipeline = torch_pipeline(size, tmp_path / "tokenizers" / "clip", seed)
    expected = pipeline(
        TEXT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=8 * side,
        width=8 * side,
        latents=torch.from_numpy(np.asarray(start).transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    pipeline.save_pretrained(tmp_path / "published")
    del pipeline
    stable_diffusion.convert(tmp_path / "published", tmp_path / "weights")

    def error(dtype):
        generator = our_generator(tmp_path / "weights", size, tokenizers, dtype)
        request = Request(("text",), ("ct",), steps=STEPS, prompt_pairs=(("text", "ct"),))
        given = {"text": generator.ids([TEXT])}
        model, params = generator.model, generator.params
        z = generator.sample(request, given, jax.random.key(seed)[None], GUIDANCE, 0.0)["ct"] / model.scales["image"]
        # In colour, where `decode` takes the mean of the channels.
        vae = model.families["image"].vae()
        image = jit(lambda params, z: apply(vae, params, "image/vae", z, method="decode"))(params, z)
        return oracles.relative_error(np.clip(image / 2 + 0.5, 0, 1), expected)

    errors = {"float32": error(jnp.float32)} | ({"bf16": error(jnp.bfloat16)} if size is FULL else {})
    said = ", ".join(f"{dtype} {value:.1e}" for dtype, value in errors.items())
    record_property("relative error", said)
    print(f"\ntext to image at {8 * side} px: relative error {said}, deviation {expected.std():.2f}")
    assert expected.std() > 0.1 and errors["float32"] <= 1e-3 and errors.get("bf16", 0) < 0.2
