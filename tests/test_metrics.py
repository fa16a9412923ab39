"""The metrics, beside scikit-image, scipy, closed forms, or values written down by hand."""

import numpy as np
import pytest
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medm2g_jax.data.phantom.report import Findings, parse, swap_side
from medm2g_jax.evaluate.metrics import METRICS, figures_of, image, labels, retrieval, text, text_figures
from medm2g_jax.evaluate.metrics.intervals import bootstrap, wilson

MASS = "large left upper mass . the heart is enlarged ."  # five facts


def pictures(n: int = 4, side: int = 16, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Real ones, and the same with noise."""
    rng = np.random.default_rng(seed)
    real = rng.uniform(-1, 1, size=(n, side, side, 1)).astype(np.float32)
    return real, np.clip(real + 0.3 * rng.normal(size=real.shape), -1, 1).astype(np.float32)


def test_psnr_is_scikit_image_s_over_the_batch():
    real, made = pictures()
    expected = peak_signal_noise_ratio(real.astype(np.float64), made.astype(np.float64), data_range=2)
    assert image.psnr(real, made) == METRICS["PSNR dB"](real, made) == pytest.approx(expected, abs=1e-9)
    assert image.psnr(real, real) == float("inf")


@pytest.mark.parametrize("side", (7, 16, 33))
def test_ssim_is_scikit_image_s_of_each_image(side):
    real, made = pictures(side=side)
    expected = [structural_similarity(a, b, data_range=2, channel_axis=-1) for a, b in zip(real, made, strict=True)]
    np.testing.assert_allclose(image.ssim(real, made), expected, atol=1e-6)
    assert METRICS["SSIM"](real, made) == pytest.approx(np.mean(expected), abs=1e-6)


def test_finding_f1_of_the_phantom():
    f1 = METRICS["finding F1"]
    assert f1([MASS], [MASS], parse) == text.finding_f1([MASS], [MASS], parse) == 1.0
    # Wrong side: 4 of 5 right on both sides. Wrong kind: the side is lost with it.
    assert f1([MASS], [swap_side(MASS)], parse) == pytest.approx(0.8)
    assert f1([MASS], [MASS.replace("mass", "opacity")], parse) == pytest.approx(0.6)
    # Micro: 5 hits, 10 reference facts, 5 stated.
    clear = "the lungs are clear . normal heart ."
    assert f1([MASS, MASS], [MASS, clear], parse) == pytest.approx(2 * 5 / 15)
    assert f1([clear], [""], parse) == 1.0
    with pytest.raises(ValueError, match="zip"):
        f1([MASS], [], parse)


NAMES = ("edema", "fracture", "pneumonia")


@pytest.mark.parametrize("form", ("set", "mapping"))
def test_finding_f1_of_any_labeller(form):
    """Labels of the CheXpert sort, in both forms that a labeller may have them in."""

    def labeller(report: str):
        found = {name: True if name in report.split() else None for name in NAMES}
        return {name for name in NAMES if found[name]} if form == "set" else found

    rng = np.random.default_rng(0)
    stated = rng.random((2, 30, len(NAMES))) < 0.4
    real, made = ([" ".join(np.asarray(NAMES)[row]) for row in side] for side in stated)
    hits, wrong = (stated[0] & stated[1]).sum(), (stated[0] ^ stated[1]).sum()
    assert text.finding_f1(real, made, labeller) == pytest.approx(2 * hits / (2 * hits + wrong))


def test_agreement_field_by_field():
    real = Findings("mass", "left", "small", "upper", False)
    assert text.agreement(real, real._replace(side="right", size=None)) == {
        "kind": True, "side": False, "size": False, "level": True, "cardiomegaly": True,
    }  # fmt: skip
    normal = Findings("none", cardiomegaly=True)
    expected = {"kind": False, "side": None, "size": None, "level": None, "cardiomegaly": False}
    assert text.agreement(normal, real) == expected
    assert text.agreement({"edema", "fracture"}, {"edema"}) == {"edema": True, "fracture": False}
    assert text.agreement({"edema": True, "fracture": None}, {}) == {"edema": False, "fracture": None}


def test_retrieval_at_1():
    e = np.eye(4, dtype=np.float32)
    at_1 = retrieval.retrieval_at_1
    assert at_1(e, 5 * e) == 1.0
    assert at_1(e, e[[1, 0, 2, 3]]) == 0.5
    assert at_1(e, e[[1, 2, 3, 0]]) == 0.0
    # Rows 0 and 1 carry the same caption: taking one for the other is no mistake.
    classes = np.array([7, 7, 2, 3])
    assert at_1(e, e[[1, 0, 2, 3]], classes) == 1.0
    assert retrieval.chance(classes) == pytest.approx((2 * 2 + 1 + 1) / 16)
    # By cosine, not by length: row 1 of b is long, and no one's nearest but its own.
    assert at_1(e, e + np.float32(0.3), None) == 1.0
    assert at_1(e, e * np.float32([[1], [100], [1], [1]])) == 1.0
    # Both ways: all rows of a find row 0 of b first, and row 0 of b finds row 0 of a.
    one = np.float32([[1, 0], [0.9, 0.1], [0.8, 0.2]])
    other = np.float32([[1, 0], [-1, 0.1], [-1, 0.2]])
    both = 0.5 * (at_1(one, other) + at_1(other, one))
    assert METRICS["retrieval@1"](one, other) == pytest.approx(both) and at_1(one, other) != at_1(other, one)


def test_judged_labels():
    reads = [np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])]
    np.testing.assert_array_equal(labels.agree(reads), [True, True, False, True])
    np.testing.assert_array_equal(labels.agree([*reads, np.array([1, 1, 0, 0])]), [False, True, False, True])
    assert METRICS["right"](*reads) == 0.75


def test_wilson_is_its_closed_form():
    z, p, n = stats.norm.ppf(0.975), 0.9, 20
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(18, 20) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))
    figure = METRICS["exact"].figure("t", "exact", ["a"] * 20, ["a"] * 18 + ["b"] * 2, seed=0)
    assert figure.interval == wilson(18, 20) and (figure.value, figure.n) == (0.9, 20)


def test_bootstrap_is_scipy_s():
    scores = np.random.default_rng(0).gamma(2.0, size=60)
    expected = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert bootstrap(scores, lambda x: float(np.mean(x))) == pytest.approx(expected, abs=0.03)
    assert bootstrap(scores[:1], np.mean) is None
    # Slices of one subject that are all alike say no more than one of them.
    subjects = [f"p{i}" for i in range(len(scores)) for _ in range(3)]
    assert bootstrap(np.repeat(scores, 3), np.mean, subjects=subjects) == pytest.approx(bootstrap(scores, np.mean))
    assert bootstrap(scores, np.mean, subjects=["one"] * len(scores)) is None
    assert METRICS["PSNR dB"].figure("t", "PSNR dB", *[pictures()[0]] * 2, seed=0).interval is None  # no error at all


def test_rows_between_floor_and_ceiling():
    real, made = pictures()
    mean = np.zeros_like(real)
    (top,) = [f for f in figures_of("image", "CT -> CT", real, 0.5 * (real + made), seed=0, floor=("zeros", [mean]))
              if f.metric == "PSNR dB"]  # fmt: skip
    assert top.floor == (image.psnr(real, mean), "zeros") and top.ceiling is None
    low, high = top.interval
    assert low < top.value < high
    found = figures_of("image", "report -> CT", real, made, seed=0, autoencoder=[top])
    (below,) = [f for f in found if f.metric == "PSNR dB"]
    assert below.ceiling == (top.value, "the autoencoder") and below.floor == top.floor
    # The floor is the best of its candidates.
    texts = ["a", "b", "b"]
    (exact,) = text_figures("t", texts, texts, None, seed=0, floor=("constant", [["a"] * 3, ["b"] * 3]))
    assert exact.floor == (pytest.approx(2 / 3), "constant") and exact.value == 1
    assert [f.metric for f in text_figures("t", texts, texts, parse, seed=0)] == ["exact", "finding F1"]
