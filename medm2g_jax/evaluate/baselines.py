"""What stands beside a model: answers that cost nothing or little, from the same training pairs, on the same subjects.

A table: a new baseline is one function and one row. Images in [-1, 1], (n h w c), the modality's window.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from medm2g_jax.evaluate.metrics.image import Images, squared_error

LEVELS = 256  # of a look-up table
PATCH = 5  # side of the patches that the ridge regression reads
RIDGE = 1e-3  # its penalty, of the mean squared feature
ROWS = 16  # images whose patches are in memory at once


class Pairs(NamedTuple):
    """Training pairs: what is given, in order, and the image that goes with it."""

    given: Sequence[Images]
    made: Images


def mean_image(train: Pairs, given: Sequence[Images]) -> Images:
    """The mean of the training images, whatever is given."""
    return np.broadcast_to(train.made.mean(axis=0, keepdims=True), given[0].shape)


def look_up_table(train: Pairs, given: Sequence[Images]) -> Images:
    """For each grey level of one source the mean of the target there; of several sources the one that errs least on
    the training pairs."""
    best, answer = np.inf, given[0]
    for seen, asked in zip(train.given, given, strict=True):
        level = _levels(seen)
        counts = np.bincount(level.ravel(), minlength=LEVELS)
        sums = np.bincount(level.ravel(), train.made.ravel().astype(np.float64), minlength=LEVELS)
        filled = np.flatnonzero(counts)  # a level that training never saw takes what its neighbours have
        table = np.interp(np.arange(LEVELS), filled, sums[filled] / counts[filled]).astype(np.float32)
        error = float(squared_error(train.made, table[level]).mean())
        if error < best:
            best, answer = error, table[_levels(asked)]
    return answer


def _levels(x: Images) -> np.ndarray:
    return np.clip((np.asarray(x) + 1) * (LEVELS / 2), 0, LEVELS - 1).astype(int)


def patch_ridge(train: Pairs, given: Sequence[Images]) -> Images:
    """Each pixel as a linear function of the 5 x 5 pixels around it in all sources, by ridge regression."""
    squares = products = 0.0
    for rows in _chunks(len(train.made)):
        seen = _patches([x[rows] for x in train.given])
        squares = squares + seen.T @ seen
        products = products + seen.T @ train.made[rows].reshape(-1, train.made.shape[-1]).astype(np.float64)
    penalty = RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
    penalty[-1, -1] = 0.0  # the constant is free
    weights = np.linalg.solve(squares + penalty, products)
    out = [_patches([x[rows] for x in given]) @ weights for rows in _chunks(len(given[0]))]
    made = np.concatenate(out).reshape(len(given[0]), *train.made.shape[1:])
    return np.clip(made, -1, 1).astype(np.float32)


def _chunks(n: int) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, n, ROWS)]


def _patches(images: Sequence[Images]) -> Float[np.ndarray, "pixels features"]:
    """The neighbourhood of each pixel in all images, edges repeated, and a constant."""
    half = PATCH // 2
    columns = []
    for x in images:
        padded = np.pad(np.asarray(x, np.float64), ((0, 0), (half, half), (half, half), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (PATCH, PATCH), axis=(1, 2))
        columns.append(windows.reshape(np.prod(x.shape[:3]), -1))
    return np.concatenate([*columns, np.ones((len(columns[0]), 1))], axis=1)


def nearest_image(train: Pairs, given: Sequence[Images]) -> Images:
    """The training image whose sources are nearest to those given, pixel by pixel."""
    flat = lambda images: np.concatenate([np.reshape(x, (len(x), -1)) for x in images], axis=1).astype(np.float32)  # noqa: E731
    seen, asked = flat(train.given), flat(given)
    distance = (seen**2).sum(1)[None, :] - 2 * asked @ seen.T  # up to what is the same for all of `seen`
    return train.made[distance.argmin(axis=1)]


Baseline = Callable[[Pairs, Sequence[Images]], Images]
IMAGES: dict[str, Baseline] = {
    "the mean image": mean_image,
    "a look-up table": look_up_table,
    "ridge regression on 5 x 5 patches": patch_ridge,
    "the nearest training image": nearest_image,
}


def constant_report(reports: Sequence[str], n: int) -> list[str]:
    """The training report that is most frequent, word for word, for everyone; the first of equals."""
    words, counts = np.unique(np.asarray(reports, dtype=object).astype(str), return_counts=True)
    return [str(words[counts.argmax()])] * n


def template_report(reports: Sequence[str], n: int) -> list[str]:
    """What most training reports say, for everyone: the sentences that half of them hold or more, those first that come
    first; where there is none, the one that most hold."""
    places: dict[str, list[int]] = {}
    for report in reports:
        held = filter(None, (sentence.strip() for sentence in report.split(".")))
        for place, sentence in enumerate(dict.fromkeys(held)):
            places.setdefault(sentence, []).append(place)
    most = max(map(len, places.values()), default=0)
    usual = [sentence for sentence, at in places.items() if len(at) >= min(len(reports) / 2, most)]
    usual.sort(key=lambda sentence: np.mean(places[sentence]))
    return [" . ".join(usual) + " ."] * n


def nearest_report(
    reports: Sequence[str], seen: Float[np.ndarray, "m d"], asked: Float[np.ndarray, "n d"]
) -> list[str]:
    """The training report of the image nearest in an embedding of unit vectors."""
    return [reports[int(i)] for i in (asked @ seen.T).argmax(axis=1)]
