"""From a picture to a network's input: one way, for files that are windowed and for values in a unit."""

import numpy as np
import pytest

from medm2g_jax.data.images import square
from medm2g_jax.data.picture import Picture, network_input, normalised
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

CT, XRAY = MODALITIES["ct"], MODALITIES["xray"]


def test_windowed_pixels_count_over_their_span_whatever_the_modality():
    grey = np.array([[0, 51, 255]], np.uint8)
    for modality in (CT, XRAY):
        np.testing.assert_allclose(normalised(Picture(grey, (0, 255)), modality), [[-1, -0.6, 1]], atol=1e-6)
    deep = np.array([[0, 819, 4095, 5000]], np.uint16)
    np.testing.assert_allclose(normalised(Picture(deep, (0, 4095)), CT), [[-1, -0.6, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(normalised(Picture(deep, (819, 4095)), CT)[0, :3], [-1, -1, 1], atol=1e-6)


def test_values_in_a_unit_go_through_the_modalitys_window():
    hu = np.array([[-2000, -1000, -300, 400, 3000]], np.int16)
    np.testing.assert_allclose(normalised(Picture(hu, None), CT), [[-1, -1, 0, 1, 1]], atol=1e-6)


def test_the_networks_input_is_square_and_of_one_channel():
    image = np.random.default_rng(0).integers(0, 255, (30, 50)).astype(np.uint8)
    out = network_input(Picture(image, (0, 255)), XRAY, 16)
    assert out.shape == (16, 16, 1) and out.dtype == np.float32
    np.testing.assert_allclose(out[..., 0], square((image / 127.5 - 1).astype(np.float32), 16), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_an_error(bad):
    with pytest.raises(UserError, match=r"x.png: expected an image of finite values, found NaN or infinite"):
        network_input(Picture(np.array([[0.0, bad]]), None, path="x.png"), CT, 8)
    with pytest.raises(UserError, match=r"the image: .* found shape \(0, 4\)"):
        network_input(Picture(np.zeros((0, 4)), None), CT, 8)
