"""Which record training row r is of: a pure function of (seed, r), by size or by weights, every record equally often.

By size: row r is record r of an endless row of shuffled epochs. By weights: rows come in blocks of BLOCK, of which each
part has its share, to the row, in a shuffled order; row r is then the next one of its part's own endless row of
shuffled epochs. Which that is follows from the block's number and the row's place in it, so that nothing is counted
from the beginning and nothing is kept.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from medm2g_jax.data.source import Source, shares

BLOCK = 10_000  # rows; weights count in its fractions
_ORDER, _PARTS = 1, 4  # keys apart from each other's and from the rows' own


def parts_of(source: Source, index: Int[np.ndarray, "n"]) -> list[tuple[Int[np.ndarray, "m"], float]]:
    """The records `index`, ascending, by part, with their shares, which add up to 1; of parts that have some. One part
    where the source has no weights."""
    given = shares(source)
    if given is None:
        return [(index, 1.0)]
    parts = np.split(index, np.searchsorted(index, [end for end, _ in given[:-1]]))
    kept = [(part, weight) for part, (_, weight) in zip(parts, given, strict=True) if len(part)]
    whole = sum(weight for _, weight in kept)
    return [(part, weight / whole) for part, weight in kept]


def in_turn(source: Source, index: Int[np.ndarray, "n"], seed: int) -> Callable[[int], int]:
    """Row -> its record, of those of `index`."""
    parts = parts_of(source, index)

    # Not grain's own shuffle: it takes 30 ms / n an element of a set of n (measured; 8 ms where n is 3).
    @functools.lru_cache(maxsize=4 * len(parts))
    def order(part: int, epoch: int) -> np.ndarray:
        key = [seed, epoch, _ORDER] if len(parts) == 1 else [seed, epoch, _ORDER, part]
        return np.random.default_rng(key).permutation(parts[part][0])

    def of_part(part: int, row: int) -> int:
        epoch, position = divmod(row, len(parts[part][0]))
        return int(order(part, epoch)[position])

    if len(parts) == 1:
        return lambda row: of_part(0, row)
    counts = _counts([weight for _, weight in parts])

    @functools.lru_cache(maxsize=4)
    def block(number: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each of its rows, and how many rows of that part come before it in the block."""
        which = np.random.default_rng([seed, number, _PARTS]).permutation(np.repeat(np.arange(len(parts)), counts))
        before = np.empty(BLOCK, int)
        for part, count in enumerate(counts):
            before[which == part] = np.arange(count)
        return which, before

    def record(row: int) -> int:
        number, place = divmod(row, BLOCK)
        which, before = block(number)
        part = int(which[place])
        return of_part(part, number * counts[part] + int(before[place]))

    return record


def at_random(source: Source, index: Int[np.ndarray, "n"]) -> Callable[[np.random.Generator], int]:
    """rng -> one of the records `index`."""
    parts = parts_of(source, index)
    if len(parts) == 1:
        return lambda rng: int(rng.choice(parts[0][0]))
    weights = [weight for _, weight in parts]
    return lambda rng: int(rng.choice(parts[rng.choice(len(parts), p=weights)][0]))


def _counts(weights: Sequence[float]) -> list[int]:
    """Rows of a block for each part: its share, rounded so that they add up, and one at least."""
    counts = [max(1, int(weight * BLOCK)) for weight in weights]
    rests = np.argsort([count - weight * BLOCK for count, weight in zip(counts, weights, strict=True)], kind="stable")
    while (short := BLOCK - sum(counts)) > 0:
        for part in rests[:short]:
            counts[part] += 1
    while sum(counts) > BLOCK:
        counts[int(np.argmax(counts))] -= 1
    return counts
