"""95 % intervals: Wilson's of a share, and the bootstrap of anything else; a test of paired differences. Rows of one
subject are no witnesses of their own: where several are, subjects are drawn, each with all its rows."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Shaped

DRAWS = 1000


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Of a share of `hits` among n independent rows."""
    from scipy.stats import binomtest  # half a second, which no training needs

    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


def bootstrap(
    scores: Shaped[np.ndarray, "n ..."],
    value: Callable[[np.ndarray], float],
    seed: int = 0,
    subjects: Sequence | None = None,
) -> tuple[float, float] | None:
    """Percentile interval of value(scores) over draws of the subjects with replacement; None of fewer than two, or
    where a draw has no finite value (the PSNR of equal images).

    Args:
      subjects: whose each row is; None: each is one's own.
    """
    groups = rows_of(subjects, len(scores))
    n = len(groups)
    if n < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, n, (DRAWS, n))
    alone = n == len(scores)
    chosen = drawn if alone else (np.concatenate([groups[k] for k in draw]) for draw in drawn)
    values = np.asarray([value(scores[rows]) for rows in chosen], np.float64)
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def rows_of(subjects: Sequence | None, n: int) -> list[np.ndarray]:
    """The rows of each subject, those first that come first."""
    if subjects is None or len(set(subjects)) == n:
        return list(np.arange(n)[:, None])
    places: dict = {}
    for row, subject in enumerate(subjects):
        places.setdefault(subject, []).append(row)
    return [np.asarray(rows) for rows in places.values()]


def signed_rank(differences: Shaped[np.ndarray, "n"]) -> float:
    """Wilcoxon's signed-rank test of paired differences: how likely ones as far from 0 are where neither is more, in
    two-sided p. Rows without a difference say nothing; of no other there is no evidence, p 1."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0
