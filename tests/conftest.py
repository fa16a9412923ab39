"""Tests run on 8 virtual CPU devices, with every jaxtyping annotation of the package checked at call time.

MEDM2G_TEST_PLATFORM=cuda: on a GPU, for what is marked `gpu` and, in float32 that is not cut to TF32, `full`.
"""

import functools
import gc
import os
import shutil
import tempfile

PLATFORM = os.environ.get("MEDM2G_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    # These tests spend their time compiling: level 0, the older emitters, one module of LLVM's and none of its dear
    # passes take 30 % less of it than level 0 alone, which takes half of what is shipped.
    FLAGS = (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_llvm_disable_expensive_passes=true",
    )
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
else:
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# One compilation cache for the whole session: workers and the processes that tests start inherit its place, and train
# the same programs many times. Whoever makes it takes it away.
CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="medm2g-tests-")
os.environ["MEDM2G_CPU_OPTIONS"] = "none"  # nothing is measured, in the processes that tests start neither
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
from absl import flags  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain asks for parsed flags
install_import_hook("medm2g_jax", "beartype.beartype")

import jax.numpy as jnp  # noqa: E402

from medm2g_jax import cpu, device  # noqa: E402

# Tracing makes millions of small objects that live on: looking for garbage among them takes a twentieth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

# First, so that no worker is left with one of them when the others have nothing more to do.
LONGEST = ("test_end_to_end", "test_alone", "test_loop", "test_recipes", "test_open", "test_launch")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_unconfigure():
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


SHIPPED = cpu.CHOICES[cpu.FIRST] if PLATFORM == "cpu" else None


@pytest.fixture
def jit(request, monkeypatch):
    """jit that compiles fast; in a test marked `full`, there and in the package, the one users have."""
    if request.node.get_closest_marker("full") is None:
        import oracles  # and with it torch, which most tests do without

        return oracles.fast_jit
    monkeypatch.setattr(device, "compiler_options", lambda: SHIPPED)
    return device.jit


@pytest.fixture
def agree(request, jit, record_property):
    """agree(net, run, theirs, *args): run(net, *args), a dict of arrays, is torch's dict of tensors `theirs`.

    Each within a relative error of `limit`, ten times that at full size. There the largest is printed, and the same in
    bfloat16, which may be `half`.
    """
    import oracles

    full = jit is device.jit

    def agree(net, run, theirs, *args, limit=1e-5, half=0.1):
        def largest(net):
            ours = jit(functools.partial(run, net))(*args)
            assert ours.keys() == theirs.keys()
            return max((oracles.relative_error(ours[name], theirs[name]), name) for name in theirs)

        errors = {"float32": largest(net)}
        if full:
            errors["bf16"] = largest(net.clone(dtype=jnp.bfloat16))
            said = ", ".join(f"{dtype} {error:.1e} ({name})" for dtype, (error, name) in errors.items())
            record_property("relative error", said)
            print(f"\n{request.node.name}: relative error {said}")
        assert errors["float32"][0] <= limit * (10 if full else 1), errors
        assert "bf16" not in errors or errors["bf16"][0] < half, errors

    return agree
