"""One image made from others on its grid (the paper's MRI synthesis and MRI-CT translation): is it nearer to the truth
than what costs nothing, and does each source help?

Measured on the same test subjects, by every metric of images: the target made from all sources, the mean of several
draws, and one step of the sampler; from the last source alone; from the sources of another subject; beside `baselines`,
a regression by the flow's own UNet where it is asked for, and the autoencoder, which no sample can pass. What the first
source adds, and by how much the model is ahead of each baseline, is told by the paired difference in dB. How much the
draws can be trusted to say how sure they are: how often the truth lies among them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from medm2g_jax.data.pipeline import of_streams, share_a_grid
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.baselines import IMAGES, Pairs
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import figures_of
from medm2g_jax.evaluate.metrics.image import Images, decibel, squared_error
from medm2g_jax.evaluate.metrics.intervals import bootstrap
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.evaluate.regression import ALL, fit
from medm2g_jax.evaluate.samples import CHUNK, samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import stream_word

MEAN_OF = 500  # training images, or pairs, that baselines are made from
DRAWS = 8


def can_synthesise(pairs: Sequence[Sequence[str]], makes: Sequence[str], given: Sequence[str], target: str) -> bool:
    """Does a model with these trained guide pairs, that makes these modalities, guide the target by what is given?"""
    name = target.partition(":")[0]
    needed = {(s.partition(":")[0], name) for s in given}
    return name in makes and needed <= {tuple(p) for p in pairs}


def synthesis(
    model: Model,
    source: Source,
    given: Sequence[str],
    target: str,
    rows: int,
    seed: int = 0,
    *,
    regression: int = 0,
    sheet: epath.Path | None = None,
) -> list[Figure]:
    """Figures of `target` made from the streams `given`, of test subjects that have them all.

    Args:
      regression: steps of the regression by the flow's UNet; 0: none.
      sheet: a picture of the worst, the median and the best case to write.

    Raises:
      UserError: fewer test subjects than rows, or no training image of the target.
    """
    real = of_streams(source, (*given, target), "test", rows, seed)
    if not real or len(real[target]) < rows:
        streams = ", ".join((*given, target))
        raise UserError(
            f"--rows={rows}: {source.name} holds {len(real[target]) if real else 0} test subjects with {streams}"
        )
    train = of_streams(source, (target,), "train", MEAN_OF, seed)
    if not train:
        raise UserError(f"{source.name}: no training image of {target}, which the mean image is of")
    x, sources = real[target], {s: real[s] for s in given}
    last = given[-1]
    order = np.random.default_rng(seed + 1).permutation(rows)

    register = "trained" if share_a_grid(source, (*given, target), "test") else "made"

    def made(some: dict[str, Images], seed: int, **options: Any) -> Images:
        return samples(model, some, [target], rows, seed, register=register, **options)[target]

    words = task_words(given, target)
    floor = ("the mean image", [np.broadcast_to(train[target].mean(0, keepdims=True), x.shape)])
    again = _reconstructed(model, target, x)
    ceiling = figures_of("image", f"{words[1]} -> {words[1]}", x, again, seed=seed, floor=floor)
    ends = dict(seed=seed, autoencoder=ceiling)
    drawn = np.stack([made(sources, seed + i) for i in range(DRAWS)])
    task = f"{words[0]} -> {words[1]}"
    out = [*ceiling, *figures_of("image", task, x, drawn[0], **ends)]
    out += figures_of("image", f"{task}, mean of {DRAWS} draws", x, drawn.mean(0), **ends)
    out.append(_coverage(task, x, drawn, seed))
    last_words = stream_word(last)
    if len(given) > 1:
        alone = made({last: sources[last]}, seed)
        out += figures_of("image", f"{last_words} -> {words[1]}", x, alone, **ends)
        out.append(_gain(f"{task}, beyond {last_words} alone", x, drawn[0], alone, seed))
    shuffled = made({s: image[order] for s, image in sources.items()}, seed)
    out += figures_of("image", f"{words[0]} of another subject -> {words[1]}", x, shuffled, **ends)
    out += figures_of("image", f"{task} in one step", x, made(sources, seed, steps=1), **ends)
    out += figures_of("image", f"{last_words} taken for {words[1]}", x, sources[last], **ends)
    beside: dict[str, Images] = {}
    for name, image in _baselines(model, source, sources, target, regression, seed):
        beside[name] = image
        out += figures_of("image", f"{task} by {name}", x, image, **ends)
        out.append(_gain(f"{task}, beyond {name}", x, drawn[0], image, seed))
    if sheet is not None:
        _sheet(sheet, task, x, sources, {"made": drawn[0], f"mean of {DRAWS}": drawn.mean(0)} | beside)
    return out


def _sheet(
    path: epath.Path, task: str, x: Images, sources: Mapping[str, Images], candidates: Mapping[str, Images]
) -> None:
    """The subjects whose image is the worst, the median and the best in squared error, beside all candidates."""
    order = np.argsort(-squared_error(x, candidates["made"]))
    chosen = [int(order[i]) for i in dict.fromkeys((0, len(order) // 2, len(order) - 1))]
    real = {stream_word(s): image for s, image in sources.items()} | {"the true image": x}
    rows = [(name, [image[i] for i in chosen]) for name, image in (real | dict(candidates)).items()]
    captions = [f"{how}: {decibel(squared_error(x[[i]], candidates['made'][[i]])):.1f} dB"
                for how, i in zip(("worst", "median", "best"), chosen, strict=False)]  # fmt: skip
    grid(path, rows, captions, f"{task}, by PSNR of one draw")
    print(path, flush=True)


def _baselines(
    model: Model, source: Source, sources: dict[str, Images], target: str, regression: int, seed: int
) -> Iterator[tuple[str, Images]]:
    """(name, images) of each baseline that training pairs allow."""
    streams = (*sources, target)
    train = of_streams(source, streams, "train", MEAN_OF, seed)
    if not train:
        print(f"  no training record holds {', '.join(streams)}: no baseline that learns from pairs", flush=True)
        return
    pairs = Pairs([train[s] for s in sources], train[target])
    for name, baseline in IMAGES.items():
        yield name, baseline(pairs, [*sources.values()])
    if regression:
        train = of_streams(source, streams, "train", ALL, seed)
        yield f"regression, {regression} steps", fit(model, train, target, steps=regression, seed=seed).answer(sources)


def task_words(given: Sequence[str], target: str) -> tuple[str, str]:
    """What people call the sources, and the target."""
    return " + ".join(map(stream_word, given)), stream_word(target)


def _coverage(task: str, x: Images, drawn: np.ndarray, seed: int) -> Figure:
    """How often a pixel's truth lies between the least and the greatest of its draws: (k - 1) / (k + 1) of k draws
    from what the truth is drawn from."""
    inside = ((x >= drawn.min(0)) & (x <= drawn.max(0))).mean(axis=(1, 2, 3))
    k = len(drawn)
    return Figure(
        task=task,
        metric=f"truth among {k} draws",
        protocol="pixels among draws",
        value=float(inside.mean()),
        interval=bootstrap(inside, np.mean, seed),
        n=len(x),
        seed=seed,
        ceiling=Reference((k - 1) / (k + 1), "draws from what the truth is drawn from"),
    )


def _gain(task: str, x: Images, one: Images, other: Images, seed: int) -> Figure:
    """How much nearer one image is than the other, subject by subject."""
    gains = np.asarray([decibel(b) - decibel(a) for a, b in zip(*_pairs(x, other, one), strict=True)])
    return Figure(
        task=task,
        metric="PSNR dB, paired difference",
        protocol="range1, each image",
        value=float(gains.mean()),
        interval=bootstrap(gains, np.mean, seed),
        n=len(gains),
        seed=seed,
        floor=Reference(0.0, "no difference"),
    )


def _pairs(x: Images, *images: Images) -> list[np.ndarray]:
    return [squared_error(x, image)[:, None] for image in images]


def _reconstructed(model: Model, stream: str, x: Images) -> Images:
    name = stream.partition(":")[0]
    again = jax.jit(lambda p, x: model.model.decode(p, name, model.model.encode(p, name, x)))
    return np.concatenate([np.asarray(again(model.params, x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)])
