"""What a judge reads in generated images, beside the exact labels and across modalities; values are indices."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer

Read = Integer[np.ndarray, "n"]


def right(real: Read, read: Read) -> Bool[np.ndarray, "n"]:
    """Whether each is read as what it is."""
    return real == read


def agree(reads: Sequence[Read]) -> Bool[np.ndarray, "n"]:
    """Whether all show the same."""
    first, *others = reads
    return np.all([first == other for other in others], axis=0)


def beside(a: Read, b: Read) -> Integer[np.ndarray, "n 2"]:
    """What is read in one image and in the other."""
    return np.stack([a, b], axis=1)


def kappa(pairs: Integer[np.ndarray, "n 2"]) -> float:
    """Cohen's kappa of two readings: agreement beyond that of independent ones; 0 where both ever read one thing."""
    a, b = pairs.T
    values = np.unique(pairs)
    chance = float(sum(np.mean(a == v) * np.mean(b == v) for v in values))
    return 0.0 if chance == 1 else float((np.mean(a == b) - chance) / (1 - chance))
