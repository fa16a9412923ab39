"""The training entry: what it says at the door, before jax starts."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medm2g_jax.errors import UserError
from medm2g_jax.main import processes, read_config

HERE = Path(__file__).parent
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"}


def main(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu", **environment}
    line = [sys.executable, "-m", "medm2g_jax.main", "--config=configs/image_vae.py:tiny", *arguments]
    return subprocess.run(line, cwd=HERE.parent, env=env, text=True, capture_output=True, timeout=100)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES: expected a whole number, found ''"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES: .*found 'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1.0"}, "JAX_PROCESS_ID: .*found '1.0'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: .*found '-1'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: expected 0 to .*found 2 of"),
        ({"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "found 0 of JAX_NUM_PROCESSES=0"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set and JAX_PROCESS_ID is not"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is set and JAX_NUM_PROCESSES is not"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "expected HOST:PORT of process 0, found 'localhost'"),
    ],
)
def test_what_launchers_say_is_read_or_refused(environment, message):
    with pytest.raises(UserError, match=message):
        processes(ADDRESS | environment)


def test_what_launchers_say_is_read():
    assert processes(ADDRESS) == processes({}) == {}
    assert processes(ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}) == dict(num_processes=4, process_id=3)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], ADDRESS, "JAX_COORDINATOR_ADDRESS asks for several processes"),
        (["--distributed"], {}, "--distributed asks for several processes"),
        ([], ADDRESS | {"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES: expected"),
        (["--config.log_every=0"], {}, "config.log_every: expected a whole number from 1"),
    ],
)
def test_one_line_and_exit_2(arguments, environment, message, tmp_path):
    done = main(*arguments, f"--workdir={tmp_path}/run", **environment)
    assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    ["seed=-1", "steps=0", "accumulate=0", "eval_rows=-1", "checkpoint_every=0", "lr=nan", "lr=0", "b1=1", "warmup=1.5",
     "clip=0", "keep=0", "loss.l1=-1", "loss.mse=inf", "sample.eta=2", "sample.guidance=nan", "net.width=0",
     "data.train=0", "image_size=-64", f"seed={2**32}", f"steps={2**31}"],
)  # fmt: skip
def test_every_number_has_its_range(override):
    field, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"^config\.{field}: expected a (whole|finite) number.*, found {value}"):
        read_config(["--config=" + str(HERE.parent / "configs/image_vae.py:tiny"), f"--config.{override}"])


def test_so_has_an_upstream_stage():
    with pytest.raises(UserError, match=r"^config\.stages\.text_vae\.batch: expected .* found 0"):
        read_config([f"--config={HERE.parent}/configs/ldm.py:text,tiny", "--config.stages.text_vae.batch=0"])
    with pytest.raises(UserError, match=r"^config\.stages\.text_vae\.loss: expected a weight above 0.*ce, kl"):
        off = ["--config.stages.text_vae.loss.ce=0", "--config.stages.text_vae.loss.kl=0"]
        read_config([f"--config={HERE.parent}/configs/ldm.py:text,tiny", *off])


def test_a_thread_that_hangs_does_not_keep_a_failed_process():
    code = (
        "import threading, time\nfrom medm2g_jax import main\nfrom medm2g_jax.errors import UserError\n"
        "def fail(*_, **__):\n    threading.Thread(target=time.sleep, args=(300,)).start()\n"
        "    raise UserError('full')\n"
        "main.app.run = fail\nmain.console()\n"
    )
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: full\n") and time.time() - began < 30
