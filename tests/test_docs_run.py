"""What README and docs print is typed here as it stands there, in the order of each page: slow, so `full`.

The model is the one in the box. What a page leaves to the reader is in ALIKE; what needs published weights, or
hours that are not here, is left out, or made smaller by LESS.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_docs import PAGES, ROOT, commands

import medm2g_jax
from medm2g_jax import cli
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.main import read_config

pytestmark = pytest.mark.full

# What the pages leave to the reader. The model is the one in the box; DIR is written by `desk`.
ALIKE = {"RUN": "phantom", "runs/phantom-tiny": "phantom", "manifest:IU_XRAY": "manifest:DIR"}
LESS = {"evaluate": ("--rows", "8"), "audit": ("--rows", "8")}  # of what takes minutes


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which what the pages name lies: images, volumes, texts, a prepared set."""
    import nibabel
    from PIL import Image

    root = tmp_path_factory.mktemp("reader")
    source = Phantom(size=64, seed=3, train=0, val=0, test=6)
    pixels = lambda stream: source.images(range(6), stream)[..., 0]  # noqa: E731
    grey = lambda x: Image.fromarray(np.uint8(127.5 * (x + 1)))  # noqa: E731
    (root / "scans").mkdir()
    for n, image in enumerate(pixels("ct")):
        grey(image).save(root / "scans" / f"{n}.png")
    for name in ("film.png", "a.png", "b.png"):
        grey(pixels("ct")[0]).save(root / name)
    grey(pixels("mri:t2")[0]).save(root / "t2.png")
    affine = np.diag([-4.0, -4.0, 5.0, 1.0])
    for name, stream in (("t1", "mri:t1"), ("t2", "mri:t2"), ("mr", "mri:t2")):
        volume = np.int16(500 * (pixels(stream) + 1)).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(volume, affine), root / f"{name}.nii.gz")
    for study in range(4):
        folder = root / "STUDIES" / f"p{study}"
        folder.mkdir(parents=True)
        for contrast in ("t1", "flair"):
            volume = np.int16(500 * (pixels(f"mri:{contrast}") + 1)).transpose(2, 1, 0)
            nibabel.save(nibabel.Nifti1Image(volume, affine), folder / f"{contrast}.nii.gz")
    (root / "DIR").mkdir()
    rows = []
    for n in range(6):
        images = {stream: f"{n}_{stream.replace(':', '_')}.png" for stream in ("ct", "xray", "mri:t1", "mri:t2")}
        for stream, name in images.items():
            grey(pixels(stream)[n]).save(root / "DIR" / name)
        if n % 2:
            del images["ct"]  # which is to be made
        text = source.read(n, "text", np.random.default_rng(n))
        split = ("train", "test", "test")[n % 3]
        rows.append(dict(id=f"p{n}", subject=f"p{n}", split=split, images=images, text=text, license="CC0"))
    (root / "DIR" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "reports.txt").write_text("large mass in the left upper lung .\nno mass .\n")
    (root / "configs").symlink_to(ROOT / "configs")
    return root


def typed(page: Path) -> list[list[str]]:
    return [[w for w in words if not re.match(r"[A-Z0-9_]+=", w)] for words in commands(page)]


def test_readme_s_commands(desk, monkeypatch):
    monkeypatch.chdir(desk)
    for words in typed(ROOT / "README.md"):
        run(words)


@pytest.mark.parametrize("name", ("generate", "embed", "audit", "evaluate", "install", "index"))
def test_a_page_s_commands(desk, monkeypatch, name):
    monkeypatch.chdir(desk)
    for words in typed(ROOT / "docs" / f"{name}.md"):
        run(words)


def run(words: list[str]) -> None:
    """Type a command. Of a training the config is made and no step; a page in the browser has tests of its own."""
    print("$", shlex.join(words), flush=True)
    words = [ALIKE.get(word, word) for word in words]
    if words[0] == "python":
        assert read_config([word for word in words if word.startswith("--config")]).stage
        return
    verb = words[1]
    if verb == "demo":
        return
    if verb == "prepare":
        words = ["MADE" if word == "DIR" else word for word in words]
    for word in ("out", "OUT", "results", "audit"):  # which another command has written
        shutil.rmtree(word, ignore_errors=True)
    try:
        cli.main([*words[1:], *LESS.get(verb, ())])
    except SystemExit as left:  # 3: done, and something is to be looked at
        assert left.code in (0, None, cli.SEEN), words


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "generate.md", ROOT / "docs" / "extend.md"],
                         ids=lambda p: p.stem)  # fmt: skip
def test_lines_of_python(desk, monkeypatch, page):
    """Each page's Python in one process, top to bottom."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks and page in PAGES
    program = "\n".join(blocks).replace("runs/phantom-tiny", "phantom")
    if page.stem == "extend":
        program += (
            "\nimport medm2g_jax\nmodel = medm2g_jax.load('phantom')\nimport numpy as np\n"
            "asked = dict(given={'text': 'large mass in the left upper lung .'}, make=['ct'], steps=5, eta=0.0)\n"
            "ours, theirs = (model.generate(**asked, sampler=s).samples['ct'] for s in ('straight', 'ddim'))\n"
            "assert np.abs(ours - theirs).max() < 1 and ours.std() > 100\n"
        )
    (desk / f"{page.stem}.py").write_text(program)
    path = str(Path(medm2g_jax.__file__).parents[1])
    env, line = dict(os.environ, PYTHONPATH=path), [sys.executable, f"{page.stem}.py"]
    done = subprocess.run(line, cwd=desk, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
