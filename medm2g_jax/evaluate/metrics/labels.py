"""What a judge reads in generated images, beside the exact labels and across modalities; values are indices."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

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


def auroc(
    truth: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"], weights: Float[np.ndarray, "d n"]
) -> Float[np.ndarray, "d"]:
    """The area under the ROC curve: how likely a row that has it scores more than one that has not, equal scores
    counting half; of rows that are there as often as each line of `weights` says. NaN where all rows are of one sort.

    Args:
      truth: 1, 0, or NaN where nobody knows: such rows do not count.
    """
    order = np.argsort(scores, kind="stable")
    truth, scores, weights = truth[order], scores[order], weights[:, order]
    has, has_not = weights * (truth == 1), weights * (truth == 0)
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(has_not, axis=1)], axis=1)
    ends = (np.searchsorted(scores, scores, side) for side in ("left", "right"))
    won = sum(below[:, end] for end in ends) / 2
    pairs = has.sum(1) * has_not.sum(1)
    return np.where(pairs > 0, (has * won).sum(1) / np.maximum(pairs, 1), np.nan)


def mean_auroc(truth: Float[np.ndarray, "n k"], scores: Float[np.ndarray, "n k"]) -> float:
    """`auroc` of each finding, averaged over those that some rows have and others have not."""
    once = np.ones((1, len(truth)))
    return float(np.nanmean([auroc(t, s, once)[0] for t, s in zip(truth.T, scores.T, strict=True)]))
