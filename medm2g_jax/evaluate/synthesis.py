"""One image made from others on its grid (the paper's MRI synthesis and MRI-CT translation): is it nearer to the truth
than what costs nothing, and does each source help?

Measured on the same test subjects, by every metric of images: the target made from all sources, the mean of several
draws, and one step of the sampler; from the last source alone; from the sources of another subject; beside `baselines`,
the joint flow that inpaints what is missing, a regression and a pix2pix by the flow's own UNet where they are asked
for, and the autoencoder, which no sample can pass. What the first source adds, and by how much the model is ahead of
each baseline, is told by paired differences, with their test. How much the draws can be trusted to say how sure they
are: how often the truth lies among them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from medm2g_jax.data.pipeline import of_streams, records_with, share_a_grid
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.baselines import IMAGES, Pairs
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.inpainting import can_inpaint, inpainted
from medm2g_jax.evaluate.judge import Judge, Reads, ahead
from medm2g_jax.evaluate.metrics.image import Images, decibel, squared_error
from medm2g_jax.evaluate.metrics.intervals import bootstrap
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.evaluate.regression import ALL, fit, fit_adversarial
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.evaluate.samples import CHUNK, samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import stream_word

MEAN_OF = 500  # training images, or pairs, that baselines are made from
DRAWS = 8
MADE = "made"  # what a picture calls the model's own


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
    row: Row,
    regression: int = 0,
    protocols: Sequence[str] = (),
    reads: Callable[[str], Reads] | None = None,
    sheet: epath.Path | None = None,
) -> list[Figure]:
    """Figures of `target` made from the streams `given`, of test subjects that have them all.

    Args:
      row: measures each row, or takes it up (`rows.Rows`).
      regression: steps of the regression and of the pix2pix by the flow's UNet; 0: none.
      protocols: public evaluators whose figures are wanted as well, of `judge.PUBLIC`.
      reads: a stream's probe, where the source has exact labels.
      sheet: a picture of the worst, the median and the best case to write.

    Raises:
      UserError: fewer test subjects than rows, or no training image of the target.
    """
    found = len(records_with(source, (*given, target), "test", rows, seed))
    if found < rows:
        raise UserError(f"--rows={rows}: {source.name} holds {found} test subjects with {', '.join((*given, target))}")
    train = of_streams(source, (target,), "train", MEAN_OF, seed)
    if not train:
        raise UserError(f"{source.name}: no training image of {target}, which the mean image is of")
    mean = train[target].mean(0, keepdims=True)
    read = reads and (lambda images: reads(target)(images))  # not trained where all rows are taken up
    judge = Judge(model, source, given, target, rows, seed, mean, read, protocols)
    x, sources, last = judge.x, judge.sources, given[-1]
    register = "trained" if share_a_grid(source, (*given, target), "test") else "made"

    def made(some: dict[str, Images], seed: int, **options: Any) -> Images:
        return samples(model, some, [target], rows, seed, register=register, **options)[target]

    words = task_words(given, target)
    task, last_words = f"{words[0]} -> {words[1]}", stream_word(last)
    shown = Shown(sheet, task, x, sources)
    draw = functools.cache(lambda i: made(sources, seed + i))
    out: list[Figure] = []

    def add(name: str, image: Callable[[], Images], beyond: str = "", picture: str = "") -> None:
        """The row of one answer, and by how much the model is ahead of it."""

        def measure() -> list[Figure]:
            images = image()
            shown.keep(picture, images)
            return judge.figures(name, images) + (judge.beyond(beyond, draw(0), images) if beyond else [])

        out.extend(row(name if name.startswith(task) else f"{task}: {name}", measure))

    again = f"{words[1]} -> {words[1]}{judge.beside}"
    ceiling = row(f"{task}: {again}", lambda: judge.ceiling(again, _reconstructed(model, target, x)))
    judge.below(ceiling)
    out.extend(ceiling)
    add(task, lambda: draw(0), picture=MADE)
    drawn = lambda: np.stack([draw(i) for i in range(DRAWS)])  # noqa: E731
    add(f"{task}, mean of {DRAWS} draws", lambda: drawn().mean(0), picture=f"mean of {DRAWS}")
    out.extend(row(f"{task}, truth among {DRAWS} draws", lambda: [_coverage(task, x, drawn(), seed, judge.subjects)]))
    if len(given) > 1:
        alone = lambda: made({last: sources[last]}, seed)  # noqa: E731
        add(f"{last_words} -> {words[1]}", alone, beyond=f"{task}, beyond {last_words} alone")
    order = np.random.default_rng(seed + 1).permutation(rows)
    add(
        f"{words[0]} of another subject -> {words[1]}",
        lambda: made({s: image[order] for s, image in sources.items()}, seed),
    )
    add(f"{task} in one step", lambda: made(sources, seed, steps=1))
    add(f"{last_words} taken for {words[1]}", lambda: sources[last])
    for name, image in _baselines(model, source, sources, target, rows, regression, seed).items():
        add(f"{task} by {name}", image, beyond=f"{task}, beyond {name}", picture=name)
    shown.draw()
    for sentence in ahead(out):
        print(f"  {sentence}", flush=True)
    return out


class Shown:
    """The picture of a case: the subjects whose image is the worst, the median and the best in squared error, beside
    all candidates. Kept beside it until it is drawn, for whoever goes on tomorrow.

    Args:
      sheet: its file; None: no picture.
    """

    def __init__(self, sheet: epath.Path | None, task: str, x: Images, sources: Mapping[str, Images]):
        self._sheet, self._task, self._x, self._sources = sheet, task, x, sources
        self._waiting = None if sheet is None else sheet.parent / f".{sheet.stem}.npz"
        self._kept: dict[str, np.ndarray] = {}
        if self._waiting is not None and self._waiting.exists():
            self._kept = dict(np.load(self._waiting))

    def keep(self, name: str, images: Images) -> None:
        """What an answer is of the subjects shown, who are chosen by the model's."""
        if self._sheet is None or not name or (name != MADE and MADE not in self._kept):
            return
        if name == MADE:
            order = np.argsort(-squared_error(self._x, images))
            self._kept["chosen"] = np.asarray([*dict.fromkeys(int(order[i]) for i in (0, len(order) // 2, -1))])
        self._kept[name] = np.asarray(images[self._kept["chosen"]], np.float32)
        part = self._waiting.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **self._kept)
        part.replace(self._waiting)

    def draw(self) -> None:
        """Write the picture, if there is anything that is not in it."""
        if not self._kept:
            return
        chosen = self._kept.pop("chosen")
        x, made = self._x[chosen], self._kept[MADE]
        real = {stream_word(s): image[chosen] for s, image in self._sources.items()} | {"the true image": x}
        rows = [(name, list(images)) for name, images in (real | self._kept).items()]
        captions = [f"{how}: {decibel(squared_error(x[[i]], made[[i]])):.1f} dB"
                    for i, how in zip(range(len(chosen)), ("worst", "median", "best"), strict=False)]  # fmt: skip
        grid(self._sheet, rows, captions, f"{self._task}, by PSNR of one draw")
        self._waiting.unlink()
        print(self._sheet, flush=True)


def _baselines(
    model: Model, source: Source, sources: dict[str, Images], target: str, rows: int, regression: int, seed: int
) -> dict[str, Callable[[], Images]]:
    """{name: makes the images} of each baseline that the model and training pairs allow."""
    streams, out = (*sources, target), {}
    if can_inpaint(model, (*sources,), target):
        out["inpainting without guidance"] = lambda: inpainted(model, sources, target, rows, seed)
    if not len(records_with(source, streams, "train", 1, seed)):
        print(f"  no training record holds {', '.join(streams)}: no baseline that learns from pairs", flush=True)
        return out

    @functools.cache
    def pairs() -> Pairs:
        train = of_streams(source, streams, "train", MEAN_OF, seed)
        return Pairs([train[s] for s in sources], train[target])

    for name, baseline in IMAGES.items():
        out[name] = lambda baseline=baseline: baseline(pairs(), [*sources.values()])
    if regression:
        every = functools.cache(lambda: of_streams(source, streams, "train", ALL, seed))
        for name, how in (("regression", fit), ("pix2pix", fit_adversarial)):
            learnt = functools.partial(how, steps=regression, seed=seed)
            out[f"{name}, {regression} steps"] = lambda f=learnt: f(model, every(), target).answer(sources)
    return out


def task_words(given: Sequence[str], target: str) -> tuple[str, str]:
    """What people call the sources, and the target."""
    return " + ".join(map(stream_word, given)), stream_word(target)


def _coverage(task: str, x: Images, drawn: np.ndarray, seed: int, subjects: Sequence | None = None) -> Figure:
    """How often a pixel's truth lies between the least and the greatest of its draws: (k - 1) / (k + 1) of k draws
    from what the truth is drawn from."""
    inside = ((x >= drawn.min(0)) & (x <= drawn.max(0))).mean(axis=(1, 2, 3))
    k = len(drawn)
    return Figure(
        task=task,
        metric=f"truth among {k} draws",
        protocol="pixels among draws",
        value=float(inside.mean()),
        interval=bootstrap(inside, np.mean, seed, subjects),
        n=len(x),
        seed=seed,
        ceiling=Reference((k - 1) / (k + 1), "draws from what the truth is drawn from"),
    )


def _reconstructed(model: Model, stream: str, x: Images) -> Images:
    name = stream.partition(":")[0]
    again = jax.jit(lambda p, x: model.model.decode(p, name, model.model.encode(p, name, x)))
    return np.concatenate([np.asarray(again(model.params, x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)])
