"""Metrics of reports by their words: beside pycocoevalcap's values, or by hand."""

import numpy as np
import pytest

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics import METRICS, report_figures, words

VOCABULARY = (
    "the heart is lungs are clear no effusion small large left right mass opacity upper lower normal . enlarged"
)


def reports(seed: int, n: int) -> tuple[list[str], list[str]]:
    """Random ones, and the same with words changed, lost and doubled; one is empty, one unlike anything."""
    rng, vocabulary = np.random.default_rng(seed), VOCABULARY.split()
    real = [list(rng.choice(vocabulary, rng.integers(3, 20))) for _ in range(n)]
    made = []
    for text in real:
        kept = [w if rng.random() < 0.8 else str(rng.choice(vocabulary)) for w in text if rng.random() < 0.9]
        made.append(kept + kept[: rng.integers(0, 4)])
    made[1], made[2] = [], ["pneumothorax", "seen"]
    return [" ".join(t) for t in real], [" ".join(t) for t in made]


NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")


@pytest.mark.parametrize(
    ("seed", "n", "expected"),
    [  # by pycocoevalcap 1.2
        (0, 40, (0.7327766179525412, 0.6282516477103842, 0.5422663284818523, 0.46342573470931636,
                 0.6827438112173215, 4.057206162601032)),
        (1, 7, (0.47070158117003896, 0.4514810962089467, 0.41899656258286844, 0.39277129640761255,
                0.4922947422288927, 3.202020105170601)),
    ],
)  # fmt: skip
def test_pycocoevalcap_s_values(seed, n, expected):
    real, made = reports(seed, n)
    assert [METRICS[name](real, made) for name in NAMES] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("seed", "n", "expected"), [(0, 40, 0.5486376707977553), (1, 7, 0.4318213945869287)])
def test_fast_bleu_s_values(seed, n, expected):
    """By fast-bleu 0.0.90 and by nltk 3.10's sentence_bleu, first smoothing, of CXR-Report-Metric's words."""
    real, made = reports(seed, n)
    assert METRICS["BLEU-2, rexrank"](real, made) == pytest.approx(expected, abs=1e-9)
    upper = [text.upper().replace(" .", ".") for text in made]
    assert METRICS["BLEU-2, rexrank"](real, upper) == pytest.approx(expected, abs=1e-9)


def test_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 threes; as long as the real one.
    real, made = ["the heart is normal in size"], ["the heart was normal in size"]
    bleu = [METRICS[f"BLEU-{k}"](real, made) for k in (1, 2, 3)]
    assert bleu == pytest.approx([5 / 6, (5 / 6 * 3 / 5) ** (1 / 2), (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3)], abs=1e-8)
    # A word counts as often as the real report has it; 2 words for 6 cost exp(1 - 6 / 2).
    assert METRICS["BLEU-1"](real, ["the the"]) == pytest.approx(0.5 * np.exp(-2), abs=1e-8)
    # All reports together: 2 of 2 words and 0 of 2.
    assert METRICS["BLEU-1"](["a b", "c d"], ["a b", "e f"]) == pytest.approx(0.5, abs=1e-8)
    # "a c d" of "a b c d": precision 1, recall 3 / 4.
    assert METRICS["ROUGE-L"](["a b c d"], ["a c d"]) == pytest.approx(2.44 * 0.75 / (0.75 + 1.44))
    assert words.longest("x a b a c".split(), "a a x b c".split()) == 3
    # Same words, none shared by the others: 10; nothing in common: 0.
    same = ["a b c d e", "f g h i j"]
    np.testing.assert_allclose(words.cider(same, same), [10, 10])
    np.testing.assert_allclose(words.cider(same, ["k l m n o", ""]), [0, 0])


def test_report_figures_are_of_cleaned_texts_with_the_real_ones_beside():
    real = ["The heart is normal. 1. Lungs are clear.", "Left effusion.", "Large mass."]
    made = ["the heart is normal . lungs are clear .", "left effusion .", "left effusion ."]
    figures = {(f.task, f.metric): f for f in report_figures("X-ray -> report", real, made, "r2gen", seed=0)}
    assert {f.protocol for f in figures.values()} == {"words, r2gen"}
    value = lambda metric, more="": figures[f"X-ray -> report{more}", metric].value  # noqa: E731
    assert value("BLEU-1") == pytest.approx((9 + 3 + 1) / 15, abs=1e-8)
    assert value("distinct reports") == pytest.approx(2 / 3) and value("distinct reports", ", the real ones") == 1
    assert value("words a report") == value("words a report", ", the real ones") == 5
    low, high = figures["X-ray -> report", "BLEU-1"].interval
    assert low < value("BLEU-1") < high == pytest.approx(1)
    raw = {f.metric: f for f in report_figures("X-ray -> report", real, made, "none", seed=0)}
    assert raw["BLEU-1"].protocol == "words, none" and raw["BLEU-1"].value < value("BLEU-1")


def test_what_has_no_answer_is_refused_in_words(capsys):
    with pytest.raises(UserError, match="real report 1 has no word left after cleaning"):
        report_figures("t", ["clear .", " . "], ["clear .", "clear ."], "r2gen", seed=0)
    with pytest.raises(UserError, match="2 real reports and 1 made ones"):
        METRICS["ROUGE-L"](["a", "b"], ["a"])
    for real in (["clear ."], ["clear ."] * 3):
        with pytest.raises(UserError, match=f"CIDEr of {len(real)} real reports that all have the same words"):
            METRICS["CIDEr"](real, real)
    with pytest.raises(UserError, match="0 real reports"):
        METRICS["BLEU-4"]([], [])
    with pytest.raises(UserError, match="--clean best"):
        report_figures("t", ["a"], ["a"], "best", seed=0)
    left = [f.metric for f in report_figures("t", ["clear ."] * 2, ["clear .", ""], "none", seed=0)]
    assert "CIDEr" not in left and "BLEU-4" in left and "t: CIDEr is left out" in capsys.readouterr().out
