import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from medm2g_jax.data import images
from medm2g_jax.errors import UserError


def smooth(height, width, seed=0):
    noise = np.random.default_rng(seed).normal(size=(height, width))
    field = scipy.ndimage.gaussian_filter(noise, 6)
    return (field / np.abs(field).max()).astype(np.float32)


def test_the_whole_range_of_a_file_is_the_window(tmp_path):
    grey = np.array([[0, 51, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    np.testing.assert_allclose(images.read(tmp_path / "8.png"), [[-1, -0.6, 1]], atol=1e-6)
    Image.fromarray(np.array([[0, 13107, 65535]], np.uint16)).save(tmp_path / "16.png")
    np.testing.assert_allclose(images.read(tmp_path / "16.png"), [[-1, -0.6, 1]], atol=1e-6)
    for mode in ("RGB", "RGBA", "LA", "P"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "other.png")
        np.testing.assert_allclose(images.read(tmp_path / "other.png"), [[-1, -0.6, 1]], atol=1e-6)
    Image.fromarray(np.full((16, 16), 102, np.uint8)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(images.read(tmp_path / "a.jpg"), -0.2, atol=0.01)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_cut_anywhere_is_named(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    file = tmp_path / name
    Image.fromarray(pixels).save(file)
    whole = file.read_bytes()
    for end in (0, 5, 20, 40, 60, 200, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:end])
        with pytest.raises(UserError, match=name):
            images.read(file)
    for content in (b"GIF89a" + whole[6:], whole[:60] + bytes(200) + whole[260:]):
        file.write_bytes(content)
        if content[:3] == b"GIF" or name == "a.png":  # a JPEG has no checksum
            with pytest.raises(UserError, match=name):
                images.read(file)


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
