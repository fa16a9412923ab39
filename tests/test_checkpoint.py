"""Checkpoints and results: bit-equal on any mesh, and never wrong whatever happened to the files or to the process."""

import errno
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from medm2g_jax.errors import UserError
from medm2g_jax.train.checkpoint import (
    Checkpoints,
    fingerprint,
    fingerprints,
    load_model,
    quiet_orbax,
    read_meta,
    save_model,
)
from medm2g_jax.train.disk import cause, worded

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """As in an entry point."""
    quiet_orbax()


def test_importing_leaves_the_host_program_s_hooks_and_filters_alone():
    """Only an entry point may change what the whole process prints, and twice is once."""
    code = """
        import logging, sys, warnings
        import jax, jax.numpy, orbax.checkpoint, etils.epath, grain, tensorboardX  # what they do is their own
        import scipy.ndimage, scipy.stats
        def state():
            loggers = ["", "absl", "asyncio", "jax", "orbax", "grain", "tensorboardX"]
            levels = [(logging.getLogger(n).level, list(logging.getLogger(n).filters)) for n in loggers]
            return sys.unraisablehook, sys.excepthook, list(warnings.filters), levels
        before = state()
        import medm2g_jax.run, medm2g_jax.loading, medm2g_jax.cli, medm2g_jax.main, medm2g_jax.plan
        from medm2g_jax.train.log import quiet
        print(state() == before)
        quiet()
        once = state()
        quiet()
        print(once != before, state() == once)
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=100)
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr


def mesh_of(data, fsdp):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def place(tree, mesh):
    def sharding(x):
        shards = x.ndim == 2 and x.shape[1] % mesh.shape["fsdp"] == 0
        return NamedSharding(mesh, jax.P(None, "fsdp") if shards else jax.P())

    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), tree)


def make_state(seed, mesh, width=400):
    rng = np.random.default_rng(seed)
    params = {
        "ct/unet/a/kernel": jnp.asarray(rng.normal(size=(8, width)), jnp.float32),
        "ct/unet/a": jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16),  # a name that begins another one
        "mri/unet/a/kernel": jnp.asarray(rng.normal(size=(800, 2)), jnp.bfloat16),
        "mri/on": jnp.asarray(rng.integers(0, 2, 5), bool),
    }
    floats = {k: v for k, v in params.items() if v.dtype != bool}
    opt = optax.adamw(1e-3).init(floats)
    opt = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 99, x.dtype), opt)
    state = {"step": jnp.int32(seed), "trainable": params, "ema": jax.tree.map(lambda x: -x, floats), "opt": opt}
    return place(state, mesh)


def abstract(state, mesh=None):
    state = jax.tree.map(np.asarray, state) if mesh else state
    placed = place(state, mesh) if mesh else state
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)


def bits(tree):
    return jax.tree.map(lambda x: (x.dtype, np.asarray(x).tobytes()), tree)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1)


def save_two(folder, mesh):
    """Steps 1 and 2 in `folder`, and their states."""
    states = {step: make_state(step, mesh) for step in (1, 2)}
    saves = Checkpoints(folder)
    for step, state in states.items():
        saves.save(step, state, metric=1.0 / step, meta={"seed": step})
    saves.close()
    return states


def holding(folder, array):
    """The files that hold the array's bytes, and where; arrays are stored uncompressed."""
    raw = np.asarray(array).tobytes()
    found = [(path, path.read_bytes().find(raw)) for path in folder.rglob("*") if path.is_file()]
    found = [(path, at) for path, at in found if at >= 0]
    assert found
    return found


# The fingerprint.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "bool"])
def test_fingerprint_equals_the_closed_form_on_every_mesh(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2 if dtype == "bool" else 2**15, (6, 8, 3))
    x = np.asarray(jnp.asarray(raw, dtype))
    words = x.astype(np.uint8) if dtype == "bool" else x.view(f"uint{8 * x.dtype.itemsize}")
    expected = sum((2 * i + 1) * int(w) for i, w in enumerate(words.ravel())) % 2**32
    assert int(fingerprint(jnp.asarray(x))) == expected
    assert fingerprints({"here": jnp.asarray(x)}) == {"here": expected}
    for data, fsdp in ((2, 4), (2, 1)):
        for spec in (jax.P(), jax.P("data", "fsdp"), jax.P(None, ("data", "fsdp"))):
            sharded = jax.device_put(x, NamedSharding(mesh_of(data, fsdp), spec))
            assert fingerprints({"a/b": [sharded]}) == {"a/b/0": expected}


def test_fingerprint_sees_every_single_bit_flip():
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, (50, 40), dtype=np.uint32)
    places, positions = rng.integers(0, words.size, 2000), rng.integers(0, 32, 2000)
    flipped = np.tile(words.reshape(1, -1), (2000, 1))
    flipped[np.arange(2000), places] ^= np.uint32(1) << positions.astype(np.uint32)
    values = jax.vmap(fingerprint)(jnp.asarray(flipped.reshape(2000, 50, 40)))
    assert np.all(np.asarray(values) != int(fingerprint(jnp.asarray(words))))


# Round trips.


def test_restores_bit_equal_on_other_meshes(tmp_path, monkeypatch):
    state = make_state(3, mesh_of(2, 4))
    monkeypatch.chdir(tmp_path)
    saves = Checkpoints("run")  # relative, as --workdir mostly is
    assert saves.restore(abstract(state)) is None and saves.best() is None
    saves.save(3, state, meta={"note": "x", "pair": (1, 2)})
    saves.close()
    for data, fsdp in ((2, 4), (1, 2), (1, 1)):
        other = abstract(state, mesh_of(data, fsdp))
        restored, step, meta = Checkpoints(tmp_path / "run").restore(other)
        assert step == 3 and meta == {"note": "x", "pair": [1, 2]}
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, other))


def test_arrays_may_be_donated_right_after_save(tmp_path, mesh):
    state = make_state(0, mesh, width=50_000)
    before = bits(state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree), donate_argnums=0)
    saves = Checkpoints(tmp_path / "run")
    saves.save(1, state)
    for _ in range(5):
        state = step(state)
    restored, _, _ = saves.restore(abstract(state))
    saves.close()
    assert bits(restored) == before != bits(state)


def test_keeps_the_newest_and_the_best(tmp_path, mesh):
    folder = tmp_path / "run"
    state = {step: {"p": {"a": jnp.full(4, step, jnp.float32)}} for step in range(1, 8)}
    saves = Checkpoints(folder)
    for step, metric in ((1, 3.0), (2, 1.0), (3, 1.0), (4, float("nan")), (5, None), (6, 1.5)):
        saves.save(step, state[step], metric=metric)
        assert saves.best() == min(step, 3)  # the later of equals
    assert sorted(os.listdir(folder)) == ["3", "5", "6"]
    saves.save(7, state[7], metric=0.5)
    saves.close()
    assert sorted(os.listdir(folder)) == ["6", "7"]

    saves = Checkpoints(folder, keep=1)  # metrics are read back
    assert saves.best() == 7
    wanted = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    for step, value in (("best", 7), (6, 6)):
        np.testing.assert_array_equal(saves.restore_item(step, "p", {"a": wanted})["a"], np.full(4, value))
    with pytest.raises(UserError, match="no checkpoint 5|step 5 is unfinished"):
        saves.restore_item(5, "p", {"a": wanted})
    saves.close()


def test_forced_save_replaces_and_keeps_the_metric(tmp_path, mesh):
    states = save_two(tmp_path / "run", mesh)
    saves = Checkpoints(tmp_path / "run")
    saves.save(2, states[1])  # there already
    assert bits(saves.restore(abstract(states[1]))[0]) == bits(states[2])
    saves.save(2, states[1], force=True)
    assert saves.best() == 2
    restored, step, _ = saves.restore(abstract(states[1]))
    saves.close()
    assert step == 2 and bits(restored) == bits(states[1])
    assert sorted(os.listdir(tmp_path / "run")) == ["1", "2"]

    # Killed while it was being replaced: the old copy comes back.
    (tmp_path / "run" / "2").rename(tmp_path / "run" / "2.replaced")
    (tmp_path / "run" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path / "run").restore(abstract(states[1]))[1] == 2
    assert sorted(os.listdir(tmp_path / "run")) == ["1", "2"]


def test_another_network_is_an_error_not_a_step_back(tmp_path, mesh):
    states = save_two(tmp_path / "run", mesh)
    for change, text in (
        (lambda a: a["ema"].pop("ct/unet/a"), r"ema/ct/unet/a: bfloat16\[3\] saved, absent expected"),
        (lambda a: a["ema"].update(new=a["ema"]["ct/unet/a"]), r"ema/new: absent saved, bfloat16\[3\] expected"),
        (
            lambda a: a["ema"].update({"ct/unet/a": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}),
            r"ema/ct/unet/a: bfloat16\[3\] saved, bfloat16\[4\] expected",
        ),
    ):
        wanted = abstract(states[1])
        change(wanted)
        with pytest.raises(UserError, match=text):
            Checkpoints(tmp_path / "run").restore(wanted)


# Damage.


def restore_damaged(folder, states, capsys):
    """Step restored; whatever the damage, the values are exactly those of that step, and it was said in one line."""
    capsys.readouterr()
    saves = Checkpoints(folder)
    restored, step, meta = saves.restore(abstract(states[1]))
    saves.close()
    assert bits(restored) == bits(states[step]) and meta == {"seed": step}
    out, err = capsys.readouterr()
    lines = out.splitlines()
    if step == 1:
        assert len(lines) == 1 and str(folder / "2") in lines[0] and "step 1 is used instead" in lines[0]
    else:
        assert not lines
    assert not err
    return step, out


def test_flipped_bits_in_every_file(tmp_path, mesh, capsys):
    states = save_two(tmp_path / "run", mesh)
    rng = np.random.default_rng(0)
    files = [p for p in (tmp_path / "run" / "2").rglob("*") if p.is_file()]
    assert len(files) > 8
    for path in files:
        good = path.read_bytes()
        for bit in rng.choice(8 * len(good), min(6, 8 * len(good)), replace=False):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            restore_damaged(tmp_path / "run", states, capsys)
        path.write_bytes(good)


def test_flipped_bit_in_the_data_is_noticed(tmp_path, mesh, capsys):
    states = save_two(tmp_path / "run", mesh)
    for item in ("trainable", "ema"):
        kernel = states[2][item]["ct/unet/a/kernel"]
        for path, at in holding(tmp_path / "run" / "2" / "state", kernel):
            good = path.read_bytes()
            for offset, bit in ((0, 0), (1001, 7), (kernel.nbytes - 1, 6)):
                bad = bytearray(good)
                bad[at + offset] ^= 1 << bit
                path.write_bytes(bad)
                step, out = restore_damaged(tmp_path / "run", states, capsys)
                assert step == 1 and f"the fingerprint of {item}/ct/unet/a/kernel differs" in out
            path.write_bytes(good)


def test_truncated_and_missing_files(tmp_path, mesh, capsys):
    states = save_two(tmp_path / "run", mesh)
    steps = {}
    for path in [p for p in (tmp_path / "run" / "2").rglob("*") if p.is_file()]:
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        steps["half", path.name] = restore_damaged(tmp_path / "run", states, capsys)[0]
        path.unlink()
        steps["gone", path.name] = restore_damaged(tmp_path / "run", states, capsys)[0]
        path.write_bytes(good)
    assert steps["half", "metadata"] == steps["gone", "metadata"] == steps["half", "_METADATA"] == 1
    for path, _ in holding(tmp_path / "run" / "2" / "state", states[2]["ema"]["ct/unet/a/kernel"]):
        assert steps["gone", path.name] == 1


def test_empty_folder_is_passed_over_and_goes_with_the_next_save(tmp_path, mesh, capsys):
    states = save_two(tmp_path / "run", mesh)
    (tmp_path / "run" / "9").mkdir()
    (tmp_path / "run" / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    saves = Checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "3.orbax-checkpoint-tmp").exists()
    assert saves.restore(abstract(states[1]))[1] == 2
    out = capsys.readouterr().out.splitlines()
    assert out == [f"warning: checkpoint {tmp_path / 'run' / '9'} is unfinished; step 2 is used instead"]
    saves.save(3, states[1])
    saves.close()
    assert sorted(os.listdir(tmp_path / "run")) == ["2", "3"]

    only = tmp_path / "only"
    (only / "7").mkdir(parents=True)
    assert Checkpoints(only).restore(abstract(states[1])) is None


def test_after_damage_the_run_goes_on_from_the_intact_step(tmp_path, mesh, capsys):
    states = save_two(tmp_path / "run", mesh)
    for path, at in holding(tmp_path / "run" / "2" / "state", states[2]["ema"]["ct/unet/a/kernel"]):
        path.write_bytes(path.read_bytes()[: at + 100])
    saves = Checkpoints(tmp_path / "run")
    assert saves.best() == 2  # not known yet
    best = saves.restore_item("best", "ema", abstract(states[1])["ema"])
    assert bits(best) == bits(states[1]["ema"]) and saves.best() == 1
    saves.save(2, states[2])  # the damaged one may be written again
    restored, step, _ = saves.restore(abstract(states[1]))
    saves.close()
    assert step == 2 and bits(restored) == bits(states[2])


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path, mesh):
    states = save_two(tmp_path / "run", mesh)
    for step in ("1", "2"):
        (tmp_path / "run" / step / "state" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="step 2 is damaged.*step 1 is damaged.*delete the folder"):
        Checkpoints(tmp_path / "run").restore(abstract(states[1]))


# Full disks and kills, in a process of their own.

CHILD = """
    import os, resource, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, {root!r})
    import jax, jax.numpy as jnp, numpy as np
    from medm2g_jax.errors import UserError
    from medm2g_jax.train.checkpoint import Checkpoints, quiet_orbax, save_model, read_meta
    quiet_orbax()
    folder = sys.argv[1]
    def state(step):
        rng = np.random.default_rng(step)
        return {{"p": {{f"a/{{i}}": jnp.asarray(rng.normal(size=100_000), jnp.float32) for i in range(6)}}}}
    def say(*words):
        print(*words, flush=True)
    saves = Checkpoints(folder)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
"""


def child(body, *arguments, **options):
    code = textwrap.dedent(CHILD).format(root=str(ROOT)) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **options
    )


def test_full_disk_says_why_and_keeps_the_last_good_step(tmp_path):
    body = """
    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    saves.save(1, state(1), metric=1.0)
    saves.wait()
    for then in (saves.wait, lambda: saves.save(3, state(3)), saves.wait):
        try:
            limit(100_000)
            saves.save(2, state(2), force=True)
            then()
            say("no error")
        except UserError as error:
            say(error)
        limit(resource.RLIM_INFINITY)
        say(sorted(os.listdir(folder)))
    try:  # the step that is being replaced
        limit(100_000)
        saves.save(1, state(1), force=True)
        saves.close()
    except UserError as error:
        say(error)
    try:
        save_model(folder + "/result", state(1)["p"], {})
    except UserError as error:
        say(error)
    limit(resource.RLIM_INFINITY)
    say(read_meta(folder + "/result"), os.listdir(folder + "/result"))
    saves = Checkpoints(folder)
    say(saves.restore(wanted)[1])
    """
    process = child(body, tmp_path / "run", stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 10, out
    for line in (*lines[:6:2], lines[6]):
        assert line.startswith(f"{tmp_path / 'run'}: saving step "), line
        assert "File too large" in line and "the last good checkpoint, step 1, is kept" in line
    assert lines[1:6:2] == ["['1']"] * 3
    assert "result/model: writing the result failed" in lines[7] and "File too large" in lines[7]
    assert lines[8:] == ["None []", "1"]
    assert not err.strip(), err  # one line each, no tracebacks


@pytest.mark.parametrize("what", ["inodes", "bytes"])
def test_a_full_file_system_names_what_is_used_up_and_keeps_no_process_waiting(what, tmp_path):
    body = """
    import time
    what = sys.argv[2]
    def fill(leave):
        found = os.statvfs(folder)
        if what == "bytes":
            with open(folder + "/fill", "wb") as file:
                file.write(b"x" * (found.f_bavail * found.f_frsize - leave))
        else:
            for i in range(found.f_favail - leave):
                open(f"{folder}/fill{i}", "w").close()
    def make_room():
        for path in os.listdir(folder):
            if path.startswith("fill"):
                os.remove(folder + "/" + path)
    saves.close()
    saves = Checkpoints(folder + "/run")
    saves.save(1, state(1), metric=1.0)
    saves.wait()
    for leave in (0, 1, 2, 4, 6, 9, 12) if what == "inodes" else (0, 5000, 1_000_000):
        fill(leave)
        try:
            saves = Checkpoints(folder + "/run")
            try:
                saves.save(2, state(2))
                saves.wait()
            finally:
                saves.close()
        except UserError as error:
            say(error)
        try:
            save_model(folder + "/result", state(1)["p"], {})
        except UserError as error:
            say(error)
        saves.close()  # again, after the first error was told
        make_room()
        saves = Checkpoints(folder + "/run")
        assert saves.restore(wanted)[1] == 1 and read_meta(folder + "/result") is None
        saves.close()
    say("end", time.time())
    """
    options = {"inodes": "nr_inodes=150", "bytes": "size=20m"}
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options[what], "none", tmp_path]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        process = child(body, tmp_path, what, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=60)
        ended = time.time()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert process.returncode == 0 and not err.strip(), err
    *lines, (end, at) = [line.split() if line.startswith("end") else line for line in out.splitlines()]
    assert end == "end" and ended - float(at) < 10
    assert len(lines) == 2 * (7 if what == "inodes" else 3)
    said = {"inodes": "too few inodes left", "bytes": "too little space left"}[what]
    assert all(said in line and "No space left on device" in line for line in lines), lines
    assert all("the last good checkpoint, step 1, is kept" in line for line in lines[::2])


def test_killed_at_any_moment_is_restorable(tmp_path):
    body = """
    restored = saves.restore(wanted)
    step = restored[1] if restored else 0
    if restored:
        good = all((np.asarray(x) == np.asarray(y)).all()
                   for x, y in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state(step))))
        say("restored" if good else "WRONG", step)
    while True:
        step += 1
        following = state(step)
        say("saving", step)
        saves.save(step, following, metric=float(step % 5))
        if step % 2:
            saves.wait()
            say("saved", step)
            saves.save(step, following, force=bool(step % 3))
    """
    rng = random.Random(0)
    saved, kills = 0, 3
    for kill in range(kills + 1):
        process = child(body, tmp_path / "run")
        saving = 0
        for line in process.stdout:
            word, step = line.split()
            assert word in ("saving", "saved", "restored"), line
            if word == "restored":
                assert int(step) >= saved
                saved = int(step)
            elif word == "saved":
                saved = int(step)
            saving += word == "saving"
            if saving == 2 + kill % 2 or kill == kills and word == "restored":
                break
        else:
            raise AssertionError(f"the child ended by itself after {line!r}")
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        rest = [line.split() for line in process.stdout if line.endswith("\n")]
        saved = max([saved, *(int(step) for word, step in rest if word == "saved")])
    assert saved >= kills


# Several processes.

HOST = """
    import os, pathlib, sys
    os.environ |= {{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}}
    sys.path.insert(0, {root!r})
    import jax, jax.numpy as jnp, numpy as np
    folder, port, host = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{{port}}", num_processes=2, process_id=host)
    from medm2g_jax.train import checkpoint
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    halves = jax.sharding.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
    def values(step):
        return np.random.default_rng(step).normal(size=(64, 400)).astype(np.float32)
    def state(step):
        x = values(step)
        return {{"p": {{"a/b": jax.make_array_from_callback(x.shape, halves, lambda i: x[i])}}}}
    def same(a, b):
        return bool(jax.jit(lambda x, y: (x == y).all())(a["p"]["a/b"], b["p"]["a/b"]))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    def restored():
        saves = checkpoint.Checkpoints(folder)
        found, step, _ = saves.restore(wanted)
        saves.close()
        return step if same(found, state(step)) else "WRONG"
    saves = checkpoint.Checkpoints(folder)
    saves.save(1, state(1))
    saves.save(2, state(1))
    saves.save(2, state(2), force=True)
    saves.close()
    steps = [restored()]
    read = checkpoint._read_arrays
    def refuse(path, *rest):  # a disk error that only the second host meets
        if host == 1 and path.parent.name == "2":
            raise OSError("input/output error")
        return read(path, *rest)
    checkpoint._read_arrays = refuse
    steps.append(restored())
    checkpoint._read_arrays = read
    if host == 0:  # a flipped bit in what only the first host holds
        raw = values(2)[:, :100].tobytes()
        for path in pathlib.Path(folder, "2", "state").rglob("*"):
            data = bytearray(path.read_bytes() if path.is_file() else b"")
            if raw in data:
                data[data.find(raw) + 5] ^= 1
                path.write_bytes(data)
    steps.append(restored())
    checkpoint.save_model(folder + "/result", state(3)["p"], {{}})
    loaded = {{"p": checkpoint.load_model(folder + "/result", shardings=lambda name, x: halves)}}
    print(*steps, same(loaded, state(3)), flush=True)
"""


def test_two_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = textwrap.dedent(HOST).format(root=str(ROOT))
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run"), port, str(host)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]
    for host in hosts:
        out, _ = host.communicate(timeout=100)
        assert host.returncode == 0 and out.splitlines()[-1] == "2 1 1 True", out


# The result of a stage.


def test_result_round_trip_partial_and_cast(tmp_path, monkeypatch):
    mesh = mesh_of(2, 4)
    params = make_state(5, mesh)["trainable"]
    monkeypatch.chdir(tmp_path)
    save_model("ct", params, {"stage": "ct", "scales": {"image": 0.18}})
    meta = read_meta(tmp_path / "ct")
    assert meta["format"] == 2 and meta["stage"] == "ct" and meta["fingerprints"] == fingerprints(params)
    assert meta["shapes"]["ct/unet/a/kernel"] == [8, 400] and meta["dtypes"]["ct/unet/a"] == "bfloat16"
    assert bits(load_model(tmp_path / "ct")) == bits(params)

    where = NamedSharding(mesh_of(1, 2), jax.P(None, "fsdp"))
    part = load_model(
        tmp_path / "ct",
        names=lambda name: name.startswith("ct/") and name.endswith("kernel"),
        shardings=lambda name, x: where if x.shape == (8, 400) else None,
        dtype=jnp.bfloat16,
    )
    assert list(part) == ["ct/unet/a/kernel"] and part["ct/unet/a/kernel"].sharding == where
    np.testing.assert_array_equal(part["ct/unet/a/kernel"], params["ct/unet/a/kernel"].astype(jnp.bfloat16))
    assert load_model(tmp_path / "ct", names=lambda n: n == "mri/on", dtype=jnp.bfloat16)["mri/on"].dtype == bool
    with pytest.raises(UserError, match="none of the names"):
        load_model(tmp_path / "ct", names=lambda name: name.startswith("pet/"))


def test_the_words_name_the_cause_there_is(tmp_path):
    for number, words in (
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may not write there"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOSPC, "inodes free"),
    ):
        told = OSError(number, os.strerror(number), str(tmp_path))
        wrapped = ValueError(f"RESOURCE_EXHAUSTED: Failed to write: {os.strerror(number)} [source locations='x']")
        outer = ValueError("one of many failed")
        outer.__cause__ = told
        for error in (told, wrapped, outer):
            assert words in cause(tmp_path / "not" / "made", error)
        with pytest.raises(UserError, match=words), worded(tmp_path):
            raise told
    for other in (FileNotFoundError(errno.ENOENT, "x", str(tmp_path / "a")), OSError(errno.EACCES, "x", "/elsewhere")):
        with pytest.raises(OSError), worded(tmp_path):
            raise other


def test_close_never_raises_over_the_first_error(tmp_path, mesh, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    saves = Checkpoints(tmp_path / "run")
    saves.save(1, make_state(1, mesh))
    monkeypatch.setattr(saves._saver, "wait_until_finished", full)
    with pytest.raises(KeyError):
        try:
            raise KeyError("the first")
        finally:
            saves.close()
    saves = Checkpoints(tmp_path / "run")
    saves.save(2, make_state(1, mesh))
    monkeypatch.setattr(saves._saver, "wait_until_finished", full)
    with pytest.raises(UserError, match="saving step 2 failed.*No space left"):
        saves.close()
    saves.close()


def test_damaged_result_is_an_error_for_the_names_it_touches(tmp_path, mesh):
    params = make_state(5, mesh)["trainable"]
    folder = tmp_path / "ct"
    save_model(folder, params, {})
    for path, at in holding(folder / "model", params["ct/unet/a/kernel"]):
        bad = bytearray(path.read_bytes())
        bad[at + 77] ^= 16
        path.write_bytes(bad)
    for dtype in (None, jnp.bfloat16):
        with pytest.raises(UserError, match=r"ct/model is damaged: the fingerprint of ct/unet/a/kernel .*delete .*ct"):
            load_model(folder, dtype=dtype)
    assert list(load_model(folder, names=lambda name: name == "mri/on")) == ["mri/on"]
    (folder / "model" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="ct/model is damaged: .*delete .*ct"):
        load_model(folder, names=lambda name: name == "mri/on")


def test_result_exists_only_when_complete(tmp_path, mesh, monkeypatch):
    params = make_state(5, mesh)["trainable"]
    folder = tmp_path / "ct"
    assert read_meta(folder) is None
    with pytest.raises(UserError, match="model.json: not found"):
        load_model(folder)

    save_model(folder, params, {"run": 1})

    def killed(*_):
        raise KeyboardInterrupt

    # Killed in the last step of writing another result over it: the old one is gone, the new one not there yet.
    monkeypatch.setattr("etils.epath.gpath.PosixGPath.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, params, {"run": 2})
    monkeypatch.undo()
    assert read_meta(folder) is None
    save_model(folder, params, {"run": 3})
    assert read_meta(folder)["run"] == 3 and sorted(os.listdir(folder)) == ["model", "model.json"]

    text = (folder / "model.json").read_text()
    for bad, message in (
        (text[:-20], "model.json is damaged"),
        (json.dumps({"format": 1}), "model.json is damaged"),
        (text.replace('"format": 2', '"format": 1'), "format 1, this version reads format 2"),
    ):
        (folder / "model.json").write_text(bad)
        with pytest.raises(UserError, match=message):
            read_meta(folder)
