"""One image made from others on its grid (the paper's MRI synthesis and MRI-CT translation): is it nearer to the truth
than what costs nothing, and does each source help?

Measured on the same test subjects, PSNR and SSIM: the target made from all sources, and the mean of several draws; from
the last source alone; from the sources of another subject; beside the last source itself taken for it (identity), the
mean image of training, and the autoencoder, which no sample can pass. What the first source adds is told by the paired
difference in dB. How much the draws can be trusted to say how sure they are: how often the truth lies among them.
"""

from collections.abc import Sequence

import jax
import numpy as np

from medm2g_jax.data.pipeline import of_streams, share_a_grid
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import figures_of
from medm2g_jax.evaluate.metrics.image import Images, decibel, squared_error
from medm2g_jax.evaluate.metrics.intervals import bootstrap
from medm2g_jax.evaluate.samples import CHUNK, samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import stream_word

MEAN_OF = 500  # training images that the mean image is of
DRAWS = 8


def can_synthesise(pairs: Sequence[Sequence[str]], makes: Sequence[str], given: Sequence[str], target: str) -> bool:
    """Does a model with these trained guide pairs, that makes these modalities, guide the target by what is given?"""
    name = target.partition(":")[0]
    needed = {(s.partition(":")[0], name) for s in given}
    return name in makes and needed <= {tuple(p) for p in pairs}


def synthesis(
    model: Model, source: Source, given: Sequence[str], target: str, rows: int, seed: int = 0
) -> list[Figure]:
    """Figures of `target` made from the streams `given`, of test subjects that have them all.

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

    def made(some: dict[str, Images], seed: int) -> Images:
        return samples(model, some, [target], rows, seed, register=register)[target]

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
    return [*out, *figures_of("image", f"{last_words} taken for {words[1]}", x, sources[last], **ends)]


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
