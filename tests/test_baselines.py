"""What stands beside a model, against closed forms."""

import numpy as np
import pytest

from medm2g_jax.evaluate import baselines
from medm2g_jax.evaluate.baselines import IMAGES, Pairs, constant_report, nearest_report, template_report
from medm2g_jax.evaluate.metrics.image import psnr

RNG = np.random.default_rng(0)


def images(n: int, side: int = 12) -> np.ndarray:
    return RNG.uniform(-1, 1, (n, side, side, 1)).astype(np.float32)


def test_a_function_of_the_grey_level_is_found_by_the_table_and_of_the_right_source():
    noise, source = images(20), images(20)
    curve = lambda x: np.sin(2 * x)  # noqa: E731
    train = Pairs([noise[:16], source[:16]], curve(source[:16]))
    made = baselines.look_up_table(train, [noise[16:], source[16:]])
    assert psnr(curve(source[16:]), made) > 45
    dark = np.full((1, 12, 12, 1), -1.0, np.float32)
    train = Pairs([np.clip(source, 0, 1)], curve(np.clip(source, 0, 1)))
    assert np.isfinite(baselines.look_up_table(train, [dark])).all(), "a level that no training image has"


def test_the_patch_regression_is_least_squares_with_a_penalty():
    a, b = images(6), images(6)
    blurred = sum(np.roll(a, shift, axis) for shift in (-1, 1) for axis in (1, 2)) / 4
    target = np.clip(blurred - 0.2 * b, -1, 1)
    made = baselines.patch_ridge(Pairs([a[:5], b[:5]], target[:5]), [a[5:], b[5:]])
    x = baselines._patches([a[:5], b[:5]])
    # Row by row what lies around a pixel, then a constant.
    assert x[12 * 5 + 5, 12] == a[0, 5, 5, 0] and x[12 * 5 + 5, 13] == a[0, 5, 6, 0] and (x[:, -1] == 1).all()
    # The same as ordinary least squares with a row for each penalised weight.
    penalty = np.sqrt(baselines.RIDGE * np.sum(x**2) / x.shape[1]) * np.eye(x.shape[1])[:-1]
    y = np.concatenate([target[:5].ravel(), np.zeros(len(penalty))])
    weights = np.linalg.lstsq(np.concatenate([x, penalty]), y, rcond=None)[0]
    other = np.clip(baselines._patches([a[5:], b[5:]]) @ weights, -1, 1)
    np.testing.assert_allclose(made.ravel(), other, atol=1e-5)


def test_the_nearest_training_image_is_the_one_itself():
    a, target = images(8), images(8)
    train = Pairs([a], target)
    order = RNG.permutation(8)
    np.testing.assert_array_equal(baselines.nearest_image(train, [a[order]]), target[order])


@pytest.mark.parametrize("name", IMAGES)
def test_every_baseline_answers_in_the_target_s_window(name):
    train = Pairs([images(20), images(20)], images(20))
    made = IMAGES[name](train, [images(3), images(3)])
    assert made.shape == (3, 12, 12, 1) and np.abs(made).max() <= 1


def test_reports():
    assert constant_report(["b", "a", "c", "a"], 3) == ["a", "a", "a"]
    some = ["clear lungs . no effusion .", "no effusion. mass.", "clear lungs. big heart. no effusion.", "a mass ."]
    assert template_report(some, 2) == 2 * ["clear lungs . no effusion ."]
    assert template_report(["a . b .", "c .", "d .", "c . e ."], 1) == ["c ."]
    seen = np.eye(3)
    assert nearest_report(["x", "y", "z"], seen, seen[[2, 0]]) == ["z", "x"]
