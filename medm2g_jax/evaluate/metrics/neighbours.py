"""Does a model give back what it was trained on? Distances of its samples to training subjects and to held-out ones.

Two questions, since a model can fail either alone:

    pools   is a sample nearer to the nearest training row than to the nearest held-out one? Of two pools the larger is
            nearer by chance alone, so they are equally large; and what the pools themselves differ in is taken off by
            asking the same of real held-out images in the samples' place (of subjects in neither pool). Whether it is
            chance is told by exchanging rows between the pools: many samples may have one neighbour
    gap     is it much nearer to one training subject than to the next ones, as a copy is? Distances to the first and to
            the k-th neighbour shrink alike when a pool grows, so their ratio may be asked of the whole training set. A
            sample is a copy where its gap there is far less than that of any sample among held-out subjects, of whom
            nothing can have been copied (after Carlini et al. 2023, "Extracting Training Data from Diffusion Models")
"""

import numpy as np
from jaxtyping import Bool, Float, Shaped

NEXT = 10  # subjects after the nearest
COPY = 0.8  # of the least gap among held-out subjects
SURE = 0.4  # of it; in d dimensions one sample comes so near by chance with a probability of 0.4 to the power of d
EXCHANGES = 400
_DEEP = 64  # rows, of which all are in one of two pools with a probability of 2 to the power of -63
_LEAST = 1e-6  # a distance: of an exact copy there is no logarithm


def distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Root mean square difference of each row of `a` to each of `b`."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)
    return np.sqrt(np.maximum(squared, 0) / x.shape[1])


def of_subjects(d: Float[np.ndarray, "n m"], subjects: Shaped[np.ndarray, "m"]) -> Float[np.ndarray, "n s"]:
    """Distance to the nearest row of each subject, whose rows follow each other."""
    starts = np.flatnonzero(np.concatenate([[True], subjects[1:] != subjects[:-1]]))
    return np.minimum.reduceat(d, starts, axis=1)


def log_ratios(train: Float[np.ndarray, "n m"], held: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """log(distance to the nearest training row / to the nearest held-out row), of equally large pools.

    Raises:
      ValueError: they are not.
    """
    if train.shape != held.shape:
        raise ValueError(f"pools of {train.shape[1]} and {held.shape[1]} rows: the larger is nearer by chance")
    near = [np.log(np.maximum(d.min(1), _LEAST)) for d in (train, held)]
    return near[0] - near[1]


def beside_real(
    train: Float[np.ndarray, "n m"],
    held: Float[np.ndarray, "n m"],
    real_train: Float[np.ndarray, "n m"],
    real_held: Float[np.ndarray, "n m"],
) -> Float[np.ndarray, "n"]:
    """`log_ratios` of samples, less those of the real images that they were asked to be."""
    return log_ratios(train, held) - log_ratios(real_train, real_held)


def exchanged(
    train: Float[np.ndarray, "n m"],
    held: Float[np.ndarray, "n m"],
    real_train: Float[np.ndarray, "n m"],
    real_held: Float[np.ndarray, "n m"],
    seed: int = 0,
) -> float:
    """How likely a mean of `beside_real` as low as this one is where nobody knows which rows were trained on: its place
    among those of pools between which rows are exchanged at random."""
    near = [_sorted(np.concatenate(two, 1)) for two in ((train, held), (real_train, real_held))]
    rng, half, rows = np.random.default_rng(seed), train.shape[1], np.arange(len(train))
    observed, lower = np.mean(beside_real(train, held, real_train, real_held)), 0
    for _ in range(EXCHANGES):
        first = rng.permutation(2 * half) < half  # which rows are in the pool that stands for training
        own = [(first[order], logs) for order, logs in near]
        made, real = (np.mean(logs[rows, x.argmax(1)] - logs[rows, (~x).argmax(1)]) for x, logs in own)
        lower += made - real <= observed + _LEAST
    return float((1 + lower) / (1 + EXCHANGES))


def _sorted(d: Float[np.ndarray, "n m"]) -> tuple[Shaped[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The places of the nearest rows and the logarithms of their distances: so many that some are in either pool."""
    order = np.argsort(d, axis=1)[:, :_DEEP]
    return order, np.log(np.maximum(np.take_along_axis(d, order, 1), _LEAST))


def geometric(logs: Float[np.ndarray, "n"]) -> float:
    """The geometric mean of what these are logarithms of."""
    return float(np.exp(np.mean(logs)))


def gaps(d: Float[np.ndarray, "n s"]) -> Float[np.ndarray, "n"]:
    """Distance to the nearest subject over the mean of those to the next ones: about 1 in many dimensions, 0 of an
    exact copy."""
    near = np.sort(d, axis=1)[:, : NEXT + 1]
    return near[:, 0] / np.maximum(near[:, 1:].mean(1), _LEAST)


def copies(
    train: Float[np.ndarray, "n s"], held: Float[np.ndarray, "k r"], share: float = COPY
) -> Bool[np.ndarray, "n"]:
    """Which samples have a far lesser gap among training subjects, by this share, than any has among held-out ones."""
    return gaps(train) < share * gaps(held).min()


def by_chance(count: int, n: int) -> float:
    """At most how likely it is that n samples copy so many subjects where no row was copied: that so many, the least of
    2 n gaps, are all of one half. Subjects count and not samples, since samples that are alike have one neighbour."""
    return float(np.prod([(n - i) / (2 * n - i) for i in range(count)]))
