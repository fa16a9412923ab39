"""The commands of a user with published weights, at the published size, on this CPU: 24 GB of memory, 60 GB of disk,
an hour and a half. One after the other: `make test-full` runs them so."""

import os
import subprocess
import sys
from pathlib import Path

import published
import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[1]
FEW = ["--config.upstream=init", "--config.batch=1", "--config.eval_rows=1", "--config.sample.steps=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the published size, converted; the folder that MEDM2G_FULL_SIZE names keeps them."""
    kept = os.environ.get("MEDM2G_FULL_SIZE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("full")
    if not (folder / "weights" / "optimus").is_dir():
        published.full_weights(folder)
    return folder / "weights"


@pytest.fixture(scope="module")
def run_root(tmp_path_factory):
    kept = os.environ.get("MEDM2G_FULL_SIZE")
    return (Path(kept) if kept else tmp_path_factory.mktemp("full_run")) / "run"


def run(arguments: list[str], weights: Path | str) -> tuple[str, float]:
    """What a command prints, and its peak resident memory in GB."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", MEDM2G_SD_WEIGHTS=str(weights), XLA_FLAGS="")
    line = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(line, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * 1024 / 1e9
    print(out, f"peak resident memory {peak:.2f} GB")
    assert status == 0
    return out, peak


def test_three_steps(weights, run_root):
    line = ["medm2g_jax.main", "--config=configs/text_ct.py", "--config.steps=3", f"--workdir={run_root}", *FEW]
    out, peak = run(line, weights)
    assert "preset sd15" in out and peak < 22
    norms = dict(pair.rsplit(" ", 1) for pair in out.partition("gradient norms: ")[2].split("\n")[0].split(", "))
    # theta_c of every flow that trains, V and f_B of CT through the text flow, which is frozen but for its guides.
    assert norms.keys() >= {"ct/context", "ct/adapt", "ct/unet"} and all(float(v) > 0 for v in norms.values())


def test_three_steps_of_the_preset_between(tmp_path):
    """base from nothing: 256 px, no weights. (With Stable Diffusion's autoencoder alone: MEDM2G_SD_WEIGHTS.)"""
    line = ["medm2g_jax.main", "--config=configs/text_ct.py:base", "--config.steps=3", f"--workdir={tmp_path}", *FEW]
    out, peak = run([*line, "--config.sample.rows=1"], "")
    assert "preset base" in out and "text_ct: all done" in out and peak < 12
    norms = dict(pair.rsplit(" ", 1) for pair in out.partition("gradient norms: ")[2].split("\n")[0].split(", "))
    assert norms.keys() >= {"ct/context", "ct/adapt", "ct/unet"} and all(float(v) > 0 for v in norms.values())


def test_guided_samples(weights, run_root):
    """Text to X-ray as it is; text, CT and X-ray together from parameters stored in half precision."""
    root = run_root.with_name("two_rounds")
    for name in ("text_xray", "text_ct"):
        run(["medm2g_jax.main", f"--config=configs/{name}.py", "--config.steps=1", f"--workdir={root}", *FEW], weights)
    make = ["medm2g_jax", "generate", "--out", str(root / "out"), "--model"]
    one = ["--given", "text=large mass in the left upper lung .", "--make", "xray", "--steps", "50"]
    out, peak = run([*make, str(root / "text_xray"), *one], weights)
    assert "text -> xray: prompt tokens, guide tokens" in out and peak < 20
    both = ["--make", "text,ct,xray", "--steps", "4", "--dtype", "bfloat16"]
    out, peak = run([*make, str(root), *both], weights)
    assert "ct -> text: guide tokens" in out and peak < 20
