"""The metrics as a table: each is a function that scores rows, and what makes one value of the scores.

    METRICS["SSIM"](real, made)                              the value
    METRICS["SSIM"].figure("report -> CT", real, made, ...)  with its interval, floor and ceiling
    figures_of("image", "report -> CT", real, made, ...)     by every metric of images

A new metric is one function in a file here and one row below; every task that compares such things then reports it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import image, labels, neighbours, retrieval, text
from medm2g_jax.evaluate.metrics.intervals import bootstrap, wilson


def _mean(scores: np.ndarray) -> float:
    return float(np.mean(scores))


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
      of: what it compares: "image", "text", "findings" (texts, and a labeller), "embedding", "label",
        "pools" and "subjects" (distances).
      scores: (real, made, ...) -> (n ...), of each row.
      protocol: see `protocols.PROTOCOLS`.
      value: of all scores; of shares, which are true or false, the interval is Wilson's.
      higher: whether more is better.
    """

    of: str
    scores: Callable[..., np.ndarray]
    protocol: str
    value: Callable[[np.ndarray], float] = _mean
    higher: bool = True

    def __call__(self, *arguments: Any) -> float:
        return self.value(self.scores(*arguments))

    def figure(self, task: str, name: str, *arguments: Any, seed: int, **fields: Any) -> Figure:
        """Measured; `fields` are floor, ceiling, or another protocol."""
        scores = self.scores(*arguments)
        n = len(scores)
        share = scores.dtype == bool
        interval = wilson(int(scores.sum()), n) if share else bootstrap(scores, self.value)
        given = {"protocol": self.protocol, "interval": interval} | fields
        return Figure(task=task, metric=name, value=self.value(scores), n=n, seed=seed, **given)


METRICS: dict[str, Metric] = {
    "PSNR dB": Metric("image", image.squared_error, "range1", image.decibel),
    "SSIM": Metric("image", image.ssim, "range1"),
    "exact": Metric("text", text.exact, "word for word"),
    "finding F1": Metric("findings", text.fact_counts, "findings", text.micro_f1),
    "retrieval@1": Metric("embedding", retrieval.both_ways, "gallery, own partner"),
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
) -> list[Figure]:
    """One figure by every metric that compares things of this sort.

    Args:
      more: further arguments of the metrics: the labeller of findings.
      floor: what needs no model, and candidates of it to put in `made`'s place: the best of them counts.
      autoencoder: figures of the target's own autoencoder: the ceiling of what it decodes, and their floor where
        `floor` is not given.
    """
    out = []
    for name, metric in METRICS.items():
        if metric.of != of:
            continue
        top = next((f for f in autoencoder if (f.metric, f.protocol) == (name, metric.protocol)), None)
        ends = dict(floor=top.floor, ceiling=Reference(top.value, "the autoencoder")) if top else {}
        if floor is not None:
            what, candidates = floor
            best = max if metric.higher else min
            ends["floor"] = Reference(best(metric(real, one, *more) for one in candidates), what)
        out.append(metric.figure(task, name, real, made, *more, seed=seed, **ends))
    return out


def text_figures(
    task: str, real: Sequence[str], made: Sequence[str], labeller: text.Labeller | None, **options: Any
) -> list[Figure]:
    """Texts by every metric of texts and, where the source has a labeller, by every metric of findings; `options` are
    those of `figures_of`."""
    figures = figures_of("text", task, real, made, **options)
    return figures + (figures_of("findings", task, real, made, labeller, **options) if labeller else [])
