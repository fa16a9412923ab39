"""The metrics as a table: each is a function that scores rows, and what makes one value of the scores.

    METRICS["SSIM"](real, made)                              the value
    METRICS["SSIM"].figure("report -> CT", real, made, ...)  with its interval, floor and ceiling
    figures_of("image", "report -> CT", real, made, ...)     by every metric of images
    figures_of("selfrdb", "T1 -> T2", real, made, ...)       as a public evaluator has it

A new metric is one function in a file here and one row below; every task that compares such things then reports it.
Which equals what: docs/metrics.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from medm2g_jax.data.clean import clean
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import (
    distribution,
    image,
    labels,
    modalities,
    natural,
    neighbours,
    published,
    regions,
    retrieval,
    text,
    words,
)
from medm2g_jax.evaluate.metrics.intervals import bootstrap, wilson


def _median(scores: np.ndarray) -> float:
    return float(np.median(scores))


def _mean(scores: np.ndarray) -> float:
    return float(np.mean(scores))


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
      of: what it compares, and so its arguments (docs/metrics.md has them all): "image", "text", "findings" (texts, and
        a labeller), "embedding", "label"; "masked", "lesion" (images, and masks); "features" of an extractor; "words"
        of cleaned reports; the name of a public evaluator.
      scores: (real, made, ...) -> (n ...), of each row.
      protocol: see `protocols.PROTOCOLS`.
      value: of all scores; of shares, which are true or false, the interval is Wilson's.
      higher: whether more is better; None: neither is, and such a number has no floor.
    """

    of: str
    scores: Callable[..., np.ndarray]
    protocol: str
    value: Callable[[np.ndarray], float] = _mean
    higher: bool | None = True

    def __call__(self, *arguments: Any) -> float:
        return self.value(self.scores(*arguments))

    def figure(
        self, task: str, name: str, *arguments: Any, seed: int, subjects: Sequence | None = None, **fields: Any
    ) -> Figure:
        """Measured; `fields` are floor, ceiling, or another protocol; `subjects` whose each row is."""
        scores = self.scores(*arguments)
        n = len(scores)
        if scores.dtype == bool and (subjects is None or len(set(subjects)) == n):
            interval = wilson(int(scores.sum()), n)
        else:
            interval = bootstrap(scores, self.value, subjects=subjects)
        given = {"protocol": self.protocol, "interval": interval} | fields
        return Figure(task=task, metric=name, value=self.value(scores), n=n, seed=seed, **given)


@dataclass(frozen=True)
class OfSets:
    """A row of the table that compares whole sets: it is made of no scores of rows, and has no interval.

    Attributes:
      of, protocol, higher: as `Metric`'s.
      value: (real, made, ...) -> the number.
    """

    of: str
    value: Callable[..., float]
    protocol: str
    higher: bool | None = True

    def __call__(self, *arguments: Any) -> float:
        return self.value(*arguments)

    def figure(self, task: str, name: str, *sets: Any, seed: int, subjects: Any = None, **fields: Any) -> Figure:
        """Measured; its n is that of the smaller set. `fields` are floor, ceiling, or another protocol; `subjects` is
        there to be called as `Metric`'s: there is no interval."""
        given = {"protocol": self.protocol} | fields
        return Figure(task=task, metric=name, value=self(*sets), n=min(map(len, sets)), seed=seed, **given)


METRICS: dict[str, Metric | OfSets] = {
    "PSNR dB": Metric("image", image.squared_error, "range1", image.decibel),
    "SSIM": Metric("image", image.ssim, "range1"),
    "SSIM, [0, 1]": Metric("image in [0, 1]", image.unit_ssim, "range1, [0, 1]"),
    "MAE, [0, 1]": Metric("image in [0, 1]", image.absolute_error, "range1, [0, 1]", higher=False),
    **{
        f"MS-SSIM, {k} scales": Metric(f"image in {k} scales", partial(image.ms_ssim, scales=k), "range1, [0, 1]")
        for k in (2, 3, 4, 5)
    },
    **{
        f"MS-SSIM among draws, {k} scales": Metric(
            f"draws in {k} scales", partial(image.diversity, scales=k), "range1, [0, 1]", higher=False
        )
        for k in (2, 3, 4, 5)
    },
    "PSNR dB, masked": Metric("masked", image.masked_squared_error, "masked", image.decibel),
    "SSIM, masked": Metric("masked", image.masked_ssim, "masked"),
    "MAE, masked": Metric("masked", image.masked_absolute_error, "masked", higher=False),
    "MAE, lesion": Metric("lesion", image.masked_absolute_error, "lesion", higher=False),
    "bias, lesion": Metric("lesion", image.masked_bias, "lesion", higher=None),
    "PSNR dB, syndiff": Metric("syndiff", published.syndiff_psnr, "syndiff"),
    "PSNR dB, selfrdb": Metric("selfrdb", published.selfrdb_psnr, "selfrdb"),
    "SSIM %, selfrdb": Metric("selfrdb", published.selfrdb_ssim, "selfrdb"),
    "MAE HU, synthrad2025": Metric("synthrad2025", published.synthrad_mae, "synthrad2025", higher=False),
    "PSNR dB, synthrad2025": Metric("synthrad2025", published.synthrad_psnr, "synthrad2025"),
    "MS-SSIM, synthrad2025": Metric("synthrad2025", published.synthrad_ms_ssim, "synthrad2025"),
    "NIQE": Metric("natural", natural.niqe, "niqe", higher=False),
    "perceptual distance": Metric("maps", image.perceptual, "maps", higher=False),
    "Dice": Metric("region", regions.dice, "regions"),
    "HD95 px": Metric("boundary", partial(regions.hd95, spacing=None), "regions", higher=False),
    "HD95 mm": Metric("boundary in mm", regions.hd95, "regions", higher=False),
    "FID": OfSets("features", distribution.fid, "features", higher=False),
    "KID": OfSets("features", distribution.kid, "features", higher=False),
    "precision": Metric("features", distribution.precision, "features"),
    "recall": Metric("features", distribution.recall, "features"),
    "density": Metric("features", distribution.density, "features"),
    "coverage": Metric("features", distribution.coverage, "features"),
    "exact": Metric("text", text.exact, "word for word"),
    **{
        f"BLEU-{k}": Metric("words", words.bleu_counts, "words, none", partial(words.bleu, order=k))
        for k in range(1, words.ORDER + 1)
    },
    "ROUGE-L": Metric("words", words.rouge_l, "words, none"),
    "CIDEr": Metric("words", words.cider, "words, none"),
    "BLEU-2, rexrank": Metric("rexrank", words.rexrank_bleu, "rexrank"),
    "words a report": Metric("words", words.lengths, "words, none", higher=None),
    "distinct reports": OfSets("words", words.distinct, "words, none"),
    "finding F1": Metric("findings", text.fact_counts, "findings", text.micro_f1),
    "retrieval@1": Metric("embedding", retrieval.both_ways, "gallery, own partner"),
    "cosine with its source @ours": Metric("partners", retrieval.cosines, "aligned space"),
    **{
        f"R@{k}": Metric("gallery", partial(retrieval.hits, k=k), "gallery, own partner, ties shared")
        for k in (1, 5, 10)
    },
    "median rank": Metric("gallery", retrieval.ranks, "gallery, own partner, ties shared", _median, higher=False),
    "modality read": Metric("modalities", modalities.read, "modalities", higher=None),
    "same modality of the 10 nearest": Metric("modalities", modalities.purity, "modalities", higher=None),
    "silhouette of modalities": Metric("modalities", modalities.silhouette, "modalities", higher=None),
    "modality gap": OfSets("modalities", modalities.gap, "modalities", higher=None),
    "AUROC": OfSets("scores", labels.mean_auroc, "reader"),
    "right": Metric("label", labels.right, "probe"),
    "agree": Metric("label", labels.agree, "probe"),
    "kappa": Metric("labels", labels.beside, "probe", labels.kappa),
    "train / held-out distance": Metric("pools", neighbours.log_ratios, "neighbours, pixels", neighbours.geometric),
    "train / held-out distance, over real images'": Metric(
        "pools", neighbours.beside_real, "neighbours, pixels", neighbours.geometric
    ),
    "share of copies": Metric("subjects", neighbours.copies, "neighbours, pixels", higher=False),
}


def figures_of(
    of: str,
    task: str,
    real: Any,
    made: Any,
    *more: Any,
    seed: int,
    floor: tuple[str, Sequence[Any]] | None = None,
    autoencoder: Sequence[Figure] = (),
    subjects: Sequence | None = None,
) -> list[Figure]:
    """One figure by every metric that compares things of this sort.

    Args:
      more: further arguments of the metrics: the labeller of findings.
      floor: what needs no model, and candidates of it to put in `made`'s place: the best of them counts.
      autoencoder: figures of the target's own autoencoder: the ceiling of what it decodes, and their floor where
        `floor` is not given.
      subjects: whose each row is.
    """
    out = []
    for name, metric in METRICS.items():
        if metric.of != of:
            continue
        top = next((f for f in autoencoder if (f.metric, f.protocol) == (name, metric.protocol)), None)
        ends = dict(floor=top.floor, ceiling=Reference(top.value, "the autoencoder")) if top else {}
        if floor is not None and metric.higher is not None:
            what, candidates = floor
            best = max if metric.higher else min
            ends["floor"] = Reference(best(metric(real, one, *more) for one in candidates), what)
        out.append(metric.figure(task, name, real, made, *more, seed=seed, subjects=subjects, **ends))
    return out


def text_figures(
    task: str, real: Sequence[str], made: Sequence[str], labeller: text.Labeller | None, **options: Any
) -> list[Figure]:
    """Texts by every metric of texts and, where the source has a labeller, by every metric of findings; `options` are
    those of `figures_of`."""
    figures = figures_of("text", task, real, made, **options)
    return figures + (figures_of("findings", task, real, made, labeller, **options) if labeller else [])


def feature_figures(
    task: str, real: Any, made: Any, extractor: str, *, seed: int, protocol: str = "features"
) -> list[Figure]:
    """Sets of features (n d) by every metric of them, with the extractor's name: "ours" of `Model.embed`. What cannot
    be measured is left out, and said."""
    return _what_can_be("features", task, f" @{extractor}", real, made, seed=seed, protocol=protocol)


def public_figures(of: str, task: str, real: Any, made: Any, *more: Any, seed: int, **fields: Any) -> list[Figure]:
    """As a public evaluator has it, by its name. What cannot be measured is left out, and said."""
    return _what_can_be(of, task, "", real, made, *more, seed=seed, **fields)


def report_figures(
    task: str, real: Sequence[str], made: Sequence[str], cleaning: str, *, seed: int, subjects: Sequence | None = None
) -> list[Figure]:
    """Reports by every metric of their words, both cleaned by a named way of `data.clean`; beside them how long the
    real ones are and how many of those differ. What cannot be measured is left out, and said.

    Raises:
      UserError: no such way; a real report that has no word left.
    """
    a, b = ([clean(text, cleaning) for text in texts] for texts in (real, made))
    words.tokens(a, b)
    how: dict[str, Any] = dict(seed=seed, protocol=f"words, {cleaning}")
    how |= dict(subjects=subjects) if subjects is not None else {}
    figures = _what_can_be("words", task, "", a, b, **how)
    beside = ("words a report", "distinct reports")
    return figures + [METRICS[name].figure(f"{task}, the real ones", name, a, a, **how) for name in beside]


def _what_can_be(of: str, task: str, suffix: str, real: Any, made: Any, *more: Any, **how: Any) -> list[Figure]:
    out = []
    for name, metric in METRICS.items():
        if metric.of == of:
            try:
                out.append(metric.figure(task, name + suffix, real, made, *more, **how))
            except UserError as why:
                print(f"  {task}: {name}{suffix} is left out: {why}", flush=True)
    return out


def retrieval_figures(
    names: tuple[str, str],
    a: Any,
    b: Any,
    captions: Sequence[str] | None = None,
    *,
    seed: int,
    subjects: Sequence | None = None,
) -> list[Figure]:
    """Rows of embeddings (n d) and their partners, each looked for among the other, both ways; the floor is a random
    order. Where captions are given one of the same words is a hit: repeated ones cannot be told apart."""
    classes = None if captions is None else np.unique(np.asarray(captions), return_inverse=True)[1]
    hit, out = "own partner" if captions is None else "same words", []
    for (first, second), x, y in ((names, a, b), (names[::-1], b, a)):
        task = f"{first} -> {second}"
        for name, metric in METRICS.items():
            if metric.of == "gallery":
                nothing = np.ones((len(x), 1))  # tells nothing apart: all are ties
                floor = Reference(metric(nothing, nothing, classes), "a random order")
                how = dict(seed=seed, protocol=f"gallery, {hit}, ties shared", floor=floor, subjects=subjects)
                out.append(metric.figure(task, name, x, y, classes, **how))
    return out


def modality_figures(task: str, embeddings: Mapping[str, Any], *, seed: int) -> list[Figure]:
    """How far modalities lie apart in a shared space.

    Args:
      embeddings: {modality: (n d)}, row i of each of subject i.
    """
    modality = np.concatenate([np.full(len(x), i) for i, x in enumerate(embeddings.values())])
    subject = np.concatenate([np.arange(len(x)) for x in embeddings.values()])
    x = np.concatenate(list(embeddings.values()))
    of = {name: metric for name, metric in METRICS.items() if metric.of == "modalities"}
    return [metric.figure(task, name, modality, subject, x, seed=seed) for name, metric in of.items()]
