"""Several streams made together from one thing (section 3.5, the paper's figure 4 (c)): do they show one patient?

Of the same test records, for each two of what is made: does one find its own partner among all of the other, by the
model's own prompt encoders, both ways, where they were made jointly; where each was made on its own from the same
source, which is what agreement through the source alone gives; where nothing was given; and of the real images, which
nothing that is made can be expected to pass. Needs no labels; where there are some, `phantom.Bench` asks these.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax.data.pipeline import read_streams
from medm2g_jax.data.source import Source
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.metrics import retrieval_figures
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.evaluate.samples import samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import split_stream, stream_word

SHOWN = 6


def jointly(
    model: Model,
    source: Source,
    given: Sequence[str],
    target: Sequence[str],
    rows: int,
    seed: int,
    *,
    row: Row,
    sheet: epath.Path | None = None,
) -> list[Figure]:
    """Figures of the streams `target`, made from the streams `given` of `rows` test records.

    Args:
      row: measures each row, or takes it up (`rows.Rows`).
      sheet: a picture of the first ones to write.
    """
    held = read_streams(source, given, "test", rows, seed)
    asked = {s: held[s] if isinstance(held[s][0], str) else np.stack(held[s]) for s in given}
    both = read_streams(source, (*given, *target), "test", rows, seed)
    groups = model.request(tuple(given), tuple(target)).groups()
    if len(groups) > 1:
        apart = " with ".join(" + ".join(map(stream_word, group)) for group in groups)
        print(f"  no trained guide links {apart}: made together they are what they are on their own", flush=True)

    def by_one(values: dict[str, Any]) -> dict[str, np.ndarray]:
        # Other noise for each: of one seed two streams could agree by it.
        return {s: samples(model, values, [s], rows, seed + 1 + i)[s] for i, s in enumerate(target)}

    ways: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "jointly": functools.cache(lambda: samples(model, asked, target, rows, seed)),
        "each on its own": functools.cache(lambda: by_one(asked)),
        "jointly, of nothing": functools.cache(lambda: samples(model, {}, target, rows, seed)),
    }
    if both and len(both[target[0]]) == rows:
        ways["real"] = functools.cache(lambda: {s: np.stack(both[s]) for s in target})
    able = [s for s in target if split_stream(s)[0] in model.givable]
    words, out = " + ".join(map(stream_word, given)), []
    for how, make in ways.items():
        for a, b in itertools.combinations(able, 2):

            def found(a=a, b=b, make=make, how=how) -> list[Figure]:
                vectors = [model.embedded(s, make()[s]) for s in (a, b)]
                names = [stream_word(s) if how == "real" else f"{words} -> {stream_word(s)}, {how}" for s in (a, b)]
                return retrieval_figures(tuple(names), *vectors, seed=seed)

            out += row(f"{words} -> {stream_word(a)} and {stream_word(b)}, {how}", found)
    if sheet is not None:
        shown = {f"{stream_word(s)}, {how}": images[s] for how in (*ways,)[:2] for s, images in
                 ((s, ways[how]()) for s in target)}  # fmt: skip
        if "real" in ways:
            shown = {f"{stream_word(s)}, real": x for s, x in ways["real"]().items()} | shown
        captions = next((v[:SHOWN] for v in asked.values() if isinstance(v, list)), ())
        title = f"{words} -> {' + '.join(map(stream_word, target))}"
        grid(sheet, [(name, list(x[:SHOWN])) for name, x in shown.items()], captions, title)
        print(sheet, flush=True)
    return out
