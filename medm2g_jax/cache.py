"""Where this user's programs keep what they can make again. It imports no jax, so that `doctor` can ask without it."""

import os
from pathlib import Path


def user_cache() -> Path:
    """The package's own folder there, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medm2g_jax"


def compiled() -> Path:
    """Where programs of models without a run root are kept compiled, if the environment names no other place."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache() / "xla")
