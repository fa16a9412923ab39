"""What pip installs: a wheel that works in an empty folder, and pins, ranges and extras that agree."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medm2g_jax.errors import UserError
from medm2g_jax.main import config_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel of this tree; built in a copy, since building writes beside the sources."""
    path = tmp_path_factory.mktemp("wheel")
    source = path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for name in ("medm2g_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--no-index", "-w", str(path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(path.glob("*.whl"))) as file:
        file.extractall(path / "installed")
    return path / "installed"


def test_an_installed_package_finds_its_configs(wheel, tmp_path):
    """In an empty folder: plan, the trainer and evaluate take both forms, and get as far as what is not there."""
    tools = (
        "import sys; from medm2g_jax import cli, main, __file__ as here; assert here.startswith(sys.path[1]), here; "
    )
    program = (
        tools
        + """
def run(entry, *arguments):
    sys.argv = ["medm2g", *arguments]
    try:
        entry()
    except SystemExit as left:
        print("exit", left.code, file=sys.stderr)

run(cli.main, "plan", "--config=configs/text_ct.py:tiny", "--workdir=w")
run(cli.main, "plan", "--config=ct_mri:tiny", "--workdir=w", "--config.batch=2")
run(cli.main, "evaluate", "--model", "RUN")
run(main.console, "--config=configs/text_ct.py:tiny", "--workdir=w", "--config.upstream=require")
"""
    )
    line = [sys.executable, "-c", "import sys; sys.path.insert(1, sys.argv[1]); " + program, str(wheel)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "text_ct" in done.stdout and "ct_mri" in done.stdout, done.stdout + done.stderr
    assert "no config file" not in done.stderr
    assert "no finished round" in done.stderr and "text_ct needs the result of" in done.stderr, done.stderr


def test_a_config_is_a_path_or_a_name(tmp_path, monkeypatch):
    own = str(ROOT / "configs" / "text_ct.py")
    monkeypatch.chdir(tmp_path)
    for form in ("configs/text_ct.py", "configs/text_ct", "text_ct.py", "text_ct"):
        assert config_file(f"{form}:tiny") == f"{own}:tiny" and config_file(form) == own
    # What the user has comes first, and a path elsewhere is never taken for a name.
    (tmp_path / "configs").mkdir()
    for place in ("configs/mine.py", "configs/text_ct.py"):
        (tmp_path / place).write_text("")
    assert config_file("mine:tiny") == "configs/mine.py:tiny" and config_file("text_ct") == "configs/text_ct.py"
    assert config_file(f"{tmp_path}/configs/mine.py:a,b") == f"{tmp_path}/configs/mine.py:a,b"
    (tmp_path / "ldm").mkdir()
    assert config_file("ldm:ct") == str(ROOT / "configs" / "ldm.py") + ":ct"
    for wrong in ("text-ct:tiny", "other/text_ct.py", f"{tmp_path}/text_ct.py", "", ":tiny", "configs/__init"):
        with pytest.raises(UserError, match="no config file.*--config=text_ct:tiny.*align, ct_mri"):
            config_file(wrong)


def test_every_pin_is_in_its_range_and_fits_the_demo(wheel):
    said = map(Requirement, metadata.Distribution.at(next(wheel.glob("*.dist-info"))).requires)
    ranges = {canonicalize_name(r.name): r.specifier for r in said if r.marker is None}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    exact = {
        canonicalize_name(m[1]): m[2] for m in (re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)$", x) for x in lines) if m
    }
    assert len(exact) > 15
    assert {n: v for n, v in exact.items() if n in ranges and not ranges[n].contains(v)} == {}
    # gradio 6.31, the demo's floor, asks for pillow<13,>=8: no pillow that we allow is one that it refuses.
    gradio = Requirement("pillow<13.0,>=8.0").specifier
    assert gradio.contains(exact["pillow"])
    assert not any(ranges["pillow"].contains(v) and not gradio.contains(v) for v in ("7.0", "13.0.0", "13.1", "14.0"))
