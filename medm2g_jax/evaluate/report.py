"""report.html of a run: plan and times, every stage's picture and numbers, real and generated reports with the findings
that agree marked. One file, nothing to load from elsewhere."""

import base64
import html
import json

from etils import epath

from medm2g_jax import rounds
from medm2g_jax.data.phantom.report import compare, parse
from medm2g_jax.evaluate.pictures import SYNTHETIC
from medm2g_jax.train import checkpoint

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .7em 0; } td, th { padding: .2em .9em .2em 0; text-align: left;
vertical-align: top; } td.n { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
.yes { color: #11691f; } .no { color: #a3160c; } .note { background: #fff4d6; padding: .5em .8em; }
code { background: #f2f2f2; padding: .1em .3em; }
"""

# A number of the same name with one of these behind it is the floor of the number without.
FLOORS = (" by chance", " of the mean image", " of the best constant report")


def write_report(root: epath.Path, listing: tuple[str, ...], phantom: bool) -> epath.Path:
    """Write root/report.html from what the finished stages left in their folders.

    Args:
      listing: of the run; stages are shown in its order.
      phantom: texts can be read for findings.
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
    autoencoders = {k: v for stage, meta in done if stage.endswith("_vae") for k, v in meta.get("numbers", {}).items()}
    for stage, meta in reversed(done):  # the newest result first: it is what the run was for
        parts.append(f"<h2>{stage}</h2>")
        parts += [_image(p, stage) for p in sorted((root / stage).glob("*.png"))]
        parts.append(_numbers(stage, meta.get("numbers", {}), autoencoders))
        evaluation = root / stage / "evaluation.json"
        if evaluation.exists():
            parts.append("<h3>medm2g evaluate</h3>" + _evaluation(json.loads(evaluation.read_text())))
        texts = root / stage / "texts.json"
        if texts.exists():
            parts.append(_texts(json.loads(texts.read_text()), phantom))
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


def _numbers(stage: str, numbers: dict, autoencoders: dict) -> str:
    """Each figure between its floor and its ceiling: generated images and reports cannot pass their autoencoder."""
    rows = ["<tr><th></th><th>floor</th><th></th><th>ceiling</th></tr>"]
    floors = {name: end for name in numbers for end in FLOORS if name.endswith(end)}
    for name in (n for n in numbers if n not in floors):
        end = next((e for e in FLOORS if name + e in numbers), "")
        low, source, high = numbers.get(name + end) if end else None, end, None
        if not stage.endswith("_vae") and name.endswith("finding F1"):
            high = autoencoders.get("reconstruction, finding F1")
        elif not stage.endswith("_vae") and "PSNR dB" in name:
            target = name.rpartition("-> ")[2].partition(",")[0].partition(" PSNR")[0]
            low, source = autoencoders.get(f"{target} PSNR dB of the mean image"), " of the mean image"
            high = autoencoders.get(f"{target} PSNR dB")
        cells = [html.escape(name)]
        cells += ["" if low is None else f"{low:.3f}<br><small>{html.escape(source.strip())}</small>"]
        cells += [f"<b>{numbers[name]:.3f}</b>"]
        cells += ["" if high is None else f"{high:.3f}<br><small>of the autoencoder</small>"]
        rows.append("<tr><td>" + "</td><td class=n>".join(cells) + "</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _evaluation(table: dict) -> str:
    rows = []
    for name, row in table.items():
        if isinstance(row, dict):
            cells = (
                f"{k} {v['share']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" if isinstance(v, dict) else f"{k} {v:.3f}"
                for k, v in row.items()
            )
            value = ", ".join(cells)
        else:
            value = f"{row:.3f}"
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _texts(texts: dict[str, list[str]], phantom: bool) -> str:
    columns = list(texts)
    out = ["<table><tr>", *(f"<th>{html.escape(c)}</th>" for c in columns), "</tr>"]
    for row in zip(*texts.values(), strict=True):
        out.append("<tr>")
        for column, text in zip(columns, row, strict=True):
            judged = phantom and "real" in texts and column != "real"
            marks = _agreement(row[columns.index("real")], text) if judged else ""
            out.append(f"<td>{html.escape(text)}{marks}</td>")
        out.append("</tr>")
    return "".join(out) + "</table>"


def _agreement(real: str, text: str) -> str:
    """The findings of the real report, each marked as met or missed by the text."""
    marks = []
    for field, agrees in compare(parse(real), parse(text)).items():
        if agrees is not None:
            marks.append(
                f"<span class={'yes' if agrees else 'no'}>{'&#10003;' if agrees else '&#10007;'} {field}</span>"
            )
    return "<br><small>" + " ".join(marks) + "</small>"
