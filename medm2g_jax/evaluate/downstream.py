"""Do generated images help who trains a network on real ones? (The paper's table 8, asked soundly.)

A small UNet, the reader, is trained on a part of the real data, and on the same part in other company:

    real alone
    real, augmented            shifted, brighter or darker, noisy: what costs nothing. Never mirrored
    generated, mixed in        half of each batch is generated
    generated, then real       the first half of the steps is on generated ones alone, the second on real ones
    other real ones, mixed in  the real images of the very subjects that the generated ones were asked for: what a
                               generator that has nothing to learn any more would give
    generated alone            no real image at all

All take as many steps. Training subjects are in two halves: real parts are of the one, the other is asked for. What is
generated for a subject has this subject's labels or, where what is given lies on its grid, this subject's mask. The
parts, the first weights and the batches are drawn anew for each seed; the test's subjects are the same for all, and
intervals are over both. The generator may have been trained on images of both halves: what it saw of them is in what it
makes, and wholly in "other real ones".
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from medm2g_jax.data.findings import in_words
from medm2g_jax.data.pipeline import share_a_grid
from medm2g_jax.data.source import Source, masks, present
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics.intervals import DRAWS
from medm2g_jax.evaluate.metrics.labels import auroc
from medm2g_jax.evaluate.metrics.regions import dice
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.evaluate.samples import CHUNK, samples
from medm2g_jax.evaluate.synthesis import task_words
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, stream_word
from medm2g_jax.nn.layers import GroupNorm, ResBlock, conv, upsample
from medm2g_jax.train.log import duration

BATCH, LR = 16, 3e-3
SIDE = 16  # of the reader's first maps, whatever the image's size
SHIFT, CONTRAST, NOISE = 1 / 16, 0.2, 0.1  # of an augmented image: of its side, of its values, of their range
FEWEST = 10  # subjects that a half has to have


class Arm(NamedTuple):
    """What a reader is trained on beside its real images: another pool, how, and whether all are augmented."""

    other: str = ""
    how: str = ""  # "mixed", "first", "alone"
    augment: bool = False


REAL = "real alone"
BEYOND = f", beyond {REAL}"
ARMS = {
    REAL: Arm(),
    "real, augmented": Arm(augment=True),
    "generated, mixed in": Arm("generated", "mixed"),
    "generated, then real": Arm("generated", "first"),
    "other real ones, mixed in": Arm("other", "mixed"),
}
ALONE = {"generated alone": Arm("generated", "alone")}


class Reader(nn.Module):
    """A UNet of two levels, 16 x 16 pixels at the first; (b h w 1) in [-1, 1] -> logits.

    Attributes:
      outputs: findings, each of which is there or not: (b outputs); 0: is a pixel the lesion's: (b h w 1).
    """

    outputs: int
    channels: Sequence[int] = (24, 48)
    groups: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b ..."]:
        b, h, w, _ = x.shape
        p = max(1, h // SIDE)  # pixels of a patch
        x = x.reshape(b, h // p, p, w // p, p).transpose(0, 1, 3, 2, 4).reshape(b, h // p, w // p, p * p)
        x, kept = conv(self.channels[0], "conv_in", jnp.float32)(x), []
        for i, features in enumerate(self.channels):
            if i:
                x = conv(features, f"downsample_{i}", jnp.float32, stride=2)(x)
            x = ResBlock(features, self.groups, name=f"down_{i}")(x)
            kept.append(x)
        if self.outputs:
            x = jax.nn.silu(GroupNorm(self.groups, name="norm_out")(x))
            return nn.Dense(self.outputs, name="out")(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))
        for i in reversed(range(len(self.channels) - 1)):
            x = jnp.concatenate([conv(self.channels[i], f"upsample_{i}", jnp.float32)(upsample(x)), kept[i]], -1)
            x = ResBlock(self.channels[i], self.groups, name=f"up_{i}")(x)
        x = nn.Dense(p * p, name="out")(jax.nn.silu(GroupNorm(self.groups, name="norm_out")(x)))
        return x.reshape(b, h // p, w // p, p, p).transpose(0, 1, 3, 2, 4).reshape(b, h, w, 1)


class Pool(NamedTuple):
    """Images that a reader may be trained on: places -> (n h w 1); and what is true of each: (n k), 1, 0 or NaN where
    nobody knows, or masks (n h w 1)."""

    images: Callable[[np.ndarray], np.ndarray]
    truth: np.ndarray

    def __len__(self) -> int:
        return len(self.truth)

    def only(self, places: np.ndarray) -> "Pool":
        return Pool(lambda chosen: self.images(places[chosen]), self.truth[places])


class Trainer:
    """Trains readers of one sort: one program for all of them."""

    def __init__(self, outputs: int, steps: int, example: Float[np.ndarray, "h w 1"]):
        self.reader, self.steps, self._example = Reader(outputs), steps, example[None]
        tx = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_onecycle_schedule(steps, LR, 0.1), b2=0.99)
        )

        def loss(params: Any, x: Array, y: Array) -> Array:
            logits = self.reader.apply(params, x)
            known = ~jnp.isnan(y)
            each = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, y, 0)) * known
            value = each.sum() / jnp.maximum(known.sum(), 1)
            if outputs:
                return value
            # Of a few pixels among many: entropy alone is content with none.
            guess = jax.nn.sigmoid(logits)
            return value + 1 - (2 * (guess * y).sum() + 1) / (guess.sum() + y.sum() + 1)

        def step(params, opt, x, y, key, augment):
            x, y = _augmented(x, y, key, augment)
            updates, opt = tx.update(jax.grad(loss)(params, x, y), opt, params)
            return optax.apply_updates(params, updates), opt

        self._step, self._tx, self._init = jit(step), tx, jax.jit(self.reader.init)
        self._read = jit(lambda params, x: jax.nn.sigmoid(self.reader.apply(params, x)))

    def train(self, arm: Arm, real: Pool, other: Pool | None, seed: int) -> Any:
        """The reader's parameters after all steps."""
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        params = self._init(key, self._example)
        opt = self._tx.init(params)
        for i in range(self.steps):
            shares = {"mixed": 0.5, "first": float(i < self.steps // 2), "alone": 1.0}
            count = round(BATCH * shares.get(arm.how, 0.0))
            parts = [(pool, n) for pool, n in ((real, BATCH - count), (other, count)) if n]
            drawn = [(pool, rng.integers(0, len(pool), n)) for pool, n in parts]
            x, y = (np.concatenate(z) for z in zip(*((p.images(at), p.truth[at]) for p, at in drawn), strict=True))
            params, opt = self._step(params, opt, x, y, jax.random.fold_in(key, i), float(arm.augment))
        return params

    def read(self, params: Any, images: Float[np.ndarray, "n h w 1"]) -> np.ndarray:
        """Probabilities (n k), or (n h w 1)."""
        return np.concatenate([self._read(params, images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)])


def _augmented(x: Array, y: Array, key: Array, amount: Array | float) -> tuple[Array, Array]:
    """Shifted, with other contrast and brightness, and with noise; of amount 0 the same. Masks go along."""
    b, h = x.shape[:2]
    most = max(1, round(SHIFT * h))
    where, scale, light, noise = jax.random.split(key, 4)
    offset = jnp.round(amount * jax.random.randint(where, (b, 2), -most, most + 1)).astype(jnp.int32) + most

    def shifted(images: Array) -> Array:
        wide = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
        return jax.vmap(lambda z, at: jax.lax.dynamic_slice(z, (at[0], at[1], 0), images.shape[1:]))(wide, offset)

    uniform = lambda k: amount * jax.random.uniform(k, (b, 1, 1, 1), minval=-CONTRAST, maxval=CONTRAST)  # noqa: E731
    x = shifted(x) * (1 + uniform(scale)) + uniform(light) + amount * NOISE * jax.random.normal(noise, x.shape)
    return x, shifted(y) if y.ndim == 4 else y


# --- the two tasks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How large the comparison is.

    Attributes:
      fractions: of the base, that readers are trained on.
      base: training records that all of them are, one half of the subjects; 0: as many as that half has.
      asked: generated images, and other real ones, of the other half.
      steps: of each reader.
      seeds: readers of each sort.
      findings: by name; () for all that some training and test records show, and others do not.
    """

    fractions: Sequence[float] = (0.01, 0.1, 1.0)
    base: int = 1000
    asked: int = 1000
    steps: int = 300
    seeds: int = 3
    findings: Sequence[str] = ()


class Halves(NamedTuple):
    """Records by number: real ones, those that are asked for, and the test's."""

    base: list[int]
    asked: list[int]
    test: list[int]


Scores = Callable[[Float[np.ndarray, "d n"]], Float[np.ndarray, "d s"]]  # weights of test records -> each seed's score
Judged = dict[str, tuple[Scores, Reference, int]]  # metric -> scores, what needs no model, images that count


class Task(NamedTuple):
    """What readers are trained for.

    Attributes:
      words: of the figures.
      outputs: see `Reader`.
      truth: records -> what is true of their images, see `Pool`.
      value: (record, stream) -> what the generator is given.
      judge: (truth of the test, what each seed's reader says (s n ...)) -> what these score.
    """

    words: str
    outputs: int
    truth: Callable[[Sequence[int]], np.ndarray]
    value: Callable[[int, str], Any]
    judge: Callable[[np.ndarray, np.ndarray], Judged]


def classified(
    model: Model, source: Source, given: Sequence[str], target: str, rows: int, seed: int, *, row: Row, plan: Plan
) -> list[Figure]:
    """AUROC of readers that say which findings an image of `target` shows, the mean over findings. Generated images are
    asked for by the report of a record, or by its findings in words where it has none.

    Raises:
      UserError: nobody says what records show, or too few subjects.
    """
    of = present(source)
    if of is None:
        raise UserError(
            f"{source.name}: no record says which findings it shows; expected data whose rows have labels in `info`, "
            "as `medm2g prepare` writes them of chexpert, mimic_cxr, chestxray14, siim and rsna"
        )
    halves = _halves(source, (target,), rows, plan)
    found = {i: of(i) for part in halves for i in part}
    asked_for = plan.findings or sorted({name for one in found.values() for name in one})
    both = lambda name, part: {True, False} <= {found[i].get(name, False) for i in part}  # noqa: E731
    names = [name for name in asked_for if both(name, halves.base) and both(name, halves.test)]
    if not names:
        raise UserError(
            f"{source.name}: none of {', '.join(asked_for) or 'no finding'} is there in some training and some test "
            "records, and not in others"
        )
    print(f"  findings: {', '.join(names)}", flush=True)

    def truth(index: Sequence[int]) -> np.ndarray:
        known = [[found[i].get(name, False) for name in names] for i in index]
        return np.asarray([[np.nan if v is None else float(v) for v in row] for row in known], np.float32)

    def value(index: int, stream: str) -> Any:
        return _read(source, index, stream) if stream in source.records[index].streams else in_words(found[index])

    def judge(real: np.ndarray, read: np.ndarray) -> Judged:
        def scores(weights: np.ndarray) -> np.ndarray:
            each = [[auroc(real[:, k], one[:, k], weights) for k in range(len(names))] for one in read]
            return np.nanmean(each, axis=1).T

        return {"AUROC": (scores, Reference(0.5, "chance"), len(real))}

    task = Task(f"{stream_word(target)}, findings", len(names), truth, value, judge)
    return _compared(model, source, given, target, halves, task, seed, row, plan)


def segmented(
    model: Model, source: Source, given: Sequence[str], target: str, rows: int, seed: int, *, row: Row, plan: Plan
) -> list[Figure]:
    """Dice of readers that outline the lesion in images of `target`, 1 where both are empty, and, among images with a
    lesion, how often the likeliest pixel lies in it. Generated images are made of what lies on their grid, so that the
    mask is known.

    Raises:
      UserError: the source has no masks, what is given does not lie on the grid, or too few subjects.
    """
    of, streams = masks(source), (*given, target)
    if of is None or not share_a_grid(source, streams, "train"):
        what = "no masks of lesions" if of is None else f"{', '.join(streams)} on different grids"
        raise UserError(f"{source.name} has {what}: what is generated would have no mask to learn from")

    def truth(index: Sequence[int]) -> np.ndarray:
        return np.stack([of(i, target) for i in index]).astype(np.float32)

    def judge(real: np.ndarray, read: np.ndarray) -> Judged:
        there = real.reshape(len(real), -1) > 0
        ill = there.any(1).astype(np.float64)
        overlap = np.stack([dice(real, one > 0.5) for one in read], 1)
        hits = np.take_along_axis(there, np.stack([one.reshape(len(one), -1).argmax(1) for one in read], 1), 1)

        def mean(weights: np.ndarray, each: np.ndarray) -> np.ndarray:
            return weights @ each / np.maximum(weights.sum(1, keepdims=True), 1)

        return {
            "Dice": (lambda w: mean(w, overlap), Reference(float(1 - ill.mean()), "no lesion ever"), len(real)),
            "lesion pointed at": (
                lambda w: mean(w * ill, hits.astype(np.float64)),
                Reference(float(there.mean(1)[ill > 0].mean()), "any pixel"),
                int(ill.sum()),
            ),
        }

    halves = _halves(source, streams, rows, plan)
    task = Task(f"{stream_word(target)}, lesion's mask", 0, truth, lambda i, s: _read(source, i, s), judge)
    return _compared(model, source, given, target, halves, task, seed, row, plan)


def _read(source: Source, index: int, stream: str) -> Any:
    return source.read(index, stream, np.random.default_rng([0, index]))


def _halves(source: Source, streams: Sequence[str], rows: int, plan: Plan) -> Halves:
    """Records that hold these streams, none of them synthetic, of the first subjects: the phantom renders neighbours
    together. Training subjects go to one half and the other in turn."""
    held: dict[str, dict[str, list[int]]] = {"train": {}, "val": {}, "test": {}}
    for i, record in enumerate(source.records):
        if set(streams) <= set(record.streams) - set(record.synthetic):
            held[record.split].setdefault(record.subject, []).append(i)
    train = list(held["train"].values())
    if len(train) < 2 * FEWEST:
        raise UserError(
            f"{source.name}: {len(train)} training subjects with {', '.join(streams)}; expected {2 * FEWEST} or more: "
            "a half is trained on, the images of the other half are asked for"
        )
    halves = ((train[::2], plan.base), (train[1::2], plan.asked), (held["test"].values(), rows))
    return Halves(*([i for own in subjects for i in own][: most or None] for subjects, most in halves))


def _compared(
    model: Model,
    source: Source,
    given: Sequence[str],
    target: str,
    halves: Halves,
    task: Task,
    seed: int,
    row: Row,
    plan: Plan,
) -> list[Figure]:
    """Figures of all readers, and of what each has beyond real images alone; a row for each part of the real ones."""

    def pool(index: Sequence[int]) -> Pool:
        return Pool(lambda at: np.stack([_read(source, index[k], target) for k in at]), task.truth(index))

    @functools.cache
    def others() -> dict[str, Pool | None]:
        made = _made(model, source, given, target, halves.asked, task, seed)
        generated = Pool(made.__getitem__, task.truth(halves.asked))
        return {"": None, "generated": generated, "other": pool(halves.asked)}

    real, test = pool(halves.base), pool(halves.test)
    x = test.images(np.arange(len(test)))
    trainer = Trainer(task.outputs, plan.steps, x[0])
    judged = _Judge(task, test.truth, [source.records[i].subject for i in halves.test], plan, seed)

    def scores(arm: Arm, count: int) -> Judged:
        read = []
        for k in range(plan.seeds):
            # The same for all arms of a seed: what is drawn is not what is compared.
            part = real.only(np.random.default_rng([seed, k]).permutation(len(real))[:count])
            read.append(trainer.read(trainer.train(arm, part, others()[arm.other], seed + k), x))
        return task.judge(test.truth, np.stack(read))

    def of_part(words: str, count: int) -> list[Figure]:
        alone, out, began = None, [], time.monotonic()
        for done, (name, arm) in enumerate(ARMS.items(), 1):
            found = scores(arm, count)
            out += judged.figures(f"{words}: {name}", found, alone)
            alone = alone or found
            left = (time.monotonic() - began) * (len(ARMS) / done - 1)
            print(f"  {words}: {done}/{len(ARMS)} trainings of {plan.seeds} readers  {duration(left)} left", flush=True)
        return out

    out: list[Figure] = []
    for fraction in plan.fractions:
        count = max(1, round(fraction * len(real)))
        words = f"{task.words}, {100 * fraction:g} % real ({count})"
        out += row(words, functools.partial(of_part, words, count))
    for name, arm in ALONE.items():
        words = f"{task.words}: {name} ({len(halves.asked)})"
        out += row(words, lambda words=words, arm=arm: judged.figures(words, scores(arm, 1), None))
    return out


def _made(
    model: Model, source: Source, given: Sequence[str], target: str, index: Sequence[int], task: Task, seed: int
) -> Float[np.ndarray, "n h w 1"]:
    """An image of `target` for each record."""
    began, parts = time.monotonic(), []
    near = all(MODALITIES[s.partition(":")[0]].is_image for s in given)
    options = {"register": "trained"} if near and share_a_grid(source, (*given, target), "train") else {}
    for at in range(0, len(index), CHUNK):
        chosen = [index[min(i, len(index) - 1)] for i in range(at, at + CHUNK)]  # filled up: one executable
        values = {s: [task.value(i, s) for i in chosen] for s in given}
        values = {s: v if isinstance(v[0], str) else np.stack(v) for s, v in values.items()}
        parts.append(samples(model, values, [target], CHUNK, seed, first=at, **options)[target])
        if at == 0:
            seconds = (time.monotonic() - began) * max(0, len(index) / CHUNK - 1)
            task_ = " -> ".join(task_words(given, target))
            print(f"  {task_}: {len(index)} to make, {duration(seconds)} left", flush=True)
    return np.concatenate(parts)[: len(index)]


class _Judge:
    """Figures of readers, with intervals over the test's subjects and the seeds, the same draws for all."""

    def __init__(self, task: Task, truth: np.ndarray, subjects: Sequence[str], plan: Plan, seed: int):
        whose = np.unique(np.asarray(subjects), return_inverse=True)[1]
        rng, count = np.random.default_rng(seed), whose.max() + 1
        self._weights = rng.multinomial(count, np.full(count, 1 / count), DRAWS)[:, whose].astype(np.float64)
        self._seeds = rng.integers(0, plan.seeds, (DRAWS, plan.seeds))
        self._whole, self._plan, self._seed = np.ones((1, len(whose))), plan, seed

    def figures(self, words: str, scores: Judged, beside: Judged | None) -> list[Figure]:
        """beside: the scores that these are compared with, seed by seed and subject by subject."""
        out = []
        for metric, (score, floor, n) in scores.items():
            out.append(self._figure(words, metric, score, floor, n))
            if beside:
                other = beside[metric][0]
                more = lambda w, a=score, b=other: a(w) - b(w)  # noqa: E731
                zero = Reference(0.0, "no difference")
                out.append(self._figure(words + BEYOND, f"{metric}, paired difference", more, zero, n))
        return out

    def _figure(self, words: str, metric: str, score: Scores, floor: Reference, n: int) -> Figure:
        drawn = np.take_along_axis(score(self._weights), self._seeds, 1).mean(1)
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        return Figure(
            task=words,
            metric=metric,
            protocol="reader",
            value=float(score(self._whole).mean()),
            interval=(float(low), float(high)),
            n=n,
            seed=self._seed,
            floor=floor,
        )
