"""Images made from texts as a set (the paper's tables 4 and 5): a free sample has no true pixels to be near to.

Measured on the same test records: how near the set of what is made from their reports is to the set of real ones, by
every metric of features, beside what the same flow makes of nothing and real training images, which a model cannot be
expected to pass; how well each fits its report, by the model's own encoders; NIQE, of
images that are large enough; and how much four draws of one report differ, beside real images of different subjects.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image

from medm2g_jax.config import weights_folder
from medm2g_jax.data.pipeline import read_streams, records_with
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import extractors
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.metrics import METRICS, feature_figures, figures_of, natural
from medm2g_jax.evaluate.metrics.image import scales_in
from medm2g_jax.evaluate.pictures import grid, to_uint8
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.evaluate.samples import samples
from medm2g_jax.evaluate.synthesis import task_words
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream, stream_word

DRAWS = 4
Features = Callable[[np.ndarray], np.ndarray]
SHOWN = 8
BENCH, BENCHED = "chexgenbench", ("inception", "rad_dino")  # a protocol, and what it has features of


def as_sets(
    model: Model,
    source: Source,
    given: Sequence[str],
    target: str,
    rows: int,
    seed: int,
    *,
    row: Row,
    protocols: Sequence[str] = (),
    sheet: epath.Path | None = None,
) -> list[Figure]:
    """Figures of `target` made from the streams `given`, of `rows` test records that have them. Extractors are the
    model's own C, which also steers what it makes: it tells models apart, and is no witness from outside; and those of
    `extractors` that were trained on such images, where there are their weights.

    Args:
      row: measures each row, or takes it up (`rows.Rows`).
      protocols: ("chexgenbench",): features are of what that benchmark makes of images, where it has them.
      sheet: a picture of the first ones to write.
    """
    held = read_streams(source, (*given, target), "test", rows, seed)
    x = np.stack(held[target])
    subjects = [source.records[i].subject for i in records_with(source, (*given, target), "test", rows, seed)]
    asked = {s: held[s] if isinstance(held[s][0], str) else np.stack(held[s]) for s in given}
    task = " -> ".join(task_words(given, target))
    draw = functools.cache(lambda i: samples(model, asked, [target], rows, seed + i)[target])
    train = read_streams(source, (target,), "train", rows, seed)
    nothing = functools.cache(lambda: samples(model, {}, [target], rows, seed)[target])
    beside = {task: lambda: draw(0), f"nothing -> {stream_word(target)}": nothing}
    if train and len(train[target]) == rows:
        beside[f"real training {stream_word(target)}"] = lambda: np.stack(train[target])
    out = []
    if all(split_stream(s)[0] in model.givable for s in (*given, target)):
        vectors = functools.cache(
            lambda: [model.embedded(s, model.ids(v) if isinstance(v, list) else v) for s, v in asked.items()]
        )
        for name, images in (*list(beside.items())[:2], (f"real {stream_word(target)}", lambda: x)):
            near = lambda name=name, images=images: figures_of(  # noqa: E731
                "partners", name, vectors(), model.embedded(target, images()), seed=seed, subjects=subjects
            )
            out += row(f"{task}: {name} beside what is given", near)
    for extractor, features, protocol in _extractors(model, target, protocols):
        real = functools.cache(functools.partial(features, x))

        def measure(name: str, extractor=extractor, features=features, real=real, how=protocol) -> list[Figure]:
            return feature_figures(name, real(), features(beside[name]()), extractor, seed=seed, protocol=how)

        for name in beside:
            out += row(f"{task}: {name} @{extractor}", functools.partial(measure, name))

    for whose, pristine in _pristine(x, train.get(target, [])):
        for name, images in (*beside.items(), (f"real {stream_word(target)}", lambda: x)):

            def sharp(name=name, images=images, whose=whose, pristine=pristine) -> list[Figure]:
                try:
                    return [METRICS["NIQE"].figure(name, f"NIQE @{whose}", x, images(), pristine(), seed=seed)]
                except UserError as why:
                    print(f"  {name}: NIQE @{whose} is left out: {why}", flush=True)
                    return []

            out += row(f"{task}: {name}, NIQE @{whose}", sharp)

    def draws() -> list[Figure]:
        drawn, some = [draw(i) for i in range(DRAWS)], []
        if (scales := scales_in(*x.shape[1:3])) > 1:
            name = f"MS-SSIM among draws, {scales} scales"
            real = np.stack([x[np.random.default_rng(seed + i).permutation(rows)] for i in range(DRAWS)])
            for who, images in ((task, np.stack(drawn)), (f"real {stream_word(target)} of {DRAWS} subjects", real)):
                some.append(METRICS[name].figure(who, name, images, seed=seed))
        if sheet is not None:
            shown = {"real": x, **{f"made, draw {i + 1}": images for i, images in enumerate(drawn)}}
            captions = next((v[:SHOWN] for v in asked.values() if isinstance(v, list)), ())
            grid(sheet, [(name, list(images[:SHOWN])) for name, images in shown.items()], captions, task)
            print(sheet, flush=True)
        return some

    return out + row(f"{task}: {DRAWS} draws", draws)


def at_299(images: np.ndarray) -> np.ndarray:
    """As CheXGenBench brings images to its extractors: 299 x 299, by PIL's bilinear rule, in 256 levels."""
    small = [Image.fromarray(to_uint8(one[..., 0])).resize((299, 299), Image.Resampling.BILINEAR) for one in images]
    return np.stack(small).astype(np.float32)[..., None] / 127.5 - 1


def _pristine(x: np.ndarray, train: Sequence[np.ndarray]) -> Iterator[tuple[str, Callable[[], natural.Pristine]]]:
    """(whose, what NIQE compares with): training images, and photographs where their file is; nothing of images that
    are too small for it, which is said."""
    h, w = x.shape[1:3]
    if (h // natural.BLOCK) * (w // natural.BLOCK) < 2:
        print(f"  NIQE is left out: images of {h} x {w} pixels do not hold two blocks of {natural.BLOCK}", flush=True)
        return
    if len(train):
        yield "training images", functools.cache(lambda: natural.fitted(np.stack(train)))
    file = epath.Path(weights_folder() or ".") / "niqe_pris_params.npz"
    if weights_folder() and file.exists():
        yield "photographs", functools.cache(lambda: natural.published(str(file)))
    else:
        where = "the folder that MEDM2G_SD_WEIGHTS names"
        print(f"  NIQE @photographs is left out: it wants niqe_pris_params.npz of BasicSR in {where}", flush=True)


def _extractors(model: Model, target: str, protocols: Sequence[str]) -> Iterator[tuple[str, Features, str]]:
    """(name, features of images in [-1, 1], protocol); what has no weights is left out, and said."""
    yield "ours", functools.partial(model.embedded, target), "features"
    for name, own in extractors.EXTRACTORS.items():
        if own.reads(MODALITIES[split_stream(target)[0]]):
            try:
                loaded = extractors.load(name)
            except UserError as why:
                print(f"  FID @{name} and its kin are left out: {why}", flush=True)
            else:
                if BENCH in protocols and name in BENCHED:
                    yield name, lambda images, of=loaded.features: of(at_299(images)), BENCH
                else:
                    yield name, loaded.features, "features"
