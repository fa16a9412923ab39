"""Retrieval of the partner in the shared space: cosine, over the rows of the batch as gallery."""

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Rows = Float[np.ndarray, "n d"]


def nearest(a: Rows, b: Rows) -> Int[np.ndarray, "n"]:
    """The place in `b` of the row nearest to each row of `a`."""
    cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    return np.argmax(cosine, axis=1)


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
