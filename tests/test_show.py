"""Pieces of what a stage ends with; whole pictures are drawn in the tests of runs."""

import re

import numpy as np
from ml_collections import ConfigDict

from medm2g_jax.evaluate import report, show


def test_pairs_without_text_are_all_told_apart():
    """A batch begins with `about`, which is no row of anything."""
    image = np.zeros((5, 4, 4, 1), np.float32)
    batch = {"about": {"stream": {"mri": np.zeros(5, np.int32)}}, "ct": image, "mri": image}
    np.testing.assert_array_equal(show._classes(batch, None), np.arange(5))


def test_slow_samples_say_how_far_they_are(monkeypatch, capsys):
    now = iter([0.0, 30.0, 60.0, 90.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(now))
    config = ConfigDict(dict(stage="text_ct", batch=16))  # 2 for each of 8 devices
    made = show._in_parts(config, lambda part: part + 1, np.arange(5))
    np.testing.assert_array_equal(made, np.arange(1, 6))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  text_ct: {n} of 5 held-out records, {left} s left" for n, left in ((2, 45), (4, 15))]


def test_the_report_puts_figures_between_floor_and_ceiling():
    autoencoders = {"reconstruction, finding F1": 0.98, "CT PSNR dB": 26.9, "CT PSNR dB of the mean image": 16.2}
    numbers = {"CT -> report, finding F1": 0.39, "CT -> report, finding F1 of the best constant report": 0.33}
    page = report._numbers("text_ct", numbers | {"report -> CT, PSNR dB": 13.9}, autoencoders)
    rows = [re.findall(r"\d+\.\d{3}", row) for row in page.split("<tr>")[2:]]
    assert rows == [["0.330", "0.390", "0.980"], ["16.200", "13.900", "26.900"]]
    # An autoencoder has a floor and no ceiling but perfection.
    page = report._numbers("image_vae", {k: v for k, v in autoencoders.items() if "CT" in k}, autoencoders)
    assert re.findall(r"\d+\.\d{3}", page) == ["16.200", "26.900"]
