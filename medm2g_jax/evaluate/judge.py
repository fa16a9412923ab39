"""What is measured of images of one stream, made from others for the same test records: every metric of images; where
the lesion is known, the error inside it; how well what was made fits what was given; what a probe reads in it.

Where published networks' weights are there, also how far it is from the truth in their maps; where the task names
public evaluators, what they make of it. PSNR alone rewards the mean of what may be. The others do not, so that they
stand beside it, on every row.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medm2g_jax.data.pipeline import read_streams, records_with
from medm2g_jax.data.source import Source, labels, masks
from medm2g_jax.evaluate import extractors
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import METRICS, figures_of, public_figures
from medm2g_jax.evaluate.metrics.image import Images, decibel, squared_error
from medm2g_jax.evaluate.metrics.intervals import bootstrap, rows_of, signed_rank
from medm2g_jax.evaluate.metrics.published import body
from medm2g_jax.evaluate.probes import FIELDS, as_indices, finding_figures
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream, stream_word

Reads = Callable[[Images], Mapping[str, np.ndarray]]  # `probes.train_probe`'s
PAIRED, FAR = "PSNR dB, paired difference", "perceptual distance"


class Judge:
    """The test records of one case, and the figures of whatever is made for them.

    Args:
      mean: the mean image of training, which every figure has as its floor.
      reads: the probe of the target, where the source has exact labels.
      protocols: public evaluators whose figures are wanted as well, of PUBLIC.

    Attributes:
      x: the target's real images; `sources` those of what is given; `subjects` whose they are.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        given: Sequence[str],
        target: str,
        rows: int,
        seed: int,
        mean: Images,
        reads: Reads | None = None,
        protocols: Sequence[str] = (),
    ):
        self.model, self.target, self.seed, self._reads = model, target, seed, reads
        held = {s: np.stack(x) for s, x in read_streams(source, (*given, target), "test", rows, seed).items()}
        self.x, self.sources = held[target], {s: held[s] for s in given}
        self._mean = np.broadcast_to(mean, self.x.shape)
        self.beside = f", beside {' + '.join(map(stream_word, given))}"  # several cases may have this target
        self._real = f"real {stream_word(target)}{self.beside}"
        indices = records_with(source, (*given, target), "test", rows, seed)
        self.subjects = [source.records[i].subject for i in indices]
        self._protocols, self._indices = protocols, indices
        every = records_with(source, (*given, target), "test", len(source.records), seed)
        self._slices = Counter(source.records[i].subject for i in every)
        kind = MODALITIES[split_stream(target)[0]]
        self._maps = {name: extractors.load(name).maps for name in extractors.there(kind)}
        on_grid = all(target in source.records[i].grid for i in indices)
        outline = masks(source) if on_grid else None
        self._lesion = None if outline is None else np.stack([outline(int(i), target) for i in indices])
        self._findings = None if reads is None else as_indices([labels(source)(int(i)) for i in indices])
        able = all(split_stream(s)[0] in model.givable for s in (*given, target))
        self._given = [model.embedded(s, x) for s, x in self.sources.items()] if able else []
        self._ends: dict[str, Any] = dict(floor=("the mean image", [self._mean]))
        self._ceilings: dict[str, Reference] = {}

    def ceiling(self, task: str, again: Images) -> list[Figure]:
        """Of what the autoencoder makes of the real images, and what the probe reads in these."""
        real = [] if self._reads is None else self._found(self._real, self.x)
        return self.figures(task, again) + real

    def below(self, figures: Sequence[Figure]) -> None:
        """Figures of `ceiling`, measured now or before, are the ceiling of those that follow."""
        self._ends = dict(autoencoder=figures)
        real = [f for f in figures if f.task == self._real]
        self._ceilings = {f.metric: Reference(f.value, "the probe on real images") for f in real}

    def figures(self, task: str, made: Images) -> list[Figure]:
        """Of images (n h w 1) made for the test records."""
        how = dict(seed=self.seed, subjects=self.subjects)
        out = figures_of("image", task, self.x, made, **how, **self._ends)
        if self._lesion is not None and (ill := self._lesion.any((1, 2, 3))).any():
            ends = self._ends | ({"floor": ("the mean image", [self._mean[ill]])} if "floor" in self._ends else {})
            whose = [s for s, there in zip(self.subjects, ill, strict=True) if there]
            triple = self.x[ill], made[ill], self._lesion[ill]
            out += figures_of("lesion", task, *triple, seed=self.seed, subjects=whose, **ends)
        if self._given:
            there = self.model.embedded(self.target, made)
            mean = self.model.embedded(self.target, self._mean) if "floor" in self._ends else None
            ends = self._ends | ({} if mean is None else {"floor": ("the mean image", [mean])})
            out += figures_of("partners", task, self._given, there, **how, **ends)
        for name, maps in self._maps.items():
            floor = METRICS[FAR](self.x, self._mean, maps) if "floor" in self._ends else None
            ends = {} if floor is None else dict(floor=Reference(floor, "the mean image"))
            out.append(METRICS[FAR].figure(task, f"{FAR} @{name}", self.x, made, maps, **how, **ends))
        for name in self._protocols:
            out += PUBLIC[name](self, task, made)
        return out + ([] if self._reads is None else self._found(task, made))

    def in_volumes(self, task: str, made: Images) -> list[Figure]:
        """As SynthRAD2025 has it, of the subjects whose slices are all among the rows, one upon the other as they stand
        in the data set."""
        kind, protocol = MODALITIES[split_stream(self.target)[0]], "synthrad2025, slices"
        whose = np.asarray(self.subjects)
        whole = [s for s in dict.fromkeys(self.subjects) if (whose == s).sum() == self._slices[s]]
        if kind.unit != "HU" or not whole:
            why = f"{kind.unit or 'no unit'}, not HU" if whole else "no subject has all its slices among the rows"
            print(f"  {task}: synthrad2025 is left out: {why}", flush=True)
            return []
        order = np.argsort(self._indices)
        stacks = [[kind.in_unit(x[order][whose[order] == s, ..., 0]) for s in whole] for x in (self.x, made)]
        masks = [body(volume) for volume in stacks[0]]
        return public_figures("synthrad2025", task, *stacks, masks, seed=self.seed, protocol=protocol)

    def _found(self, task: str, images: Images) -> list[Figure]:
        """What the probe reads: of records with a lesion all fields, of others whether it sees none."""
        none, read = FIELDS["kind"].index("none"), self._reads(images)
        ill = self._findings["kind"] != none
        true, seen = ({name: values[ill] for name, values in of.items()} for of in (self._findings, read))
        out = finding_figures(task, true, seen, self._ceilings, self.seed) if ill.any() else []
        if not ill.all():
            clear = read["kind"][~ill] == none
            ends = dict(ceiling=self._ceilings.get("no lesion seen where none is"))
            pair = np.ones(len(clear), int), clear.astype(int)
            out.append(METRICS["right"].figure(task, "no lesion seen where none is", *pair, seed=self.seed, **ends))
        return out

    def beyond(self, task: str, one: Images, other: Images) -> list[Figure]:
        """How much better `one` is than `other`, record by record: in PSNR, and where the lesion is known in the error
        inside it."""
        errors = (squared_error(self.x, image) for image in (one, other))
        first, second = (np.asarray([decibel(e) for e in each[:, None]]) for each in errors)
        out = [self._paired(task, PAIRED, "range1, each image", first - second, self.subjects)]
        if self._lesion is not None and (ill := self._lesion.any((1, 2, 3))).any():
            metric = METRICS["MAE, lesion"]
            first, second = (metric.scores(self.x[ill], image[ill], self._lesion[ill]) for image in (one, other))
            whose = [s for s, there in zip(self.subjects, ill, strict=True) if there]
            out.append(self._paired(task, "MAE, lesion, paired difference", metric.protocol, first - second, whose))
        return out

    def _paired(self, task: str, metric: str, protocol: str, gains: np.ndarray, subjects: Sequence) -> Figure:
        return Figure(
            task=task,
            metric=metric,
            protocol=protocol,
            value=float(gains.mean()),
            interval=bootstrap(gains, np.mean, self.seed, subjects),
            n=len(gains),
            seed=self.seed,
            floor=Reference(0.0, "no difference"),
            p=signed_rank(np.asarray([gains[rows].mean() for rows in rows_of(subjects, len(gains))])),
        )


PUBLIC: dict[str, Callable[[Judge, str, Images], list[Figure]]] = {
    "syndiff": lambda judge, task, made: public_figures(
        "syndiff", task, judge.x, made, seed=judge.seed, subjects=judge.subjects
    ),
    "selfrdb": lambda judge, task, made: public_figures(
        "selfrdb", task, judge.x, made, None, judge.subjects, seed=judge.seed
    ),
    "synthrad2025": Judge.in_volumes,
}

NEAREST = " of the nearest training image"  # whose report is an answer
BESIDE = ("MAE, lesion", "cosine with its source @ours", "kind right", "lesion seen")
WORDS = ("BLEU-4", "finding F1")


def ahead(figures: Sequence[Figure]) -> list[str]:
    """A sentence for each answer that beats the model: in PSNR, with what the two have beside it; in what reports say,
    where the intervals are apart."""
    of = {(f.task, f.metric): f for f in figures}
    out = []
    for f in figures:
        task, _, name = f.task.partition(", beyond ")
        other = f"{task} by {name}"
        if f.metric != PAIRED or f.interval is None or f.interval[1] >= 0 or (other, "PSNR dB") not in of:
            continue
        pairs = [(m, of[other, m], of[task, m]) for m in BESIDE if (other, m) in of and (task, m) in of]
        beside = "; ".join(f"{m} {theirs.value:.3f} (the model {ours.value:.3f})" for m, theirs, ours in pairs)
        low, high = (-x for x in reversed(f.interval))
        out.append(
            f"{task}: {name} beats the model in PSNR, by {-f.value:.2f} dB [{low:.2f}, {high:.2f}], p {f.p:.2g}"
            + (f"; beside it {beside}" if beside else "")
        )
    for (task, metric), theirs in of.items():
        ours = of.get((task.removesuffix(NEAREST), metric))
        if task.endswith(NEAREST) and metric in WORDS and ours and ours.interval and theirs.interval:
            if theirs.interval[0] > ours.interval[1]:
                first, second = (f"{f.value:.3f} [{f.interval[0]:.3f}, {f.interval[1]:.3f}]" for f in (theirs, ours))
                whose = f"that{NEAREST}"
                out.append(f"{ours.task}: {whose} beats the model in {metric}, {first} over {second}")
    return out
