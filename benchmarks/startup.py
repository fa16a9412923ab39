"""From the start of the trainer's process to the end of its first step: cold, and from the compilation cache.

python -m benchmarks.startup [--device=gpu --dtype=bfloat16]

Runs `python -m medm2g_jax.main --config=configs/ldm.py:ct,tiny` from untrained upstream networks until it prints its
first step, then ends it. Both runs of a pair begin in an empty folder, so both also make the phantom and train the
tokenizers; the second one finds the first one's compiled programs. There is no torch original to stand beside it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common import ROOT, environment, format_spread, parser, spread

PAIRS = 2
STAGE = "ldm_ct"
SMALL = ("--config.data.train=60", "--config.data.val=6", "--config.data.test=0", "--config.batch=2")


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """{"cold" | "cached": {"stage", "step"}}: seconds until the stage begins (imports, data, tokenizers) and until its
    first step is done."""
    found = {"cold": [], "cached": []}
    for _ in range(options.repeats or PAIRS):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in found.items():
                print(f"{time.strftime('%H:%M:%S')}  start to first step: {name}", file=sys.stderr, flush=True)
                times.append(_first_step(options, Path(folder) / name, Path(folder) / "cache"))
    return {
        name: {"stage": spread([a for a, _ in times]), "step": spread([b for _, b in times])}
        for name, times in found.items()
    }


def _first_step(options: argparse.Namespace, workdir: Path, cache: Path) -> tuple[float, float]:
    line = [sys.executable, "-m", "medm2g_jax.main", "--config=configs/ldm.py:ct,tiny", f"--workdir={workdir}"]
    line += ["--config.upstream=init", "--config.steps=1", f"--config.dtype={options.dtype}"]
    line += SMALL if options.small else ()
    env = environment(options.device) | {"JAX_COMPILATION_CACHE_DIR": os.fspath(cache)}
    start = time.monotonic()
    begun, said = 0.0, []
    with subprocess.Popen(
        line, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as trainer:
        for text in trainer.stdout:
            said.append(text)
            if text.startswith(f"== {STAGE}"):
                begun = time.monotonic() - start
            if text.startswith(f"{STAGE} 1/"):
                done = time.monotonic() - start
                trainer.kill()
                return begun, done
    sys.exit(f"failed: python {' '.join(line[1:])}\n{''.join(said)[-4000:]}")


def table(found: Mapping[str, Mapping]) -> str:
    lines = ["| start to first step | until the stage begins, s | until its first step is done, s |", "|---|---|---|"]
    for name, times in found.items():
        lines.append(f"| {name} | {format_spread(times['stage'], 1)} | {format_spread(times['step'], 1)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure(parser().parse_args())))
