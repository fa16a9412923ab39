"""What README and docs print is typed here as it stands there, in the order of each page: slow, so `full`.

The model is the one in the box, and every command a process of its own, compiled as users have it. What a page leaves
to the reader is written by tests/reader.py or stands in ALIKE; what takes minutes is made smaller by LESS and SMALL;
what is not typed stands in LEFT, each with its reason.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reader
from test_docs import PAGES, ROOT, commands

import medm2g_jax
from medm2g_jax import cli

pytestmark = pytest.mark.full

ALIKE = {"RUN": "phantom", "RUN_OR_W": "phantom", "runs/phantom-tiny": "phantom"}
ALIKE |= {f"manifest:{name}": "manifest:XRAY" for name in ("IU_XRAY", "CHEXPERT", "RSNA", "SET")}
LESS = {"evaluate": ("--rows", "8"), "audit": ("--rows", "8")}
SMALL = {r"regression=\d+": "regression=10", r"steps=\d+": "steps=5", r"base=1\d+": "base=100", r"asked=\d+": "asked=8"}
LEFT = {
    "demo": "tests/test_demo.py drives its page",
    "--topology": "needs the TPU compiler of `make plan-env`; tests/test_plan.py and test_sweep.py have the rest",
    "pytest": "a test",
}
# Of `make` and `pip`, CI types the one and tests/test_packaging.py the other. Of a training the plan is made;
# tests/test_end_to_end.py and test_alone.py train.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("reader")
    reader.write(root)
    shutil.copytree(ROOT / "configs", root / "configs")
    tasks = (root / "configs" / "tasks.py").read_text()
    for large, less in SMALL.items():
        assert re.search(large, tasks)
        tasks = re.sub(large, less, tasks)
    (root / "configs" / "tasks.py").write_text(tasks)
    return root


@pytest.fixture
def desk(written, tmp_path, monkeypatch):
    """A folder in which what the pages name lies, for one page."""
    shutil.copytree(written, tmp_path / "desk", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda p: p.stem)
def test_a_page_s_commands(desk, page):
    for env, words in commands(page):
        typed(words, **env)


def typed(words: list[str], **env: str) -> None:
    """Type a command."""
    words = [ALIKE.get(word, word) for word in words]
    print("$", shlex.join(words), flush=True)
    if left := [why for what, why in LEFT.items() if any(word.partition("=")[0] == what for word in words)]:
        print("not typed:", *left, flush=True)
        return
    if words[0] == "python":
        words = ["medm2g", "plan", *(word for word in words if word.startswith(("--config", "--workdir")))]
    verb = words[1]
    if "--out" in words:  # which another command has written
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    done = process("-m", "medm2g_jax", *words[1:], *LESS.get(verb, ()), **env)
    print(done.stdout, done.stderr[-3000:], flush=True)
    assert done.returncode in (0, cli.SEEN), words  # 3: done, and something is to be looked at
    assert "the data cannot be read" not in done.stdout + done.stderr


def process(*words: str, **env: str) -> subprocess.CompletedProcess:
    known = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    known |= dict(env, PYTHONPATH=str(Path(medm2g_jax.__file__).parents[1]))
    return subprocess.run([sys.executable, *words], env=known, capture_output=True, text=True)


# What a page's lines of Python stand on, and what is asked of them.
BEFORE = {
    "formats": "import medm2g_jax\nmodel = medm2g_jax.load('phantom')\n",
    "metrics": """
import numpy as np
import medm2g_jax
model = medm2g_jax.load("phantom")
rng = np.random.default_rng(0)
real = np.clip(rng.normal(size=(12, 64, 64, 1)).cumsum(1) / 8, -1, 1)
made = np.clip(real + 0.1 * rng.normal(size=real.shape), -1, 1)
mask, subjects = np.ones(real.shape, bool), np.arange(12)
volumes = [np.float32(1000 * real[..., 0]) for _ in range(2)]
made_volumes, masks = [x + 10 for x in volumes], [np.ones(x.shape, bool) for x in volumes]
files = [f"scans/{n}.png" for n in range(6)]
made_files = files[::-1]
reports = [f"mass in the {side} lung . {size} effusion ." for side in ("left", "right") for size in "abc"]
made_reports = reports[1:] + reports[:1]
images, texts = model.embed("ct", files), model.embed("text", reports)
""",
}
AFTER = {
    "extend": """
import medm2g_jax
import numpy as np
model = medm2g_jax.load("phantom")
asked = dict(given={"text": "large mass in the left upper lung ."}, make=["ct"], steps=5, eta=0.0)
ours, theirs = (model.generate(**asked, sampler=s).samples["ct"] for s in ("straight", "ddim"))
assert np.abs(ours - theirs).max() < 1 and ours.std() > 100
""",
    "formats": """
back = formats.read_volume("ct_head")
import numpy as np
assert back.values.shape == volume.values.shape and back.unit == "HU" and np.allclose(back.affine, volume.affine)
""",
}


def python(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)], ids=lambda p: p.stem)
def test_a_page_s_lines_of_python(desk, page):
    """In one process, top to bottom."""
    program = python(page).replace("runs/phantom-tiny", "phantom")
    Path("page.py").write_text(f"{BEFORE.get(page.stem, '')}{program}{AFTER.get(page.stem, '')}")
    done = process("page.py")
    assert done.returncode == 0, done.stderr[-2000:]
