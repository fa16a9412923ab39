"""NumPy's files: what `generate` wrote comes back as it was; nothing is unpickled."""

import numpy as np
import pytest
from test_volume import turned

from medm2g_jax.data import formats
from medm2g_jax.data.formats import array
from medm2g_jax.data.picture import normalised
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, ">i2", np.uint8, bool])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_image_is_in_its_unit(tmp_path, dtype, order):
    values = np.arange(-10, 10).reshape(4, 5).astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(values, order=order))
    picture = formats.read(tmp_path / "a.npy", 20, MODALITIES["ct"])
    np.testing.assert_array_equal(picture.pixels, values)
    assert picture.span is None and picture.path == str(tmp_path / "a.npy")
    shown = normalised(picture, MODALITIES["ct"])
    np.testing.assert_allclose(shown, (values.astype(float) + 1000) / 700 - 1, atol=1e-6)


def test_a_volume_has_no_place(tmp_path):
    formats.write_volume(tmp_path / "a.npy", turned("PIR"), {})
    volume = formats.read_volume(tmp_path / "a.npy")
    np.testing.assert_array_equal(volume.values, turned("PIR").values)
    assert volume.notes == (array._NOWHERE,) and volume.spacing == (1, 1, 1)


def test_what_is_no_array_of_numbers_is_refused(tmp_path):
    for values, message in (
        (np.zeros(3), r"float64 of shape \(3,\); expected numbers"),
        (np.zeros((2, 2, 2, 2)), "float64 of shape .*expected numbers"),
        (np.array([["a"]]), "<U1 of shape"),
        (np.array([[None]], object), "object of shape"),
        (np.zeros((2, 2), complex), "complex128 of shape"),
        (np.zeros((0, 2)), "0 x 2 voxels; expected lengths from 1"),
    ):
        np.save(tmp_path / "a.npy", values, allow_pickle=True)
        with pytest.raises(UserError, match=f"a.npy: {message}"):
            formats.read(tmp_path / "a.npy", 100)
    np.save(tmp_path / "a.npy", np.zeros((20, 20)))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="ends after 109 of 400 values"):
        formats.read(tmp_path / "a.npy", 400)
    with pytest.raises(UserError, match="20 x 20 voxels, more than the 399"):
        formats.read(tmp_path / "a.npy", 399)
    (tmp_path / "a.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.npy: not a whole NumPy file"):
        formats.read(tmp_path / "a.npy", 400)
