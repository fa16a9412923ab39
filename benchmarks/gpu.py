"""The first quarter of an hour on one GPU: what is asked of it, most important first, each row written when measured.

benchmarks/gpu.sh [--dry-run] [--minutes=14] [--results=DIR]

Every row is a process of its own, so that what one leaves in memory, or ends by, no other meets. The rows:

    ceiling             bfloat16 product of two 8192 x 8192 matrices: what the chip gives a program at most
    unet step           training step of SD-1.5's UNet at 512 px (64 x 64 latents, 77 tokens, AdamW): ours, and
                        diffusers' under torch.compile with autocast, channels last
    ldm:ct, text_ct     the trainer's own step of these stages at `sd15`, with everything that is frozen in it
    ddim                50 guided steps of that UNet; decode: an image of 512 px

TFLOP are those of the traced step's products (`program.products`), for ours and torch's; share: of the ceiling.
first: the first call less a later one, in a fresh process without a compilation cache: tracing, compiling, choosing.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks import ddim, train_step, vae
from benchmarks.common import ROOT, SD15, TINY, environment, seconds_of

# (row, child's words, seconds that it may need); what no longer fits into the time is said, not begun.
ROWS = [
    ("ceiling", ("ceiling",), 40),
    ("unet step, batch 32, ours", ("step", "ours", "32"), 150),
    ("unet step, batch 32, torch.compile", ("step", "torch", "32"), 150),
    ("ldm:ct step, batch 32", ("stage", "ldm:ct", "32"), 240),
    ("ddim 50, batch 16, ours", ("ddim", "ours", "16"), 100),
    ("ddim 50, batch 16, torch.compile", ("ddim", "torch", "16"), 120),
    ("text_ct step, batch 8", ("stage", "text_ct", "8"), 260),
    ("ddim 50, batch 1, ours", ("ddim", "ours", "1"), 60),
    ("ddim 50, batch 1, torch.compile", ("ddim", "torch", "1"), 90),
    ("decode, ours", ("decode", "ours"), 40),
    ("decode, torch.compile", ("decode", "torch"), 60),
    ("unet step, batch 8, ours", ("step", "ours", "8"), 120),
    ("unet step, batch 8, torch.compile", ("step", "torch", "8"), 120),
    ("text_ct step, batch 32", ("stage", "text_ct", "32"), 260),
    ("ldm:ct step, batch 8", ("stage", "ldm:ct", "8"), 200),
    ("unet step, batch 64, ours", ("step", "ours", "64"), 150),
    ("unet step, batch 64, torch.compile", ("step", "torch", "64"), 150),
    ("ldm:ct step, batch 64", ("stage", "ldm:ct", "64"), 260),
    ("text_ct step, batch 64", ("stage", "text_ct", "64"), 260),
]
SIDE, CALLS = 8192, 5
# Of a stage in a dry run.
SMALL = {"image_size": 32, "net.width": 32, "net.image_unet.channels": (16,), "net.image_unet.attention": (False,)}
SMALL |= {"net.text_unet.channels": (16,), "net.text_unet.attention": (False,), "net.clip_image.image": 32}
SMALL |= {"net.image_context.channels": (8, 16), "net.clip_text.layers": 1, "net.clip_image.layers": 1}


def main(options: argparse.Namespace) -> None:
    """All rows, as far as the time goes."""
    begun = time.monotonic()
    found: dict = {"date": time.strftime("%Y-%m-%d"), "device": options.device, "dtype": options.dtype}
    found |= {"dry": options.dry_run, "rows": {}}
    small = {words[:2]: (name, words, need) for name, words, need in reversed(ROWS)}  # where batches are alike
    for name, words, need in [*small.values()][::-1] if options.dry_run else ROWS:
        left = 60 * options.minutes - (time.monotonic() - begun)
        late = left < (0 if options.dry_run else need / 2)
        found["rows"][name] = {"error": f"not begun: {left:.0f} s left"} if late else _child(words, options, left)
        print(_line(name, found), flush=True)
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / ("gpu-dry-run" if options.dry_run else "gpu-bfloat16")
        path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(found) + "\n")


def _child(words, options, seconds: float) -> dict:
    """What a row's process prints, or why there is nothing."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--child", *words] + ["--dry-run"] * options.dry_run
    env = environment(options.device) | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    env["PYTHONPATH"] = str(ROOT)
    try:
        done = subprocess.run(line, env=env, cwd=ROOT, text=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within the {seconds:.0f} s that were left"}
    if done.returncode:
        return {"error": next((s for s in reversed(done.stderr.splitlines()) if "Error" in s), "failed")[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict) -> str:
    """The rows in Markdown."""
    head = f"# Benchmarks: {found['device']}, {found['dtype']}{', dry run: sizes mean nothing' if found['dry'] else ''}"
    lines = [head, "", f"{found['date']}, `benchmarks/gpu.sh`; `benchmarks/gpu.py` says what the columns are.", ""]
    lines += ["| row | seconds | rows/s | TFLOP/s | share of the ceiling | first call, s | GB of the device |"]
    lines += ["|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(name, found) for name in found["rows"])])


def _line(name: str, found: dict) -> str:
    row = found["rows"][name]
    if "error" in row:
        return f"| {name} | {row['error'].replace('|', '/')} | | | | | |"
    rate, ceiling = _rate(name, found), _rate("ceiling", found)
    share = f"{rate / ceiling:.0%}" if rate and ceiling else ""
    cells = [f"{row['seconds']:.4g}", f"{row['rows'] / row['seconds']:.4g}", f"{rate:.4g}" if rate else "", share]
    return f"| {name} | {' | '.join(cells)} | {row['first']:.3g} | {row['GB']:.3g} |"


def _rate(name: str, found: dict) -> float | None:
    """TFLOP/s of a row; torch's has the FLOPs of ours."""
    row, ours = found["rows"].get(name, {}), found["rows"].get(name.replace("torch.compile", "ours"), {})
    flops = row.get("flops") or ours.get("flops")
    return flops / row["seconds"] / 1e12 if flops and "seconds" in row else None


# --- a row, in its own process ----------------------------------------------------------------------------------------


def measure(words: list[str], options: argparse.Namespace) -> dict:
    """{"seconds" of a call, "first", "rows" a call, "tflop_s" or none, "GB"}."""
    kind, *rest = words
    flops, rows, side = None, 1, rest[0] if rest else "ours"
    small = options.small
    if kind == "ceiling":
        call, flops = _ceiling(512 if small else SIDE)
    elif kind == "stage":
        call, flops = _stage(rest[0], 8 if small else int(rest[1]), options)
        side, rows = "ours", 8 if small else int(rest[1])
    elif kind == "decode":
        call = vae.ours(options, "decode") if side == "ours" else vae.torch(options, True, "decode")
    else:
        rows = 2 if small else int(rest[1])
        sizes = (TINY, rows, 8) if small else (SD15, rows, 64)
        task = train_step if kind == "step" else ddim
        sizes = sizes if kind == "step" else (*sizes, 5 if small else 50)
        if (kind, side) == ("step", "ours"):
            call, flops = _unet_step(options, sizes)
        else:
            call = task.ours(options, sizes) if side == "ours" else task.torch(options, True, sizes)
    first = seconds_of(call)
    call()
    times = [seconds_of(call) for _ in range(1 if small else CALLS)]
    seconds = median(times)
    out = {"seconds": seconds, "all": times, "first": first - seconds, "rows": rows, "flops": flops}
    return out | {"GB": _memory(side, options)}


def _ceiling(n: int):
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    turns = 20  # in one program, so that starting it does not count
    product = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: (x @ y) * jnp.bfloat16(n**-0.5), x))
    return lambda: jax.block_until_ready(product(x)), turns * 2 * n**3


def _unet_step(options, sizes):
    """(call, FLOPs) of a training step of the UNet."""
    import jax

    from medm2g_jax import program

    step, (state, *batch) = train_step.our_step(options, sizes)
    flops = program.products(step.trace(state, *batch).jaxpr.jaxpr)[0]

    def call():
        nonlocal state
        state, loss = step(state, *batch)
        jax.block_until_ready((state, loss))

    return call, flops


def _stage(config: str, batch: int, options):
    """(call, FLOPs) of the trainer's own step, compiled as the trainer compiles it, with weights at random."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from medm2g_jax import program
    from medm2g_jax.config import get_config
    from medm2g_jax.train import abstract, sharding
    from medm2g_jax.train.state import create

    target, _, subject = config.partition(":")
    words = [*([subject] if subject else []), "tiny" if options.small else "sd15"]
    asked = get_config(target, ",".join(words))
    for path, value in SMALL.items() if options.small else ():
        *parents, leaf = path.split(".")
        functools.reduce(lambda at, name: at[name], parents, asked)[leaf] = value
    asked.batch, asked.dtype = batch, options.dtype
    vocab = dict(clip=700, bert=300, gpt2=450) if options.small else dict(clip=49408, bert=28996, gpt2=50260)
    mesh = sharding.make_mesh(asked.mesh, jax.devices()[:1])
    backend = "cpu" if options.device == "cpu" else "gpu"
    setup, (state, frozen, rows, _) = abstract.abstract_stage(asked, vocab, mesh, backend)
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32)

    def draw(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            values = np.resize(noise, x.shape) * (float(np.prod(x.shape[:-1])) ** -0.5 if len(x.shape) > 1 else 0.1)
            return jax.device_put(values.astype(x.dtype), x.sharding)
        return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)

    trainable, frozen, rows = (jax.tree.map(draw, x) for x in (state.trainable, frozen, rows))
    state = jax.jit(lambda p: create(p, setup.tx), out_shardings=setup.layout)(trainable)
    step, _ = setup.programs(asked.remat)
    key = jax.random.key(0)
    flops = program.products(jax.make_jaxpr(setup.train_step)(state, frozen, rows, key).jaxpr)[0]

    def call():
        nonlocal state
        state, metrics = step(state, frozen, rows, key)
        jax.block_until_ready((state, metrics))

    return call, flops


def _memory(side: str, options) -> float:
    """GB of the device at most; on a CPU 0."""
    if options.device == "cpu":
        return 0.0
    if side == "torch":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--dry-run", action="store_true", help="on this CPU, at tiny sizes: does every row run?")
    arguments.add_argument("--minutes", type=float, default=14.0, help="for all rows")
    arguments.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    arguments.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    options.small, options.device = options.dry_run, "cpu" if options.dry_run else "gpu"
    options.dtype, options.repeats = "bfloat16", None
    if options.child:
        print(json.dumps(measure(options.child, options)))
    else:
        main(options)
