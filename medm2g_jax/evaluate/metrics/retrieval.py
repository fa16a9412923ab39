"""Retrieval of the partner in the shared space: cosine, over the rows of the batch as gallery."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from medm2g_jax.errors import UserError

Rows = Float[np.ndarray, "n d"]


def nearest(a: Rows, b: Rows) -> Int[np.ndarray, "n"]:
    """The place in `b` of the row nearest to each row of `a`."""
    cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    return np.argmax(cosine, axis=1)


def cosines(sources: Sequence[Rows], made: Rows) -> Float[np.ndarray, "n"]:
    """Of each row of `made` with its own partner in each source, the mean."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    return np.mean([np.einsum("nd,nd->n", unit(x), unit(made)) for x in sources], axis=0)


def hits_at_1(a: Rows, b: Rows, classes: Shaped[np.ndarray, "n"] | None = None) -> Bool[np.ndarray, "n"]:
    """Whether the nearest row of `b` to each row of `a` is its own, or one of the same class where classes are given
    (identical captions cannot be told apart)."""
    classes = np.arange(len(a)) if classes is None else np.asarray(classes)
    return classes[nearest(a, b)] == classes


def retrieval_at_1(a: Rows, b: Rows, classes: Shaped[np.ndarray, "n"] | None = None) -> float:
    """Share of rows of `a` that find their partner in `b` first."""
    return float(np.mean(hits_at_1(a, b, classes)))


def both_ways(a: Rows, b: Rows, classes: Shaped[np.ndarray, "n"] | None = None) -> Float[np.ndarray, "n"]:
    """The hits of each row, from a to b and from b to a, halved."""
    return np.mean([hits_at_1(a, b, classes), hits_at_1(b, a, classes)], axis=0)


def chance(classes: Shaped[np.ndarray, "n"]) -> float:
    """What `retrieval_at_1` of a random order is: the mean share of the gallery that counts as a hit."""
    return float(np.mean([np.mean(classes == c) for c in classes]))


# --- among the first k, ties shared ----------------------------------------------------------------------------------

CHUNK = 1024  # rows whose cosines are in memory together
Partners = Float[np.ndarray, "_ _"]  # as many as rows, or they are refused in words
TIE = 1e-9  # cosines nearer than this are equal


def hits(a: Rows, b: Partners, classes: Shaped[np.ndarray, "n"] | None = None, *, k: int = 1) -> Float[np.ndarray, "n"]:
    """Of each row of `a`, the chance that its own partner in `b`, or one of the same class, is among the first k, where
    rows of equal cosine come in any order: 0 or 1 without ties.

    Raises:
      UserError: a row of zeros, which has no direction; unlike numbers of rows, or one.
    """
    from scipy.stats import hypergeom  # half a second, which no training needs

    nearer, equal, right = _places(a, b, classes)
    draws = np.clip(k - nearer, 0, equal)  # of the ties, those among the first k; none of which is right:
    return np.where(k > nearer, 1 - hypergeom.pmf(0, equal, right, draws), 0.0)


def ranks(a: Rows, b: Partners, classes: Shaped[np.ndarray, "n"] | None = None) -> Float[np.ndarray, "n"]:
    """Of each row of `a`, the place of its own partner in `b`, or of the first of the same class, from 1; of ties the
    mean over their orders."""
    nearer, equal, right = _places(a, b, classes)
    return nearer + (equal + 1) / (right + 1)


def _places(a: Rows, b: Partners, classes: Shaped[np.ndarray, "n"] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row of `a`: how many rows of `b` are nearer than the nearest right one; how many are as near, right ones
    included; how many of those are right."""
    x, y = (_unit(z, word) for z, word in ((a, "first"), (b, "second")))
    if len(x) != len(y) or len(x) < 2:
        raise UserError(
            f"retrieval: {len(x)} rows and {len(y)} partners; expected as many, and two or more: one is always found"
        )
    classes = np.arange(len(x)) if classes is None else np.asarray(classes)
    out = []
    for first in range(0, len(x), CHUNK):
        cosine = x[first : first + CHUNK] @ y.T
        right = classes[first : first + CHUNK, None] == classes
        best = np.where(right, cosine, -np.inf).max(1, keepdims=True)
        equal = np.abs(cosine - best) <= TIE
        out.append([(cosine > best + TIE).sum(1), equal.sum(1), (equal & right).sum(1)])
    nearer, equal, right = np.concatenate(out, axis=1)
    return nearer, equal, right


def _unit(rows: Partners, word: str) -> Partners:
    x = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"retrieval: row {int(np.argmin(lengths))} of the {word} is 0 and has no direction")
    return x / lengths
