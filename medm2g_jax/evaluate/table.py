"""Figures as a table: CSV for machines, Markdown for people."""

import csv as csv_
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medm2g_jax.evaluate.figures import Figure, number
from medm2g_jax.evaluate.judge import ahead
from medm2g_jax.evaluate.protocols import PROTOCOLS

COLUMNS = ("task", "metric", "protocol", "value", "low", "high", "n", "seed", "floor", "ceiling", "p")


def csv(figures: Sequence[Figure]) -> str:
    """A line a figure, all digits."""
    text = io.StringIO()
    writer = csv_.writer(text)
    writer.writerow(COLUMNS)
    for f in figures:
        low, high = f.interval or ("", "")
        ends = (end.value if end else "" for end in (f.floor, f.ceiling))
        p = "" if f.p is None else f.p
        writer.writerow([f.task, f.metric, f.protocol, f.value, low, high, f.n, f.seed, *ends, p])
    return text.getvalue()


def markdown(figures: Sequence[Figure], record: Mapping[str, Any], published: str = "") -> str:
    """What the figures are of, `tables`, what others have published, and the protocols."""
    first = ", ".join(f"{name} {value}" for name, value in record.items())
    own = [f"Published, by others: {published}", ""] if published else []
    return "\n".join([first, "", *tables(figures), *own, *protocols(dict.fromkeys(f.protocol for f in figures))]) + "\n"


def tables(figures: Sequence[Figure]) -> list[str]:
    """Lines: a row a task, a column a metric, a table for each set of metrics; then what is ahead of the model."""
    rows: dict[str, dict[tuple[str, str], Figure]] = {}
    for f in figures:
        rows.setdefault(f.task, {})[f.metric, f.protocol] = f
    alike: dict[tuple, list[str]] = {}
    for task, of in rows.items():
        alike.setdefault(tuple(of), []).append(task)
    lines = []
    for metrics, tasks in alike.items():
        lines += [f"| | {' | '.join(metric for metric, _ in metrics)} | n |", "|---" * (len(metrics) + 2) + "|"]
        for task in tasks:
            cells = [_cell(rows[task][m]) for m in metrics]
            counts = dict.fromkeys(str(f.n) for f in rows[task].values())
            lines.append(f"| {task} | {' | '.join(cells)} | {', '.join(counts)} |")
        lines.append("")
    return lines + [line for sentence in ahead(figures) for line in (f"**{sentence}**", "")]


def protocols(names: Iterable[str]) -> list[str]:
    """Lines: what each is."""
    said = {name: "; ".join(f"{k}: {text}" for k, text in vars(PROTOCOLS[name]).items() if text) for name in names}
    return [f"- {name}: {words}" for name, words in said.items()]


def _cell(f: Figure) -> str:
    interval = f" [{', '.join(map(number, f.interval))}]" if f.interval else ""
    return f"{number(f.value)}{interval}{'' if f.p is None else f', p {f.p:.1g}'}"
