"""What the benchmarks share: options, processes, interleaved timing, tables.

A task is one call of a network, ours and the same one in torch (diffusers, eager, channels_last). Both get random
weights of the same shapes: that they compute the same is for tests to show. The numbers of a row:

    seconds    of one call, median [least, most]; a pair is one call of ours and then one of torch, in one process
    ratio      ours / torch of each pair, median [least, most]; below 1 ours is faster
    compile    the first call less the median: tracing, compiling, and for torch what it prepares once
    peak       memory of a process that builds one of the two and runs it twice: resident on CPU, compiling included; of
               the device on GPU
    others     cores that other processes, or the machine's host, used meanwhile: near 0 on a quiet machine

On AMD CPUs torch's MKL takes a slow path. There every timing is repeated in a process that makes MKL believe in an
Intel CPU ("fast MKL"). This module loads neither jax nor torch, and the scripts load each only where it is built: a
process that measures memory holds one of them.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
# glibc reads them when a process starts. Without, it hands every call's buffers back and faults them in again; what is
# larger than a thread's arena it hands back all the same, and gets in pages of 2 MB instead of 4 KB.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# Sizes of the UNets, as `nn.unet.UNet` takes them: Stable Diffusion 1.5's, one that trains on a CPU, and --small.
SD15 = dict(
    channels=(320, 640, 1280, 1280), attention=(True, True, True, False), layers=2, heads=8, groups=32, width=768
)
MEDIUM = SD15 | dict(channels=(64, 128, 256, 256))
TINY = dict(channels=(16, 32), attention=(True, False), layers=1, heads=2, groups=8, width=16)

Call = Callable[[], Any]  # runs once, and returns when the result is there


@dataclass(frozen=True)
class Task:
    """What one script measures.

    Attributes:
      script: its module in this folder.
      ours: options -> call.
      torch: (options, compiled) -> call; compiled: with torch.compile.
      pairs: timed calls of each.
      goals: what is compared with -> ratio that must not be passed, on CPU in float32.
    """

    script: str
    name: str
    ours: Callable[[argparse.Namespace], Call]
    torch: Callable[[argparse.Namespace, bool], Call]
    pairs: int
    goals: Mapping[str, float] = field(default_factory=dict)


def parser() -> argparse.ArgumentParser:
    """Options of every script."""
    out = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    out.add_argument("--repeats", type=int, help="timed calls of each network; each task has its own number")
    out.add_argument("--small", action="store_true", help="tiny sizes: do the scripts run? Their numbers mean nothing")
    out.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # what this process is to measure
    return out


def main(tasks: Sequence[Task], options: argparse.Namespace | None = None) -> None:
    """A script: measure its tasks and print their table; or, as a process of its own, one number."""
    options = options or parser().parse_args()
    if options.child:
        print(json.dumps(measure_here(tasks, options)))
    else:
        print(table([row for task in tasks for row in measure(task, options)]))


# --- processes --------------------------------------------------------------------------------------------------------


def environment(device: str, preload: str = "") -> dict[str, str]:
    """Of a process that is measured."""
    env = os.environ | MALLOC | {"JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu"}
    env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.45"  # on a GPU jax otherwise leaves torch next to nothing
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # compile times are those without it
    return env | ({"LD_PRELOAD": preload} if preload else {})


def run_child(script: str, options: argparse.Namespace, *words: str, preload: str = "") -> dict[str, Any]:
    """What a script's `--child` prints: JSON in its last line."""
    flags = [f"--device={options.device}", f"--dtype={options.dtype}"]
    flags += ["--small"] * options.small + [f"--repeats={options.repeats}"] * bool(options.repeats)
    line = ["-m", f"benchmarks.{script}", *flags, "--child", *words]
    env = environment(options.device, preload)
    done = subprocess.run([sys.executable, *line], env=env, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"failed: python {' '.join(line)}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def intel_shim() -> Iterator[str]:
    """A library to preload that makes MKL take its fast path on an AMD CPU; "" where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("no C compiler (cc): MKL's fast path is left out", file=sys.stderr)
        yield ""
        return
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/intel.so"
        source = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path]
        subprocess.run(command, input=source, text=True, check=True)
        yield path


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a task, one for each thing that ours is compared with."""
    say = lambda what: print(f"{time.strftime('%H:%M:%S')}  {task.name}: {what}", file=sys.stderr, flush=True)  # noqa: E731
    say("timing")
    stock = run_child(task.script, options, "time", task.name)
    rows = _rows(task, stock, options, "torch, stock MKL" if stock["slow_mkl"] else "torch")
    if stock["slow_mkl"]:
        with intel_shim() as shim:
            if shim:
                say("timing with MKL's fast path")
                fast = run_child(task.script, options, "time", task.name, preload=shim)
                rows += _rows(task, fast, options, "torch, fast MKL")
    say("peak memory")
    peak = {side: run_child(task.script, options, "peak", task.name, side)["GB"] for side in ("ours", "torch")}
    rows[0]["peak GB"] = peak
    return rows


def _rows(task: Task, timed: Mapping, options: argparse.Namespace, eager: str) -> list[dict[str, Any]]:
    rows = []
    for side in [name for name in timed["seconds"] if name != "ours"]:
        against = eager if side == "torch" else side
        pair = {"ours": timed["seconds"]["ours"], "torch": timed["seconds"][side]}
        row = {"task": task.name, "against": against, "device": timed["device"], "pairs": len(pair["ours"])}
        row |= {name: spread(values) for name, values in pair.items()}
        row["ratio"] = spread([a / b for a, b in zip(pair["ours"], pair["torch"], strict=True)])
        first = {"ours": timed["first"]["ours"], "torch": timed["first"][side]}
        row["compile"] = {name: max(0.0, first[name] - row[name]["median"]) for name in first}
        row |= {"others": timed["others"], "options": timed["options"]}
        goal = task.goals.get("fast" if against.endswith("fast MKL") else "stock")
        if goal and (options.device, options.dtype, options.small) == ("cpu", "float32", False):
            row |= {"goal": goal, "met": row["ratio"]["median"] <= goal}
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def measure_here(tasks: Sequence[Task], options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: `time TASK`, or `peak TASK ours|torch`."""
    verb, name, *side = options.child
    task = next(task for task in tasks if task.name == name)
    if verb == "time":
        return _time(task, options)
    call = task.ours(options) if side == ["ours"] else task.torch(options, False)
    call(), call()
    return {"GB": _peak(options, side[0])}


def _time(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    calls = {"ours": task.ours(options), "torch": task.torch(options, False)}
    if options.device == "gpu":
        calls["torch.compile"] = task.torch(options, True)
    first = {name: seconds_of(call) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    start, busy, own = time.monotonic(), _busy(), time.process_time()
    for _ in range(options.repeats or task.pairs):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    wall, own = time.monotonic() - start, time.process_time() - own
    others = None if busy is None else max(0.0, (_busy() - busy - own) / wall)
    import jax
    import torch

    from medm2g_jax.device import compiler_options

    amd = Path("/proc/cpuinfo").exists() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    slow = options.device == "cpu" and amd and torch.backends.mkl.is_available()
    about = dict(others=others, slow_mkl=slow, device=jax.devices()[0].device_kind, options=compiler_options())
    return dict(seconds=seconds, first=first, **about)


def seconds_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _busy() -> float | None:
    """CPU seconds of all processes since the machine started, with what its host took away; None where not Linux."""
    if not Path("/proc/stat").exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _peak(options: argparse.Namespace, side: str) -> float:
    if options.device == "cpu":
        # A child counts from its parent's size on, which is small: the parent loads neither jax nor torch.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if side == "torch":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `measure` in Markdown."""
    lines = [
        "| task | against | ours s | torch s | ratio | goal | compile s, ours / torch | peak GB, ours / torch "
        "| pairs | others, cores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = f"<= {row['goal']}: {'met' if row['met'] else 'missed'}" if "goal" in row else ""
        peak = "{ours:.1f} / {torch:.1f}".format(**row["peak GB"]) if "peak GB" in row else ""
        compiled = "{ours:.1f} / {torch:.1f}".format(**row["compile"])
        times = [format_spread(row["ours"], 3), format_spread(row["torch"], 3), format_spread(row["ratio"], 2)]
        others = "" if row["others"] is None else f"{row['others']:.2f}"
        lines.append(_line(row["task"], row["against"], *times, goal, compiled, peak, row["pairs"], others))
    return "\n".join(lines)


def format_spread(values: Mapping[str, float], digits: int) -> str:
    return "{median:.{d}f} [{least:.{d}f}, {most:.{d}f}]".format(**values, d=digits)


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
