"""How far modalities lie apart in the shared space: what a t-SNE picture suggests, in numbers.

Of each row its modality (n), its subject (n), and where it stands (n d), which is brought to unit length. A space where
modalities mix can be one that tells nothing apart: retrieval belongs beside these.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Shaped

from medm2g_jax.errors import UserError

Labels = Shaped[np.ndarray, "n"]
Rows = Float[np.ndarray, "n d"]
NEIGHBOURS = 10
RIDGE = 1.0
CHUNK = 1024  # rows whose distances are in memory together


def read(modality: Labels, subject: Labels, x: Rows) -> Bool[np.ndarray, "_"]:
    """Whether a linear reader tells the modality of each row of the half of the subjects that it was not fitted to.
    Ridge regression of +1 and -1, one modality against the rest; subjects are dealt out by a fixed seed.

    Raises:
      UserError: one modality; rows of zeros; fewer than two subjects; a half without one of the modalities.
    """
    x, names = _rows(modality, x)
    subjects = np.random.default_rng(0).permutation(np.unique(subject))
    fitted = np.isin(subject, subjects[: len(subjects) // 2])
    if set(names) != set(modality[fitted]) or fitted.all():
        raise UserError(
            f"modality read: {len(subjects)} subjects, in halves, do not have every modality in both; expected more"
        )
    mean, targets = x[fitted].mean(0), np.where(modality[fitted, None] == names, 1.0, -1.0)
    z, middle = x[fitted] - mean, targets.mean(0)
    weights = np.linalg.solve(z.T @ z + RIDGE * np.eye(z.shape[1]), z.T @ (targets - middle))
    return names[((x[~fitted] - mean) @ weights + middle).argmax(1)] == modality[~fitted]


def purity(modality: Labels, subject: Labels, x: Rows) -> Float[np.ndarray, "n"]:
    """The share of the same modality among the ten rows nearest to each.

    Raises:
      UserError: one modality; rows of zeros; ten rows or fewer.
    """
    x, _ = _rows(modality, x)
    if len(x) <= NEIGHBOURS:
        raise UserError(f"same modality of the {NEIGHBOURS} nearest: {len(x)} rows; expected more than {NEIGHBOURS}")
    out = []
    for first, d in _distances(x):
        d[np.arange(len(d)), first + np.arange(len(d))] = np.inf  # not itself
        nearest = np.argpartition(d, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        out.append((modality[nearest] == modality[first : first + len(d), None]).mean(1))
    return np.concatenate(out)


def silhouette(modality: Labels, subject: Labels, x: Rows) -> Float[np.ndarray, "n"]:
    """(b - a) / max(a, b) of each row: a its mean distance to its own modality, b to the nearest other one (Rousseeuw
    1987): 1 apart, 0 mixed. 0 of a modality's only row.

    Raises:
      UserError: one modality; rows of zeros.
    """
    x, names = _rows(modality, x)
    of = modality[:, None] == names
    count = of.sum(0)
    out = []
    for first, d in _distances(x):
        own = of[first : first + len(d)]
        sums = np.sqrt(d) @ of
        a = (sums * own).sum(1) / np.maximum((count * own).sum(1) - 1, 1)
        b = np.where(own, np.inf, sums / count).min(1)
        alone, most = (count * own).sum(1) == 1, np.maximum(a, b)
        out.append(np.where(alone | (most == 0), 0, (b - a) / np.where(most, most, 1)))
    return np.concatenate(out)


def gap(modality: Labels, subject: Labels, x: Rows) -> float:
    """Distance of the means of two modalities, between 0 and 2; of more of them the mean over pairs.

    Raises:
      UserError: one modality; rows of zeros.
    """
    x, names = _rows(modality, x)
    means = np.stack([x[modality == name].mean(0) for name in names])
    d = np.linalg.norm(means[:, None] - means, axis=-1)
    return float(d.sum() / (len(names) * (len(names) - 1)))


def _rows(modality: Labels, x: Rows) -> tuple[Rows, Shaped[np.ndarray, "_"]]:
    """Of unit length, and the modalities there are."""
    names, lengths = np.unique(modality), np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    if len(names) < 2:
        raise UserError(f"embeddings of {len(names)} modality; expected two or more to lie apart")
    if not lengths.all():
        raise UserError(f"row {int(np.argmin(lengths))} of the embeddings is 0 and has no direction")
    return np.asarray(x, np.float64) / lengths, names


def _distances(x: Rows) -> Iterator[tuple[int, Float[np.ndarray, "_ _"]]]:
    """The first of some rows at a time, and their squared distances to all."""
    for first in range(0, len(x), CHUNK):
        yield first, np.maximum(2 - 2 * x[first : first + CHUNK] @ x.T, 0)
