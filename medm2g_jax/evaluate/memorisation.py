"""Samples of a model beside the rows that it was trained on and rows that were held out: is one of them a copy?

For one request, as "report -> CT": a sample for each of some held-out subjects, of what their records give; then, in
pixels and in the model's own aligned space, the two questions of `metrics.neighbours`. Subjects whose records ask are
in no pool: what is made of a record is like that record.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from medm2g_jax.data.images import square
from medm2g_jax.data.pipeline import share_a_grid
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import METRICS
from medm2g_jax.evaluate.metrics import neighbours as near
from medm2g_jax.evaluate.samples import samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import split_stream, stream_word
from medm2g_jax.train.log import duration

HELD = ("val", "test")
LINE = 0.95  # flagged: samples are surely nearer to training rows than this, beside what real images are
CHANCE = 0.01  # flagged: copies, if so many are less likely than this by chance
FEWEST = 30  # subjects that it takes; of held-out ones a third ask
POOL = 5000  # training rows that are looked through, at most
SIDE = 64  # pixels of the images that are compared, at most
EVERY = 5.0  # seconds between two lines of progress
PIXELS, SPACE = "pixels", "aligned space"
RATIO, BESIDE, COPIES = (name for name, metric in METRICS.items() if metric.of in ("pools", "subjects"))


class Ask(NamedTuple):
    """What is made of which streams of a held-out record."""

    given: tuple[str, ...]
    make: str

    def __str__(self) -> str:
        return f"{' + '.join(map(stream_word, self.given)) or 'nothing'} -> {stream_word(self.make)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Records of a data set, and their images as they are compared: space -> (n d)."""

    index: tuple[int, ...]
    subjects: np.ndarray
    features: Mapping[str, Float[np.ndarray, "n d"]]

    def first(self, count: int) -> np.ndarray:
        """The places of the first row of each of so many subjects."""
        return np.sort(np.unique(self.subjects, return_index=True)[1])[:count]


def _by_subject(source: Source, splits: Sequence[str], streams: Iterable[str], seed: int) -> list[list[int]]:
    """The records of each subject of these splits that hold all streams, none of them synthetic, in a drawn order."""
    found: dict[str, list[int]] = {}
    for i, record in enumerate(source.records):
        if record.split in splits and set(streams) <= set(record.streams) - set(record.synthetic):
            found.setdefault(record.subject, []).append(i)
    subjects = list(found.values())
    return [subjects[i] for i in np.random.default_rng(seed).permutation(len(subjects))]


def _compared(model: Model, stream: str, images: Float[np.ndarray, "n h w 1"]) -> dict[str, np.ndarray]:
    """Images as networks read them, as they are compared."""
    small = images if images.shape[1] <= SIDE else np.stack([square(x[..., 0], SIDE) for x in images])
    out = {PIXELS: np.asarray(small, np.float32).reshape(len(images), -1)}
    if split_stream(stream)[0] in model.givable:
        out[SPACE] = model.embedded(stream, np.asarray(images, np.float32))
    return out


def _read(model: Model, source: Source, subjects: list[list[int]], stream: str, say: Callable[[str], Any]) -> Rows:
    """The rows of these subjects; read in parts, of which no more is kept than what is compared."""
    index = [i for own in subjects for i in own]
    whose = np.repeat(np.arange(len(subjects)), [len(own) for own in subjects])
    parts, began, told, size = [], time.monotonic(), time.monotonic(), 64
    for at in range(0, len(index), size):
        chosen = [index[min(i, len(index) - 1)] for i in range(at, at + size)]  # filled up: one executable
        read = np.stack([_value(source, i, stream) for i in chosen])
        parts.append({k: x[: len(index) - at] for k, x in _compared(model, stream, read).items()})
        if (now := time.monotonic()) - told > EVERY:
            rate = (at + size) / (now - began)
            say(f"  {at + size}/{len(index)} rows read  {rate:.3g}/s  {duration((len(index) - at) / rate)} left")
            told = now
    return Rows(tuple(index), whose, {k: np.concatenate([part[k] for part in parts]) for k in parts[0]})


def _value(source: Source, index: int, stream: str) -> Any:
    return source.read(index, stream, np.random.default_rng([0, index]))


def _made(
    model: Model, source: Source, ask: Ask, index: Sequence[int], seed: int, say: Callable[[str], Any]
) -> Float[np.ndarray, "n h w 1"]:
    """A sample for each record, of what it gives."""
    register = "trained" if ask.given and share_a_grid(source, (*ask.given, ask.make), "test") else "made"
    parts, began, size = [], time.monotonic(), min(model.defaults["rows"], len(index))
    for at in range(0, len(index), size):
        chosen = [index[min(i, len(index) - 1)] for i in range(at, at + size)]
        values = {s: [_value(source, i, s) for i in chosen] for s in ask.given}
        given = {s: v if isinstance(v[0], str) else np.stack(v) for s, v in values.items()}
        parts.append(samples(model, given, [ask.make], size, seed, first=at, register=register)[ask.make])
        done = min(at + size, len(index))
        rate = done / (time.monotonic() - began)
        say(f"  {done}/{len(index)} samples  {rate:.2g}/s  {duration((len(index) - done) / rate)} left")
    return np.concatenate(parts)[: len(index)]


class Pair(NamedTuple):
    """A sample and the row of the nearest training subject, in one space; records by their numbers in the source.

    gap, copy: see `neighbours`.
    """

    space: str
    sample: int
    asked_by: int
    train: int
    held: int
    distance: float
    gap: float
    copy: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Audited:
    """What was found of one request: why it is flagged, [] where it passes; a pair for each space and sample."""

    ask: Ask
    figures: list[Figure]
    reasons: list[str]
    pairs: list[Pair]


def judged(ask: Ask, made: Mapping[str, np.ndarray], real: Rows, train: Rows, held: Rows, seed: int = 0) -> Audited:
    """What the neighbours of samples say, space by space.

    Args:
      made: samples as they are compared, space -> (n d); one for each row of `real`, the records that asked for them.
    """
    out = Audited(ask, [], [], [])
    pools = train, held
    count = min(len(set(pool.subjects.tolist())) for pool in pools)
    for space, x in made.items():
        task, protocol = f"{ask}, {space}", f"neighbours, {space}"
        each = [[near.distances(rows, pool.features[space]) for pool in pools] for rows in (x, real.features[space])]
        rows = [d[:, pool.first(count)] for two in each for d, pool in zip(two, pools, strict=True)]
        subjects = [near.of_subjects(d, pool.subjects) for two in each for d, pool in zip(two, pools, strict=True)]
        out.figures.extend(_figures(task, protocol, rows, subjects, seed))
        out.reasons.extend(_nearer(out.figures[-2], near.exchanged(*rows, seed)))
        copied, gaps = near.copies(*subjects[:2]), near.gaps(subjects[0])
        places = each[0][0].argmin(1)
        # Alone a copy counts in pixels only: the aligned space has so few dimensions that chance comes as near.
        sure = space == PIXELS and bool(near.copies(*subjects[:2], near.SURE).any())
        out.reasons.extend(_copied(task, len(set(train.subjects[places[copied]].tolist())), len(x), sure))
        for i, (to_train, to_held) in enumerate(zip(*each[0], strict=True)):
            at = train.index[places[i]], held.index[to_held.argmin()], float(to_train.min())
            out.pairs.append(Pair(space, i, real.index[i], *at, float(gaps[i]), bool(copied[i])))
    return out


def _figures(task: str, protocol: str, rows: list, subjects: list, seed: int) -> list[Figure]:
    """Of distances to rows of equally large pools, and to subjects; each of samples to train and held, then of real
    images."""
    real = "real held-out images"
    measured = (
        (RATIO, rows[:2], METRICS[RATIO](*rows[2:]), real),
        (BESIDE, rows, 1.0, "a model that has kept nothing"),
        (COPIES, subjects[:2], METRICS[COPIES](*subjects[2:]), real),
    )
    return [
        METRICS[name].figure(task, name, *of, seed=seed, protocol=protocol, floor=Reference(floor, what))
        for name, of, floor, what in measured
    ]


def _nearer(beside: Figure, chance: float) -> list[str]:
    """Whether samples are nearer to training rows, in words; chance: of a value as low."""
    if beside.interval is None or beside.interval[1] >= LINE or chance >= CHANCE:
        return []
    low, high = beside.interval
    return [
        f"{beside.task}: samples are {beside.value:.3f} [{low:.3f}, {high:.3f}] times as far from training rows as "
        f"from held-out ones, beside what real images are (by chance: {chance:.2g}); flagged below {LINE}"
    ]


def _copied(task: str, subjects: int, n: int, sure: bool) -> list[str]:
    """Whether training subjects are copied, in words; sure: one of them so closely that it counts alone."""
    chance = near.by_chance(subjects, n)
    if not sure and chance >= CHANCE:
        return []
    how = "one of them closely" if sure else f"by chance: {chance:.2g}"
    return [
        f"{task}: copies of {subjects} training subject{'s' * (subjects > 1)} among {n} samples, nearer to them than "
        f"any is to a held-out one ({how})"
    ]


def remembered(
    model: Model, source: Source, ask: Ask, rows: int, seed: int = 0, say: Callable[[str], Any] = print
) -> tuple[Audited, Float[np.ndarray, "n h w 1"]]:
    """Ask for one sample of each of `rows` held-out subjects, at most a third of all, and look for its neighbours:
    (what they say, the samples).

    Raises:
      UserError: too few subjects to tell anything.
    """
    train = _by_subject(source, ("train",), [ask.make], seed)
    askers = [own[:1] for own in _by_subject(source, HELD, (*ask.given, ask.make), seed)]
    held = _by_subject(source, HELD, [ask.make], seed)
    if min(len(askers), len(held), len(train)) < FEWEST:
        raise UserError(
            f"data {source.name!r}: {len(train)} training and {len(askers)} held-out subjects have "
            f"{' and '.join((*ask.given, ask.make))}; expected at least {FEWEST} of each"
        )
    askers = askers[: min(rows, len(held) // 3)]
    asked = {source.records[own[0]].subject for own in askers}
    held = [own for own in held if source.records[own[0]].subject not in asked]
    kept, total = [], 0
    for own in train:
        if kept and total + len(own) > POOL:
            break
        kept.append(own)
        total += len(own)
    say(f"{ask}: {len(askers)} samples; {total} rows of {len(kept)} of {len(train)} training subjects, "
        f"{len(held)} held-out subjects")  # fmt: skip
    made = _made(model, source, ask, [own[0] for own in askers], seed, say)
    if split_stream(ask.make)[0] not in model.givable:
        say(f"  no prompt encoder of {stream_word(ask.make)} in this model: pixels alone")
    pools = {"train": _read(model, source, kept, ask.make, say), "held": _read(model, source, held, ask.make, say)}
    real = _read(model, source, askers, ask.make, say)
    return judged(ask, _compared(model, ask.make, made), real, pools["train"], pools["held"], seed), made
