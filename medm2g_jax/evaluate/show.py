"""What a stage ends with: one picture and a few numbers of its own, on held-out records.

    image_vae, text_vae   reconstructions: PSNR beside the mean image's; share of texts that come back word for word
    align_<pair>          retrieval of the partner, beside chance
    ldm_<m>               samples from their prompt
    <pair>                each partner made from the other; for a round with text, the counterfactual row: same seed,
                          "left" turned to "right" in the report

Numbers go to the stage's model.json, texts to texts.json, for the run's report; all of it to TensorBoard too.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from medm2g_jax import rounds
from medm2g_jax.align import info_nce, retrieval_at_1
from medm2g_jax.arrays import Params
from medm2g_jax.autoencode import psnr
from medm2g_jax.data.phantom.report import finding_f1, parse, swap_side
from medm2g_jax.data.pipeline import Rows
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.generate import Request
from medm2g_jax.keys import row_keys
from medm2g_jax.loading import Model
from medm2g_jax.modality import MODALITIES, centre
from medm2g_jax.model import MedM2G
from medm2g_jax.train.log import SLOW, duration

PICTURED = 8  # records in a picture


def show(
    *, config: ConfigDict, graph: rounds.Graph, folder: epath.Path, model: MedM2G, params: Params, data, meta: dict, log
) -> dict:
    """Draw and measure the stage that has just been trained; returns its numbers by name."""
    stage = graph.stage(config.stage)
    generator = Model(model, params, data.tokenizers, meta, config.sample)
    draw = {"vae": _autoencoder, "align": _alignment, "ldm": _single_flow, "round": _round}[stage.verb]
    numbers = draw(config, folder, generator, data, stage, meta)
    log.write_scalars(config.steps, {f"result/{k}": v for k, v in numbers.items()})
    for name, value in numbers.items():
        print(f"  {config.stage}: {name} {value:.3f}", flush=True)
    # What of it may be shown was decided when it was written.
    for path in sorted(folder.glob("*.png")):
        with path.open("rb") as f:
            log.write_images(config.steps, {path.stem: np.asarray(Image.open(f))[None, ..., None] / 255})
    if (folder / "texts.json").exists():
        log.write_texts(config.steps, json.loads((folder / "texts.json").read_text()))
    return numbers


def data_picture(data, path: epath.Path, modalities: tuple[str, ...]) -> None:
    """A few records of a source, every stream a row: the first thing a run shows."""
    if path.exists():
        return
    streams = [s for m in modalities for s in MODALITIES[m].streams if MODALITIES[m].kind == "image"]
    records = data.source.records
    most = sorted(range(len(records)), key=lambda i: (-len(records[i].streams), records[i].split == "train", i))[:8]
    held = {s for i in most for s in records[i].streams}
    rng = np.random.default_rng(0)
    rows = [
        (
            s if s in MODALITIES else s.replace(":", " "),
            [data.source.read(i, s, rng) if s in records[i].streams else None for i in most],
        )
        for s in streams
        if s in held and not (s in MODALITIES and any(o.startswith(s + ":") for o in held))
    ]
    text = centre().name
    captions = [data.source.read(i, text, rng) if text in records[i].streams else "" for i in most]
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{data.source.name}: {len(most)} of {len(records)} records"
    grid(path, rows, [c if len(c) < 200 else c[:197] + "..." for c in captions], title=title)
    print(f"wrote {path}", flush=True)


def _picture(folder: epath.Path, name: str, *args, **kwargs) -> None:
    grid(folder / name, *args, **kwargs)
    print(f"  wrote {folder / name}", flush=True)


def _in_parts(config: ConfigDict, f: Any, batch: Any) -> Any:
    """f of a batch's rows, so many at a time as a device has of a train step; a list, or arrays (n ...)."""
    size = max(1, config.batch // jax.device_count())
    count = len(jax.tree.leaves(batch)[0])
    parts, began = [], time.monotonic()
    for i in range(0, count, size):
        parts.append(f(jax.tree.map(lambda x, i=i: x[i : i + size], batch)))
        done, seconds = min(i + size, count), time.monotonic() - began
        if seconds > SLOW and done < count:
            left = duration((count - done) * seconds / done)
            print(f"  {config.stage}: {done} of {count} held-out records, {left} left", flush=True)
    return sum(parts, []) if isinstance(parts[0], list) else np.concatenate(parts)


def _images(x: Any) -> list[np.ndarray]:
    return list(np.asarray(x, np.float32))


# --- autoencoders ---------------------------------------------------------------------------------------------------


def _autoencoder(config, folder, generator, data, stage, meta) -> dict:
    (kind,) = stage.subjects
    return (
        _text_autoencoder(config, folder, generator, data, kind)
        if kind == "text"
        else _image_autoencoder(config, folder, generator, data, kind)
    )


def _text_autoencoder(config, folder, generator, data, kind) -> dict:
    ids = data.fixed(Rows(require=(centre().name,)), "val", 2 * config.sample.rows)[centre().name]
    model, params = generator.model, generator.params
    encode = jit(lambda p, x: model.encode(p, centre().name, x))
    z = encode(params, ids)
    real = [data.tokenizers.decode(row[1:]) for row in np.asarray(ids["gpt2"])]
    noise = jax.random.normal(jax.random.key(0), z.shape)
    out, numbers = {}, {}
    for name, latent in (("reconstruction", z), ("reconstruction under noise 0.5", z + 0.5 * noise)):
        texts = generator.decode(centre().name, latent)
        out[name] = texts
        numbers[f"{name}, exact"] = float(np.mean([a == b for a, b in zip(real, texts, strict=True)]))
        if data.source.name == "phantom":
            numbers[f"{name}, finding F1"] = finding_f1(real, texts)
    _texts(folder, data, {"real": real[:16], **{k: v[:16] for k, v in out.items()}})
    return numbers


def _image_autoencoder(config, folder, generator, data, kind) -> dict:
    model, params = generator.model, generator.params
    again = {m: jit(lambda p, x, m=m: model.decode(p, m, model.encode(p, m, x))) for m in model.flows}
    rows, numbers = [], {}
    for m in rounds.graph(config.listing).modalities:
        if MODALITIES[m].kind != kind:
            continue
        try:
            x = data.fixed(Rows(require=(m,)), "val", config.sample.rows)[m]
            mean = data.fixed(Rows(require=(m,)), "train", 2 * config.sample.rows)[m].mean(0, keepdims=True)
        except UserError:
            continue  # this source holds no such images
        y = _in_parts(config, lambda part, m=m: again[m](params, part), x)
        numbers[f"{MODALITIES[m].word} PSNR dB"] = _psnr(x, y)
        numbers[f"{MODALITIES[m].word} PSNR dB of the mean image"] = _psnr(x, np.broadcast_to(mean, x.shape))
        rows += [(f"{MODALITIES[m].word}, real", _images(x[:PICTURED])), ("reconstructed", _images(y[:PICTURED]))]
    if data.source.open:
        _picture(folder, "reconstructions.png", rows, title="Held-out images through the autoencoder")
    return numbers


def _psnr(x: np.ndarray, y: np.ndarray) -> float:
    return float(psnr(jnp.asarray(x), jnp.asarray(y)))


# --- alignment ------------------------------------------------------------------------------------------------------


def _alignment(config, folder, generator, data, stage, meta) -> dict:
    a, b = stage.subjects
    numbers = {}
    pooled = {m: jit(lambda p, x, m=m: generator.model.flows[m].prompt(p, x).pooled) for m in (a, b)}
    for split in ("val", "train"):
        batch = data.fixed(Rows(require=(a, b)), split, 2 * config.sample.rows)
        u = {m: np.asarray(pooled[m](generator.params, batch[m]), np.float32) for m in (a, b)}
        classes = _classes(batch, data)
        chance = float(np.mean([np.mean(classes == c) for c in classes]))
        numbers[f"{split} retrieval@1"] = 0.5 * (
            retrieval_at_1(u[a], u[b], classes) + retrieval_at_1(u[b], u[a], classes)
        )
        numbers[f"{split} retrieval@1 by chance"] = chance
        if split == "val":
            _retrieved(folder, data, stage, batch, u)
    numbers["val InfoNCE nats"] = float(info_nce(jnp.asarray(u[a]), jnp.asarray(u[b]), float(np.log(1 / 0.07))))
    return numbers


def _classes(batch, data) -> np.ndarray:
    """What retrieval can tell apart: reports of the same findings (phantom) or of the same words cannot be."""
    if centre().name not in batch:
        return np.arange(len(jax.tree.leaves(batch)[0]))
    texts = [data.tokenizers.decode(row[1:]) for row in np.asarray(batch[centre().name]["gpt2"])]
    keys = [str(parse(t)) if data.source.name == "phantom" else t for t in texts]
    return np.unique(keys, return_inverse=True)[1]


def _retrieved(folder, data, stage, batch, u) -> None:
    """The nearest partner of eight records, where one of the pair is an image and may be shown."""
    a, b = stage.subjects
    if MODALITIES[b].kind != "image" or not data.source.open:
        return
    nearest = np.argmax(u[a] @ (u[b] / np.linalg.norm(u[b], axis=1, keepdims=True)).T, 1)[:PICTURED]
    captions = ()
    word = MODALITIES[b].word
    rows = [(f"its own {word}", _images(batch[b][:PICTURED])), ("the nearest", _images(batch[b][nearest]))]
    if MODALITIES[a].kind == "text":
        captions = [data.tokenizers.decode(row[1:]) for row in np.asarray(batch[a]["gpt2"])[:PICTURED]]
    else:
        rows.insert(0, (MODALITIES[a].word, _images(batch[a][:PICTURED])))
    title = f"{MODALITIES[a].word} -> nearest {MODALITIES[b].word} in the shared space, held out"
    _picture(folder, "retrieval.png", rows, captions, title=title)


# --- flows and rounds -----------------------------------------------------------------------------------------------


def _request(config, meta, given: tuple[str, ...], make: tuple[str, ...], **kwargs) -> Request:
    s = config.sample
    pairs = {f"{k}_pairs": tuple(tuple(p) for p in meta["pairs"][k]) for k in ("prompt", "guide")}
    return Request(given, make, s.steps, s.sampler, s.spacing, s.guide, **(pairs | kwargs))


def _sampled(config, generator, request: Request, given: dict) -> Any:
    (target,) = request.make

    def some(part):
        z = generator.sample(request, *part, config.sample.guidance, config.sample.eta)
        return generator.decode(target, z[target])

    keys = row_keys(jax.random.key(0), len(jax.tree.leaves(given)[0]))
    return _in_parts(config, some, (given, keys))


def _count(config, target: str, most: int, rows: Any) -> int:
    """Samples to draw: texts as many as there are rows, images `most`; of a batch of one, one."""
    count = len(jax.tree.leaves(rows)[0])
    return count if MODALITIES[target].kind == "text" else min(count, most, config.batch)


def _single_flow(config, folder, generator, data, stage, meta) -> dict:
    (target,) = stage.subjects
    sources = [m for m in rounds.graph(config.listing).prompts(target) if m != target]
    source = sources[0]
    batch = data.fixed(Rows(require=(target, source)), "val", config.sample.rows)
    n = _count(config, target, 2 * PICTURED, batch)
    given = jax.tree.map(lambda x: x[:n], batch[source])
    pairs = tuple((s, target) for s in rounds.graph(config.listing).prompts(target))
    request = _request(config, meta, (source,), (target,), guides="none", prompt_pairs=pairs)
    made = _sampled(config, generator, request, {source: given})
    return _compare(folder, data, source, target, given, batch[target], made, "samples.png")


def _compare(folder, data, source, target, given, real, made, name: str) -> dict:
    """Real beside generated: a picture, or texts with the findings they share."""
    if MODALITIES[target].kind == "text":
        texts = [data.tokenizers.decode(row[1:]) for row in np.asarray(real["gpt2"])[: len(made)]]
        _texts(folder, data, {"real": texts[:16], "generated": made[:16]})
        if data.source.open and MODALITIES[source].kind == "image":
            captions = [f"real: {a} / generated: {b}" for a, b in zip(texts, made, strict=True)]
            word = MODALITIES[source].word
            _picture(folder, name, [(word, _images(given[:6]))], captions[:6], title=f"{word} -> report", side=190)
        numbers = {"exact report": float(np.mean([a == b for a, b in zip(texts, made, strict=True)]))}
        if data.source.name == "phantom":
            numbers["finding F1"] = finding_f1(texts, made)
            numbers["finding F1 of the best constant report"] = max(finding_f1(texts, [t] * len(texts)) for t in texts)
        return numbers
    rows = [(f"{MODALITIES[target].word}, real", _images(real[:PICTURED])), ("generated", _images(made[:PICTURED]))]
    captions = ()
    if MODALITIES[source].kind == "text":
        captions = [data.tokenizers.decode(row[1:]) for row in np.asarray(given["gpt2"])[:PICTURED]]
    else:
        rows.insert(0, (f"{MODALITIES[source].word}, given", _images(given[:PICTURED])))
    if not data.source.open:
        rows = rows[-1:]
        captions = ()
    title = f"{MODALITIES[source].word} -> {MODALITIES[target].word}, held-out records"
    _picture(folder, name, rows, captions, title=title)
    return {f"{MODALITIES[target].word} PSNR dB": _psnr(np.asarray(real[: len(made)]), made)}


def _round(config, folder, generator, data, stage, meta) -> dict:
    a, b = stage.subjects
    batch = data.fixed(Rows(require=(a, b)), "val", config.sample.rows)
    numbers: dict = {}
    for source, target in ((b, a), (a, b)):
        request = _request(config, meta, (source,), (target,))
        n = _count(config, target, PICTURED, batch)
        given = jax.tree.map(lambda x: x[:n], batch[source])  # noqa: B023
        made = _sampled(config, generator, request, {source: given})
        word = f"{MODALITIES[source].word} -> {MODALITIES[target].word}"
        if MODALITIES[source].kind == "text" and MODALITIES[target].kind == "image":
            _counterfactual(config, folder, generator, data, request, given, batch[target], made)
            numbers[f"{word}, PSNR dB"] = _psnr(np.asarray(batch[target][:n]), made)
        else:
            name = "samples.png" if MODALITIES[a].kind == "image" and target == b else f"{target}_from_{source}.png"
            some = _compare(folder, data, source, target, given, batch[target], made, name)
            numbers |= {f"{word}, {k}": v for k, v in some.items()}
    return numbers


def _counterfactual(config, folder, generator, data, request, given, real, made) -> None:
    """samples.png of a round with text: report -> image, and the same seeds with left and right exchanged in it."""
    (source,), (target,) = request.given, request.make
    n = len(made)
    texts = [data.tokenizers.decode(row[1:]) for row in np.asarray(given["gpt2"])]
    swapped = _sampled(config, generator, request, {source: generator.ids([swap_side(t) for t in texts])})
    word = MODALITIES[target].word
    rows = [
        (f"{word} generated from the report below", _images(made)),
        ("same seeds, left and right exchanged in the report", _images(swapped)),
    ]
    if data.source.open:
        rows.insert(0, (f"{word}, real", _images(real[:n])))
    captions = texts if data.source.open else ()
    _picture(folder, "samples.png", rows, captions, title=f"report -> {word}, held-out records", side=150)


def _texts(folder: epath.Path, data, texts: dict[str, list[str]]) -> None:
    """Texts for the run's report. Of data that is not open, generated ones only."""
    kept = texts if data.source.open else {k: v for k, v in texts.items() if k == "generated"}
    (folder / "texts.json").write_text(json.dumps(kept, indent=1))
