"""What a run says of itself: TensorBoard files, log.jsonl, one line on the console; memory and versions.

clu.metric_writers imports TensorFlow, so this writes event files through tensorboardX under clu's method names. Files
are written locally; of a remote run directory (gs://) a local copy is kept, and copied there whole by `sync`. A run
that was killed and goes on from step s drops what it had written of later steps. Only process 0 writes and prints.
Images and texts of real patients are written only where the data are open; numbers and generated samples always.
"""

import importlib.metadata
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from medm2g_jax.train.checkpoint import quiet_orbax
from medm2g_jax.train.events import Event, EventsWriter, SessionLog, summary

Images = Float[np.ndarray, "n h w c"] | Float[Array, "n h w c"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SLOW = 20  # seconds from which a run says what it is doing, or how far it is
_NOISY = ("absl", "jax", "orbax", "grain", "tensorboardX")


class Log:
    """The log of one stage in `folder`. Nothing is touched before `open_at`."""

    def __init__(self, folder: epath.PathLike, stage: str, total_steps: int, open_data: bool, unit: str = "steps"):
        self._unit = unit  # of what is counted
        self.folder = epath.Path(folder)
        self._stage, self._total, self._open_data = stage, total_steps, open_data
        self._writes = jax.process_index() == 0
        self._remote = _is_remote(self.folder)
        self._local = self.folder
        self._copied: dict[str, int] = {}  # sizes
        self._rows = self._events = None
        self._first: tuple[int, float] | None = None
        self._plan_eta = 0.0

    def open_at(self, step: int, plan_eta: float | int = 0.0) -> None:
        """Begin, or go on after `step`: rows of later steps, which a killed run left, are dropped.

        Args:
          plan_eta: seconds that the stages after this one will take.
        """
        self.close()
        self._first, self._plan_eta = None, plan_eta
        if not self._writes:
            return
        if self._remote:
            self._local = epath.Path(tempfile.mkdtemp(prefix=f"{self._stage}-log-"))
            self._copied = {}
            _copy(self.folder, self._local, {})
        events = self._local / "tensorboard"
        events.mkdir(parents=True, exist_ok=True)
        path = self._local / "log.jsonl"
        kept = _rows_until(path.read_text() if path.exists() else "", step)
        part = self._local / "log.jsonl.part"
        part.write_text("".join(kept))
        part.replace(path)
        self._rows = open(path, "a", buffering=1)
        # tensorboardX names files by the second: two runs within one would share, and empty, a file.
        self._events = EventsWriter(os.fspath(events / "events"), f".{time.time_ns()}")
        # TensorBoard hides the events of earlier files from this step on.
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One row of log.jsonl, one point each in TensorBoard; NaN and infinity are null in log.jsonl."""
        if self._writes:
            values = {name: float(value) for name, value in scalars.items()}
            plain = {name: value if np.isfinite(value) else None for name, value in values.items()}
            self._rows.write(json.dumps({"step": step, **plain}) + "\n")
            self._write(step, (summary.scalar(name, value) for name, value in values.items()))

    def write_images(self, step: int, images: Mapping[str, Images], real: bool = False) -> None:
        """Each batch of images in [0, 1] as one tiled picture; with `real`, of patients, only where data are open."""
        if self._writes and (self._open_data or not real):
            shades = {name: np.rint(255 * np.clip(batch, 0, 1)).astype(np.uint8) for name, batch in images.items()}
            self._write(step, (summary.image(name, batch, dataformats="NHWC") for name, batch in shades.items()))

    def write_texts(self, step: int, texts: Mapping[str, str | Sequence[str]], real: bool = False) -> None:
        """Each text, or list of texts, under its name; with `real`, of patients, only where data are open."""
        if self._writes and (self._open_data or not real):
            joined = {k: text if isinstance(text, str) else "\n\n".join(text) for k, text in texts.items()}
            self._write(step, (summary.text(name, text) for name, text in joined.items()))

    def write_config(self, config: ConfigDict) -> None:
        """What the stage runs with: as text, and its own plain fields as TensorBoard's hyper-parameters, beside the
        held-out loss that they led to."""
        if self._writes:
            own = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
            self.write_texts(0, {"config": f"```\n{config}\n```"})
            self._write(0, summary.hparams(own, {"held_out/loss": 0.0}))

    def progress(self, step: int, scalars: Mapping[str, Any], plan_eta: float | int | None = None) -> None:
        """Print where the stage stands: the scalars without "/" in their names, the speed, the time left.

        Speed is the mean since the first line after `open_at`, whose own steps include compilation.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        steps, seconds = step - self._first[0], now - self._first[1]
        parts = [f"{self._stage} {step}/{self._total}"]
        parts += [f"{name} {float(value):.4g}" for name, value in scalars.items() if "/" not in name]
        if steps > 0 and seconds > 0:
            left = (self._total - step) * seconds / steps
            after = self._plan_eta if plan_eta is None else plan_eta
            parts += [f"{steps / seconds:.3g} {self._unit}/s", f"{duration(left)} left"]
            parts += [f"{duration(left + after)} for the whole plan"] if after else []
        self.say("  ".join(parts))

    def say(self, line: str) -> None:
        """Print one line."""
        if self._writes:
            print(line, flush=True)

    def sync(self) -> None:
        """Copy the files to a remote run directory; a local one has them already."""
        if self._rows is not None and self._remote:
            _copy(self._local, self.folder, self._copied)

    def close(self) -> None:
        """Bring the files to their place and close them; may be called twice."""
        self.sync()
        if self._rows is not None:
            self._rows.close()
            self._events.close()
            self._rows = self._events = None
            if self._remote:
                self._local.rmtree()

    def _write(self, step, summaries):
        for one in summaries:
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=one))
        self._events.flush()


def duration(seconds: float | int) -> str:
    """45 s, 7 min 38 s, 2 h 05 min, 3 d 04 h."""
    seconds = round(seconds)
    for name, size, below, unit in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // unit:02d} {below}"
    return f"{seconds} s"


def memory() -> dict[str, float]:
    """GB in use: of this process, and of its fullest device (now and at most) where the backend counts it."""
    try:
        with open("/proc/self/statm") as file:
            host = int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak, which macOS gives in bytes
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"memory/host GB": host / 1e9}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    for key, name in (("bytes_in_use", "memory/device GB"), ("peak_bytes_in_use", "memory/device peak GB")):
        if any(key in s for s in stats):
            found[name] = max(s.get(key, 0) for s in stats) / 1e9
    return found


def quiet() -> None:
    """For entry points: leave the console to our own lines; only errors of the libraries are shown."""
    quiet_orbax()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA, where it has not started yet
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    absl = logging.getLogger("absl")  # what our readers say of data goes through it
    absl.setLevel(logging.WARNING)
    absl.addFilter(_of_ours_or_an_error)


def _of_ours_or_an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or f"{os.sep}medm2g_jax{os.sep}" in record.pathname


def versions() -> dict[str, Any]:
    """What this process runs on, for the run's record."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def _is_remote(folder: epath.Path) -> bool:
    return "://" in os.fspath(folder)


def _rows_until(text: str, step: int) -> list[str]:
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except ValueError:  # the last line of a killed run may be cut short
            continue
    return kept


def _copy(source: epath.Path, target: epath.Path, copied: dict[str, int]) -> None:
    """Copy log.jsonl and the event files that have changed in size; `copied` remembers the sizes."""
    (target / "tensorboard").mkdir(parents=True, exist_ok=True)
    events = source / "tensorboard"
    names = ["log.jsonl", *(f"tensorboard/{path.name}" for path in (events.iterdir() if events.exists() else ()))]
    for name in names:
        path = source / name
        if path.exists() and copied.get(name) != (size := path.stat().length):
            path.copy(target / name, overwrite=True)
            copied[name] = size
