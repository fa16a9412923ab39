"""`prompt_in` of Stable Diffusion's flows: the linear map from shared tokens to what its UNet reads (DESIGN section 6).

    min_W  sum |x W - y|^2 + lambda |W|^2      x: C_T's tokens of a caption, in the shared space; y: SD's hidden states

Ridge regression in float64 over the tokens of a few hundred captions, lambda by captions held out. So converted SD-1.5
answers prompts of the shared space at step 0 while its own weights stay as they are.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from medm2g_jax.convert import converted, weights
from medm2g_jax.convert.captions import captions
from medm2g_jax.convert.converted import Converted
from medm2g_jax.convert.files import Output, write_safetensors
from medm2g_jax.data import text as tokenization
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.model import under
from medm2g_jax.nn.attention import context
from medm2g_jax.nn.clip import CLIPText
from medm2g_jax.nn.unet import UNet

COUNT, HELD_OUT = 320, 64
LAMBDAS = tuple(10.0**k for k in range(-10, 3))  # times the mean of the diagonal of x'x
BATCH = 16


def ready(to: Path) -> bool:
    """Are both folders there, with a tokenizer, and the map not fitted yet?"""
    there = all(converted.exists(to, part) for part in ("sd15", "clip"))
    return there and tokenizer_of(to) is not None and not (to / "sd15" / weights.PROMPT_IN).exists()


def tokenizer_of(to: Path) -> Path | None:
    folders = (to / part / "tokenizers" / "clip" for part in ("clip", "sd15"))
    return next((f for f in folders if f.is_dir()), None)


def fit(to: Path) -> dict[str, float]:
    """Fit the map, write it beside sd15's weights, and return what it is worth.

    Returns:
      lambda (as chosen), residual (|x W - y| / |y| on held-out captions), residual_fitted, condition (of the text
      projection), surviving (share of the text-conditioned eps at step 0: 1 - |d_ours - d_sd| / |d_sd| for the
      difference d that a prompt makes to eps), captions.

    Raises:
      UserError: sd15 or clip is missing, there is no tokenizer, or the two do not fit together.
    """
    sd, cl = converted.read(to, "sd15"), converted.read(to, "clip")
    folder = tokenizer_of(to)
    if folder is None:
        raise UserError(f"{to / 'clip' / 'tokenizers' / 'clip'}: no tokenizer there; copy CLIP's files into it")
    own, shared = sd.meta["net"]["clip_text"], cl.meta["net"]["clip_text"]
    if own["length"] != shared["length"] or sd.meta["vocab"] != cl.meta["vocab"]:
        raise UserError(f"{to}: the text encoders of sd15/ and clip/ read other ids; bring SD-1.5's CLIP (ViT-L/14)")
    if sd.meta["net"]["width"] != cl.meta["net"]["width"]:
        raise UserError(
            f"{to}: sd15/ reads prompts of width {sd.meta['net']['width']}, clip/ makes {cl.meta['net']['width']}; "
            "bring SD-1.5's CLIP (ViT-L/14)"
        )
    ids = _ids(folder, captions(COUNT), shared["length"])
    vocab = cl.meta["vocab"]["clip"]
    x, raw = _encode(cl, shared, vocab, ids)
    y = raw if _same_tower(sd, cl) else _encode(sd, own, vocab, ids)[1]
    split = COUNT - HELD_OUT
    kernel, found = ridge(x[:split], y[:split], x[split:], y[split:])
    projection = cl.tensors["text/projection/kernel"].read().astype(np.float64)
    found |= {"condition": float(np.linalg.cond(projection)), "captions": COUNT}
    found["surviving"] = surviving(sd, kernel, x[split : split + 2], y[split : split + 2], x[:1], y[:1])
    made = {"prompt_in/kernel": Output(kernel.shape, np.dtype(np.float32), lambda: kernel)}
    path = to / "sd15" / weights.PROMPT_IN
    part = path.with_suffix(".partial")
    write_safetensors(part, made, {"format": "pt", "fit": json.dumps(found)})
    part.replace(path)
    return found


def ridge(
    x: np.ndarray, y: np.ndarray, x_out: np.ndarray, y_out: np.ndarray, lambdas: Sequence[float] = LAMBDAS
) -> tuple[np.ndarray, dict[str, float]]:
    """The kernel (d e), float32, of the lambda that is best on the held-out captions, and its residuals.

    Args:
      x, y: tokens (captions n d), hidden states (captions n e); x_out, y_out: of held-out captions.
    """
    d, e = x.shape[-1], y.shape[-1]
    xx, xy = np.zeros((d, d)), np.zeros((d, e))
    for a, b in zip(x, y, strict=True):  # float64 sums, a caption at a time
        a, b = a.astype(np.float64), b.astype(np.float64)
        xx += a.T @ a
        xy += a.T @ b
    values, vectors = np.linalg.eigh(xx)
    turned = vectors.T @ xy
    unit = float(np.trace(xx) / d)
    best: tuple[float, float, np.ndarray] | None = None
    for factor in lambdas:
        kernel = vectors @ (turned / (np.maximum(values, 0) + factor * unit)[:, None])
        error = residual(x_out, y_out, kernel)
        if best is None or error < best[0]:
            best = error, factor, kernel
    error, factor, kernel = best
    return kernel.astype(np.float32), {
        "lambda": factor,
        "residual": error,
        "residual_fitted": residual(x, y, kernel),
    }


def residual(x: np.ndarray, y: np.ndarray, kernel: np.ndarray) -> float:
    """|x W - y| / |y| over all tokens."""
    wrong = whole = 0.0
    for a, b in zip(x, y, strict=True):
        wrong += float(np.sum((a.astype(np.float64) @ kernel - b) ** 2))
        whole += float(np.sum(b.astype(np.float64) ** 2))
    return math.sqrt(wrong / whole)


def surviving(sd: Converted, kernel: np.ndarray, x, y, x_null, y_null, side: int = 16, t: int = 500) -> float:
    """Share of what a prompt does to SD's eps that it still does through the map, against SD's own states."""
    net = sd.meta["net"]
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in net["image_unet"].items()}
    latent = net["image_vae"]["latent"]
    unet = UNet(**sizes, out_channels=latent, width=net["width"])
    flat = {n: jnp.asarray(v.read(), jnp.float32) for n, v in sd.tensors.items() if n.startswith("unet/")}
    params = {"params": under(flat, "unet")}
    b = len(x)
    side = max(side, 2 ** (len(sizes["channels"]) - 1))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, side, side, latent)), jnp.float32)
    z, times = jnp.broadcast_to(z, (b, *z.shape[1:])), jnp.full((b,), t)
    run = jit(lambda params, tokens: unet.apply(params, z, times, context(tokens)))

    def change(prompt, null):
        both = (jnp.asarray(tokens, jnp.float32) for tokens in (prompt, np.repeat(null, b, 0)))
        return np.subtract(*(run(params, tokens) for tokens in both))

    raw, ours = change(y, y_null), change(x @ kernel, x_null @ kernel)
    return 1.0 - float(np.linalg.norm(ours - raw) / np.linalg.norm(raw))


def _ids(folder: Path, texts: Sequence[str], length: int) -> np.ndarray:
    """CLIP ids as the data pipeline makes them, (captions n)."""
    return tokenization.clip_ids(epath.Path(folder), texts, length)


def _same_tower(sd: Converted, cl: Converted) -> bool:
    """Published SD-1.5 holds CLIP's own text tower: one pass then serves both."""
    names = [n for n in sd.tensors if n.startswith("text/")]
    return all(sd.meta["crc32"][n] == cl.meta["crc32"].get(n) for n in names)


def _encode(source: Converted, sizes: dict[str, Any], vocab: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens in the shared space, hidden states), float32, of the text tower in a folder."""
    flat = {n[5:]: jnp.asarray(t.read(), jnp.float32) for n, t in source.tensors.items() if n.startswith("text/")}
    width = source.meta["net"]["width"]
    flat.setdefault("projection/kernel", jnp.zeros((sizes["width"], width)))  # SD has none
    tower, params = CLIPText(vocab=vocab, **sizes, projection=width), {"params": unflatten_dict(flat, sep="/")}
    run = jit(tower.apply)
    out: tuple[list, list] = ([], [])
    for i in range(0, len(ids), BATCH):
        batch = np.resize(ids[i : i + BATCH], (BATCH, ids.shape[1]))  # one shape, one program
        said, n = run(params, jnp.asarray(batch)), len(ids[i : i + BATCH])
        out[0].append(np.asarray(said.tokens)[:n])
        out[1].append(np.asarray(said.hidden)[:n])
    return np.concatenate(out[0]), np.concatenate(out[1])
