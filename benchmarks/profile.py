"""Where the time of a program goes, by kind of operation: of ours from XLA's trace, of torch's from its profiler.

XLA runs operations at once where they do not wait for each other, so an instant is shared out evenly between those that
are under way; what is left is time in which none was. A fusion counts as the heaviest thing in it: convolution, matrix
product, reduction, then elementwise; one that only moves values is a copy.
"""

import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.common import Call

CONVOLUTION, PRODUCT, REDUCTION, COPY = "convolutions", "matrix products", "reductions", "copies"
ELEMENTWISE, OPTIMIZER, NOTHING = "elementwise", "optimizer", "no operation under way"
KINDS = [f"{kind}, {way}" for kind in (CONVOLUTION, PRODUCT) for way in ("forward", "backward")]
KINDS += [REDUCTION, ELEMENTWISE, COPY, OPTIMIZER, NOTHING]

# Opcodes of HLO. cuDNN and cuBLAS appear as custom calls on GPUs.
_MOVES = {"copy", "transpose", "bitcast", "reshape", "broadcast", "concatenate", "slice", "pad", "reverse", "constant"}
_MOVES |= {"parameter", "tuple", "get-tuple-element", "dynamic-slice", "dynamic-update-slice", "iota", "convert"}
# Names of torch's operators, "aten::" taken off; the first that is found in the name.
_TORCH = [
    (r"conv", CONVOLUTION),
    (r"mm$|matmul|linear|scaled_dot_product", PRODUCT),
    (r"norm|softmax|sum|mean|mse_loss", REDUCTION),
    (r"copy_|cat$|clone|contiguous|upsample|fill_|zero|empty|^to$|view|transpose|permute|reshape|expand", COPY),
]


def our_kinds(call: Call, hlo: str, repeats: int) -> dict[str, float]:
    """Seconds a call by kind; hlo: the compiled program's text."""
    import jax

    call()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            wall = time.perf_counter() - start
        trace = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    kinds = _hlo_kinds(hlo)
    intervals = [(kinds.get(name, ELEMENTWISE), *interval) for name, interval in _intervals(trace)]
    return _per_call({kind: seconds / 1e9 for kind, seconds in _shared(intervals).items()}, wall, repeats)


def _intervals(trace) -> Iterable[tuple[str, tuple[float, float]]]:
    """(instruction, (start, end) in ns) of everything that ran. On CPU an operation only begins in its own event, and
    ends, maybe in another thread, in an event "end: NAME"."""
    begun, ended = defaultdict(list), defaultdict(list)
    for event in (event for plane in trace.planes for line in plane.lines for event in line.events):
        if event.name.startswith("end: "):
            ended[event.name.removeprefix("end: ")].append(event.start_ns)
        name = dict(event.stats).get("hlo_op")
        if name:
            begun[name].append((event.start_ns, event.start_ns + event.duration_ns))
    for name, own in begun.items():
        ends = sorted(ended[name])
        for i, (start, end) in enumerate(sorted(own)):
            yield name, (start, max(end, ends[i]) if len(ends) == len(own) else end)


def _shared(intervals: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Time by kind, each instant shared out between the intervals that hold it."""
    points = sorted((at, change, kind) for kind, *ends in intervals for at, change in zip(ends, (1, -1), strict=True))
    out, active, before = Counter(), Counter(), 0.0
    for at, change, kind in points:
        count = active.total()
        for other, n in active.items() if count else ():
            out[other] += (at - before) * n / count
        active[kind] += change
        before = at
    return dict(out)


def _hlo_kinds(hlo: str) -> dict[str, str]:
    """Instruction -> kind."""
    opcodes, found, computation = defaultdict(set), {}, ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            computation = head[1]
        elif part := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            target = re.search(r'custom_call_target="([^"]+)"', line)
            called = re.search(r"calls=%([\w.-]+)", line)
            path = re.search(r'op_name="([^"]*)"', line)
            own = target[1] if target else part[2]
            opcodes[computation].add(own)
            found[part[1]] = own, called and called[1], path[1] if path else ""
    return {name: _hlo_kind(opcodes[called] if called else {own}, path) for name, (own, called, path) in found.items()}


def _hlo_kind(opcodes: set[str], path: str) -> str:
    way = "backward" if "transpose(" in path else "forward"
    for kind, pattern in ((CONVOLUTION, "conv(olution|[A-Z])"), (PRODUCT, "^dot|cublas|gemm")):
        if any(re.search(pattern, opcode) for opcode in opcodes):
            return f"{kind}, {way}"
    if any(opcode.startswith("reduce") for opcode in opcodes):
        return REDUCTION
    if opcodes <= _MOVES:
        return COPY
    return ELEMENTWISE if not path or "jvp(" in path else OPTIMIZER


def torch_kinds(call: Call, repeats: int, gpu: bool) -> dict[str, float]:
    """Seconds a call by kind, the time in an operator less that in those it calls."""
    import torch

    call()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wall = time.perf_counter() - start
    out = Counter()
    for event in profiler.events():
        if kind := _torch_kind(event):
            out[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
    return _per_call(out, wall, repeats)


def _torch_kind(event) -> str | None:
    if not event.name.startswith("aten::"):
        return None
    above, parent = "", event.cpu_parent
    while parent is not None:
        above, parent = f"{above} {parent.name}", parent.cpu_parent
    if "Optimizer.step" in above:
        return OPTIMIZER
    name = event.name.removeprefix("aten::")
    kind = next((kind for pattern, kind in _TORCH if re.search(pattern, name)), ELEMENTWISE)
    # What an operator of ATen calls inside itself, oneDNN's reordering of weights for one, belongs to its own kind.
    way = "backward" if "evaluate_function" in above else "forward"
    return f"{kind}, {way}" if kind in (CONVOLUTION, PRODUCT) else kind


def _per_call(seconds: Mapping[str, float], wall: float, repeats: int) -> dict[str, float]:
    return {k: v / repeats for k, v in seconds.items()} | {NOTHING: (wall - sum(seconds.values())) / repeats}


def table(ours: Mapping[str, float], torch: Mapping[str, float]) -> str:
    """Both by kind, in ms, in Markdown."""
    lines = ["| kind | ours ms | torch ms | ours less torch, ms |", "|---|---|---|---|"]
    rows = [(kind, ours.get(kind, 0.0), torch.get(kind, 0.0)) for kind in KINDS]
    rows.append(("all, while profiled", sum(ours.values()), sum(torch.values())))
    lines += [f"| {kind} | {1e3 * a:.0f} | {1e3 * b:.0f} | {1e3 * (a - b):+.0f} |" for kind, a, b in rows]
    return "\n".join(lines)
