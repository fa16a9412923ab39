"""`medm2g audit`: does a model give back the people it was trained on?

    medm2g audit --model RUN --out DIR

Each image that the model makes is asked for as `requests` says, and `evaluate.memorisation` looks at the samples.

    DIR/audit.json          figures, the pairs that are flagged, the verdict, the model and the data
    DIR/audit-<stream>.png  the samples nearest to one training subject; beside them the rows that they are near to,
                            where these may be shown

What this cannot see: copied texts; a part of an image in another; people of whom one has several looks, since a network
that tells who it is needs several studies a subject to train on, which no set here promises.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from medm2g_jax.data.contents import contents
from medm2g_jax.data.source import Source
from medm2g_jax.data.write import NOTE, probe, unwritable
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import line, to_json
from medm2g_jax.evaluate.memorisation import FEWEST, HELD, PIXELS, Ask, Audited, remembered
from medm2g_jax.evaluate.pictures import SYNTHETIC, grid
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream

SHOWN = 8  # samples in a picture


def requests(model: Model, source: Source) -> list[Ask]:
    """A row for each image modality that the model makes and training and held-out records hold: of the first source
    that its flow was trained with and held-out records have beside it, else of nothing. A contrast that is stated comes
    before one that is not."""
    held = {split: [set(r.streams) for r in source.records if r.split in split] for split in (("train",), HELD)}
    counts = [Counter(s for streams in some for s in streams) for some in held.values()]
    trained = [tuple(pair) for kind in ("prompt", "guide") for pair in model.meta["pairs"][kind]]
    out = []
    for name in model.modalities:
        there = [s for s in counts[0] if split_stream(s)[0] == name and counts[1][s]]
        if not MODALITIES[name].is_image or not there:
            continue
        make = max(there, key=lambda s: (":" in s, counts[0][s]))
        sources = [a for a, b in trained if b == name != a and a in model.givable]
        given = [s for a in sources for s in counts[1] if split_stream(s)[0] == a
                 if sum({s, make} <= streams for streams in held[HELD]) >= FEWEST]  # fmt: skip
        out.append(Ask((given[0],) if given else (), make))
    return out


def audit(
    model: Model,
    source: Source,
    out: str | Path,
    *,
    make: Sequence[str] = (),
    rows: int = 200,
    seed: int = 0,
    say: Callable[[str], Any] = print,
) -> list[str]:
    """Audit a model on the data that it was trained on, and write what was found; returns why it is flagged, nothing
    where it passes.

    Args:
      make: streams; () for all of `requests`.
      rows: samples of each; at most a third of the held-out subjects.

    Raises:
      UserError: nothing can be asked for, too few subjects, or the folder cannot be written.
    """
    began, folder = time.time(), epath.Path(out)
    table = requests(model, source)
    if unknown := [s for s in make if s not in {ask.make for ask in table}] or not table:
        named = f"--make {unknown[0]}" if make else f"data {source.name!r}"
        able = ", ".join(ask.make for ask in table) or "nothing"
        raise UserError(
            f"{named}: audited is an image that the model makes and that training and held-out records hold: {able}"
        )
    probe(folder, "--out")
    found = []
    for ask in table:
        if not make or ask.make in make:
            one, made = remembered(model, source, ask, rows, seed, say)
            for figure in one.figures:
                say(f"  {line(figure)}")
            found.append((one, made))
    reasons = [reason for one, _ in found for reason in one.reasons]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one, made in found:
            _picture(folder, source, one, made)
        told = _told(model, source, [one for one, _ in found], reasons, seed)
        (folder / "audit.json").write_text(json.dumps(told | dict(seconds=round(time.time() - began, 1)), indent=1))
    except OSError as error:
        raise unwritable(folder, error) from error
    return reasons


def _told(model: Model, source: Source, found: Sequence[Audited], reasons: list[str], seed: int) -> dict[str, Any]:
    return dict(
        note=NOTE,
        verdict="flagged" if reasons else "passes",
        reasons=reasons,
        data=dict(source=source.name, fingerprint=contents(source).fingerprint),
        model=model.provenance(seed=seed),
        figures=to_json(figure for one in found for figure in one.figures),
        copies=[{"make": one.ask.make, **pair._asdict()} for one in found for pair in one.pairs if pair.copy],
    )


def _picture(folder: epath.Path, source: Source, one: Audited, made: Float[np.ndarray, "n h w 1"]) -> None:
    """The samples of the least gaps in pixels; of data that are not open these alone."""
    pairs = sorted((p for p in one.pairs if p.space == PIXELS), key=lambda p: p.gap)[:SHOWN]

    def real(index: int) -> np.ndarray:
        return source.read(index, one.ask.make, np.random.default_rng([0, index]))

    lines = [("made", [made[p.sample] for p in pairs])]
    if source.open:
        lines.append(("the training row nearest to it", [real(p.train) for p in pairs]))
        lines.append(("the held-out row nearest to it", [real(p.held) for p in pairs]))
    captions = [f"gap {p.gap:.2f}{', a copy' if p.copy else ''}; record {p.train}" for p in pairs]
    grid(folder / f"audit-{one.ask.make.replace(':', '-')}.png", lines, captions, str(one.ask), foot=SYNTHETIC)
