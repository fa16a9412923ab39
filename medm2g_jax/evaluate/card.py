"""A prepared data set described: its figures, its data card, a look at it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax import __version__
from medm2g_jax.data.case import Adapter
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.source import SPLITS, images_of
from medm2g_jax.evaluate import pictures

_SIDE = 160  # pixels of an image in the preview
_SHOWN = 8  # rows of it


def statistics(
    rows: Sequence[Mapping[str, Any]],
    cases: int,
    left: int,
    rejected: Iterable[tuple[str, str]],
    moved: Sequence[tuple[str, float, float, float, float, float]],
    alike: int,
) -> dict[str, Any]:
    """What a prepared set holds, in numbers alone.

    Args:
      cases, left: found, and left out before any image was read.
      rejected: (stream, reason) of each.
      moved: (stream, mutual information before, after, mm, edge overlap before, after) of volumes that were registered.
      alike: images of different splits that look the same.
    """
    texts = [len(row["text"].split()) for row in rows if row.get("text")]
    streams = {}
    for key in sorted({key for row in rows for key in row.get("images", {})}):
        having = [row for row in rows if key in row.get("images", {})]
        spacing = [row["spacing"][key] for row in having if key in row.get("spacing", {})]
        streams[key] = {"images": len(having), "spacing_mm": _range(mm for pair in spacing for mm in pair)}
    together = Counter(" + ".join(sorted(row["images"])) for row in rows if row.get("registered"))
    return {
        "cases": {"found": cases, "left_out_before": left},
        "rejected": dict(Counter(f"{stream or 'case'}: {reason}" for stream, reason in rejected).most_common()),
        "rows": {split: sum(row["split"] == split for row in rows) for split in SPLITS},
        "subjects": {split: len({row["subject"] for row in rows if row["split"] == split}) for split in SPLITS},
        "streams": streams,
        "on_one_grid": dict(sorted(together.items())),
        "texts": {
            "count": len(texts),
            "rows": {split: sum(bool(row.get("text")) for row in rows if row["split"] == split) for split in SPLITS},
            "words": _range(texts),
        },
        "registered": {
            "volumes": len(moved),
            "mutual_information_before": _range(m[1] for m in moved),
            "mutual_information_after": _range(m[2] for m in moved),
            "moved_mm": _range(m[3] for m in moved),
            "edge_overlap_before": _range(m[4] for m in moved),
            "edge_overlap_after": _range(m[5] for m in moved),
        },
        "look_alike_across_splits": alike,
        "synthetic": sum(bool(row.get("synthetic")) for row in rows),
        "burned_in_annotation": sum("burned_in_annotation" in row.get("info", {}) for row in rows),
    }


def _range(values: Iterable[int | float]) -> list[float]:
    """Lowest, median, highest; nothing of nothing."""
    found = list(values)
    return [round(float(f(found)), 4) for f in (min, np.median, max)] if found else []


def lines(stats: Mapping[str, Any]) -> list[str]:
    """What a user reads when it is done."""
    counts = ", ".join(f"{s} {n} rows of {stats['subjects'][s]} subjects" for s, n in stats["rows"].items())
    held = ", ".join(f"{key} {one['images']}" for key, one in stats["streams"].items())
    out = [f"prepared: {counts}", f"  images: {held or 'none'}; texts: {stats['texts']['count']}"]
    if stats["on_one_grid"]:
        out.append("  on one grid: " + ", ".join(f"{what} {n} rows" for what, n in stats["on_one_grid"].items()))
    if stats["rejected"]:
        out.append(f"  left out or cut apart ({sum(stats['rejected'].values())}, see rejected.jsonl):")
        out += [f"    {n} x {reason}" for reason, n in list(stats["rejected"].items())[:10]]
    if (moves := stats["registered"])["volumes"]:
        what = ("mutual information", "edge overlap")
        said = (f"{w} {' -> '.join(f'{moves[key][1]:.3g}' for key in moves if key.startswith(w.replace(' ', '_')))}"
                for w in what)  # fmt: skip
        out.append(f"  {moves['volumes']} volumes registered: {', '.join(said)} (medians)")
    if n := stats["synthetic"]:
        out.append(f"  {n} rows hold what a model made, by their files' own words: they are marked `synthetic`")
    if n := stats["burned_in_annotation"]:
        out.append(f"  {n} rows hold images that say that text is burned into them: look whether it names a patient")
    if n := stats["look_alike_across_splits"]:
        out.append(f"  {n} kinds of image look alike in different splits: look whether they are the same patient's")
    return out


def markdown(adapter: Adapter, settings: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The data card.

    Args:
      settings: how it was made, name -> value.
    """
    held = stats["streams"].items()
    table = "\n".join(f"| {key} | {one['images']} | {one['spacing_mm'] or ''} |" for key, one in held)
    texts = stats["texts"]["rows"]
    splits = "\n".join(f"| {s} | {stats['subjects'][s]} | {n} | {texts[s]} |" for s, n in stats["rows"].items())
    rejected = "\n".join(f"| {reason} | {n} |" for reason, n in stats["rejected"].items()) or "| nothing | 0 |"
    made = "\n".join(f"- {key}: `{value}`" for key, value in settings.items())
    return f"""# {adapter.title}

Licence: {adapter.licence}

{adapter.access}

Prepared by medm2g_jax {__version__}. Not for clinical use.

| split | subjects | rows | rows with a text |
|---|---|---|---|
{splits}

| images | count | mm a pixel: lowest, median, highest |
|---|---|---|
{table}

Texts: {stats["texts"]["count"]}. Rows whose images share a grid: {sum(stats["on_one_grid"].values())}.
Cases found: {stats["cases"]["found"]}; left out before an image was read: {stats["cases"]["left_out_before"]}.

| left out, or cut apart | count |
|---|---|
{rejected}

How it was made:

{made}
"""


def preview(folder: Path, path: Path, shown: bool) -> None:
    """A look at rows of all splits and with all images that there are, those with most of them first, read as the
    trainer reads them.

    Args:
      shown: may texts be seen?
    """
    source = Manifest(folder, _SIDE, template_text=True)
    chosen = _spread(source)
    streams = sorted({s for i in chosen for s in images_of(source.records[i].streams)})
    if not streams:
        return
    rng = np.random.default_rng(0)
    rows = [
        (stream, [source.read(i, stream, rng) if stream in source.records[i].streams else None for i in chosen])
        for stream in streams
    ]
    captions = []
    for i in chosen:
        record = source.records[i]
        texts = [stream for stream in record.streams if stream not in images_of(record.streams)]
        captions.append(source.read(i, texts[0], rng)[:160] if shown and texts else record.split)
    foot = "real data, see README.md; not for clinical use"
    pictures.grid(epath.Path(path), rows, captions, source.name, _SIDE, foot)


def _spread(source: Manifest) -> list[int]:
    """Records of every kind (which images it holds, its split), of each about as many, evenly out of all of them."""
    kinds: dict[tuple, list[int]] = {}
    for i, record in enumerate(source.records):
        if held := images_of(record.streams):
            kinds.setdefault((-len(held), SPLITS.index(record.split), held), []).append(i)
    groups = [kinds[kind] for kind in sorted(kinds)][:_SHOWN]
    counts = [0] * len(groups)
    while sum(counts) < min(_SHOWN, sum(map(len, groups))):
        counts[min((c, n) for n, c in enumerate(counts) if c < len(groups[n]))[1]] += 1
    of_each = zip(groups, counts, strict=True)
    return [group[(2 * k + 1) * len(group) // (2 * n)] for group, n in of_each for k in range(n)]
