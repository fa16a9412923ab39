"""Several data sets as one: "manifest:A+manifest:B", "phantom+manifest:A".

Records are those of all parts, one part after the other. Ids and subjects get their part's name before them
("A/p17"): parts are different data sets, and "p17" of one is not "p17" of the other. Who has one set in two folders
with the same people in both puts the folders into one folder, which is one set, where a subject in two splits is an
error.

Training rows are drawn by `weights`, or by size where there are none; everything else (held-out rows, tokenizers,
contents) takes the parts as they are. Each part has its own range of 16-bit images. What only one part knows of its
records (the phantom's findings) the whole does not.
"""

import bisect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax.data import source as sources
from medm2g_jax.data.picture import Picture, Span
from medm2g_jax.data.source import Record, Source
from medm2g_jax.errors import UserError
from medm2g_jax.modality import split_stream

# A "+" parts two sets only where a form follows, so that a folder may have one in its name.
_PLUS = re.compile(r"\+(?=manifest:|tfds:|phantom(?:\+|$))")


def split(spec: str) -> list[str]:
    """The specs of a mixture's parts; of a single set, its own. A folder whose name holds "+manifest:", "+tfds:" or
    ends in "+phantom" cannot be named."""
    return _PLUS.split(spec)


def check_weights(weights: Sequence[int | float], parts: int) -> None:
    """Hold weights, the share of training rows of each part, to be one a part and above 0; they need not add up to 1.
    (): by size.

    Raises:
      UserError: they are not.
    """
    if weights and (len(weights) != parts or not all(0 < w < math.inf for w in weights)):
        raise UserError(
            f'config.data.weights: expected a number above 0 for each of data.source\'s {parts} (parts have "+" '
            f"between them), found {tuple(weights)}"
        )


class Mixture:
    """A `Source` over several."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[int | float] = ()):
        """weights: see `check_weights`.

        Raises:
          UserError: see there.
        """
        check_weights(weights, len(parts))
        self._parts = list(parts)
        names = [part.name for part in parts]
        self._names = [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, 1)]
        self.name = "+".join(self._names)
        self.open = all(part.open for part in parts)
        self.records: Sequence[Record] = [
            Record(f"{name}/{r.id}", f"{name}/{r.subject}", r.split, r.streams, r.licence, r.grid, r.synthetic)
            for name, part in zip(self._names, parts, strict=True)
            for r in part.records
        ]
        self._begins = [0, *itertools.accumulate(len(part.records) for part in parts)]
        # See `source.shares`.
        self.shares = [(end, float(w)) for end, w in zip(self._begins[1:], weights, strict=True)] if weights else None

    def read(self, index: int, stream: str, rng: np.random.Generator) -> np.ndarray | str:
        """See `Source.read`."""
        part, own = self._place(index)
        return part.read(own, stream, rng)

    def picture(self, index: int, stream: str) -> Picture | None:
        """See `source.picture_of`."""
        return sources.picture_of(*self._place(index), stream)

    def entry(self, index: int, stream: str) -> dict[str, Any] | None:
        """See `source.entry_of`."""
        return sources.entry_of(*self._place(index), stream)

    def check(self, cache: epath.PathLike | None = None, say: Callable[[str], Any] | None = None) -> None:
        """See `source.check`; each part remembers in a file of its own beside `cache`.

        Raises:
          UserError: lists what is broken in all parts.
        """
        wrong = []
        for number, part in enumerate(self._parts):
            path = None if cache is None else epath.Path(cache)
            own = path and path.with_name(f"{path.stem}.{number}{path.suffix}")
            try:
                sources.check(part, own, say)
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            raise UserError("; ".join(wrong))

    @property
    def ranges(self) -> dict[str, Span]:
        """See `source.ranges`; of streams on whose range all parts agree that have one."""
        found: dict[str, set[Span]] = {}
        for part in self._parts:
            for stream, span in sources.ranges(part).items():
                found.setdefault(stream, set()).add(tuple(span))
        return {stream: spans.pop() for stream, spans in sorted(found.items()) if len(spans) == 1}

    @property
    def extents(self) -> dict[str, Span]:
        """See `source.extents`; of all parts."""
        found: dict[str, Span] = {}
        for part in self._parts:
            for stream, (low, high) in sources.extents(part).items():
                least, most = found.get(stream, (low, high))
                found[stream] = min(low, least), max(high, most)
        return found

    @property
    def steady(self) -> tuple[str, ...]:
        """See `source.steady`: what is so in every part that holds it."""
        held = [{s for streams in {r.streams for r in part.records} for s in streams} for part in self._parts]
        loose = {s for own, part in zip(held, self._parts, strict=True) for s in own if not sources.steady(part, s)}
        return tuple(sorted(set().union(*held) - loose))

    @property
    def licences(self) -> dict[str, int]:
        """How many records are under which licence."""
        return dict(Counter(record.licence for record in self.records))

    def identity(self) -> Iterator[str]:
        """What each record holds, part by part."""
        for part in self._parts:
            own = getattr(part, "identity", None)
            yield from sources.texts_of(part) if own is None else own()

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._begins, index) - 1
        return self._parts[number], index - self._begins[number]


def check_ranges(source: Source, asked: Sequence[str]) -> None:
    """Hold the streams and modalities of `--config.data.range` to what some part holds: a part need not hold them all.

    Raises:
      UserError: none does.
    """
    held = sorted({s for streams in {r.streams for r in source.records} for s in sources.images_of(streams)})
    for stream in asked:
        if not any(stream in (s, split_stream(s)[0]) for s in held):
            said = ", ".join(held) or "nothing"
            raise UserError(f"data range of {stream!r}: {source.name} has images of {said}")
