"""Every set that is known: prepared, trained on, generated from. Slow: programs of a model a set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepared import SETS

pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", SETS)
def test_a_set_as_downloaded_serves_a_model(name, tmp_path):
    script = Path(__file__).with_name("prepared.py")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, script, name, tmp_path], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"made {SETS[name][-1]} of " in done.stdout
