"""report.html of a run: plan and times, every stage's picture and numbers, real and generated reports with the findings
that agree marked. One file, nothing to load from elsewhere."""

import base64
import html
import json
from typing import Any

from etils import epath

from medm2g_jax import rounds
from medm2g_jax.evaluate.figures import Figure, Reference, from_json, number
from medm2g_jax.evaluate.metrics.text import Labeller, agreement
from medm2g_jax.evaluate.pictures import SYNTHETIC
from medm2g_jax.evaluate.rows import figures_in
from medm2g_jax.train import checkpoint

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .7em 0; } td, th { padding: .2em .9em .2em 0; text-align: left;
vertical-align: top; } td.n { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
.yes { color: #11691f; } .no { color: #a3160c; } .note { background: #fff4d6; padding: .5em .8em; }
code { background: #f2f2f2; padding: .1em .3em; }
"""


def write_report(root: epath.Path, listing: tuple[str, ...], labeller: Labeller | None = None) -> epath.Path:
    """Write root/report.html from what the finished stages left in their folders.

    Args:
      listing: of the run; stages are shown in its order.
      labeller: reads the findings of texts (`data.source.labeller`); without one they are shown as they are.
    """
    parts = [f"<p class=note>{html.escape(SYNTHETIC[0].upper() + SYNTHETIC[1:])}.</p>"]
    done = [(s, m) for s in rounds.graph(listing).stages if (m := checkpoint.read_meta(root / s)) is not None]
    first = sorted(p for p in root.glob("*.png"))
    parts += [_image(p, "records of the data this run trained on") for p in first]
    parts.append("<h2>Plan</h2><table><tr><th>stage</th><th>trains</th><th>parameters</th><th>seconds</th></tr>")
    for stage, meta in done:
        parts.append(
            f"<tr><td>{stage}</td><td>{', '.join(meta['trains'])}</td><td class=n>{meta['parameters'] / 1e6:.2f} M</td>"
            f"<td class=n>{meta['seconds']:.0f}</td></tr>"
        )
    total = sum(meta["seconds"] for _, meta in done)
    parts.append(f"<tr><td>all</td><td></td><td></td><td class=n>{total:.0f}</td></tr></table>")
    for stage, meta in reversed(done):  # the newest result first: it is what the run was for
        parts.append(f"<h2>{stage}</h2>")
        parts += [_image(p, stage) for p in sorted((root / stage).glob("*.png"))]
        parts.append(_figures(from_json(meta["figures"])))
        evaluation = root / stage / "evaluation.json"
        if evaluation.exists():
            parts.append("<h3>medm2g evaluate</h3>" + _figures(figures_in(json.loads(evaluation.read_text()))))
        texts = root / stage / "texts.json"
        if texts.exists():
            parts.append(_texts(json.loads(texts.read_text()), labeller))
    title = f"{root.name}: {done[-1][0] if done else 'nothing finished yet'}"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    path = root / "report.html"
    path.write_text(f"{page}<h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n")
    return path


def _image(path: epath.Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(what)}: {html.escape(path.name)}" src="data:image/png;base64,{data}"></p>'


def _figures(figures: list[Figure]) -> str:
    """Each figure between its floor and its ceiling."""
    rows = ["<tr><th></th><th></th><th>floor</th><th></th><th>ceiling</th><th>n</th></tr>"]
    for figure in figures:
        value = f"<b>{number(figure.value)}</b>"
        if figure.interval is not None:
            value += f"<br><small>[{', '.join(map(number, figure.interval))}]</small>"
        names = [
            html.escape(figure.task),
            f'<span title="{html.escape(figure.protocol)}">{html.escape(figure.metric)}</span>',
        ]
        cells = [_end(figure.floor), value, _end(figure.ceiling), str(figure.n)]
        rows.append(f"<tr><td>{'</td><td>'.join(names)}</td><td class=n>{'</td><td class=n>'.join(cells)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _end(end: Reference | None) -> str:
    return "" if end is None else f"{number(end.value)}<br><small>{html.escape(end.what)}</small>"


def _texts(texts: dict[str, list[str]], labeller: Labeller | None) -> str:
    columns = list(texts)
    out = ["<table><tr>", *(f"<th>{html.escape(c)}</th>" for c in columns), "</tr>"]
    for row in zip(*texts.values(), strict=True):
        out.append("<tr>")
        for column, text in zip(columns, row, strict=True):
            judged = labeller is not None and "real" in texts and column != "real"
            marks = _agreement(labeller(row[columns.index("real")]), labeller(text)) if judged else ""
            out.append(f"<td>{html.escape(text)}{marks}</td>")
        out.append("</tr>")
    return "".join(out) + "</table>"


def _agreement(real: Any, made: Any) -> str:
    """The findings of the real report, each marked as met or missed by the text's."""
    marks = []
    for field, agrees in agreement(real, made).items():
        if agrees is not None:
            colour, sign = ("yes", "&#10003;") if agrees else ("no", "&#10007;")
            marks.append(f"<span class={colour}>{sign} {html.escape(field)}</span>")
    return "<br><small>" + " ".join(marks) + "</small>"
