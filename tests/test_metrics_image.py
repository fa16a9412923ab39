"""Metrics of images by the named protocols: beside scikit-image, torch, or closed forms.

The protocols' public evaluators take the same steps with the same libraries; docs/metrics.md says which commit.
"""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import difference
from medm2g_jax.evaluate.metrics import METRICS, figures_of, image, published


def pictures(n: int = 3, h: int = 32, w: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth ones, and the same with noise, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    real = gaussian_filter(rng.normal(size=(n, h, w, 1)), (0, 2, 2, 0))
    real /= np.abs(real).max()
    return real, np.clip(real + 0.1 * rng.normal(size=real.shape), -1, 1)


def test_images_in_0_to_1_are_scikit_image_s():
    real, made = pictures()
    x, y = (real + 1) / 2, (made + 1) / 2
    ssim = [structural_similarity(a, b, data_range=1, channel_axis=-1) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(image.unit_ssim(real, made), ssim, atol=1e-9)
    assert METRICS["MAE, [0, 1]"](real, made) == pytest.approx(np.abs(x - y).mean(), abs=1e-12)


def test_an_image_smaller_than_a_window():
    real, made = pictures(1, 6, 20)
    for metric in (image.ssim, image.unit_ssim, published.selfrdb_ssim):
        with pytest.raises(UserError, match="images of 6 x 20 are smaller than its window of 7 x 7"):
            metric(real, made)


@pytest.mark.parametrize(("scales", "h", "w"), [(1, 11, 30), (2, 33, 40), (3, 57, 41), (5, 161, 176)])
def test_ms_ssim_is_scikit_image_s_maps_of_torch_s_pooled_images(scales, h, w):
    """With a k1 beyond all measure, scikit-image's SSIM is its second factor alone. The published one is that of Wang
    et al. with their five weights, as pytorch-msssim has it."""
    real, made = pictures(2, h, w)
    gaussian = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    weights = np.asarray(image.WEIGHTS[:scales])
    weights = weights if scales == 5 else weights / weights.sum()
    expected = []
    for x, y in zip((real + 1) / 2, (made + 1) / 2, strict=True):
        x, y = (torch.from_numpy(z[None, :, :, 0]) for z in (x, y))
        value = 1.0
        for scale, weight in enumerate(weights, start=1):
            k1 = 0.01 if scale == scales else 1e9
            value *= structural_similarity(x[0].numpy(), y[0].numpy(), K1=k1, **gaussian) ** weight
            pad = [side % 2 for side in x.shape[1:]]
            x, y = (torch.nn.functional.avg_pool2d(z, 2, padding=pad) for z in (x, y))
        expected.append(value)
    np.testing.assert_allclose(image.ms_ssim(real, made, scales), expected, atol=1e-6)


def test_ms_ssim_says_how_many_scales_fit():
    real, made = pictures(1, 64, 64)
    with pytest.raises(UserError, match="MS-SSIM of 5 scales: an image of 64 x 64 has 3"):
        image.ms_ssim(real, made, 5)
    with pytest.raises(UserError, match="has none"):
        image.ms_ssim(real[:, :10], made[:, :10], 1)
    assert METRICS["MS-SSIM, 3 scales"](real, real) == pytest.approx(1)


def test_diversity_is_the_mean_over_pairs_of_draws():
    draws = np.stack([pictures(2, 32, 32, seed)[1] for seed in range(3)])
    pairs = [image.ms_ssim(draws[a], draws[b], 2) for a, b in ((0, 1), (0, 2), (1, 2))]
    figure = METRICS["MS-SSIM among draws, 2 scales"].figure("t", "MS-SSIM among draws, 2 scales", draws, seed=0)
    assert figure.value == pytest.approx(np.mean(pairs)) and figure.n == 2
    assert image.diversity(draws[[0, 0, 0]], 2) == pytest.approx(1)
    with pytest.raises(UserError, match="one draw"):
        image.diversity(draws[:1])


def test_inside_a_mask_is_scikit_image_s_of_its_pixels():
    real, made = pictures()
    mask = np.random.default_rng(1).random(real.shape) < 0.4
    errors = [peak_signal_noise_ratio(a[m], b[m], data_range=2) for a, b, m in zip(real, made, mask, strict=True)]
    each = 10 * np.log10(4 / image.masked_squared_error(real, made, mask))
    np.testing.assert_allclose(each, errors, atol=1e-9)
    maps = [
        structural_similarity((a + 1) / 2, (b + 1) / 2, data_range=1, channel_axis=-1, full=True)[1][3:-3, 3:-3]
        for a, b in zip(real, made, strict=True)
    ]
    expected = [x[m[3:-3, 3:-3]].mean() for x, m in zip(maps, mask, strict=True)]
    np.testing.assert_allclose(image.masked_ssim(real, made, mask), expected, atol=1e-9)
    names = {f.metric: f.value for f in figures_of("masked", "t", real, made, mask, seed=0)}
    inside = [np.abs(a - b)[m].mean() / 2 for a, b, m in zip(real, made, mask, strict=True)]
    assert names["MAE, masked"] == pytest.approx(np.mean(inside), abs=1e-9)
    # All of the image is range1's.
    assert METRICS["PSNR dB, masked"](real, made, np.ones_like(mask)) == pytest.approx(image.psnr(real, made))
    with pytest.raises(UserError, match="mask of row 1 holds no pixel"):
        image.masked_ssim(real, made, mask * np.float32([1, 0, 1]).reshape(3, 1, 1, 1))


def test_a_lesion_s_error_and_bias():
    real = np.zeros((2, 8, 8, 1))
    lesion = np.zeros(real.shape, bool)
    lesion[:, 2:4, 2:4] = True
    made = real - 0.5 * lesion + 0.9 * ~lesion  # what is around it does not count
    assert METRICS["MAE, lesion"](real, made, lesion) == pytest.approx(0.25)
    assert METRICS["bias, lesion"](real, made, lesion) == pytest.approx(-0.25)


# --- public evaluators -----------------------------------------------------------------------------------------------


def test_syndiff_over_each_maximum():
    real, made = pictures(2, 260, 161)
    made[:, 0, 0] = 1  # the maximum that it is divided by is not in the crop: the peak is less than 1
    real *= 0.9
    expected = []
    for x, y in zip((real + 1) / 2, (made + 1) / 2, strict=True):
        x, y = (z / z.max() for z in (x, y))
        x, y = (z[2:258, 4:156] for z in (x, y))  # of 260 and 161, as torchvision centres: 4.5 goes to 4
        expected.append(peak_signal_noise_ratio(x, y, data_range=y.max()))
    np.testing.assert_allclose(published.syndiff_psnr(real, made), expected, atol=1e-9)
    # Half as bright is the same to it; a plane image 10 % off has 20 dB.
    x = np.full((1, 8, 8, 1), 0.0)
    assert published.syndiff_psnr(x, x - 0.5) == np.inf
    x[0, 0, 0, 0] = 1.0
    y = x.copy()
    y[0, 1:, :, 0] += 0.2
    assert published.syndiff_psnr(x, y) == pytest.approx(10 * np.log10(1 / (0.1**2 * 7 / 8)))
    with pytest.raises(UserError, match="syndiff, made image 1 is at the lower end"):
        published.syndiff_psnr(np.concatenate([x, x]), np.concatenate([x, 0 * x - 1]))


@pytest.mark.parametrize("masked", (False, True))
def test_selfrdb_over_each_mean(masked):
    real, made = pictures(4, 33, 40)
    made = 1.2 * made  # beyond [-1, 1] is cut off
    mask = np.random.default_rng(1).random((4, 21, 30, 1)) < 0.7 if masked else None
    psnr, ssim = [], []
    for i in range(4):
        x, y = ((z[i, ..., 0].clip(-1, 1) + 1) / 2 for z in (real, made))
        if masked:
            x, y = (z[6:26, 5:35] * mask[i, :20, :, 0] for z in (x, y))
        x, y = x / x.mean(), y / y.mean()
        psnr.append(peak_signal_noise_ratio(x, y, data_range=x.max()))
        ssim.append(100 * structural_similarity(x, y, data_range=x.max()))
    given = (mask[:, :20],) if masked else ()
    np.testing.assert_allclose(published.selfrdb_psnr(real, made, *given), psnr, atol=1e-9)
    np.testing.assert_allclose(published.selfrdb_ssim(real, made, *given), ssim, atol=1e-9)
    # Three slices of one subject and one of another: two subjects count alike.
    both = figures_of("selfrdb", "T1 -> T2", real, made, given[0] if given else None, ["b", "a", "b", "b"], seed=0)
    values = {f.metric: (f.value, f.n) for f in both}
    assert values["PSNR dB, selfrdb"] == (pytest.approx((np.mean([psnr[0], *psnr[2:]]) + psnr[1]) / 2), 2)
    assert values["SSIM %, selfrdb"] == (pytest.approx((np.mean([ssim[0], *ssim[2:]]) + ssim[1]) / 2), 2)


def test_selfrdb_of_an_empty_image():
    real, made = pictures()
    with pytest.raises(UserError, match="selfrdb, real image 0"):
        published.selfrdb_psnr(real, made, np.zeros_like(real))
    with pytest.raises(UserError, match=r"masks of \(21, 20\); expected even sides"):
        published.selfrdb_psnr(real, made, np.ones((3, 21, 20, 1)))


def volumes(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, some beyond what the challenge counts, and a body."""
    rng = np.random.default_rng(sum(shape))
    real = gaussian_filter(rng.normal(size=shape), 2)
    real = 1500 * real / real.std()
    noise = gaussian_filter(rng.normal(size=shape), 4)
    made = real + 1500 * noise / noise.std()
    ball = sum(((np.arange(n) - n / 2) / (0.45 * n)).reshape([-1 if a == i else 1 for a in range(3)]) ** 2
               for i, n in enumerate(shape))  # fmt: skip
    return real, made, (ball < 1).astype(np.uint8)


def test_synthrad2025_inside_the_mask():
    real, made, mask = volumes((20, 22, 24))
    inside = mask == 1
    assert published.synthrad_mae([real], [made], [mask]) == pytest.approx(np.abs(real - made)[inside].mean(), abs=1e-9)
    clipped = [np.clip(z, -1024, 3071)[inside] for z in (real, made)]
    expected = peak_signal_noise_ratio(*clipped, data_range=4095)
    assert published.synthrad_psnr([real], [made], [mask]) == pytest.approx(expected, abs=1e-9)
    assert published.synthrad_mae([real, real], [made, made], [mask, mask]).shape == (2,)
    for score in (published.synthrad_mae, published.synthrad_psnr):
        with pytest.raises(UserError, match="synthrad2025: the mask of row 0 holds no"):
            score([real], [made], [0 * mask])


def test_synthrad2025_ms_ssim_is_scikit_image_s_maps_of_torch_s_pooled_volumes():
    real, made, mask = volumes((40, 98, 60))
    inside = mask == 1
    x, y = (np.where(inside, np.clip(z, -1024, 3071), -1024) + 1024 for z in (real, made))
    x, y, m = (np.pad(z, [(28, 29), (0, 0), (18, 19)], mode="edge") for z in (x, y, inside))
    expected = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363, 0.1333):
        each = structural_similarity(x, y, data_range=4095, full=True)[1]
        each = np.maximum(each, 0)[3:-3, 3:-3, 3:-3]
        expected *= (each[m[3:-3, 3:-3, 3:-3]] ** weight).mean()
        x, y = (torch.from_numpy(np.pad(z, [(1, 0)] * 3))[None] for z in (x, y))
        x, y = (torch.nn.functional.avg_pool3d(z, 2)[0].numpy() for z in (x, y))
        m = m[::2, ::2, ::2]
    assert 0.3 < expected < 0.98
    assert published.synthrad_ms_ssim([real], [made], [mask]) == pytest.approx(expected, abs=1e-6)


def test_one_pair_of_images_and_unlike_numbers():
    """What convention alone does, and that nobody subtracts it."""
    real, made = pictures(4, 64, 64)
    common = dict(seed=0)
    (one,) = figures_of("syndiff", "T1 -> T2", real, made, **common)
    other = next(f for f in figures_of("image", "T1 -> T2", real, made, **common) if f.metric == "PSNR dB")
    assert one.protocol == "syndiff" and abs(one.value - other.value) > 1
    with pytest.raises(UserError, match="'PSNR dB, syndiff'.*'PSNR dB'"):
        difference(one, other)
    renamed = METRICS["PSNR dB, syndiff"].figure("T1 -> T2", "PSNR dB", real, made, seed=0)
    with pytest.raises(UserError, match="protocol 'syndiff'.*protocol 'range1'"):
        difference(renamed, other)
    # Of [-1, 1] with the range of [0, 1] it is 6 dB less; with the greatest real value for the range as much as that.
    usual = METRICS["PSNR dB"](real, made)
    assert usual - peak_signal_noise_ratio(real, made, data_range=1) == pytest.approx(20 * np.log10(2), abs=1e-9)
    x, y = (real + 1) / 2, (made + 1) / 2
    by_greatest = peak_signal_noise_ratio(x, y, data_range=x.max())
    assert by_greatest - usual == pytest.approx(20 * np.log10(x.max()), abs=1e-9)
    twice = METRICS["PSNR dB"].figure("t", "PSNR dB", real, 0.5 * (made + real), seed=0)
    assert difference(twice, other) == pytest.approx(20 * np.log10(2), abs=1e-9)
