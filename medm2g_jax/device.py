"""What depends on the backend: the dtype of activations, compiler options, the compilation cache."""

import ctypes
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from medm2g_jax import cache, cpu
from medm2g_jax.errors import UserError

CPU_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def activation_dtype(name: str, backend: str | None = None):
    """ "auto": bfloat16 on accelerators, float32 on CPU; or the dtype of that name. `backend`: None for this one's."""
    if name == "auto":
        return jnp.float32 if (backend or jax.default_backend()) == "cpu" else jnp.bfloat16
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {name!r}: expected auto, float32 or bfloat16")
    return jnp.dtype(name).type


def host_device() -> jax.Device | None:
    """This process' CPU, which an accelerator's process has as well; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def compiler_options() -> dict[str, Any] | None:
    """Options for `jax.jit(..., compiler_options=)` on this backend; None where there are none.

    On CPU what MEDM2G_CPU_OPTIONS says, else what was found to be fastest on this machine (`cpu.kept`). They are kept
    beside the compilation cache that the environment names, else with what this user's programs keep: not in a run's
    own folder, where each would measure again.
    """
    return _options()


def measure_compiler_options() -> None:
    """Find them, where this machine has none yet: some seconds that a training, and nothing shorter, is worth."""
    _options(measure=True)
    _options.cache_clear()


@functools.cache
def _options(measure: bool = False) -> dict[str, Any] | None:
    if jax.default_backend() != "cpu":
        return None
    if (told := os.environ.get(cpu.VARIABLE)) is not None:
        return cpu.accepted(cpu.given(told))
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache.user_cache())
    return cpu.choose(folder) if measure else cpu.kept(folder)


def jit(f: Callable, *, out_shardings: Any = None, save_memory: bool = False, **options: Any) -> Callable:
    """`jax.jit` with this backend's compiler options, of a program that does not hold the names of its results.

    jax writes each result's path ("trainable['ct/unet/...']") into the program, and with it into the key of the
    compilation cache. Without them two flows that differ in the modality alone share one executable.

    Args:
      out_shardings: as `jax.jit` takes it; None leaves the part of the result that it stands for to the compiler.
      save_memory: order operations on CPU for little memory instead of much at once. A full-size round's step then has
        2.2 GB of temporaries, else 9.8 GB.
    """
    structures = {}

    def program(*args):
        out = f(*args)
        structures[jax.tree.structure(args)] = jax.tree.structure(out)
        return _unnamed(out)

    chosen = compiler_options()
    if save_memory and chosen is not None:
        chosen = chosen | CPU_MEMORY
    compiled = jax.jit(program, out_shardings=_unnamed(out_shardings), compiler_options=chosen, **options)

    executables: dict = {}

    def executable(args):
        """Compiled ahead, so that what the compiler leaves behind is given back before the program runs."""
        key = jax.tree.structure(args), tuple((x.shape, x.dtype) for x in jax.tree.leaves(args))
        if key not in executables:
            executables[key] = compiled.lower(*args).compile()
            give_back_memory()
        return executables[key]

    @functools.wraps(f)
    def call(*args):
        leaves = jax.tree.leaves((executable(args) if save_memory else compiled)(*args))
        return jax.tree.unflatten(structures[jax.tree.structure(args)], leaves)

    call.lower, call.trace = compiled.lower, compiled.trace
    return call


def keep_memory() -> None:
    """For entry points: let glibc keep what this process frees, where it would give each large buffer back to the
    system and have it handed out again page by page (a step's temporaries: benchmarks/README.md). Where the environment
    says something of it (MALLOC_...) that holds; other C libraries have no such setting."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def give_back_memory() -> None:
    """Return what this process has freed to the system, where glibc keeps it (a large program's compiler: 2 GB)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        pass


def _unnamed(tree: Any) -> Any:
    """Dicts as tuples of their values, in the order in which jax flattens them."""
    if isinstance(tree, dict):
        return tuple(_unnamed(tree[k]) for k in sorted(tree))
    return tuple(map(_unnamed, tree)) if isinstance(tree, tuple | list) else tree


def use_compilation_cache(folder) -> None:
    """Keep compiled executables in `folder`, unless the environment names another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
