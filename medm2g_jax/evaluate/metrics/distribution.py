"""How near one set is to another, by features (n d) of any extractor: whoever measures names it in the figure.

    FID        Frechet distance of two Gaussians (Heusel et al. 2017); biased, the more the fewer rows; n must exceed d
    KID        squared maximum mean discrepancy (Binkowski et al. 2018), unbiased: it may fall below 0
    precision, recall, density, coverage
               by balls around each row that reach to its fifth neighbour (Kynkaanniemi et al. 2019, Naeem et al. 2020)

`Moments` takes rows batch by batch, so that a set need not fit into memory.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Shaped

from medm2g_jax.errors import UserError

Features = Float[np.ndarray, "_ _"]  # rows, features: the sets may differ in both, and are refused in words
NEIGHBOURS = 5
CHUNK = 1024  # rows whose distances are in memory together


class Moments:
    """Mean and covariance of the rows so far."""

    def __init__(self, features: Features | None = None):
        self.n, self.mean, self._squares = 0, np.zeros(0), np.zeros((0, 0))
        if features is not None:
            self.add(features)

    def __len__(self) -> int:
        return self.n

    def add(self, features: Features, valid: Bool[np.ndarray, "_"] | None = None) -> "Moments":
        """Rows more; of a padded batch those that are valid."""
        x = np.asarray(features if valid is None else features[valid], np.float64)
        if not len(x):
            return self
        _finite(x)
        mean, total = x.mean(0), self.n + len(x)
        if not self.n:
            self.mean, self._squares = np.zeros_like(mean), np.zeros((len(mean),) * 2)
        off = mean - self.mean
        self._squares = self._squares + (x - mean).T @ (x - mean) + np.outer(off, off) * self.n * len(x) / total
        self.mean, self.n = self.mean + off * len(x) / total, total
        return self

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Of a sample: over n - 1."""
        return self._squares / (self.n - 1)


def fid(real: Features | Moments, made: Features | Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Raises:
      UserError: no more rows than features; features of two sorts; real ones that are all alike.
    """
    a, b = (x if isinstance(x, Moments) else Moments(x) for x in (real, made))
    _fit(a.mean, b.mean)
    for what, x in (("real", a), ("made", b)):
        if len(x) <= (d := len(x.mean)):
            raise UserError(
                f"FID of {len(x)} {what} rows with {d} features: the covariance of so few says nothing of most "
                f"directions; expected more than {d}, better ten times as many, or KID"
            )
    if not np.trace(a.covariance):
        raise UserError(_ALIKE)
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def kid(real: Features, made: Features) -> float:
    """Kernel (x y / d + 1)^3, over all rows at once.

    Raises:
      UserError: a single row; features of two sorts; real ones that are all alike.
    """
    x, y = _pair(real, made, 2)

    def within(z: Features) -> float:
        own = ((z**2).mean(1) + 1) ** 3
        return (sum(kernel.sum() for kernel in _kernels(z, z)) - own.sum()) / (len(z) * (len(z) - 1))

    across = sum(kernel.sum() for kernel in _kernels(x, y)) / (len(x) * len(y))
    return float(within(x) + within(y) - 2 * across)


def _kernels(x: Features, y: Features) -> Iterator[np.ndarray]:
    for first in range(0, len(x), CHUNK):
        yield (x[first : first + CHUNK] @ y.T / x.shape[1] + 1) ** 3


def precision(real: Features, made: Features) -> Bool[np.ndarray, "_"]:
    """Whether each made row lies in the ball of a real one."""
    return _counts(real, made) > 0


def recall(real: Features, made: Features) -> Bool[np.ndarray, "_"]:
    """Whether each real row lies in the ball of a made one."""
    return _counts(made, real, ("made", "real")) > 0


def density(real: Features, made: Features) -> Float[np.ndarray, "_"]:
    """In the balls of how many real rows each made one lies, over the five that lie in a ball; above 1 where made rows
    crowd where real ones do."""
    return _counts(real, made) / NEIGHBOURS


def coverage(real: Features, made: Features) -> Bool[np.ndarray, "_"]:
    """Whether a made row lies in the ball of each real one."""
    x, y = _pair(real, made, NEIGHBOURS + 1)
    nearest = np.concatenate([d.min(1) for d in _distances(x, y)])
    return nearest < _radii(x)


def _counts(centres: Features, rows: Features, words: tuple[str, str] = ("real", "made")) -> np.ndarray:
    """In how many balls of the centres each row lies."""
    x, y = _pair(centres, rows, NEIGHBOURS + 1, words)
    radii = _radii(x)
    return np.concatenate([(d < radii).sum(1) for d in _distances(y, x)])


def _radii(x: Features) -> Float[np.ndarray, "_"]:
    """Squared distance of each row to its fifth neighbour."""
    return np.concatenate([np.partition(d, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for d in _distances(x, x)])


def _distances(x: Features, y: Features) -> Iterator[Float[np.ndarray, "_ _"]]:
    """Squared, of some rows of x at a time to all of y; what rounding alone makes is 0, so that equal rows are."""
    squares = (y**2).sum(1)
    for first in range(0, len(x), CHUNK):
        rows = x[first : first + CHUNK]
        norms = (rows**2).sum(1)[:, None] + squares
        d = norms - 2 * rows @ y.T
        yield np.where(d < 1e-12 * norms, 0, d)


_ALIKE = "the real features are all alike: nothing to compare with; an extractor that sees a difference?"


def _pair(
    first: Features, second: Features, least: int, words: tuple[str, str] = ("real", "made")
) -> tuple[Features, Features]:
    """Both in float64, if they can be compared."""
    for what, x in zip(words, (first, second), strict=True):
        if len(x) < least:
            raise UserError(f"{len(x)} {what} rows of features; expected {least} or more")
        _finite(x)
    _fit(first[0], second[0])
    if not np.ptp(first if words[0] == "real" else second, axis=0).any():
        raise UserError(_ALIKE)
    return np.asarray(first, np.float64), np.asarray(second, np.float64)


def _finite(x: Features) -> None:
    if not np.isfinite(x).all():
        raise UserError(f"features: row {int(np.argmin(np.isfinite(x).all(1)))} is not finite")


def _fit(a: Shaped[np.ndarray, "d1"], b: Shaped[np.ndarray, "d2"]) -> None:
    if a.shape != b.shape:
        raise UserError(f"rows of {len(a)} and of {len(b)} features; expected those of one extractor")
