"""Metrics of the shared space: beside all orders counted out, scikit-learn's values, or closed forms."""

import itertools

import numpy as np
import pytest

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics import METRICS, modality_figures, retrieval, retrieval_figures


def counted_out(cosines: np.ndarray, right: np.ndarray, k: int) -> tuple[float, float]:
    """Share of the orders of one row's gallery, nearest first, with a right one among the first k; its mean place."""
    orders = [o for o in itertools.permutations(range(len(cosines))) if (np.diff(cosines[list(o)]) <= 1e-12).all()]
    places = [min(i for i, j in enumerate(order) if right[j]) for order in orders]
    return float(np.mean(np.asarray(places) < k)), float(np.mean(places) + 1)


@pytest.mark.parametrize("captions", (None, ("a", "b", "a", "c", "b", "a")))
def test_ties_are_shared_as_all_orders_share_them(captions):
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(3, 4))[[0, 1, 0, 0, 2, 1]]  # three places for six rows
    queries = rng.normal(size=(6, 4)).astype(np.float32).astype(float)
    classes = np.unique(captions, return_inverse=True)[1] if captions else np.arange(6)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    cosines = np.round(unit(queries) @ unit(gallery).T, 9)
    for k in (1, 2, 3, 5):
        expected = np.asarray([counted_out(c, classes == own, k) for c, own in zip(cosines, classes, strict=True)])
        np.testing.assert_allclose(retrieval.hits(queries, gallery, classes, k=k), expected[:, 0], atol=1e-9)
        np.testing.assert_allclose(retrieval.ranks(queries, gallery, classes), expected[:, 1], atol=1e-9)


def test_without_ties_it_is_retrieval_at_1():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(1100, 16)).astype(np.float32)  # more than are compared at a time
    b = (a + 1.5 * rng.normal(size=a.shape)).astype(np.float32)
    assert 0.1 < METRICS["R@1"](a, b) < 0.9
    assert METRICS["R@1"](a, b) == pytest.approx(retrieval.retrieval_at_1(a, b))
    assert METRICS["R@1"](a, b) < METRICS["R@5"](a, b) < METRICS["R@10"](a, b)


def test_both_ways_between_a_random_order_and_all():
    e = np.eye(8)
    captions = ["a"] * 2 + list("bcdefg")
    figures = {(f.task, f.metric): f for f in retrieval_figures(("report", "CT"), e, e, captions, seed=0)}
    assert [f.value for f in figures.values()] == [1, 1, 1, 1] * 2
    first = figures["CT -> report", "R@5"]
    assert first.protocol == "gallery, same words, ties shared" and first.n == 8
    # Of 5 of 8 drawn none is the only right one in 3 / 8, none of two in (3 * 2) / (8 * 7).
    assert first.floor == (pytest.approx((6 * 5 / 8 + 2 * (1 - 6 / 56)) / 8), "a random order")
    assert figures["report -> CT", "median rank"].floor.value == pytest.approx(4.5)
    own = retrieval_figures(("report", "CT"), e, e, seed=0)
    assert {f.protocol for f in own} == {"gallery, own partner, ties shared"}
    assert own[0].floor.value == pytest.approx(1 / 8)
    with pytest.raises(UserError, match="row 3 of the second is 0"):
        METRICS["R@1"](e, e * np.arange(8)[[3, 1, 2, 0, 4, 5, 6, 7], None])
    with pytest.raises(UserError, match="1 rows and 2 partners"):
        METRICS["R@1"](e[:1], e[:2])
    with pytest.raises(UserError, match="one is always found"):
        METRICS["R@1"](e[:1], e[:1])


def space(seed: int, n: int = 60, d: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, d))
    offsets = (("text", 1.5), ("ct", 1.0), ("mri", 0.0))
    return {m: shared + 0.6 * rng.normal(size=(n, d)) + o * np.eye(d)[i] for i, (m, o) in enumerate(offsets)}


@pytest.mark.parametrize(
    ("seed", "expected"),
    [  # RidgeClassifier(alpha=1), NearestNeighbors and silhouette_samples of scikit-learn 1.9.1
        (0, (0.5888888888888889, 0.38555555555555554, 0.011435088501275188)),
        (1, (0.6, 0.4061111111111111, 0.014002654657504074)),
    ],
)
def test_scikit_learn_s_values(seed, expected):
    figures = modality_figures("shared space", space(seed), seed=0)
    assert [f.value for f in figures[:3]] == pytest.approx(expected, abs=1e-6)
    assert [f.n for f in figures] == [90, 180, 180, 180]


def test_modalities_apart_and_mixed():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 4))
    # Each modality has two directions of its own: right angles, and means 2 ** 0.5 of their length apart.
    apart = {"text": np.eye(4)[[0, 1] * 20], "ct": np.eye(4)[[2, 3] * 20]}
    of = lambda figures: {f.metric: f.value for f in figures}  # noqa: E731
    found = of(modality_figures("t", apart, seed=0))
    assert found["modality read"] == 1 and found["same modality of the 10 nearest"] == 1
    assert found["modality gap"] == pytest.approx(1.0)
    # Of 40 rows the 19 at one's own place are at 0, the 20 at the other at the root of 2, as are all of the other's.
    assert found["silhouette of modalities"] == pytest.approx(1 - 20 / 39)
    mixed = of(modality_figures("t", {"text": shared[:200], "ct": shared[200:]}, seed=0))
    assert mixed["same modality of the 10 nearest"] == pytest.approx(0.5, abs=0.05)
    assert abs(mixed["silhouette of modalities"]) < 0.02 and mixed["modality read"] == pytest.approx(0.5, abs=0.15)


def test_a_space_without_modalities_is_refused_in_words():
    x = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.raises(UserError, match="embeddings of 1 modality"):
        modality_figures("t", {"ct": x}, seed=0)
    with pytest.raises(UserError, match="row 6 of the embeddings is 0"):
        modality_figures("t", {"ct": x, "mri": 0 * x}, seed=0)
    with pytest.raises(UserError, match="6 rows; expected more than 10"):
        METRICS["same modality of the 10 nearest"](np.arange(6), np.arange(6), x)
    with pytest.raises(UserError, match="1 subjects, in halves"):
        modality_figures("t", {"ct": x[:1], "mri": x[1:2]}, seed=0)
