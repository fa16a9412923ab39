"""Notebooks: whole, without outputs, and, marked `full`, run from the first cell to the last."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHORT = {"STEPS = None": "STEPS = 2"}  # what a run of it is cut down to


def code(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_whole_and_keeps_no_output(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and len(NOTEBOOKS) == 3
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for source in code(path):
        ast.parse(source)
    assert path.stem != "any_to_any" or len(code(path)) == 10


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path):
    """All cells in one process and an empty folder, as a kernel would; a last expression is only what is shown."""
    program = "\n\n".join(code(path))
    for long, short in SHORT.items():
        program = program.replace(long, short)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, "-c", program]  # as in a kernel there is no file that the processes of `prepare` would run
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
