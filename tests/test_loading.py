"""What a user gives to a model, and what it gives back: values in units, files, the grid. No network is needed."""

import numpy as np
import pytest
from PIL import Image

from medm2g_jax.data.images import square
from medm2g_jax.errors import UserError
from medm2g_jax.inference import Model

META = {"shared": {"image_size": 16, "data": {"most_pixels": 10_000}}, "ranges": {}}


def model(**meta) -> Model:
    loaded = Model.__new__(Model)  # without parameters: nothing here reads them
    loaded.meta = META | meta
    return loaded


def test_values_in_a_unit_and_files_become_what_the_networks_read(tmp_path):
    hu = np.linspace(-1500, 900, 12 * 20).reshape(12, 20)
    expected = square(np.clip((hu + 1000) / 700 - 1, -1, 1).astype(np.float32), 16)
    ours = model().model_input("ct", [hu, hu.tolist()])
    assert ours.shape == (2, 16, 16, 1) and ours.dtype == np.float32
    np.testing.assert_allclose(ours[..., 0], [expected] * 2, atol=1e-5)
    grey = np.random.default_rng(0).integers(0, 255, (12, 20), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey).save(tmp_path / "a.png", exif=exif)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        (ours,) = model().model_input("mri:t2", [path])
        np.testing.assert_allclose(
            ours[..., 0], square((grey[::-1, ::-1] / 127.5 - 1).astype(np.float32), 16), atol=1e-5
        )


def test_a_16_bit_file_counts_as_those_of_its_stream_did_in_training(tmp_path):
    Image.fromarray(np.full((16, 16), 819, np.uint16)).save(tmp_path / "a.png")
    known = model(ranges={"xray": [0, 4095]})
    for stream, loaded, value, why in (
        ("xray", known, -0.6, "0 to 4095 (as in training)"),
        ("ct", known, 819 / 32767.5 - 1, "0 to 65535 (all its bits: training met no 16-bit image of this stream)"),
        ("xray", model(), 819 / 32767.5 - 1, "all its bits"),
    ):
        (picture,) = loaded.opened(stream, [tmp_path / "a.png"])
        np.testing.assert_allclose(loaded.model_input(stream, [picture]), value, atol=1e-6)
        line = loaded._ranged(stream, picture)
        assert why in line and "a.png" in line
    assert model()._ranged("ct", np.zeros((4, 4))) == ""


@pytest.mark.parametrize(
    ("stream", "item", "message"),
    (
        ("ct", np.zeros((4, 4, 1)), r"ct: expected an image \(h w\), found an array of shape \(4, 4, 1\)"),
        ("ct", {"a": 1}, r"ct: expected an image \(h w\) or its path, found dict"),
        ("ct", np.full((4, 4), np.nan), "found NaN"),
        ("ct", "gone.png", "gone.png'?: cannot be read"),
        ("xray", "gone.bmp", "gone.bmp: of no format"),
        ("text", 3, "text: expected a str, found int"),
    ),
)
def test_what_cannot_be_given_is_one_line(stream, item, message):
    with pytest.raises(UserError, match=message):
        model().model_input(stream, [item])


def test_images_come_back_in_their_unit_on_the_grid_of_what_was_given():
    loaded = model()
    given = {"xray": loaded.opened("xray", [np.zeros((40, 30))] * 2), "text": loaded.opened("text", ["a"])}
    assert loaded._grid(given) == (40, 30)
    assert loaded._grid(given | {"ct": loaded.opened("ct", [np.zeros((8, 8))])}) == (16, 16)
    out = loaded.in_units("ct", np.full((2, 16, 16, 1), 0.5), (40, 30))
    assert out.shape == (2, 40, 30)
    np.testing.assert_allclose(out, 50, atol=1e-3)  # HU
    assert loaded.in_units("text", ["a"]) == ["a"]
