"""convert/packed: parameters in fewer bytes, and how far from what they were."""

import numpy as np
import pytest

from medm2g_jax.convert.packed import SCALE, pack, unpack
from medm2g_jax.errors import UserError

RNG = np.random.default_rng(0)
PARAMS = {
    "ct/unet/conv_in/kernel": RNG.normal(size=(3, 3, 16, 24)).astype(np.float32) * np.logspace(-3, 1, 24, dtype="f4"),
    "ct/unet/conv_in/bias": RNG.normal(size=24).astype(np.float32),
    "ct/unet/empty/kernel": np.zeros((64, 32), np.float32),
    "ct/unet/small/kernel": RNG.normal(size=(4, 4)).astype(np.float32),
}


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_what_is_stored_comes_back_within_half_a_step(precision):
    """Of int8 a step is 1/127 of the greatest in the column, of float16 2^-11 of the value."""
    stored = pack(PARAMS, precision)
    assert {n for n in stored if not n.endswith(SCALE)} == set(PARAMS)
    for name, true in PARAMS.items():
        again = unpack(name, stored[name], stored.get(name + SCALE))
        step = np.abs(true).reshape(-1, true.shape[-1]).max(0) / 127 if stored[name].dtype == np.int8 else 0
        half = 0 if precision == "float32" else 2.0**-11 * np.abs(true) + 6e-8
        assert again.dtype == np.float32 and (np.abs(again - true) <= 0.5001 * step + half).all(), name
    assert (stored["ct/unet/conv_in/kernel"].dtype == np.int8) == (precision == "int8")
    assert stored["ct/unet/small/kernel"].dtype == (np.float16 if precision != "float32" else np.float32)


def test_what_cannot_be_stored_or_read_is_said():
    with pytest.raises(UserError, match="--dtype int4: expected one of float32, float16, int8"):
        pack(PARAMS, "int4")
    with pytest.raises(UserError, match="a/bias holds values that float16 cannot"):
        pack({"a/bias": np.asarray([1e6], np.float32)}, "int8")
    kernel = pack(PARAMS, "int8")["ct/unet/conv_in/kernel"]
    for scale in (None, np.ones(3, np.float32)):
        with pytest.raises(UserError, match=r"a/kernel is int8 and has no scale of shape \(24,\)"):
            unpack("a/kernel", kernel, scale)
