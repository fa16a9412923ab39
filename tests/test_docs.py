"""README and docs: links lead somewhere, and commands name what there is."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from medm2g_jax.cli import VERBS
from medm2g_jax.rounds import HOWS, TASKS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|configs|launch|benchmarks|tests)/[\w./]+\.\w+)", page.read_text()):
        assert (ROOT / name).exists(), name


def commands(page: Path) -> list[list[str]]:
    """What its code blocks type, words of one command each."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(\w+=\S+ )*(medm2g|python -m) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_verbs_and_configs_that_exist(page):
    for words in commands(page):
        words = [w for w in words if not re.match(r"[A-Z0-9_]+=", w)]
        if words[0] == "medm2g":
            assert words[1] in VERBS, words
        for config in (w.removeprefix("--config=") for w in words if w.startswith("--config=configs/")):
            path, _, rest = config.partition(":")
            assert (ROOT / path).exists(), config
            runpy.run_path(str(ROOT / path))["get_config"](rest)  # an unknown word is an error


def test_readme_is_a_page_and_knows_every_verb():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    for verb in VERBS:
        assert f"`medm2g {verb}" in text, verb
    tasks = (ROOT / "docs" / "train.md").read_text()
    assert all(f"`{word}`" in tasks for word in (*TASKS, *HOWS))
