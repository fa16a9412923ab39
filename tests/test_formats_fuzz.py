"""No file, damaged or hostile, ends the process, reads elsewhere, or takes 5 s or 2 GB: see tests/fuzz_formats.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = 1800  # seconds on a busy machine: it hangs


def fuzz(folder: Path, seed: int, count: int) -> None:
    here = Path(__file__).parent
    line = [sys.executable, str(here / "fuzz_formats.py"), str(seed), str(count), str(folder)]
    done = subprocess.run(line, cwd=here.parent, capture_output=True, text=True, env=environment(), timeout=SLOW)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:], sorted(folder.glob("now*")))
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["slowest"][0] < 5 and found["grown"] < 2, found  # seconds of CPU, GB
    taken = sorted(name for name in found["became"] if name.startswith("taken"))
    assert taken == [], taken  # nothing made on purpose is read
    assert found["became"]["refused"] > count / 3 and found["became"]["read"] > count / 10, found


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}


def test_a_tenth(tmp_path):
    fuzz(tmp_path, 1, 1000)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand(tmp_path, seed):
    fuzz(tmp_path, 100 + seed, 1000)
