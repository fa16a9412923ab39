"""Every picture of a data set opened once, before training: that it is whole, and which range 16-bit ones use.

A broken file met at step 5000 ends a run; here all broken ones are listed together before the first step. And a 16-bit
file seldom uses its 16 bits: 12-bit X-rays (0 .. 4095) taken over 0 .. 65535 would be a flat dark grey. The range is
never one picture's own, which would make brightness mean something else in each: it is what a stream's greatest value
over the whole set needs, 0 .. 2^bits - 1, or what the user says (`parse_ranges`). 8-bit pictures are 0 .. 255.
How many millimetres pictures are wide is kept as well, for a model to know what it was trained on.
"""

import dataclasses
import itertools
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from medm2g_jax.data.picture import Picture, Span
from medm2g_jax.errors import UserError
from medm2g_jax.modality import split_stream

LISTED = 200  # broken pictures in a message; of more, the number
AHEAD = 16  # pictures a thread
SLOW = 5.0  # seconds between two lines that say how far it is


class Item(NamedTuple):
    """One picture of a data set.

    Attributes:
      where: what messages put before the error's own words: "row 'p1': ", or "" where these say it.
      stream: which it is of.
      key, stamp: its name in the cache, and what changes when its content does (size, time).
      read: gives it, or raises a UserError that names its file.
    """

    where: str
    stream: str
    key: str
    stamp: tuple[int, int]
    read: Callable[[], Picture]


def parse_ranges(spec: str) -> dict[str, Span]:
    """ "xray=0:4095,mri:t2=0:1200" -> {stream or modality: (value that counts as -1, value that counts as +1)}.

    Raises:
      UserError: it is not of this form.
    """
    ranges: dict[str, Span] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        stream, _, values = part.partition("=")
        try:
            low, high = (float(value) for value in values.split(":"))
        except ValueError:
            low = high = 0.0
        if not (np.isfinite([low, high]).all() and low < high):
            raise UserError(f"data range {part!r}: expected STREAM=LOW:HIGH, as in xray=0:4095, LOW below HIGH")
        split_stream(stream)
        ranges[stream] = (low, high)
    return ranges


class Examined:
    """What opening all pictures of a data set once tells, and their 16-bit ranges. Threads may share it."""

    def __init__(
        self,
        name: str,
        asked: Mapping[str, Span],
        most_pixels: int,
        items: Callable[[], Iterable[Item]],
        part: bool = False,
    ):
        """items: all pictures of the set; asked: ranges that the user has said, of streams or whole modalities; part:
        some of these streams may be in another set."""
        self._part = part
        self.name, self._asked, self._most_pixels, self._items = name, dict(asked), most_pixels, items
        self._found: dict[str, Span] | None = None
        self._extents: dict[str, Span] = {}
        self._lock = threading.Lock()

    @property
    def ranges(self) -> dict[str, Span]:
        """Stream -> the stored values of its 16-bit pictures that count as -1 and +1; opens all of them if need be."""
        with self._lock:
            if self._found is None:
                self._check(None, _log)
            return dict(self._found or {})

    @property
    def extents(self) -> dict[str, Span]:
        """Stream -> least and greatest length of its pictures' longer side, mm, of those that say it; likewise."""
        with self._lock:
            if self._found is None:
                self._check(None, _log)
            return dict(self._extents)

    def ranged(self, stream: str, picture: Picture) -> Picture:
        """The picture, with the range that the set's 16-bit pictures of this stream have."""
        if picture.span is None or picture.pixels.dtype != np.uint16:
            return picture
        span = self._said(stream)
        if span is None:
            found = self._found or self.ranges
            if stream not in found:
                raise UserError(
                    f"{picture.path}: of 16 bits now, which it was not when the data were checked; start again"
                )
            span = found[stream]
        return dataclasses.replace(picture, span=span)

    def check(self, cache: epath.PathLike | None = None, say: Callable[[str], Any] | None = None) -> None:
        """Open every picture once; those that `cache`, a JSON file that this writes, knows as they are not again.

        Args:
          say: is given one line that says the ranges found and, where it takes long, how far it is; the log if None.

        Raises:
          UserError: some are broken; lists all of them.
        """
        with self._lock:
            self._check(cache, say or _log)

    def _said(self, stream: str) -> Span | None:
        return self._asked.get(stream) or self._asked.get(split_stream(stream)[0])

    def _check(self, cache: epath.PathLike | None, say: Callable[[str], Any]) -> None:
        known = _read_cache(cache, self._most_pixels)
        held: set[str] = set()
        count = todo = 0
        for item in self._items():  # gone through twice, and not kept: there may be millions
            held.add(item.stream)
            count += 1
            todo += known.get(item.key, [None])[:2] != [*item.stamp]
        for stream in self._asked if not self._part else ():
            if not any(stream in (s, split_stream(s)[0]) for s in held):
                said = ", ".join(sorted(held)) or "nothing"
                raise UserError(f"data range of {stream!r}: {self.name} has images of {said}")
        now: dict[str, list] = {}
        tops: dict[str, int] = {}
        extents: dict[str, Span] = {}
        broken, number = [], 0
        began = said = time.monotonic()
        for item, entry, error in _examined(self._items(), known):
            if error:
                broken.append(item.where + error)
            else:
                now[item.key] = entry
                top, mm = entry[2:]
                if top is not None:
                    tops[item.stream] = max(top, tops.get(item.stream, 0))
                if mm is not None:
                    low, high = extents.get(item.stream, (mm, mm))
                    extents[item.stream] = min(low, mm), max(high, mm)
            number += entry is not known.get(item.key)
            if (moment := time.monotonic()) - said > SLOW and number:
                left = (moment - began) / number * (todo - number)
                say(f"data {self.name}: {number} of {todo} images opened, {left:.0f} s left")
                said = moment
        if cache is not None and todo:
            _write_cache(cache, self._most_pixels, now)
        if broken:
            more = f"; and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
            raise UserError(
                f"data {self.name}: {len(broken)} of {count} images cannot be read; mend them or take their rows "
                f"out: {'; '.join(broken[:LISTED])}{more}"
            )
        first = self._found is None
        self._extents = dict(sorted(extents.items()))
        self._found = {s: self._said(s) or (0, 2 ** max(8, top.bit_length()) - 1) for s, top in sorted(tops.items())}
        if first and self._found:
            why = {s: "as said" if self._said(s) else f"the greatest value is {top}" for s, top in tops.items()}
            spans = ", ".join(f"{s} {low:g} to {high:g} ({why[s]})" for s, (low, high) in self._found.items())
            other = f"--config.data.range={next(iter(self._found))}=LOW:HIGH says another"
            say(f"data {self.name}: 16-bit images count from -1 to +1 over {spans}; {other}")


def _log(line: str) -> None:
    logging.warning("%s", line)


def _examined(items: Iterable[Item], known: Mapping[str, list]) -> Iterator[tuple[Item, list | None, str]]:
    """(picture, what the cache has to say of it, what is wrong with it), in order; a few are opened ahead, as the rest
    of millions would fill the memory while they wait."""
    threads = min(8, os.cpu_count() or 1)  # decoders leave Python's lock
    waiting: deque[tuple[Item, list | None, Future | None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in itertools.chain(items, [None] * AHEAD * threads):
            if item is not None:
                entry = known.get(item.key)
                fresh = entry is not None and entry[:2] == [*item.stamp]
                waiting.append((item, entry, None) if fresh else (item, None, pool.submit(_examine, item)))
            if waiting and (item is None or len(waiting) > AHEAD * threads):
                done, entry, future = waiting.popleft()
                found, error = future.result() if future else (entry[2:], "")
                yield done, entry or [*done.stamp, *found], error


def _examine(item: Item) -> tuple[tuple[int | None, float | None], str]:
    """((greatest stored value if it is of 16 bits and windowed, mm of its longer side), what is wrong with it)."""
    try:
        picture = item.read()
    except UserError as error:
        return (None, None), str(error)
    deep = picture.pixels.dtype == np.uint16 and picture.span is not None
    mm = picture.spacing and round(max(n * mm for n, mm in zip(picture.pixels.shape, picture.spacing, strict=True)), 1)
    return ((int(picture.pixels.max()) if deep else None), mm), ""


def _read_cache(path: epath.PathLike | None, most_pixels: int) -> dict[str, list]:
    if path is None or not epath.Path(path).exists():
        return {}
    try:
        content = json.loads(epath.Path(path).read_text())
        whole = {k: v for k, v in content["pictures"].items() if isinstance(v, list) and len(v) == 4}
        return whole if content["most_pixels"] == most_pixels else {}
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # half a file, or another's: looking again costs time only
        return {}


def _write_cache(path: epath.PathLike, most_pixels: int, pictures: Mapping[str, list]) -> None:
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # other processes may be at it too
    part.write_text(json.dumps({"most_pixels": most_pixels, "pictures": pictures}, separators=(",", ":")))
    part.replace(path)
