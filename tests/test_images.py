import numpy as np
import pytest
import scipy.ndimage

from medm2g_jax.data import images


def smooth(height, width, seed=0):
    noise = np.random.default_rng(seed).normal(size=(height, width))
    field = scipy.ndimage.gaussian_filter(noise, 6)
    return (field / np.abs(field).max()).astype(np.float32)


def test_padding_is_black_and_centred_and_nothing_is_stretched():
    image = np.ones((32, 20), np.float32)
    out = images.square(image, 32)
    np.testing.assert_array_equal(out[:, 6:26], 1)
    np.testing.assert_array_equal(out[:, :6], -1)
    np.testing.assert_array_equal(out[:, 26:], -1)
    np.testing.assert_array_equal(images.square(image.T, 32), out.T)
    disc = np.hypot(*np.mgrid[-60:60, -100:100]) < 40
    small = images.square(np.where(disc, 1, -1).astype(np.float32), 50) > 0
    assert abs(small.any(0).sum() - small.any(1).sum()) <= 1  # a disc stays a disc


def test_resizing_is_antialiased_and_stays_in_range():
    checker = np.where(np.indices((96, 96)).sum(0) % 2, 1, -1).astype(np.float32)
    assert np.abs(images.square(checker, 24)).max() < 0.15  # without antialiasing: +-1
    edge = np.where(np.arange(64) < 32, -1, 1) * np.ones((64, 1))
    for size in (16, 200):
        out = images.square(edge.astype(np.float32), size)
        assert out.min() == -1 and out.max() == 1 and out.dtype == np.float32


@pytest.mark.parametrize("shape", [(90, 61), (61, 90), (64, 64), (33, 128)])
def test_undo_brings_the_old_grid_back(shape):
    image = smooth(*shape)
    for size in (64, 128):
        back = images.undo(images.square(image, size), shape)
        assert back.shape == shape
        inside = np.s_[5:-5, 5:-5]  # at its rim an image mixes with the padding
        assert np.square(image[inside] - back[inside]).mean() < 4e-6  # 60 dB: not shifted by a tenth of a pixel
    np.testing.assert_array_equal(images.undo(images.square(image, max(shape)), shape), image)


def test_two_images_on_one_grid_stay_aligned():
    first = smooth(75, 50)
    second = -first
    first, second = images.square(first, 32), images.square(second, 32)
    np.testing.assert_allclose(first[:, 8:24], -second[:, 8:24], atol=1e-6)  # inside the padding's reach
