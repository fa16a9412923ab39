"""A figure: one measured number, with all that it takes to compare it. Every stage and `medm2g evaluate` write figures.

A number without its protocol is worth little: one pair of images gives 28 or 35 dB depending on the data range, and a
retrieval of 0.1 is good or bad depending on the gallery. So a figure names its protocol, a row of a table, and
whoever measures puts the floor (what needs no model) and the ceiling (what no model of this kind can pass) beside it.

In JSON a list of figures is a list of dicts with these fields, in this order; reports and pictures render them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.protocols import PROTOCOLS


class Reference(NamedTuple):
    """A floor or a ceiling: its value, and what has it."""

    value: float
    what: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    Attributes:
      task: what was measured: "report -> CT"; "CT -> CT" through the autoencoder.
      metric: its name, with the unit where it has one.
      protocol: a row of `protocols.PROTOCOLS`.
      interval: (low, high), 95 %.
      n: rows measured.
      seed: of what was drawn for it: noise, shuffles, the gallery.
      floor, ceiling: what needs no model, and what a model of this kind cannot pass.
      p: of a paired difference, how likely one as large is where there is none: Wilcoxon's signed-rank test, two-sided.
    """

    task: str
    metric: str
    protocol: str
    value: float
    interval: tuple[float, float] | None = None
    n: int
    seed: int
    floor: Reference | None = None
    ceiling: Reference | None = None
    p: float | None = None

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}")


def difference(a: Figure, b: Figure) -> float:
    """How much more a is than b.

    Raises:
      UserError: they were not measured alike: unlike numbers are not compared.
    """
    for field in ("metric", "protocol"):
        if (one := getattr(a, field)) != (other := getattr(b, field)):
            raise UserError(
                f"{a.task!r} is in {field} {one!r}, {b.task!r} in {field} {other!r}: such numbers are not comparable; "
                "measure both alike"
            )
    return a.value - b.value


def to_json(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """Plain values that any JSON reader takes: what is not finite becomes "nan", "inf" or "-inf"."""
    return [{f.name: _plain(getattr(one, f.name)) for f in dataclasses.fields(Figure)} for one in figures]


def from_json(rows: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """The figures that `to_json` has written; those of before there were tests have no p."""
    out = []
    for row in rows:
        low_high = row["interval"] and tuple(float(x) for x in row["interval"])
        ends = {k: row[k] and Reference(float(row[k]["value"]), row[k]["what"]) for k in ("floor", "ceiling")}
        out.append(Figure(**{**row, "value": float(row["value"]), "interval": low_high, **ends}))
    return out


def _plain(x: Any) -> Any:
    if isinstance(x, Reference):
        return {name: _plain(value) for name, value in x._asdict().items()}
    if isinstance(x, tuple):
        return [_plain(value) for value in x]
    if isinstance(x, str) or x is None:
        return x
    return x if math.isfinite(x) else str(x)


def number(x: float) -> str:
    """Four digits that count, as every figure is shown."""
    return f"{x:#.4g}"


def line(figure: Figure) -> str:
    """A figure as one line."""
    first = f"{figure.task}: {figure.metric} {number(figure.value)}"
    if figure.interval is not None:
        first += f" [{', '.join(map(number, figure.interval))}]"
    ends = [(name, end) for name in ("floor", "ceiling") if (end := getattr(figure, name)) is not None]
    told = [first, *(f"{name} {number(end.value)}, {end.what}" for name, end in ends)]
    return "; ".join([*told, *([] if figure.p is None else [f"p {number(figure.p)}"]), f"n {figure.n}"])


def scalars(figures: Iterable[Figure]) -> dict[str, float]:
    """For TensorBoard."""
    return {f"result/{f.task}, {f.metric}": f.value for f in figures}
