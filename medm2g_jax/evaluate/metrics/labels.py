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
