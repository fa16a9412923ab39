"""Tests run on 8 virtual CPU devices, with every jaxtyping annotation of the package checked at call time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 halves the time of compiling, which is where these tests spend theirs.
_FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _FLAGS
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from absl import flags  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain asks for parsed flags
install_import_hook("medm2g_jax", "beartype.beartype")

from medm2g_jax.train import device  # noqa: E402

device.CPU_OPTIONS = {}
