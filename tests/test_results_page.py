"""docs/results.md is what its command makes of results/."""

import json

import pytest

from benchmarks.results_page import PAGE, RESULTS, page
from medm2g_jax.evaluate.figures import number
from medm2g_jax.evaluate.rows import figures_in


def test_the_page_is_what_the_command_makes_of_the_results():
    assert PAGE.read_text() == page(), "type: python -m benchmarks.results_page"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_every_result_says_how_it_came_and_is_on_the_page_whole(path):
    told, text = json.loads(path.read_text()), PAGE.read_text()
    for name in ("command", "model", "config", "contents", "date", "seconds", "seed", "records", "version"):
        assert told[name] not in ("", None), name
    assert told["command"].startswith("medm2g evaluate --model=")
    figures = figures_in(told)
    assert figures and all(f.protocol and number(f.value) in text and f"| {f.task} |" in text for f in figures)
