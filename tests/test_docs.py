"""README and docs: links lead somewhere, and commands name what there is."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
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


def typed(page: Path) -> list[list[str]]:
    """What its code blocks type, words of one command each: blocks of a language of their own are not typed."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "\n".join(lines for language, lines in blocks if not language).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(page: Path) -> list[tuple[dict[str, str], list[str]]]:
    """Of these our own: what each puts into the environment, and its words."""
    out = []
    for words in typed(page):
        env = dict(w.split("=", 1) for w in words if re.match(r"[A-Z0-9_]+=", w))
        words = words[len(env) :]
        if words[0] == "medm2g" or words[:2] == ["python", "-m"]:
            out.append((env, words))
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_verbs_and_configs_that_exist(page):
    for words in typed(page):
        assert re.match(r"(.*/)?(medm2g|python3?|pip|make)$|[A-Z0-9_]+=", words[0]), words
    for _, words in commands(page):
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_of_verbs_in_sentences_and_tables_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for line in re.findall(r"`medm2g ([^`]*)`", text):
        verb, *words = line.split()
        parser = argparse.ArgumentParser()
        VERBS[verb].arguments(parser)
        for option in (w.partition("=")[0] for w in words if re.match("--?[a-z]", w)):
            field = VERBS[verb].overrides and option.startswith("--config.")
            assert field or option in parser._option_string_actions, line


def test_the_site_of_docs_is_built_without_a_warning(tmp_path):
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
