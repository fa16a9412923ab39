"""A run from the command line: resumes after kill -9 with the same bits, on any mesh; bad input is one line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax._src.array import ArrayImpl
from micro import NET, flags, micro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medm2g_jax import beside, rounds, run
from medm2g_jax.config import stage_graph
from medm2g_jax.data.contents import contents_of
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.errors import UserError
from medm2g_jax.main import read_config
from medm2g_jax.train import checkpoint, loop, results, setup, sharding
from medm2g_jax.train.setup import assemble

HERE = Path(__file__).parent
STAGE = "ldm_xray"  # image_vae, align_text_xray, ldm_xray: three stages, one of each cheap kind


def command(root, *extra: str) -> list[str]:
    net = [f"--config.net.{k}={v}" for k, v in NET.items()]
    small = ["--config.image_size=32", "--config.data.train=96", "--config.data.val=32", "--config.data.test=16"]
    own = [f"--config.{k}=8" for k in ("batch", "steps", "eval_rows")] + [
        "--config.checkpoint_every=2",
        "--config.log_every=2",
    ]
    own += ["--config.sample.steps=2"]
    for stage in ("image_vae", "align_text_xray"):
        own += [f"--config.stages.{stage}.{k}=8" for k in ("batch", "steps", "eval_rows")]
        own += [f"--config.stages.{stage}.checkpoint_every=2"]
    line = [sys.executable, "-m", "medm2g_jax.main", "--config=configs/ldm.py:xray,tiny", f"--workdir={root}"]
    return [*line, *net, *small, *own, *extra]


def start(root, *extra: str, devices: int = 1) -> subprocess.Popen:
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags(devices))
    return subprocess.Popen(command(root, *extra), cwd=HERE.parent, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def final_state(root, stage: str) -> dict[str, np.ndarray]:
    """Everything of the last checkpoint: parameters, EMA, optimizer slots."""
    import orbax.checkpoint as ocp

    folder = root / stage / "checkpoints"
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    tree = ocp.PyTreeCheckpointer().restore(folder / str(step) / "state")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "run"
    process = start(root, "--config.stages.image_vae.show_every=4", "--config.show_every=4")
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out[-3000:]
    return root


def config_of_run(root):
    """The config of the last stage of `command`, whose shared fields are those of the run."""
    return read_config([argument for argument in command(root) if argument.startswith("--config")])


def wait_for(process: subprocess.Popen, happened, seconds: float = 200.0) -> None:
    deadline = time.time() + seconds
    while not happened() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize("times", [2, pytest.param(5, marks=pytest.mark.full)])
def test_killed_several_times_ends_with_the_same_bits(uninterrupted, tmp_path, times):
    """Killed while saving, in an upstream stage, beside which another trains, and in the last, each at a seeded moment;
    five times: before any step, in a first one and after a save as well."""
    root = tmp_path / "run"
    rng = np.random.default_rng(0)
    moments = [
        lambda: (root / "image_vae" / "config.json").exists(),  # before the first step of the first stage
        lambda: any((root / "image_vae" / "checkpoints").glob("*tmp*")),  # in mid-save, upstream
        lambda: (root / "align_text_xray" / "log.jsonl").exists(),  # in the first step of the second stage
        lambda: (root / STAGE / "checkpoints" / "2").exists(),
        lambda: any((root / STAGE / "checkpoints").glob("*tmp*")),
    ]
    said = ""
    for moment in moments if times == 5 else (moments[1], moments[4]):
        process = start(root)
        wait_for(process, moment)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        said += process.communicate()[0]
    process = start(root)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out[-3000:]
    assert f"{root / 'owner.json'}: taken over from process " in out and not list(root.glob("owner.json*"))
    assert re.search("== (align_text_xray|image_vae) .*, beside (align_text_xray|image_vae)", said), said
    for stage in ("image_vae", "align_text_xray", STAGE):
        whole, pieces = final_state(uninterrupted, stage), final_state(root, stage)
        assert whole.keys() == pieces.keys()
        different = [k for k in whole if not np.array_equal(whole[k], pieces[k])]
        assert not different, (stage, different[:5])
        rows = [json.loads(line)["step"] for line in (root / stage / "log.jsonl").read_text().splitlines()]
        assert rows == sorted(rows)


def test_a_stages_process_ends_with_its_run(tmp_path):
    """Whose end is that of the process' standard input: here from the beginning, where it would wait for its turn."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags(1)) | {beside.STAGE: "image_vae"}
    told = dict(cwd=HERE.parent, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    done = subprocess.run(command(tmp_path / "run"), **told)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr


def test_a_terminated_run_saves_and_resumes(tmp_path, uninterrupted):
    root = tmp_path / "run"
    shutil.copytree(uninterrupted, root)
    shutil.rmtree(root / STAGE)
    process = start(root, "--config.steps=4000", "--config.checkpoint_every=100000")
    wait_for(
        process, lambda: (root / STAGE / "log.jsonl").exists() and "\n" in (root / STAGE / "log.jsonl").read_text()
    )
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 143 and "the same command resumes" in out
    assert [p.name for p in (root / STAGE / "checkpoints").iterdir() if p.name.isdigit()]


def test_of_two_runs_in_one_folder_the_second_says_who_has_it(uninterrupted, tmp_path):
    """Started while the first one trains, it ends at once and touches nothing."""
    root = tmp_path / "run"
    shutil.copytree(uninterrupted, root)
    shutil.rmtree(root / STAGE)
    first = start(root, "--config.steps=100000")
    wait_for(first, lambda: any((root / STAGE / "checkpoints").glob("[0-9]*")))
    second = start(root, "--config.steps=100000")
    out, _ = second.communicate(timeout=100)
    line = out.strip().splitlines()[-1]
    assert second.returncode == 2 and line.startswith(f"error: {root} belongs to process {first.pid} on "), out
    assert "since 20" in line and "Traceback" not in out and first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()


def test_training_goes_on_only_from_what_a_stage_stands_on(uninterrupted, tmp_path):
    root = epath.Path(tmp_path / "run")
    shutil.copytree(uninterrupted, root)
    config = config_of_run(root)
    assert [what for _, what in loop.plan_stages(config, root)] == ["done"] * 3
    meta = json.loads((root / "image_vae" / "model.json").read_text())
    meta["fingerprints"] = {name: value ^ 1 for name, value in meta["fingerprints"].items()}
    (root / "image_vae" / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=rf"{STAGE}: to be trained again \(image_vae .*rm -r {root / STAGE}$"):
        run.run(config, str(root))


def test_a_run_root_knows_its_data(uninterrupted):
    record = json.loads((uninterrupted / "data.json").read_text())
    assert record["records"] == {"train": 96, "val": 32, "test": 16} and record["source"] == "phantom"
    assert record["fingerprint"] == contents_of(config_of_run(uninterrupted)).fingerprint


@pytest.mark.full  # three meshes of three stages to compile
def test_from_eight_devices_to_two_to_one(uninterrupted, tmp_path):
    """Killed on 8 devices, killed on 2, finished on 1: what an uninterrupted run on one device ends with."""
    root = tmp_path / "run"
    cube = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    for devices, mesh, step in ((8, cube, 2), (2, ["--config.mesh.fsdp=2"], 4)):
        process = start(root, *mesh, devices=devices)
        wait_for(process, lambda step=step: (root / STAGE / "checkpoints" / str(step)).exists(), 400)
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        assert (root / STAGE / "checkpoints" / str(step)).exists(), out[-3000:]
    process = start(root)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and f"{STAGE} 8/8" in out and f"{STAGE} 2/8" not in out, out[-3000:]
    whole, pieces = final_state(uninterrupted, STAGE), final_state(root, STAGE)
    for name, value in whole.items():
        if "opt" not in name:
            np.testing.assert_allclose(pieces[name], value, rtol=2e-2, atol=2e-3, err_msg=name)


def test_a_finished_run_has_everything_a_user_needs(uninterrupted):
    assert (uninterrupted / "phantom.png").exists() and (uninterrupted / "report.html").exists()
    for stage in ("image_vae", "align_text_xray", STAGE):
        folder = uninterrupted / stage
        meta = json.loads((folder / "model.json").read_text())
        assert meta["figures"] and list(folder.glob("*.png"))
        assert json.loads((folder / "versions.json").read_text())["jax"] == jax.__version__
        assert json.loads((folder / "config.json").read_text())["stage"] == stage
        assert list((folder / "tensorboard").iterdir()) and (folder / "log.jsonl").read_text()
    for stage in ("image_vae", STAGE):  # drawn at step 4 and at the end
        logged = EventAccumulator(str(uninterrupted / stage / "tensorboard"), size_guidance={"images": 0}).Reload()
        steps = [[image.step for image in logged.Images(tag)] for tag in logged.Tags()["images"]]
        assert steps and all(one == [4, 8] for one in steps), steps
    page = (uninterrupted / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")


def test_a_run_of_another_config_is_refused(uninterrupted):
    config = micro("ldm", "xray,tiny", steps=8, seed=3)
    with pytest.raises(UserError, match=r"config\.seed=0, this config has 3.*--workdir"):
        loop.plan_stages(config, epath.Path(uninterrupted))
    config = micro("ldm", "xray,tiny", steps=8)
    config.net.width = 48
    with pytest.raises(UserError, match=r"config\.net\.width=32, this config has 48"):
        loop.plan_stages(config, epath.Path(uninterrupted))


def test_a_missing_upstream_stage_names_its_command(tmp_path):
    config = micro("text_ct", upstream="require")
    with pytest.raises(UserError, match=r"image_vae.*\n.*--config=configs/image_vae\.py:tiny --workdir="):
        loop.plan_stages(config, epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/text_ct.py:tinny"], "unknown word 'tinny'"),
        (["--config=configs/text_ct.py:tiny", "--config.stpes=3"], r"did you mean --config\.steps\?"),
        (["--config=configs/text_ct.py:tiny", "--config.data.source=dicom:/x"], "phantom, manifest:PATH or tfds:NAME"),
        (["--config=configs/text_ct.py:tiny", "--config.data.source=manifest:/nowhere"], "/nowhere"),
        (["--config=configs/text_vae.py:tiny", "--config.optimizer=sgd"], r"config\.optimizer='sgd'"),
        (["--config=configs/align.py:tiny"], "after the colon"),
    ],
)
def test_bad_input_is_told(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run.run(read_config([*arguments, "--config.image_size=32"]), str(tmp_path / "run"))
    assert not list(tmp_path.rglob("*/config.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/image_vae.py:tiny", "--config.data.train=96", "--config.mesh.data=3"], "config.mesh"),
        ([], "--config=configs/text_ct.py"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags(2))
    line = [sys.executable, "-m", "medm2g_jax.main", *arguments, f"--workdir={tmp_path}/run", "--config.image_size=32"]
    if not arguments:
        line = line[:3]
    done = subprocess.run(line, cwd=HERE.parent, env=env, text=True, capture_output=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = done.stderr.strip().splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1] and "Traceback" not in done.stderr


def test_no_step_waits_for_the_host_between_logged_ones(tmp_path, monkeypatch):
    """Nothing is read back from the devices there, a step takes nothing from the host by itself, and the next batch is
    on its way before the numbers of a logged step are waited for."""
    happened: list[str] = []
    read, put, programs = ArrayImpl._value, sharding.put_batch, setup.Setup.programs

    def record(what, function):
        return lambda *args: happened.append(what) or function(*args)

    def guarded(self, save_memory):
        train_step, eval_step = programs(self, save_memory)

        def step(*args):
            with jax.transfer_guard_host_to_device("disallow_explicit"):
                return train_step(*args)

        return record("step", step), eval_step

    monkeypatch.setattr(ArrayImpl, "_value", property(record("read", read.fget)))
    monkeypatch.setattr(sharding, "put_batch", record("put", put))
    monkeypatch.setattr(setup.Setup, "programs", guarded)
    config = micro("image_vae", steps=8, log_every=4, checkpoint_every=8, eval_rows=0)
    loop.run_stage(config, epath.Path(tmp_path), run.open_data(config, epath.Path(tmp_path)))
    steps = [i for i, what in enumerate(happened) if what == "step"]
    between = [happened[a + 1 : b] for a, b in zip(steps, steps[1:], strict=False)]
    assert len(steps) == 8
    assert [some == ["put"] for some in between] == [done not in (1, 4) for done in range(1, 8)]
    assert all(some[0] == "put" and set(some[1:]) == {"read"} for some in (between[0], between[3]))


def test_the_batch_names_the_nearest_that_fits(tmp_path):
    with pytest.raises(UserError, match=r"config\.batch=12 .*config\.batch=16"):
        config = micro("image_vae", batch=12)
        data = run.open_data(config, epath.Path(tmp_path))
        loop.run_stage(config, epath.Path(tmp_path), data)


def test_accumulation_is_refused_where_it_changes_the_loss(tmp_path):
    config = micro("align", "text_xray,tiny", accumulate=2)
    data = run.open_data(config, epath.Path(tmp_path))
    with pytest.raises(UserError, match="accumulate"):
        loop.run_stage(config, epath.Path(tmp_path), data)


def test_a_fine_tune_needs_something_held_out(tmp_path):
    config = micro("finetune", "mri_to_ct,lora,tiny,alone", eval_rows=0)
    data = run.open_data(config, epath.Path(tmp_path))
    with pytest.raises(UserError, match=r"tune_mri_to_ct_lora: config\.eval_rows=0 .* expected at least 1"):
        loop.run_stage(config, epath.Path(tmp_path), data)


def test_results_verify_what_they_stand_on(uninterrupted):
    meta = checkpoint.read_meta(epath.Path(uninterrupted) / STAGE)
    assert meta["from"]["xray/flow"] == {"stage": STAGE}
    assert meta["from"]["text/clip"]["stage"] == "align_text_xray" and meta["from"]["text/clip"]["fingerprint"]
    assert set(meta["from"]) >= {"image/vae", "text/clip", "xray/clip", "xray/flow"}


def test_an_open_flow_begins_where_its_single_flow_ended(monkeypatch):
    """From the values of before and in float32; nothing that is there is made afresh."""
    config = micro("mri", listing=("mri",))
    graph, mesh = stage_graph(config), sharding.make_mesh(config.mesh)
    made_of = assemble(config, graph, mesh, {}, {}, {"mri": "sample"}, {}, jnp.float32)
    flow = re.compile(rounds.group_regex(("mri/flow",)))
    assert made_of.model.flows["mri"].process.predict == "sample" and "mri/unet/guide/kernel" in made_of.shapes
    before = {n: jnp.full(x.shape, 0.5) for n, x in made_of.shapes.items() if flow.match(n)}
    assert before and len(before) < len(made_of.shapes)
    made = {}

    def fresh(init, key, placed, dtype=None):
        made.update(placed)
        return {n: jnp.zeros(made_of.shapes[n].shape) for n in placed}

    monkeypatch.setattr(results, "fresh_params", fresh)
    params = before | {"image/vae/x": jnp.ones(3)}
    upstream = results.Upstream(params, {}, {}, (), (), (), {"mri": "sample"}, {}, ())
    made_of = dataclasses.replace(made_of, recipe=dataclasses.replace(made_of.recipe, start=None))
    data = loop.Data(Phantom(32, 0, train=1, val=0, test=0), None, {}, 32)
    trainable, frozen = loop._parameters(config, made_of, upstream, data, iter, jax.random.key(0), mesh)
    assert set(made) == set(made_of.shapes) - set(before) and {*map(rounds.group_of, made)} == {"mri/guide", "mri/grid"}
    assert set(trainable) == set(made_of.shapes) and set(frozen) == {"image/vae/x"}
    assert all(trainable[n] is before[n] for n in before)
