"""Compiler options for the CPU at hand, by measurement: what helps on one maker's costs a sixth on another's.

Once a machine and jaxlib, a small training step (convolution, GroupNorm, SiLU, attention, GEGLU) is compiled under each
of CHOICES and timed in turns; the fastest is kept in a file, which every later process reads. Nothing that changes what
is computed is among them (`xla_cpu_enable_fast_math` is not).
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from medm2g_jax.errors import UserError

Options = dict[str, Any]
VARIABLE = "MEDM2G_CPU_OPTIONS"  # "name=value,name=value", or "none": takes the place of the choice
# Medians of a step of the small UNet, s: the first 1.9 on an AMD EPYC (2.1 without), on an Intel Xeon 1.85, where
# "stock" takes 1.65 and "wide" 1.55. YNN's convolutions are slow on AMD, its dots are not; level 1 compiles in 85 % of
# the time.
CHOICES: dict[str, Options] = {
    "dots": {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_backend_optimization_level": "1",
    },
    "stock": {},
    "level 1": {"xla_backend_optimization_level": "1"},
    "wide": {"xla_cpu_prefer_vector_width": "512"},
}
FIRST = "dots"  # kept, unless another is faster by GAIN
GAIN = 0.05
ROUNDS = 7


def accepted(options: Mapping[str, Any]) -> Options:
    """Those of the options that this jaxlib knows; each other one is dropped alone, and said."""
    if _compiles(options) is None:
        return dict(options)
    out = {}
    for name, value in options.items():
        error = _compiles({name: value})
        if error is None:
            out[name] = value
        else:
            said = f"compiler option {name}={value} is refused by this jaxlib, going on without: {error}"
            print(said, file=sys.stderr)
    return out


def _compiles(options: Mapping[str, Any]) -> str | None:
    """None, or why a program does not compile under these options."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(jnp.float32(0)).compile()
    except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


def given(text: str) -> Options:
    """What VARIABLE says.

    Raises:
      UserError: not of the form NAME=VALUE,NAME=VALUE.
    """
    out: Options = {}
    for part in text.split(",") if text != "none" else ():
        name, equals, value = part.strip().partition("=")
        if not name.startswith("xla_") or not equals:
            raise UserError(f"{VARIABLE}: expected none, or xla_NAME=VALUE with commas between, found {part!r}")
        out[name] = {"true": True, "false": False}.get(value.lower(), value)
    return out


def processor() -> str:
    """The CPU's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def choose(folder: Path) -> Options:
    """The choice for this processor, its number of cores and jaxlib that `folder` keeps, else one that is measured now
    and kept. Of several processes that measure at once the first one's counts, for all."""
    about = {"processor": processor(), "cores": os.cpu_count(), "jaxlib": jaxlib.__version__, "of": CHOICES}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"cpu-options-{key}.json"
    if not path.exists():
        options = {name: accepted(some) for name, some in CHOICES.items()}
        spent = probe(options)
        best = min(spent, key=spent.get)
        best = best if spent[best] < (1 - GAIN) * spent[FIRST] else FIRST
        found = about | {"choice": best, "options": options[best], "milliseconds": spent}
        listed = ", ".join(f"{name} {ms:.1f}" for name, ms in spent.items())
        print(
            f"compiler options for {about['processor']}: {best!r} (ms of a small step: {listed}); kept in {path}, "
            f"{VARIABLE} overrides",
            file=sys.stderr,
        )
        if not _keep(path, json.dumps(found, indent=1)):
            return options[best]
    return json.loads(path.read_text())["options"]


def _keep(path: Path, text: str) -> bool:
    """Write the file unless it is there by now; False where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part") as part:
            part.write(text)
            part.flush()
            os.link(part.name, path)
    except OSError:  # it is there by now; or a folder that cannot be written, or a file system without links
        return path.is_file()
    return True


def probe(choices: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Least milliseconds of a small step under each of these options, taken in turns; those alike are measured once."""
    args = _arguments()
    steps: dict[str, tuple[Any, list[float]]] = {}
    same: dict[str, str] = {}
    for name, options in choices.items():
        same[name] = next((n for n in same if choices[n] == options), name)
        if same[name] == name:
            step = jax.jit(lambda *a: jax.grad(_loss)(*a), compiler_options=dict(options)).lower(*args).compile()
            jax.block_until_ready(step(*args))
            steps[name] = step, []
    for _ in range(ROUNDS):
        for step, seconds in steps.values():
            begun = time.perf_counter()
            jax.block_until_ready(step(*args))
            seconds.append(time.perf_counter() - begun)
    return {name: 1e3 * min(steps[same[name]][1]) for name in choices}


def _arguments():
    c, shapes = 64, {"conv": (3, 3, 64, 64), "deep": (3, 3, 256, 256)}
    shapes |= {"qkv": (64, 192), "up": (64, 512), "out": (256, 64)}
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 2))
    params = {n: 0.05 * jax.random.normal(next(keys), shape) for n, shape in shapes.items()}
    return params, jax.random.normal(next(keys), (8, 16, 16, c)), jax.random.normal(next(keys), (8, 4, 4, 4 * c))


def _loss(params, x, deep):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def normal(x):
        x = x - x.mean((1, 2), keepdims=True)
        return jax.nn.silu(x * jax.lax.rsqrt(jnp.square(x).mean((1, 2), keepdims=True) + 1e-5))

    h = (x + convolve(normal(x), params["conv"])).reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = jnp.split(h @ params["qkv"], 3, axis=-1)
    h += jax.nn.softmax(q @ k.swapaxes(1, 2) / 8) @ v
    value, gate = jnp.split(h @ params["up"], 2, axis=-1)
    h += (value * 0.5 * gate * (1 + jax.lax.erf(gate))) @ params["out"]
    return jnp.square(h).mean() + jnp.square(convolve(normal(deep), params["deep"])).mean()
