"""What a stage ends with: one picture and a few figures of its own, on held-out records.

    image_vae, text_vae   reconstructions: images beside the mean image; share of texts that come back word for word
    align_<pair>          retrieval of the partner, beside chance
    ldm_<m>               samples from their prompt
    <pair>                each partner made from the other; for a round with text, the counterfactual row: same seed,
                          "left" turned to "right" in the report

What is generated has the figures of its target's autoencoder as ceiling, read from that stage's result. Figures go to
the stage's model.json, texts to texts.json, for the run's report; all of it to TensorBoard too.
"""

import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from medm2g_jax import rounds
from medm2g_jax.align import LOG_SCALE_INIT, info_nce
from medm2g_jax.arrays import Params
from medm2g_jax.config import stage_graph
from medm2g_jax.data.phantom.report import swap_side
from medm2g_jax.data.pipeline import Batch, Rows, matching
from medm2g_jax.data.source import labeller
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, Reference, from_json, line, scalars, to_json
from medm2g_jax.evaluate.metrics import METRICS, figures_of, retrieval, text_figures
from medm2g_jax.evaluate.metrics.text import Labeller, fields
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.generate import Generator, Request
from medm2g_jax.keys import row_keys
from medm2g_jax.modality import MODALITIES, centre
from medm2g_jax.model import MedM2G
from medm2g_jax.train import checkpoint, results
from medm2g_jax.train.log import SLOW, duration

PICTURED = 8  # records in a picture
SEED = 0  # of the samples, and of which records are measured


def show(*, config: ConfigDict, folder: epath.Path, model: MedM2G, params: Params, data, meta: dict, log) -> list[dict]:
    """Draw and measure the stage that has just been trained; returns its figures, as they stand in model.json."""
    stage = stage_graph(config).stage(config.stage)
    generator = Generator(model, params, data.tokenizers, data.lengths)
    draw = {"vae": _autoencoder, "align": _alignment, "ldm": _single_flow, "round": _round}[stage.verb]
    figures = draw(config, folder, generator, data, stage, meta)
    log.write_scalars(config.steps, scalars(figures))
    for figure in figures:
        print(f"  {config.stage}: {line(figure)}", flush=True)
    # What of it may be shown was decided when it was written.
    for path in sorted(folder.glob("*.png")):
        with path.open("rb") as f:
            log.write_images(config.steps, {path.stem: np.asarray(Image.open(f))[None, ..., None] / 255})
    if (folder / "texts.json").exists():
        log.write_texts(config.steps, json.loads((folder / "texts.json").read_text()))
    return to_json(figures)


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
            print(f"  {config.stage}: {done} of {count} records, {left} left", flush=True)
    return sum(parts, []) if isinstance(parts[0], list) else np.concatenate(parts)


def _images(x: Any) -> list[np.ndarray]:
    return list(np.asarray(x, np.float32))


def _fit(data, rows: Rows, split: str) -> bool:
    """Whether any record of the split holds what `rows` asks for; none is read."""
    try:
        matching(data.source, rows, split)
    except UserError:  # the one thing that it says
        return False
    return True


def _measured(data, rows: Rows, count: int) -> tuple[Batch, str]:
    """The rows that a stage is measured on, and which they are, so that no figure says "held out" of others."""
    which = "held-out records" if _fit(data, rows, "val") else "training records"
    return data.fixed(rows, "val", count), which


def _task(source: str, target: str, how: str = "", which: str = "held-out records") -> str:
    """What a figure measures: "report -> CT, prompt alone"."""
    words = [f"{MODALITIES[source].word} -> {MODALITIES[target].word}", how]
    return ", ".join(w for w in [*words, which if which != "held-out records" else ""] if w)


def _texts_of(data, batch: Batch) -> list[str]:
    """The texts of a batch, as the decoder's tokenizer has them."""
    return [data.tokenizers.decode(row[1:]) for row in np.asarray(batch["gpt2"])]


def _labeller(data) -> Labeller | None:
    """The source's own, which reads each text once."""
    found = labeller(data.source)
    return found and functools.cache(found)


# --- autoencoders ---------------------------------------------------------------------------------------------------


def _autoencoder(config, folder, generator, data, stage, meta) -> list[Figure]:
    (kind,) = stage.subjects
    return (
        _text_autoencoder(config, folder, generator, data)
        if kind == "text"
        else _image_autoencoder(config, folder, generator, data, kind)
    )


def _text_autoencoder(config, folder, generator, data) -> list[Figure]:
    text = centre().name
    batch, which = _measured(data, Rows(require=(text,)), 2 * config.sample.rows)
    model, params = generator.model, generator.params
    z = jit(lambda p, x: model.encode(p, text, x))(params, batch[text])
    real = _texts_of(data, batch[text])
    noise = jax.random.normal(jax.random.key(SEED), z.shape)
    out: dict[str, list[str]] = {"real": real[:16]}
    figures: list[Figure] = []
    for name, how, latent in (
        ("reconstruction", "", z),
        ("reconstruction under noise 0.5", "latent noise 0.5", z + 0.5 * noise),
    ):
        texts = generator.decode(text, latent)
        out[name] = texts[:16]
        figures += text_figures(_task(text, text, how, which), real, texts, _labeller(data), seed=SEED)
    _texts(folder, data, out)
    return figures


def _image_autoencoder(config, folder, generator, data, kind) -> list[Figure]:
    model, params = generator.model, generator.params
    again = jit(lambda p, x: model.decode_image(p, kind, model.posterior(p, kind, x)[0] * model.scales[kind]))
    rows, figures, measured = [], [], set()
    for m in rounds.graph(config.listing).modalities:
        wanted = Rows(require=(m,))
        if MODALITIES[m].kind != kind or not _fit(data, wanted, "train"):
            continue  # this source holds no such images to train on
        batch, which = _measured(data, wanted, config.sample.rows)
        measured.add(which)
        x = np.asarray(batch[m])
        mean = data.fixed(wanted, "train", 2 * config.sample.rows)[m].mean(0, keepdims=True)
        y = _in_parts(config, lambda part: again(params, part), x)
        floor = ("the mean image", [np.broadcast_to(mean, x.shape)])
        figures += figures_of("image", _task(m, m, which=which), x, y, seed=SEED, floor=floor)
        rows += [(f"{MODALITIES[m].word}, real", _images(x[:PICTURED])), ("reconstructed", _images(y[:PICTURED]))]
    if data.source.open:
        titles = " and ".join(sorted(measured))
        _picture(folder, "reconstructions.png", rows, title=f"images of {titles} through the autoencoder")
    return figures


def _of_autoencoder(config, folder, target: str, which: str) -> list[Figure]:
    """What the result of the target's autoencoder says of the target, on the same sort of records; nothing where no
    stage trained it."""
    for name, stage in stage_graph(config).stages.items():
        if stage.verb == "vae" and stage.subjects == (MODALITIES[target].kind,):
            place = results.find(folder.parent, config, name)
            figures = [] if place is None else from_json(checkpoint.read_meta(place)["figures"])
            return [f for f in figures if f.task == _task(target, target, which=which)]
    return []


# --- alignment ------------------------------------------------------------------------------------------------------


def _alignment(config, folder, generator, data, stage, meta) -> list[Figure]:
    a, b = stage.subjects
    figures = []
    pooled = {m: jit(lambda p, x, m=m: generator.model.flows[m].prompt(p, x).pooled) for m in (a, b)}
    rows, task = Rows(require=(a, b)), f"{MODALITIES[a].word} <-> {MODALITIES[b].word}"
    # The training rows beside the held-out ones: the gap between them.
    for split in ("val", "train") if _fit(data, rows, "val") else ("train",):
        batch = data.fixed(rows, split, 2 * config.sample.rows)
        u = {m: np.asarray(pooled[m](generator.params, batch[m]), np.float32) for m in (a, b)}
        classes, protocol = _classes(batch, data)
        where = task if split == "val" else f"{task}, training records"
        floor = Reference(retrieval.chance(classes), "chance")
        measured = METRICS["retrieval@1"].figure
        figures.append(measured(where, "retrieval@1", u[a], u[b], classes, seed=SEED, protocol=protocol, floor=floor))
        nats = float(info_nce(jnp.asarray(u[a]), jnp.asarray(u[b]), LOG_SCALE_INIT))
        floor = Reference(float(np.log(len(classes))), "chance")
        figures.append(
            Figure(
                task=where,
                metric="InfoNCE nats",
                protocol="tau 0.07",
                value=nats,
                n=len(classes),
                seed=SEED,
                floor=floor,
            )  # fmt: skip
        )
        if split == "val":
            _retrieved(folder, data, stage, batch, u)
    return figures


def _classes(batch, data) -> tuple[np.ndarray, str]:
    """What retrieval can tell apart, and the protocol's name of that: reports of the same findings, where the source's
    labeller reads them, or of the same words cannot be."""
    if centre().name not in batch:
        return np.arange(len(jax.tree.leaves({m: x for m, x in batch.items() if m in MODALITIES})[0])), _OWN
    keys = _texts_of(data, batch[centre().name])
    reads = _labeller(data)
    if reads is not None:
        keys = [repr(sorted(fields(reads(t)).items())) for t in keys]
    return np.unique(keys, return_inverse=True)[1], _SAME[reads is not None]


_OWN = "gallery, own partner"
_SAME = {False: "gallery, same words", True: "gallery, same findings"}


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
        captions = _texts_of(data, batch[a])[:PICTURED]
    else:
        rows.insert(0, (MODALITIES[a].word, _images(batch[a][:PICTURED])))
    title = f"{MODALITIES[a].word} -> nearest {MODALITIES[b].word} in the shared space, held out"
    _picture(folder, "retrieval.png", rows, captions, title=title)


# --- flows and rounds -----------------------------------------------------------------------------------------------


def _request(config, meta, given: tuple[str, ...], make: tuple[str, ...], **kwargs) -> Request:
    s = config.sample
    pairs = {f"{k}_pairs": tuple(tuple(p) for p in meta["pairs"][k]) for k in ("prompt", "guide")}
    return Request(given, make, s.steps, s.sampler, s.guide, **(pairs | kwargs))


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


def _single_flow(config, folder, generator, data, stage, meta) -> list[Figure]:
    (target,) = stage.subjects
    sources = [m for m in rounds.graph(config.listing).prompts(target) if m != target]
    source = sources[0]
    batch, which = _measured(data, Rows(require=(target, source)), config.sample.rows)
    n = _count(config, target, 2 * PICTURED, batch)
    given = jax.tree.map(lambda x: x[:n], batch[source])
    pairs = tuple((s, target) for s in rounds.graph(config.listing).prompts(target))
    request = _request(config, meta, (source,), (target,), guides="none", prompt_pairs=pairs)
    made = _sampled(config, generator, request, {source: given})
    title = f"{MODALITIES[source].word} -> {MODALITIES[target].word}, {which}"
    _drawn(folder, data, source, target, given, batch[target], made, "samples.png", title)
    task, bounds = _task(source, target, "prompt alone", which), _of_autoencoder(config, folder, target, which)
    return _compared(data, task, target, batch[target], made, bounds)


def _compared(data, task: str, target: str, real: Any, made: Any, bounds: Sequence[Figure]) -> list[Figure]:
    """Generated beside real: images between the mean image and their autoencoder, texts between the best constant
    report and theirs."""
    if MODALITIES[target].kind != "text":
        real = np.asarray(real[: len(made)])
        return figures_of("image", task, real, np.asarray(made), seed=SEED, autoencoder=bounds)
    texts = _texts_of(data, real)[: len(made)]
    constants = [[t] * len(texts) for t in dict.fromkeys(texts)]
    floor = ("the best constant report", constants)
    return text_figures(task, texts, made, _labeller(data), seed=SEED, floor=floor, autoencoder=bounds)


def _drawn(folder, data, source, target, given, real, made, name: str, title: str) -> None:
    """Real beside generated: a picture, or texts."""
    if MODALITIES[target].kind == "text":
        texts = _texts_of(data, real)[: len(made)]
        _texts(folder, data, {"real": texts[:16], "generated": made[:16]})
        if data.source.open and MODALITIES[source].kind == "image":
            captions = [f"real: {a} / generated: {b}" for a, b in zip(texts, made, strict=True)]
            word = MODALITIES[source].word
            _picture(folder, name, [(word, _images(given[:6]))], captions[:6], title=f"{word} -> report", side=190)
        return
    rows = [(f"{MODALITIES[target].word}, real", _images(real[:PICTURED])), ("generated", _images(made[:PICTURED]))]
    captions = ()
    if MODALITIES[source].kind == "text":
        captions = _texts_of(data, given)[:PICTURED]
    else:
        rows.insert(0, (f"{MODALITIES[source].word}, given", _images(given[:PICTURED])))
    if not data.source.open:
        rows = rows[-1:]
        captions = ()
    _picture(folder, name, rows, captions, title=title)


def _round(config, folder, generator, data, stage, meta) -> list[Figure]:
    a, b = stage.subjects
    batch, which = _measured(data, Rows(require=(a, b)), config.sample.rows)
    figures: list[Figure] = []
    for source, target in ((b, a), (a, b)):
        request = _request(config, meta, (source,), (target,))
        n = _count(config, target, PICTURED, batch)
        given = jax.tree.map(lambda x: x[:n], batch[source])  # noqa: B023
        made = _sampled(config, generator, request, {source: given})
        title = f"{MODALITIES[source].word} -> {MODALITIES[target].word}, {which}"
        if MODALITIES[source].kind == "text" and MODALITIES[target].kind == "image":
            _counterfactual(config, folder, generator, data, request, given, batch[target], made, which)
        else:
            name = "samples.png" if MODALITIES[a].kind == "image" and target == b else f"{target}_from_{source}.png"
            _drawn(folder, data, source, target, given, batch[target], made, name, title)
        bounds = _of_autoencoder(config, folder, target, which)
        figures += _compared(data, _task(source, target, which=which), target, batch[target], made, bounds)
    return figures


def _counterfactual(config, folder, generator, data, request, given, real, made, which) -> None:
    """samples.png of a round with text: report -> image, and the same seeds with left and right exchanged in it."""
    (source,), (target,) = request.given, request.make
    n = len(made)
    texts = _texts_of(data, given)
    swapped = _sampled(config, generator, request, {source: generator.ids([swap_side(t) for t in texts])})
    word = MODALITIES[target].word
    rows = [
        (f"{word} generated from the report below", _images(made)),
        ("same seeds, left and right exchanged in the report", _images(swapped)),
    ]
    if data.source.open:
        rows.insert(0, (f"{word}, real", _images(real[:n])))
    captions = texts if data.source.open else ()
    _picture(folder, "samples.png", rows, captions, title=f"report -> {word}, {which}", side=150)


def _texts(folder: epath.Path, data, texts: dict[str, list[str]]) -> None:
    """Texts for the run's report. Of data that is not open, generated ones only."""
    kept = texts if data.source.open else {k: v for k, v in texts.items() if k == "generated"}
    (folder / "texts.json").write_text(json.dumps(kept, indent=1))
