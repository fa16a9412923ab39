"""`medm2g doctor` on set-ups that are really broken: it runs, and names what is missing and what mends it."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from medm2g_jax import doctor, loading
from medm2g_jax.convert import converted

ROOT = Path(__file__).parents[1]


def said(tmp_path: Path, *first: Path, memory: int = 0, **env: str) -> tuple[int, str]:
    """(exit status, what is printed) of the verb, in an empty folder; `first` on the path before all else."""
    path = os.pathsep.join(map(str, (*first, ROOT)))
    known = {k: v for k, v in os.environ.items() if not k.startswith(("MEDM2G_", "JAX_", "XLA_"))}
    known |= dict(PYTHONPATH=path, XDG_CACHE_HOME=str(tmp_path / "cache")) | env
    limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory))) if memory else None
    line = [sys.executable, "-m", "medm2g_jax", "doctor"]
    done = subprocess.run(line, cwd=tmp_path, env=known, capture_output=True, text=True, timeout=240, preexec_fn=limit)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def found(text: str, what: str) -> list[str]:
    """The lines that begin with a mark and this word, each with the one below, which says what mends it."""
    lines = text.splitlines()
    return [" ".join(lines[i : i + 2]) for i, line in enumerate(lines) if line[4:].startswith(what)]


def test_where_nothing_is_missing_it_says_so(tmp_path):
    status, text = said(tmp_path)
    assert status == 0 and text.splitlines()[-1] == "nothing to mend", text
    for word in ("python", "packages", "memory", "disk", "cache", "devices", "model", "data", "weights", "make demo"):
        assert len(found(text, word)) == 1, text
    assert "phantom, in the box: text, xray, ct, mri" in text and "9 stages in runs/phantom-tiny, 9 to train" in text
    assert not list(tmp_path.glob("runs"))


def test_six_broken_set_ups_are_each_named_with_what_mends_them(tmp_path):
    """All at once: a GPU that jax has no plug-in for, no gradio, another version of flax, a cache that cannot be
    written, data that are nowhere, converted weights with a file missing."""
    tools, packages, weights = (tmp_path / name for name in ("bin", "packages", "weights"))
    tools.mkdir()
    (tools / "nvidia-smi").write_text('#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\n')
    (tools / "nvidia-smi").chmod(0o755)
    (packages / "flax-0.8.0.dist-info").mkdir(parents=True)
    (packages / "flax-0.8.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.8.0\n")
    (packages / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nknown = m.distribution\n"
        "def distribution(name):\n    if name == 'gradio':\n        raise m.PackageNotFoundError(name)\n"
        "    return known(name)\nm.distribution = distribution\n"
    )
    for part in converted.COMMANDS:
        (weights / part).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    status, text = said(
        tmp_path,
        packages,
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        MEDM2G_DATA=str(tmp_path / "nowhere"),
        MEDM2G_SD_WEIGHTS=str(weights),
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file" / "cache"),
    )
    assert status == doctor_status(text) == 3
    for what, *words in (
        ("devices", "!!", "though this machine has GPU 0: NVIDIA H200", "pip install 'jax[cuda13]=="),
        ("extra demo", "-", "gradio>=6.31 is not here", "pip install 'gradio>=6.31'"),
        ("packages", "!!", "flax 0.8.0 is here, and flax>=0.12.8 is asked for", "pip install 'flax>=0.12.8'"),
        ("cache", "!!", "file/cache cannot be written", "JAX_COMPILATION_CACHE_DIR=FOLDER"),
        ("data", "!!", str(tmp_path / "nowhere"), ""),
        ("weights", "!!", "no converted weights there", "medm2g convert"),
    ):
        (line,) = found(text, what)
        assert all(word in line for word in words), (line, text)


def doctor_status(text: str) -> int:
    return 3 if "to mend; exit status 3" in text else 0


def test_it_runs_where_jax_does_not(tmp_path):
    """A jax that cannot be imported, and a platform that is not here: each named once, and the rest is still said."""
    broken = tmp_path / "broken" / "jax"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('undefined symbol: xla_nothing', name='jaxlib')\n")
    (broken.parent / "jaxlib-0.5.0.dist-info").mkdir()
    (broken.parent / "jaxlib-0.5.0.dist-info" / "METADATA").write_text("Name: jaxlib\nVersion: 0.5.0\n")
    status, text = said(tmp_path, broken.parent)
    assert status == 3 and text.count("undefined symbol") == 1 and "--force-reinstall jaxlib" in text, text
    (line,) = found(text, "packages")
    assert "jaxlib 0.5.0 is here" in line and "jax needs it" in line and "pip install 'jaxlib<=" in line
    assert found(text, "memory") and found(text, "disk")


def test_a_limit_of_memory_is_seen_and_what_dies_of_it_is_said(tmp_path):
    status, text = said(tmp_path, memory=600 * 2**20)
    (line,) = found(text, "memory")
    assert status == 3 and line.startswith("!!") and "0.6 GB allowed by ulimit -v" in line, text


def test_a_box_that_is_not_whole_is_named_with_what_brings_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "BOX", epath.Path(tmp_path))
    shutil.copytree(ROOT / "medm2g_jax" / "models" / "phantom", tmp_path / "phantom")
    weights = tmp_path / "phantom" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    for word in ("CRC", "no such file"):
        with pytest.raises(doctor._Lacks) as lack:
            doctor._box()
        finding = doctor.Finding(*lack.value.args)
        assert finding.mark == doctor.BROKEN and str(weights) in finding.said and word in finding.said
        assert re.search(r"-m pip install --force-reinstall --no-deps \S", finding.mend)
        weights.unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "phantom")
    with pytest.raises(doctor._Lacks, match="medm2g demo --model RUN"):
        doctor._box()


def test_memory_between_the_page_and_training_is_enough_for_one(monkeypatch):
    monkeypatch.setattr(doctor, "_memories", lambda: iter([(doctor.PAGE + 1, "free"), (doctor.TRAINING * 9, "free")]))
    assert doctor._memory().mark == doctor.LACKS
    monkeypatch.setattr(doctor, "_memories", lambda: iter([(doctor.TRAINING, "free")]))
    assert doctor._memory().mark == doctor.OK


@pytest.mark.parametrize("version", ((3, 10, 4), (3, 14, 0)))
def test_a_python_that_is_not_supported_is_named(monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    assert doctor._python().mark == doctor.BROKEN
