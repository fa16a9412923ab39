"""The rows of configs/tasks.py: each names what there is, and stands in the documentation."""

import runpy
from pathlib import Path

import pytest

from medm2g_jax.evaluate import measure
from medm2g_jax.evaluate.downstream import Plan
from medm2g_jax.evaluate.judge import PUBLIC
from medm2g_jax.evaluate.protocols import PROTOCOLS
from medm2g_jax.evaluate.rows import Rows
from medm2g_jax.loading import locate
from medm2g_jax.modality import MODALITIES

ROOT = Path(__file__).parents[1]
CONFIG = runpy.run_path(str(ROOT / "configs" / "tasks.py"))
STREAMS = {s for m in MODALITIES.values() for s in m.streams}


@pytest.mark.parametrize("name", CONFIG["TASKS"])
def test_a_task_names_what_there_is(name):
    task = CONFIG["get_config"](name)
    readers = dict(task.readers)
    cases = [case for how in ("classified", "segmented") for case in readers.pop(how, ())]
    Plan(**readers)
    cases += [*task.synthesis, *(((given,), target) for given, target in task.sets), *task.joint]
    named = [*task.reports, *task.space, *(s for given, _ in cases for s in given)]
    named += [s for _, made in cases for s in ([made] if isinstance(made, str) else made)]
    assert set(named) <= STREAMS
    assert set(task.protocols) <= {*PUBLIC, "rexrank", "chexgenbench"} and set(task.protocols) <= PROTOCOLS.keys()
    assert named or task.paper or task.findings
    assert not task.protocols or task.paper or task.published, "whose figures stand beside ours"
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert f"`{name}`" in page or f"tasks.py:{name}" in page


def test_figures_of_the_model_in_the_box_are_left_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Rows({"task": "phantom"})
    rows("nothing", list)
    measure._write(rows, locate("phantom"), "phantom", "", "")
    assert (tmp_path / "evaluation.json").is_file()
