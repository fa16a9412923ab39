"""Where the time of `make demo` goes: seconds of every stage by what its process was doing, and what was compiled.

python -m benchmarks.demo [--config=configs/text_ct.py:tiny] [--config.FIELD=VALUE ...] [--json=FILE]

Trains the whole plan into an empty folder, one stage after the other (`make demo` has two at once), with a clock around
what a stage consists of. Each moment belongs to the innermost clock that runs. A step is waited for before the next is
begun, so that its seconds are its own; data and checkpoints that the trainer overlaps with steps are so counted as they
are.
"""

import time

STARTED = time.time()  # before the imports, which are a part of the demo

import argparse  # noqa: E402
import collections  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.common import MALLOC, ROOT  # noqa: E402

KINDS = ("import", "data", "parameters", "tracing", "compiling", "steps", "held out", "pictures", "checkpoints")
COMPILER = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "tracing",
    "/jax/core/compile/backend_compile_duration": "compiling",  # or reading from the cache
}


class Clocks:
    """Intervals (stage, kind, what, begin, end) of everything that was clocked in the main thread."""

    def __init__(self):
        self.rows: list[tuple] = []
        self.stage = "before"
        self._main = threading.get_ident()

    def add(self, kind: str, what: str, begin: float, end: float) -> None:
        if threading.get_ident() == self._main:
            self.rows.append((self.stage, kind, what, begin, end))

    def around(self, kind: str, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            begin = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(kind, getattr(function, "__name__", kind), begin, time.time())

        return timed

    def patch(self, kind: str, owner, *names: str) -> None:
        for name in names:
            setattr(owner, name, self.around(kind, getattr(owner, name)))

    def compiler(self, event: str, seconds: float, **about) -> None:
        if event in COMPILER:
            now = time.time()
            self.add(COMPILER[event], str(about.get("fun_name", "")), now - seconds, now)

    def split(self) -> dict[str, dict[str, float]]:
        """stage -> kind -> seconds."""
        out: dict = collections.defaultdict(collections.Counter)
        rows = sorted(self.rows, key=lambda r: (r[3], -r[4]))
        points = sorted({t for r in rows for t in r[3:]})
        open_, at = [], 0
        for left, right in zip(points, points[1:], strict=False):
            while at < len(rows) and rows[at][3] <= left:
                open_.append(rows[at])
                at += 1
            open_ = [r for r in open_ if r[4] > left]
            if open_:
                stage, kind, *_ = max(open_, key=lambda r: r[3])
                out[stage][kind] += right - left
        return {stage: dict(kinds) for stage, kinds in out.items()}


def measure(config: str, overrides: list[str]) -> dict:
    """{"stages": {stage: {kind: s}}, "programs": [[stage, name, seconds]], ...} of a run."""
    clocks = Clocks()
    import jax
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    from medm2g_jax import main, run
    from medm2g_jax.train import checkpoint, log, loop, setup

    jax.monitoring.register_event_duration_secs_listener(clocks.compiler)
    clocks.add("import", "imports", STARTED, time.time())
    clocks.patch("data", run, "open_data", "source_of", "described")
    clocks.patch("pictures", run, "show", "data_picture", "write_report")
    clocks.patch("parameters", loop.results, "load_upstream")
    clocks.patch("parameters", loop, "_parameters")
    clocks.patch("tracing", loop, "assemble")
    clocks.patch("data", loop, "_held_out")
    clocks.patch("held out", loop, "_evaluate")
    clocks.patch("checkpoints", checkpoint.Checkpoints, "__init__", "save", "wait", "restore", "restore_item", "close")
    clocks.patch("checkpoints", checkpoint, "save_model")

    programs, batches, run_stage = setup.Setup.programs, loop.Data.batches, run.loop.run_stage

    def waited(self, save_memory):
        train_step, eval_step = programs(self, save_memory)
        step = clocks.around("steps", lambda *args: jax.block_until_ready(train_step(*args)))
        return step, eval_step

    def clocked(self, *args, **kwargs):
        source = iter(clocks.around("data", batches)(self, *args, **kwargs))
        take = clocks.around("data", lambda: next(source, None))
        return iter(take, None)

    cpu = {}

    def staged(config, *args, **kwargs):
        clocks.stage = config.stage
        begin, used = time.time(), os.times()
        try:
            return run_stage(config, *args, **kwargs)
        finally:
            now = os.times()
            cpu[config.stage] = now.user - used.user + now.system - used.system
            clocks.add("rest", "stage", begin, time.time())
            clocks.stage = "after"

    setup.Setup.programs, loop.Data.batches, run.loop.run_stage = waited, clocked, staged
    log.quiet()
    with tempfile.TemporaryDirectory() as folder:
        run.run(main.read_config([f"--config={config}", *overrides]), f"{folder}/run")
    programs_ = [[s, w, round(e - b, 2)] for s, k, w, b, e in clocks.rows if k == "compiling" and e - b > 0.3]
    return {
        "seconds": time.time() - STARTED,
        "cpu": cpu,
        "stages": clocks.split(),
        "programs": programs_,
    }


def table(found: dict) -> str:
    """Seconds in Markdown; CPU: of all threads, user and system."""
    kinds = [*KINDS, "rest"]
    lines = [f"| stage | {' | '.join(kinds)} | all | CPU |"]
    lines.append("|---" * (len(kinds) + 3) + "|")
    total: collections.Counter = collections.Counter()
    for stage, own in found["stages"].items():
        total.update(own)
        lines.append(_line(stage, own, kinds, found["cpu"].get(stage)))
    lines.append(_line("all", total, kinds, sum(found["cpu"].values())))
    return "\n".join(lines)


def _line(stage, own, kinds, cpu) -> str:
    cells = [own.get(k, 0.0) for k in kinds]
    shown = [f"{x:.1f}" if x else "" for x in (*cells, sum(cells))]
    return f"| {stage} | {' | '.join(shown)} | {'' if cpu is None else f'{cpu:.0f}'} |"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--config", default="configs/text_ct.py:tiny")
    arguments.add_argument("--json", type=Path, help="where the numbers go as well")
    options, overrides = arguments.parse_known_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.chdir(ROOT)
        os.execvpe(
            sys.executable,
            [sys.executable, "-m", "benchmarks.demo", *sys.argv[1:]],
            os.environ | MALLOC | {"JAX_PLATFORMS": "cpu"},
        )
    found = measure(options.config, overrides)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
