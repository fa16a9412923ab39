"""Parameters in fewer bytes than float32: float16, or int8 with a scale for each output feature.

    name          int8 (... f), of the kernels that are worth it; float16 of everything else
    name:scale    float32 (f,); the kernel is int8 * scale

Rounding a kernel to int8 moves each weight by at most half a scale, 1/254 of the greatest in its column. What that
costs a model is measured on its samples, not guessed: see the card of the model in the box.
"""

from collections.abc import Mapping

import numpy as np

from medm2g_jax.errors import UserError

PRECISIONS = ("float32", "float16", "int8")
SCALE = ":scale"
LEAST = 1024  # weights of a kernel from which int8 is worth a scale beside it


def pack(params: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """float32 parameters -> what is stored of them.

    Raises:
      UserError: an unknown precision, or a value that float16 cannot hold.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--dtype {precision}: expected one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return dict(params)
    out: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if precision == "int8" and value.ndim > 1 and value.size >= LEAST:
            scale = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0).astype(np.float32) / 127
            out[name] = np.round(value / np.where(scale > 0, scale, 1)).astype(np.int8)
            out[name + SCALE] = scale
        else:
            with np.errstate(over="ignore"):
                out[name] = value.astype(np.float16)
            if not np.isfinite(out[name]).all():
                raise UserError(f"{name} holds values that float16 cannot; export it with --dtype float32")
    return out


def unpack(name: str, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """One parameter as float32, from what `pack` made of it.

    Raises:
      UserError: int8 without its scale.
    """
    if stored.dtype != np.int8:
        return stored.astype(np.float32)
    if scale is None or scale.shape != stored.shape[-1:]:
        raise UserError(f"{name} is int8 and has no scale of shape {stored.shape[-1:]} beside it")
    return stored.astype(np.float32) * scale
