"""What a stage ends with: one picture and a few figures of its own, on held-out records.

    image_vae, text_vae   reconstructions: images beside the mean image; share of texts that come back word for word
    align_<pair>          retrieval of the partner, beside chance
    ldm_<m>               samples from their prompt
    tune_<task>_<how>     its target made from the other, beside its autoencoder on the same data
    <pair>                each partner made from the other; for a round with text, the counterfactual row: same seed,
                          "left" turned to "right" in the report

What is generated has the figures of its target's autoencoder as ceiling, read from that stage's result. Figures go to
the stage's model.json, texts to texts.json, for the run's report; all of it to TensorBoard too.
"""

import functools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from medm2g_jax.data.phantom.report import swap_side
from medm2g_jax.data.pipeline import Batch, Rows, share_a_grid
from medm2g_jax.data.source import Record, labeller
from medm2g_jax.device import jit
from medm2g_jax.evaluate.figures import Figure, Reference, from_json, line, scalars, to_json
from medm2g_jax.evaluate.metrics import METRICS, figures_of, retrieval, text_figures
from medm2g_jax.evaluate.metrics.text import Labeller, fields
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.generate import Request
from medm2g_jax.inference import Model
from medm2g_jax.keys import row_keys
from medm2g_jax.modality import MODALITIES, centre, stream_word
from medm2g_jax.model import MedM2G
from medm2g_jax.recipes import accelerated, rows_of
from medm2g_jax.train import checkpoint, loop, results
from medm2g_jax.train.log import SLOW, Log, duration

PICTURED = 8  # records in a picture
CEILING = "ceiling.json"  # figures of a fine-tune's autoencoder, on its own data
SEED = 0  # of the samples, and of which records are measured


@dataclass(frozen=True)
class Shown:
    """A stage that has just been trained, and what it is shown with."""

    config: ConfigDict
    graph: rounds.Graph
    folder: epath.Path
    model: Model
    data: loop.Data

    @property
    def stage(self) -> rounds.Stage:
        return self.graph.stage(self.config.stage)


def show(
    *,
    config: ConfigDict,
    graph: rounds.Graph,
    folder: epath.Path,
    model: MedM2G,
    params: Params,
    data: loop.Data,
    meta: dict,
    log: Log,
    step: int,
) -> list[dict]:
    """Draw and measure what a stage has learnt by a step, of fixed records and noise; returns its figures, as they
    stand in model.json."""
    shown = _shown(config, graph, folder, model, params, data, meta)
    draw = {"vae": _autoencoder, "align": _alignment, "ldm": _single_flow, "round": _round}[shown.stage.verb]
    figures = draw(shown)
    log.write_scalars(step, scalars(figures))
    for figure in figures:
        print(f"  {config.stage}: {line(figure)}", flush=True)
    # What of it may be shown was decided when it was written.
    for path in sorted(folder.glob("*.png")):
        with path.open("rb") as f:
            log.write_images(step, {path.stem: np.asarray(Image.open(f))[None, ..., None] / 255})
    if (folder / "texts.json").exists():
        log.write_texts(step, json.loads((folder / "texts.json").read_text()))
    return to_json(figures)


def ceiling(**stage: Any) -> None:
    """What the target's autoencoder makes of these data, before a fine-tune begins: no sample can pass it. Takes what
    `show` takes but for the log."""
    shown = _shown(**stage)
    target = shown.stage.target
    figures = _image_autoencoder(shown, [target]) if _image(target) else _text_autoencoder(shown)
    for figure in figures:
        print(f"  the autoencoder's ceiling: {line(figure)}", flush=True)
    (shown.folder / CEILING).write_text(json.dumps(to_json(figures), indent=1))


def _shown(
    config: ConfigDict,
    graph: rounds.Graph,
    folder: epath.Path,
    model: MedM2G,
    params: Params,
    data: loop.Data,
    meta: dict,
) -> Shown:
    return Shown(config, graph, folder, Model(model, params, data.tokenizers, meta, config.sample), data)


def data_picture(data, path: epath.Path, modalities: tuple[str, ...]) -> None:
    """A few records of a source, every stream a row: the first thing a run shows."""
    if path.exists():
        return
    streams = [s for m in modalities for s in MODALITIES[m].streams if MODALITIES[m].is_image]
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


def _which(data: loop.Data, held: int) -> str:
    """Which records a stage is measured on, so that no figure says "held out" of others."""
    return "held-out records" if held else "training records"


def _measured(data: loop.Data, rows: Rows, count: int) -> tuple[Batch, str]:
    """The rows that a stage is measured on, and which they are."""
    return data.fixed(rows, "val", count), _which(data, data.holds(rows, "val"))


def _task(source: str, target: str, how: str = "", which: str = "held-out records") -> str:
    """What a figure measures: "report -> CT, prompt alone"."""
    words = [f"{' + '.join(map(stream_word, source.split(' + ')))} -> {stream_word(target)}", how]
    return ", ".join(w for w in [*words, which if which != "held-out records" else ""] if w)


def _texts_of(data, batch: Batch) -> list[str]:
    """The texts of a batch, as the decoder's tokenizer has them."""
    return [data.tokenizers.decode(row[1:]) for row in np.asarray(batch["gpt2"])]


def _labeller(data) -> Labeller | None:
    """The source's own, which reads each text once."""
    found = labeller(data.source)
    return found and functools.cache(found)


# --- autoencoders ---------------------------------------------------------------------------------------------------


def _autoencoder(s: Shown) -> list[Figure]:
    images = [m for m in s.graph.modalities if MODALITIES[m].kind in s.stage.subjects and MODALITIES[m].is_image]
    return _image_autoencoder(s, images) if images else _text_autoencoder(s)


def _text_autoencoder(s: Shown) -> list[Figure]:
    text = centre().name
    batch, which = _measured(s.data, Rows(require=(text,)), 2 * s.config.sample.rows)
    model = s.model
    z = jit(lambda p, x: model.model.encode(p, text, x))(model.params, batch[text])
    real = _texts_of(s.data, batch[text])
    noise = jax.random.normal(jax.random.key(SEED), z.shape)
    out: dict[str, list[str]] = {"real": real[:16]}
    figures: list[Figure] = []
    for name, how, latent in (
        ("reconstruction", "", z),
        ("reconstruction under noise 0.5", "latent noise 0.5", z + 0.5 * noise),
    ):
        texts = model.decode(text, latent)
        out[name] = texts[:16]
        figures += text_figures(_task(text, text, how, which), real, texts, _labeller(s.data), seed=SEED)
    _texts(s, out)
    return figures


def _image_autoencoder(s: Shown, modalities: list[str]) -> list[Figure]:
    model = s.model.model
    rows, figures, measured = [], [], set()
    for m in modalities:
        wanted = Rows(require=(m,))
        if not s.data.holds(wanted, "train"):
            continue  # this source holds no such images to train on
        batch, which = _measured(s.data, wanted, s.config.sample.rows)
        measured.add(which)
        x = np.asarray(batch[m])
        mean = s.data.fixed(wanted, "train", 2 * s.config.sample.rows)[m].mean(0, keepdims=True)
        again = jit(lambda p, x, m=m: model.decode(p, m, model.encode(p, m, x)))
        y = _in_parts(s.config, lambda part, again=again: np.asarray(again(s.model.params, part)), x)
        floor = ("the mean image", [np.broadcast_to(mean, x.shape)])
        figures += figures_of("image", _task(m, m, which=which), x, y, seed=SEED, floor=floor)
        rows += [(f"{MODALITIES[m].word}, real", _images(x[:PICTURED])), ("reconstructed", _images(y[:PICTURED]))]
    if s.data.source.open:
        titles = " and ".join(sorted(measured))
        _picture(s.folder, "reconstructions.png", rows, title=f"images of {titles} through the autoencoder")
    return figures


def _of_autoencoder(s: Shown, target: str, which: str) -> list[Figure]:
    """What the result of the target's autoencoder says of the target, on the same sort of records; nothing where no
    stage trained it."""
    target = target.partition(":")[0]
    if s.stage.target:
        figures = from_json(json.loads((s.folder / CEILING).read_text()))
        return [f for f in figures if f.task == _task(target, target, which=which)]
    for name, stage in s.graph.stages.items():
        if stage.verb == "vae" and stage.subjects == (MODALITIES[target].kind,):
            place = results.find(s.folder.parent, s.config, name)
            figures = [] if place is None else from_json(checkpoint.read_meta(place)["figures"])
            return [f for f in figures if f.task == _task(target, target, which=which)]
    return []


# --- alignment ------------------------------------------------------------------------------------------------------


def _alignment(s: Shown) -> list[Figure]:
    a, b = s.stage.subjects if len(s.stage.subjects) == 2 else 2 * s.stage.subjects
    words = MODALITIES[a].word, MODALITIES[b].word if a != b else f"another contrast of {MODALITIES[b].word}"
    figures = []
    pooled = {m: jit(lambda p, x, m=m: s.model.model.flows[m].prompt(p, x).pooled) for m in s.stage.subjects}
    rows, task = rows_of(s.config, s.graph), " <-> ".join(words)
    # The training rows beside the held-out ones: the gap between them.
    for split in ("val", "train") if s.data.holds(rows, "val") else ("train",):
        batch = s.data.fixed(rows, split, 2 * s.config.sample.rows)
        pair = (a, batch[a]), (b, batch[b] if a != b else batch["about"]["prompt"][b])
        u, v = (np.asarray(pooled[m](s.model.params, x), np.float32) for m, x in pair)
        classes, protocol = _classes(s.data, batch)
        where = task if split == "val" else f"{task}, training records"
        floor = Reference(retrieval.chance(classes), "chance")
        measured = METRICS["retrieval@1"].figure
        figures.append(measured(where, "retrieval@1", u, v, classes, seed=SEED, protocol=protocol, floor=floor))
        nats = float(info_nce(jnp.asarray(u), jnp.asarray(v), LOG_SCALE_INIT))
        floor = Reference(float(np.log(len(classes))), "chance")
        ends = dict(n=len(classes), seed=SEED, floor=floor)
        figures.append(Figure(task=where, metric="InfoNCE nats", protocol="tau 0.07", value=nats, **ends))
        if split == "val":
            figures += _told_apart(s.data, batch, where, u, v)
            _retrieved(s, pair, words, u, v)
    return figures


def _told_apart(data: loop.Data, batch: Batch, task: str, u: np.ndarray, v: np.ndarray) -> list[Figure]:
    """Finding by finding, how often the nearest partner has what a report states: what the shared space does not hold
    of a report, no flow that reads it makes. Nothing where the source has no labeller."""
    reads = _labeller(data)
    if centre().name not in batch or reads is None:
        return []
    nearest = retrieval.nearest(u, v)
    stated = [fields(reads(text)) for text in _texts_of(data, batch[centre().name])]
    figures = []
    for name in dict.fromkeys(name for report in stated for name in report):
        said = [report.get(name, False) for report in stated]
        has = np.asarray([value is not None for value in said])  # None: it does not apply
        values = np.unique([str(value) for value in said], return_inverse=True)[1]
        if len(set(values[has])) < 2:
            continue
        floor = Reference(retrieval.chance(values[has]), "chance")
        pair, how = (values[has], values[nearest][has]), dict(protocol="nearest partner", floor=floor)
        figures.append(METRICS["right"].figure(task, f"{name} of the nearest", *pair, seed=SEED, **how))
    return figures


def _classes(data: loop.Data, batch: Batch) -> tuple[np.ndarray, str]:
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


def _retrieved(s: Shown, pair, words: tuple[str, str], u: np.ndarray, v: np.ndarray) -> None:
    """The nearest partner of eight records, where one of the pair is an image and may be shown."""
    (a, x), (b, y) = pair
    if not MODALITIES[b].is_image or not s.data.source.open:
        return
    nearest = retrieval.nearest(u, v)[:PICTURED]
    rows = [(f"its own: {words[1]}", _images(y[:PICTURED])), ("the nearest", _images(y[nearest]))]
    captions = ()
    if MODALITIES[a].is_image:
        rows.insert(0, (words[0], _images(x[:PICTURED])))
    else:
        captions = _texts_of(s.data, x)[:PICTURED]
    title = f"{words[0]} -> nearest {words[1]} in the shared space, held out"
    _picture(s.folder, "retrieval.png", rows, captions, title=title)


# --- flows and rounds -----------------------------------------------------------------------------------------------


def _sampled(s: Shown, request: Request, given: dict, count: int) -> Any:
    (target,) = request.make

    def some(part):
        z = s.model.sample(request, *part, s.config.sample.guidance, s.config.sample.eta)
        return s.model.decode(target, z[target])

    return _in_parts(s.config, some, (given, row_keys(jax.random.key(0), count)))


def _count(s: Shown, target: str, most: int, rows: Any) -> int:
    """Samples to draw: texts as many as there are rows, images `most`; of a batch of one, one."""
    count = len(jax.tree.leaves(rows)[0])
    return min(count, most, s.config.batch) if _image(target) else count


def _image(stream: str) -> bool:
    return MODALITIES[stream.partition(":")[0]].is_image


def _single_flow(s: Shown) -> list[Figure]:
    (target,) = s.stage.subjects
    source = next((m for m in s.graph.prompts(target) if m != target), None)
    if source is None:
        return _from_noise(s, target)
    batch, which = _measured(s.data, Rows(require=(target, source)), s.config.sample.rows)
    n = _count(s, target, 2 * PICTURED, batch)
    given = {source: jax.tree.map(lambda x: x[:n], batch[source])}
    made = _sampled(s, s.model.request((source,), (target,), guides="none"), given, n)
    _drawn(s, given, target, batch[target], made, "samples.png", f"{_task(source, target)}, {which}")
    task = _task(source, target, "prompt alone", which)
    return _compared(s, task, target, batch[target], made, _of_autoencoder(s, target, which))


def _from_noise(s: Shown, target: str) -> list[Figure]:
    """Samples of a flow that has no prompt, beside real images; no figure yet says how near they are."""
    batch, which = _measured(s.data, Rows(require=(target,)), s.config.sample.rows)
    n = _count(s, target, 2 * PICTURED, batch)
    made = _sampled(s, s.model.request((), (target,), guides="none"), {}, n)
    _drawn(s, {}, target, batch[target], made, "samples.png", f"{stream_word(target)} from noise, and {which}")
    return []


def _compared(s: Shown, task: str, target: str, real: Any, made: Any, bounds: Sequence[Figure]) -> list[Figure]:
    """Generated beside real: images between the mean image and their autoencoder, texts between the best constant
    report and theirs."""
    if _image(target):
        real = np.asarray(real[: len(made)])
        return figures_of("image", task, real, np.asarray(made), seed=SEED, autoencoder=bounds)
    texts = _texts_of(s.data, real)[: len(made)]
    constants = [[t] * len(texts) for t in dict.fromkeys(texts)]
    floor = ("the best constant report", constants)
    return text_figures(task, texts, made, _labeller(s.data), seed=SEED, floor=floor, autoencoder=bounds)


def _drawn(s: Shown, given: Mapping[str, Any], target: str, real, made, name: str, title: str) -> None:
    """Real beside generated: a picture, or texts."""
    shown = [(stream_word(m), x) for m, x in given.items() if _image(m)]
    if not _image(target):
        texts = _texts_of(s.data, real)[: len(made)]
        _texts(s, {"real": texts[:16], "generated": made[:16]})
        if s.data.source.open and shown:
            captions = [f"real: {a} / generated: {b}" for a, b in zip(texts, made, strict=True)]
            _picture(s.folder, name, [(w, _images(x[:6])) for w, x in shown], captions[:6], title=title, side=190)
        return
    rows = [(f"{w}, given", _images(x[:PICTURED])) for w, x in shown]
    rows += [(f"{stream_word(target)}, real", _images(real[:PICTURED])), ("generated", _images(made[:PICTURED]))]
    captions = next((_texts_of(s.data, x)[:PICTURED] for m, x in given.items() if not _image(m)), ())
    if not s.data.source.open:
        rows, captions = rows[-1:], ()
    _picture(s.folder, name, rows, captions, title=title)


def _round(s: Shown) -> list[Figure]:
    figures: list[Figure] = []
    if len(s.stage.subjects) == 2:
        a, b = s.stage.subjects
        rows = Rows(require=(a, b), accelerate=accelerated(s.config))
        batch, which = _measured(s.data, rows, s.config.sample.rows)
        for source, target in ((b, a), (a, b)):
            if s.stage.target not in ("", target):
                continue
            given = {source: batch[source]}
            drawn = _image(a) and target == b
            figures += _made(s, given, target, batch[target], which, "samples.png" if drawn else "")
    for m in s.stage.contrasts:
        figures += _synthesis(s, m)
    return figures


def _made(s: Shown, given: Mapping[str, Any], target: str, real: Any, which: str, name: str = "") -> list[Figure]:
    """The target made from what is given: drawn, and measured."""
    n = _count(s, target, PICTURED, real)
    given = jax.tree.map(lambda x: x[:n], dict(given))
    shared = share_a_grid(s.data.source, (*given, target), "train" if which.startswith("training") else "val")
    request = s.model.request(tuple(given), (target,), register="trained" if shared else "made")
    made = _sampled(s, request, given, n)
    task = _task(" + ".join(given), target, which=which)
    if _image(target) and not any(map(_image, given)):
        _counterfactual(s, request, given, real, made, which)
    else:
        name = name or f"{target}_from_{'_'.join(given)}.png".replace(":", "-")
        _drawn(s, given, target, real, made, name, f"{_task(' + '.join(given), target)}, {which}")
    return _compared(s, task, target, real, made, _of_autoencoder(s, target, which))


def _synthesis(s: Shown, modality: str) -> list[Figure]:
    """The contrast that comes third in how many records hold it, made from the first two, or the second from the
    first: on records that hold them all."""
    split = "val" if any(r.split == "val" and _held(r, modality) for r in s.data.source.records) else "train"
    held = Counter(c for r in s.data.source.records if r.split == split for c in _held(r, modality))
    streams = [c for c in MODALITIES[modality].streams if held[c]]
    chosen = sorted(streams, key=lambda c: -held[c])[:3]
    values = s.data.streams(chosen, split, s.config.sample.rows) if len(chosen) > 1 else {}
    if not values:
        return []
    *given, target = chosen
    which = "held-out records" if split == "val" else "training records"
    name = "" if len(s.stage.subjects) == 2 else "samples.png"
    return _made(s, {c: values[c] for c in given}, target, values[target], which, name)


def _held(record: Record, modality: str) -> list[str]:
    """The stated contrasts of a modality, where a record has several."""
    stated = [c for c in record.streams if c.startswith(f"{modality}:")]
    return stated if len(stated) > 1 else []


def _counterfactual(s: Shown, request: Request, given: Mapping[str, Any], real, made, which: str) -> None:
    """samples.png of a round with text: report -> image, and the same seeds with left and right exchanged in it."""
    ((source, ids),), (target,) = given.items(), request.make
    texts = _texts_of(s.data, ids)
    swapped = _sampled(s, request, {source: s.model.ids([swap_side(t) for t in texts])}, len(made))
    word = MODALITIES[target].word
    rows = [
        (f"{word} generated from the report below", _images(made)),
        ("same seeds, left and right exchanged in the report", _images(swapped)),
    ]
    if s.data.source.open:
        rows.insert(0, (f"{word}, real", _images(real[: len(made)])))
    captions = texts if s.data.source.open else ()
    _picture(s.folder, "samples.png", rows, captions, title=f"report -> {word}, {which}", side=150)


def _texts(s: Shown, texts: dict[str, list[str]]) -> None:
    """Texts for the run's report. Of data that is not open, generated ones only."""
    kept = texts if s.data.source.open else {k: v for k, v in texts.items() if k == "generated"}
    (s.folder / "texts.json").write_text(json.dumps(kept, indent=1))
