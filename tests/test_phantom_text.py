"""The phantom's reports: short, exact to read back, and read sensibly whatever a model writes."""

import itertools
import re

import numpy as np
import pytest

from medm2g_jax.data.phantom import report as pt
from medm2g_jax.data.phantom.report import Findings

LESIONS = [Findings(*f) for f in itertools.product(pt.KINDS[1:], pt.SIDES, pt.SIZES, pt.LEVELS, (False, True))]
EVERY = LESIONS + [Findings("none", cardiomegaly=c) for c in (False, True)]


@pytest.fixture(scope="module")
def reports():
    rng = np.random.default_rng(0)
    return [(f, pt.write(f, rng)) for f in EVERY * 40]


def test_parser_is_exact(reports):
    assert len(reports) >= 1000
    wrong = [(f, text, pt.parse(text)) for f, text in reports if pt.parse(text) != f]
    assert not wrong, wrong[:3]


def test_reports_are_short_varied_and_plain(reports):
    lengths = [len(text.split()) for _, text in reports]
    assert 15 <= min(lengths) and max(lengths) <= 35 and np.mean(lengths) < 30
    assert all(re.fullmatch(r"findings : .+ \. impression : .+ \.", text) for _, text in reports)
    assert all(re.fullmatch(r"[a-z]+|[.,:]", word) for _, text in reports for word in text.split())
    assert len({word for _, text in reports for word in text.split()}) < 80
    assert len({text for f, text in reports if f == EVERY[0]}) > 20
    assert any(" no " in text or "without" in text for f, text in reports if f.kind == "mass")  # denials beside lesions


def test_write_depends_on_rng_alone():
    assert pt.write(EVERY[3], np.random.default_rng(5)) == pt.write(EVERY[3], np.random.default_rng(5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Findings()),
        ("the the the . : ,", Findings()),
        ("no effusion .", Findings()),  # one kind denied, none stated
        ("no effusion . large left upper mass .", Findings("mass", "left", "large", "upper")),
        ("without focal lesion", Findings("none")),
        ("no mass or effusion in the left lung . the heart is enlarged .", Findings(cardiomegaly=True)),
        ("small right mass . large left effusion .", Findings("mass", "right", "small")),  # the first mention wins
        ("the lungs are clear . left mass .", Findings("none")),
        ("the lungs are not clear .", Findings()),
        ("LEFT Effusion, Heart size is normal", Findings("effusion", "left", cardiomegaly=False)),
        ("the heart is not enlarged , large opacity", Findings("opacity", size="large", cardiomegaly=False)),
        ("large heart . small mass", Findings("mass", size="small", cardiomegaly=True)),
        ("no cardiomegaly and basal opacity", Findings("opacity", level="lower", cardiomegaly=False)),
        ("left mass without effusion", Findings("mass", "left")),
    ],
)
def test_parse_free_text(text, expected):
    assert pt.parse(text) == expected


def test_swap_side_mirrors_the_findings(reports):
    other = {"left": "right", "right": "left", None: None}
    for f, text in reports[:500]:
        assert pt.parse(pt.swap_side(text)) == f._replace(side=other[f.side])
        assert pt.swap_side(pt.swap_side(text)) == text
    assert pt.swap_side("a leftover left : right .") == "a leftover right : left ."


def test_the_positive_findings():
    """The side goes with the kind; what is normal is no fact."""
    assert pt.parse("large left upper mass . the heart is enlarged .").facts() == {
        ("kind", "mass"), ("side", "mass", "left"), ("size", "large"), ("level", "upper"), ("cardiomegaly", True),
    }  # fmt: skip
    assert pt.parse("the lungs are clear . normal heart .").facts() == set()
    assert Findings(None, "left").facts() == set()  # a side without a kind
