"""The shared space of 3.2 and 3.3 by itself, where the paper's figure 7 has a picture: does a report find its image, an
image its report and the image of another modality, and how far do the modalities lie apart?

Of the same test records: retrieval both ways of each two streams, reports of the same words being one; and, of records
that have them all, how well a modality is read from a vector, how many of its neighbours are of the same, silhouette
and gap. A picture by t-SNE shows islands of what has none, so there is none here.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from medm2g_jax.data.pipeline import read_streams, records_with
from medm2g_jax.data.source import Source
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.metrics import modality_figures, retrieval_figures
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.inference import Model
from medm2g_jax.modality import split_stream, stream_word

FEWEST = 20  # records: a linear reader of ten says nothing


def in_space(
    model: Model, source: Source, given: Sequence[str], target: Sequence[str], rows: int, seed: int, *, row: Row
) -> list[Figure]:
    """Figures of the streams `target`, of `rows` test records at most that have each two of them; nothing is given."""
    streams = [s for s in target if split_stream(s)[0] in model.givable]
    for s in (s for s in target if s not in streams):
        print(f"  {s}: this model has no prompt encoder of it, and so no vectors", flush=True)

    @functools.cache
    def read(together: tuple[str, ...]) -> dict[str, list]:
        return read_streams(source, together, "test", rows, seed)

    @functools.cache
    def vectors(together: tuple[str, ...], stream: str) -> np.ndarray:
        values = read(together)[stream]
        return model.embedded(stream, model.ids(values) if isinstance(values[0], str) else np.stack(values))

    out: list[Figure] = []
    every = tuple(streams)
    whole = bool(read(every)) if len(every) > 1 else False
    for pair in itertools.combinations(streams, 2):
        together = every if whole else pair
        if not read(together):
            print(f"  no test record of {source.name} holds {' and '.join(pair)}", flush=True)
            continue

        def found(pair=pair, together=together) -> list[Figure]:
            texts = next((v for s in pair if isinstance((v := read(together)[s])[0], str)), None)
            words = stream_word(pair[0]), stream_word(pair[1])
            whose = [source.records[i].subject for i in records_with(source, together, "test", rows, seed)]
            return retrieval_figures(
                words, *(vectors(together, s) for s in pair), texts, seed=seed, subjects=whose
            )

        out += row(" <-> ".join(map(stream_word, pair)), found)
    if not whole or len(read(every)[every[0]]) < FEWEST:
        print(f"  fewer than {FEWEST} test records hold {', '.join(every)}: not how far they lie apart", flush=True)
        return out
    name = f"shared space of {', '.join(map(stream_word, every))}"
    return out + row(name, lambda: modality_figures(name, {s: vectors(every, s) for s in every}, seed=seed))
