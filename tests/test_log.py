"""Logs are read back by TensorBoard's own reader, survive kills without gaps or doubles, and keep patients out."""

import json
import logging
import mmap
import os
import platform

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medm2g_jax.train import log as log_module
from medm2g_jax.train.log import Log, duration, memory, quiet, versions


def opened(folder, step=0, open_data=True, **kwargs):
    log = Log(folder, "text_ct", 100, open_data)
    log.open_at(step, **kwargs)
    return log


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder):
    accumulator = EventAccumulator(os.fspath(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def points(folder, name):
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_scalars_reach_both_files(tmp_path):
    log = opened(tmp_path)
    log.write_scalars(1, {"loss": jax.numpy.float32(0.5), "held out/loss": np.float64(2)})
    log.write_scalars(2, {"loss": 0.25, "held out/loss": float("nan")})
    assert len(rows(tmp_path)) == 2 and len(points(tmp_path, "loss")) == 2  # while the log is open
    log.close()
    assert rows(tmp_path) == [
        {"step": 1, "loss": 0.5, "held out/loss": 2.0},
        {"step": 2, "loss": 0.25, "held out/loss": None},
    ]
    assert points(tmp_path, "loss") == [(1, 0.5), (2, 0.25)]
    assert points(tmp_path, "held_out/loss")[0] == (1, 2.0) and np.isnan(points(tmp_path, "held_out/loss")[1][1])


def test_a_killed_run_leaves_no_doubles(tmp_path):
    log = opened(tmp_path)
    for step in (10, 20, 30, 40):
        log.write_scalars(step, {"loss": float(step)})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 15, "lo')  # killed in mid-row, hence no close
    log = opened(tmp_path, step=20)
    for step in (30, 40, 50):
        log.write_scalars(step, {"loss": -float(step)})
    log.close()
    log.close()
    expected = [(10, 10.0), (20, 20.0), (30, -30.0), (40, -40.0), (50, -50.0)]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == expected
    assert points(tmp_path, "loss") == expected


def test_images_are_the_ones_given(tmp_path):
    from io import BytesIO

    from PIL import Image

    rng = np.random.default_rng(0)
    images = rng.uniform(-0.2, 1.2, (3, 8, 6, 1)).astype(np.float32)
    log = opened(tmp_path)
    log.write_images(7, {"samples": images, "colour": np.full((1, 4, 4, 3), [0.0, 0.5, 1.0], np.float32)})
    log.close()
    read = events(tmp_path)
    (event,) = read.Images("samples")
    assert event.step == 7
    picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)).convert("L"))
    expected = np.rint(255 * np.clip(images[..., 0], 0, 1)).astype(np.uint8)
    for tile in expected:  # somewhere in the tiled picture, untouched
        windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)
        assert np.any(np.all(windows == tile, axis=(2, 3)))
    (event,) = read.Images("colour")
    assert np.asarray(Image.open(BytesIO(event.encoded_image_string)))[1, 1].tolist() == [0, 128, 255]


def test_texts(tmp_path):
    log = opened(tmp_path)
    log.write_texts(3, {"reports": ["No acute finding.", "Nodule, 8 mm."], "one": "µ"})
    log.close()
    for name, text in (("reports", "No acute finding.\n\nNodule, 8 mm."), ("one", "µ")):
        (event,) = events(tmp_path).Tensors(f"{name}/text_summary")
        assert event.step == 3 and event.tensor_proto.string_val[0].decode() == text


def test_the_config_is_text_and_hyper_parameters(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    log = opened(tmp_path)
    log.write_config(ConfigDict({"lr": 0.5, "optimizer": "adam", "remat": True, "net": {"width": 8}, "crop": (1, 2)}))
    log.close()
    read = events(tmp_path)
    (text,) = read.Tensors("config/text_summary")
    assert b"optimizer: adam" in text.tensor_proto.string_val[0] and b"width: 8" in text.tensor_proto.string_val[0]
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    own = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert own["lr"].number_value == 0.5 and own["optimizer"].string_value == "adam" and own["remat"].bool_value
    assert set(own) == {"lr", "optimizer", "remat"}


@pytest.mark.parametrize("open_data", [True, False])
def test_patients_are_logged_of_open_data_only(tmp_path, open_data):
    image = np.zeros((1, 4, 4, 1), np.float32)
    log = opened(tmp_path, open_data=open_data)
    log.write_images(1, {"real": image}, real=True)
    log.write_texts(1, {"real": "Mr X, 73"}, real=True)
    log.write_images(1, {"generated": image})
    log.write_texts(1, {"generated": "normal"})
    log.close()
    tags = events(tmp_path).Tags()
    also = ["real"] if open_data else []
    assert sorted(tags["images"]) == sorted(["generated", *also])
    assert sorted(tags["tensors"]) == sorted(f"{name}/text_summary" for name in ("generated", *also))
    data = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert (b"Mr X" in data) == open_data


def test_progress_says_speed_and_time_left(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: clock[0])
    log = opened(tmp_path, step=10, plan_eta=3600.0)
    for step, now in ((11, 50.0), (21, 55.0), (51, 70.0), (100, 94.5)):
        clock[0] = now  # the first step takes 50 s, compilation; then two a second
        log.progress(step, {"loss": 0.123456, "ct": 1e-5, "norm/gradient": 3.0})
    log.progress(100, {"loss": 0.1}, plan_eta=0.0)
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "text_ct 11/100  loss 0.1235  ct 1e-05",
        "text_ct 21/100  loss 0.1235  ct 1e-05  2 steps/s  40 s left  1 h 00 min for the whole plan",
        "text_ct 51/100  loss 0.1235  ct 1e-05  2 steps/s  24 s left  1 h 00 min for the whole plan",
        "text_ct 100/100  loss 0.1235  ct 1e-05  2 steps/s  0 s left  1 h 00 min for the whole plan",
        "text_ct 100/100  loss 0.1  2 steps/s  0 s left",
    ]


def test_duration():
    seconds = (0.4, 59.6, 458, 7500, 273600)
    assert [duration(s) for s in seconds] == ["0 s", "1 min 00 s", "7 min 38 s", "2 h 05 min", "3 d 04 h"]


def test_remote_folder_gets_whole_files_at_sync(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "_is_remote", lambda folder: True)
    remote = tmp_path / "bucket" / "run"
    log = opened(remote)
    log.write_scalars(1, {"loss": 1.0})
    assert not remote.exists()
    log.sync()
    log.write_scalars(2, {"loss": 2.0})
    assert [row["step"] for row in rows(remote)] == [1]
    log.sync()
    assert points(remote, "loss") == [(1, 1.0), (2, 2.0)]
    # The machine is gone; another one goes on from step 1.
    log = opened(remote, step=1)
    log.write_scalars(2, {"loss": -2.0})
    local = log._local
    log.close()
    assert not local.exists()
    assert [(row["step"], row["loss"]) for row in rows(remote)] == [(1, 1.0), (2, -2.0)]
    assert points(remote, "loss") == [(1, 1.0), (2, -2.0)]


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = opened(tmp_path)
    log.write_scalars(1, {"loss": 1.0})
    log.write_images(1, {"x": np.zeros((1, 2, 2, 1), np.float32)})
    log.write_texts(1, {"x": "y"})
    log.progress(1, {"loss": 1.0})
    log.sync()
    log.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_memory_follows_what_is_held():
    before = memory()["memory/host GB"]
    # Pages of its own: an array may be given memory that this process already held and let go of.
    with mmap.mmap(-1, 200_000_000) as block:
        block[:: mmap.PAGESIZE] = b"\1" * len(range(0, len(block), mmap.PAGESIZE))
        grown = memory()["memory/host GB"] - before
    assert 0.15 < grown < 0.3
    assert before > 0.05


def test_versions():
    found = versions()
    assert found["python"] == platform.python_version() and found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__ and found["backend"] == "cpu" and found["devices"] == 8
    assert all(found[name] for name in ("jaxlib", "flax", "optax", "orbax-checkpoint", "grain"))
    assert json.loads(json.dumps(found)) == found


def test_quiet_leaves_our_lines_and_errors(monkeypatch):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("absl", "jax", "orbax", "grain", "tensorboardX")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.INFO)
        monkeypatch.setattr(logger, "propagate", True)
        logger._cache.clear()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logging.getLogger("jax._src.xla_bridge").warning("before")
    quiet()
    for name in ("absl", "jax._src.xla_bridge", "orbax.checkpoint", "grain", "tensorboardX.summary"):
        logging.getLogger(name).info("noise")
        logging.getLogger(name).warning("noise")
    absl_logging.info("noise")
    absl_logging.warning("noise")
    absl_logging.error("an error")
    logging.warning("ours")
    assert seen == ["before", "an error", "ours"]
