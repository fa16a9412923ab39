"""Compiler options: measured once, kept, and told what to be; what a jaxlib does not know goes alone."""

import json
import os
import platform
import subprocess
import sys

import pytest

from medm2g_jax import cpu, device
from medm2g_jax.errors import UserError

LEVEL = {"xla_backend_optimization_level": "1"}


def test_what_is_refused_is_dropped_alone(capsys):
    assert cpu.accepted(LEVEL | {"xla_cpu_no_such_option": "1", "xla_cpu_enable_fast_min_max": False}) == LEVEL | {
        "xla_cpu_enable_fast_min_max": False
    }
    said = capsys.readouterr().err
    assert said.count("is refused") == 1 and "xla_cpu_no_such_option=1" in said
    assert all(cpu.accepted(some) == some for some in cpu.CHOICES.values())
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        (dict(dots=10.0, stock=8.0, wide=7.0), "wide"),
        (dict(dots=10.0, stock=9.8, wide=9.7), "dots"),  # within what a measurement is off by
    ],
)
def test_the_fastest_is_kept_and_read_again(times, choice, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "probe", lambda options: dict.fromkeys(options, 20.0) | times)
    assert cpu.kept(tmp_path / "cache") == cpu.CHOICES[cpu.FIRST]  # an image is made without a measurement
    assert cpu.choose(tmp_path / "cache") == cpu.kept(tmp_path / "cache") == cpu.CHOICES[choice]
    (path,) = (tmp_path / "cache").iterdir()
    kept = json.loads(path.read_text())
    assert kept["processor"] == cpu.processor() and kept["milliseconds"]["stock"] == times["stock"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and repr(choice) in said and str(path) in said and cpu.VARIABLE in said
    monkeypatch.setattr(cpu, "probe", None)  # nobody measures twice
    assert cpu.choose(tmp_path / "cache") == cpu.CHOICES[choice] and not capsys.readouterr().err
    # Of two that measure at once, the first has said what both take.
    assert cpu._keep(path, "{}") and json.loads(path.read_text()) == kept
    (tmp_path / "file").write_text("")
    assert not cpu._keep(tmp_path / "file" / "x", "{}")


def test_the_environment_overrides(monkeypatch):
    told = device._options.__wrapped__
    monkeypatch.setattr(cpu, "kept", lambda folder: {"from": str(folder)})
    monkeypatch.setattr(cpu, "choose", lambda folder: {"measured for": str(folder)})
    for text, options in (("none", {}), ("xla_cpu_prefer_vector_width=512, xla_cpu_enable_fast_min_max=False",
                          {"xla_cpu_prefer_vector_width": "512", "xla_cpu_enable_fast_min_max": False})):  # fmt: skip
        monkeypatch.setenv(cpu.VARIABLE, text)
        assert told() == options
    for text in ("fast", "xla_cpu_prefer_vector_width", ""):
        monkeypatch.setenv(cpu.VARIABLE, text)
        with pytest.raises(UserError, match="MEDM2G_CPU_OPTIONS: expected none, or xla_NAME=VALUE"):
            told()
    monkeypatch.delenv(cpu.VARIABLE)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    assert told() == {"from": "/somewhere"} and told(measure=True) == {"measured for": "/somewhere"}


def test_the_probe_runs_and_measures_what_is_alike_once():
    spent = cpu.probe({"a": {}, "b": dict(LEVEL), "c": {}})
    assert spent["a"] == spent["c"] and 0 < spent["a"] < 1e4 and 0 < spent["b"] < 1e4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_a_large_buffer_that_was_freed_is_used_again():
    """Without page faults, which is what the system's handing it out anew would cost; the environment's word holds."""
    code = (
        "import numpy as np, resource; from medm2g_jax.device import keep_memory; keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "np.ones(2**26, np.uint8); before = faults(); [len(np.ones(2**26, np.uint8)) for _ in range(50)]\n"
        "print(faults() - before)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = []
    for told in ({}, {"MALLOC_ARENA_MAX": "8"}):
        done = subprocess.run([sys.executable, "-c", code], env=own | told, text=True, capture_output=True, check=True)
        found.append(int(done.stdout))
    assert 10 * found[0] < found[1], found
