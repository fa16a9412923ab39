"""All benchmarks: one table, written with machine, versions and date to results/DEVICE-DTYPE.md and .json.

python -m benchmarks.all [--device=gpu --dtype=bfloat16] [--results=DIR]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

from benchmarks import ddim, profile, startup, train_step, unet_forward, vae
from benchmarks.common import MALLOC, ROOT, measure, parser, table

TASKS = [task for script in (unet_forward, vae, ddim, train_step) for task in script.TASKS]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")


def machine(device: str) -> str:
    """Processor, cores, memory and, where it is measured, GPU, in a line that names no host."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    wide = "AVX-512" if any("avx512f" in line for line in lines) else ""
    parts = [model or platform.processor() or platform.machine(), wide, f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    return ", ".join(part for part in parts if part)


def report(results: dict) -> str:
    """The results in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    malloc = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    ours = ", ".join(f"{k}={v}" for k, v in (results["tasks"][0].get("options") or {}).items()) or "none"
    parts = [
        f"# Benchmarks: {results['device']}, {results['dtype']}",
        f"{results['date']}, {results['minutes']:.0f} minutes. {results['machine']}.\n{versions}.",
        "`make bench` wrote this; `benchmarks/common.py` says what the columns are. Medians [least, most]; ratio: "
        f"ours / torch, of interleaved pairs. Both run with `{malloc}`; compiler options of ours: {ours}.",
        table(results["tasks"]),
    ]
    if "startup" in results:
        parts += ["## Start to first step", startup.table(results["startup"])]
    if "where" in results:
        parts += [
            "## Where the training step's time goes",
            "`benchmarks/profile.py` says how it is counted. torch is as installed, without the fast MKL.",
            profile.table(**results["where"]),
        ]
    return "\n\n".join(parts)


def write(results: dict, options: argparse.Namespace, begun: float) -> None:
    """What there is so far: a run that is cut short keeps it."""
    results["minutes"] = (time.monotonic() - begun) / 60
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"{options.device}-{options.dtype}" + "-small" * options.small  # never in the place of real results
    (options.results / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.results / f"{name}.md").write_text(report(results) + "\n")


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    options = arguments.parse_args()
    begun = time.monotonic()
    results = {
        "device": options.device,
        "dtype": options.dtype,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.device),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "tasks": [],
    }
    for task in TASKS:
        results["tasks"] += measure(task, options)
        write(results, options, begun)
    results["startup"] = startup.measure(options)
    write(results, options, begun)
    results["where"] = train_step.where(options)
    write(results, options, begun)
    print(report(results))
