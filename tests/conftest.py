"""Tests run on 8 virtual CPU devices, with every jaxtyping annotation of the package checked at call time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from absl import flags  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain asks for parsed flags
install_import_hook("medm2g_jax", "beartype.beartype")
