"""Stages that stand on none of each other, side by side on one host's CPU: each in a process with its share of cores.

A small network's step is many short operations, which cores share badly (benchmarks/README.md). A stage's process is
begun before what it stands on is done, and compiles its programs meanwhile.

It is the run's own command, with the name of the stage in its environment, so that whatever the config's file registers
is there as well. What the two say to each other: the run sends the seconds that will be left after the stage, which
lets it train, down the process' standard input, whose end is the run's. Of the process' standard output, lines that
begin with SAYS are for the run (ready, done, error), all others for whoever looks on.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from medm2g_jax.data.open import source_of
from medm2g_jax.device import use_compilation_cache
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.show import ceiling, show
from medm2g_jax.train import loop
from medm2g_jax.train.abstract import compile_ahead
from medm2g_jax.train.disk import worded

AT_ONCE = 2
SAYS = "\x1e"  # a control character that no line of ours begins with
STAGE = "MEDM2G_STAGE"  # the variable that makes the run's command a stage's
PATIENCE = 120.0  # seconds a stage that was asked to stop may take for its step and its checkpoint


def cores() -> int:
    """Of those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pays(config: ConfigDict, stages: int) -> bool:
    """Whether the stages of a plan shall train side by side: on one host's CPU, with a core for each, and small
    networks (those of `config.remat`, and published weights, take much memory each)."""
    one = jax.default_backend() == "cpu" and jax.device_count() == jax.process_count() == 1
    small = not config.remat and not config.weights
    return config.side_by_side == "auto" and one and small and stages > 1 and cores() >= AT_ONCE


class _Stage:
    """A stage's process, as the run sees it."""

    def __init__(self, name: str, arguments: Sequence[str], threads: int, events: queue.SimpleQueue):
        self.name, self.state, self.began = name, "preparing", 0.0
        # XLA's CPU client has as many threads as NPROC says. A session of its own: Ctrl-C is the run's alone to answer.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "medm2g_jax.main", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "NPROC": str(threads), STAGE: name},
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def go(self, plan_eta: float | int) -> None:
        self.state, self.began = "training", time.time()
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `_read` tells
            self._process.stdin.write(b"%f\n" % plan_eta)
            self._process.stdin.flush()

    def ask_to_stop(self) -> None:
        """To save what it has learnt, and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM if self.state == "training" else signal.SIGKILL)

    def wait(self) -> None:
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self, events: queue.SimpleQueue) -> None:
        for line in self._process.stdout:
            line = line.decode(errors="replace").rstrip("\n")
            if line.startswith(SAYS):
                events.put((self.name, *json.loads(line[len(SAYS) :])))
            else:
                print(line, flush=True)
        events.put((self.name, "ended", self._process.wait()))


@dataclass(frozen=True)
class Task:
    """One of the stages to train."""

    stands_on: frozenset[str]  # all of the others that must be done before it may train
    constants: frozenset[str]  # those of them whose results its programs hold
    seconds: float | int  # that it may take: for the order, and for the time that is left
    threads: int


def tasks(
    todo: Sequence[str], plan: Mapping[str, set[str]], constants: set[str], seconds: Mapping[str, float]
) -> dict[str, Task]:
    """Those of a plan's stages that are to train.

    A stage has all cores where nothing of its plan, whether done or not, could train beside it: bits depend on the
    number of threads, and a run that was killed shall end with those that it would have had.

    Args:
      plan: each of its stages -> all that it stands on.
      constants: the stages whose results are constants of others' programs.
    """
    out = {}
    for name in todo:
        alone = all(n == name or n in plan[name] or name in plan[n] for n in plan)
        under = frozenset(plan[name] & {*todo})
        out[name] = Task(under, under & constants, seconds[name], cores() // (1 if alone else AT_ONCE))
    return out


def train(tasks: Mapping[str, Task], arguments: Sequence[str], root: epath.Path, say: Callable[[str], Any]) -> None:
    """Train these stages, each named after those that it stands on; AT_ONCE at a time, first those from which the
    longest way leads on.

    Args:
      arguments: of the run's command.

    Raises:
      UserError: a stage's; the others have saved, and the same command goes on.
      loop.Stopped: on SIGTERM and Ctrl-C, when all have saved.
    """
    way: dict[str, float] = {}
    for name in reversed(tasks):
        way[name] = tasks[name].seconds + max((way[n] for n in way if name in tasks[n].stands_on), default=0.0)
    order = sorted(tasks, key=lambda name: -way[name])
    events: queue.SimpleQueue = queue.SimpleQueue()
    stages: dict[str, _Stage] = {}
    done: dict[str, float] = {}  # seconds

    def those(*states: str) -> list[str]:
        return [name for name, stage in stages.items() if stage.state in states]

    def go_on() -> None:
        for name in order:
            if name in those("ready") and tasks[name].stands_on <= done.keys() and len(those("training")) < AT_ONCE:
                others = those("training")
                rest = sum(task.seconds for n, task in tasks.items() if n not in (*done, *others, name)) / AT_ONCE
                ratio = sum(done.values()) / sum(tasks[n].seconds for n in done) if done else 1.0
                beside = f", beside {others[0]}" if others else ""
                say(f"\n== {name} ({len(done) + len(others) + 1} of {len(tasks)}){beside}")
                stages[name].go(ratio * rest)
        for name in order:
            task = tasks[name]
            free = len(those("preparing", "training")) < AT_ONCE and len(stages) - len(done) <= AT_ONCE
            if free and name not in stages and task.stands_on <= stages.keys() and task.constants <= done.keys():
                stages[name] = _Stage(name, arguments, task.threads, events)

    def end(name: str, status: int) -> None:
        if name not in done:
            raise UserError(
                f"{name}: its process ended with status {status}, its last words stand above (-9: killed, perhaps for "
                "want of memory: --config.side_by_side=off trains one stage after the other); the same command goes on"
            )

    before = signal.signal(signal.SIGTERM, lambda *_: events.put(("", "stop", None)))
    try:
        while len(done) < len(tasks):
            go_on()
            name, what, value = events.get()
            if what == "ready":
                stages[name].state = "ready"
            elif what == "done":
                stages[name].state, done[name] = "done", time.time() - stages[name].began
                say(f"  {name}: done in {done[name]:.0f} s, {value / 1e6:.2f} M parameters -> {root / name}")
            elif what == "error":
                raise UserError(value)
            elif what == "stop":
                raise loop.Stopped("stopped, and saved; the same command resumes")
            else:
                end(name, value)
    except KeyboardInterrupt:
        raise loop.Stopped("stopped, and saved; the same command resumes") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        for stage in stages.values():
            stage.ask_to_stop()
        for stage in stages.values():
            stage.wait()


def stage(config: ConfigDict, root: epath.Path, open_data: Callable[..., loop.Data]) -> None:
    """What a stage's process does; it does not return.

    Args:
      open_data: of (config, root, source), what the run opened.
    """

    def tell(what: str, value: Any = None) -> None:
        print(SAYS + json.dumps([what, value]), flush=True)

    go: queue.SimpleQueue = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            go.put(float(line))
        os._exit(1)  # the run is gone, and the run root another's

    threading.Thread(target=listen, daemon=True).start()
    use_compilation_cache(root / "xla_cache")
    try:
        with worded(root):
            data = open_data(config, root, source_of(config))
            compile_ahead(config, root, data.source, data.vocab)
            tell("ready")
            meta = loop.run_stage(config, root, data, plan_eta=go.get(), show=show, ceiling=ceiling)
        tell("done", meta["parameters"])
    except UserError as error:
        tell("error", str(error))
    except loop.Stopped as stopped:
        print(stopped, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # an ordinary exit would wait for `listen`
    sys.stdout.flush()
    os._exit(0)  # whatever threads of libraries still wait for
