"""What a manifest's row says of an image beside its file: units, ranges, places; and what it says wrongly."""

import json

import numpy as np
import pytest
from test_manifest import RNG, deep, picture, row, write

from medm2g_jax.data.contents import contents
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

HU = np.arange(-1024, 1024).repeat(2).reshape(64, 64)


def test_a_scale_gives_hounsfield_units_back_and_no_range_is_looked_for(tmp_path, caplog):
    images = {"ct": deep(tmp_path, "a.png", HU + 1024), "xray": picture(tmp_path, "b.png", 51, (64, 64))}
    about = {"scale": {"ct": [1, -1024]}, "spacing": {"ct": [0.5, 0.75]}, "orientation": {"ct": "PL"}}
    source = Manifest(write(tmp_path, [row(0, images=images, info={"kV": [120]}, **about)]), 64)
    source.check()
    got = source.picture(0, "ct")
    assert (got.span, got.spacing, got.orientation, got.pixels.dtype) == (None, (0.5, 0.75), "PL", np.float32)
    np.testing.assert_array_equal(got.pixels, HU)
    expected = MODALITIES["ct"].normalise(HU.astype(np.float32))
    for _ in range(2):  # decoded, and remembered: to a fiftieth of a HU
        np.testing.assert_allclose(source.read(0, "ct", RNG)[..., 0], expected, atol=0.02 / 700)
    assert source.ranges == {} and not caplog.records
    np.testing.assert_allclose(source.read(0, "xray", RNG), -0.6, atol=1e-6)
    assert source.picture(0, "xray").spacing is None


def test_a_span_says_which_values_count_after_the_scale_and_beside_the_sets_own_range(tmp_path):
    values = np.arange(4096).reshape(64, 64)
    name = deep(tmp_path, "a.png", values)
    rows = [
        row(0, images={"mri_t2": name}, span={"mri_t2": [0, 2000]}),
        row(1, images={"mri_t2": name}, span={"mri_t2": [-10, 1990]}, scale={"mri_t2": [0.5, -10]}),
        row(2, images={"mri_t2": name}),
        row(3, images={"mri_t2": name}, scale={"mri_t2": [1 / 4095, 0]}),
    ]
    source = Manifest(write(tmp_path, rows), 64, ranges={"mri": (0, 1000)})
    for index, (low, high, given) in enumerate(
        [(0, 2000, values), (-10, 1990, values / 2 - 10), (0, 1000, values), (0, 1, values / 4095)]
    ):
        expected = np.clip((given - low) / (high - low) * 2 - 1, -1, 1)
        for _ in range(2):
            np.testing.assert_allclose(source.read(index, "mri:t2", RNG)[..., 0], expected, atol=4e-5)
    assert source.ranges == {"mri:t2": (0, 1000)}  # of the row that says nothing


def test_a_scale_alone_does_not_give_a_scanners_unit_a_meaning(tmp_path):
    name = deep(tmp_path, "a.png", HU + 1024)
    source = Manifest(write(tmp_path, [row(0, images={"mri": name}, scale={"mri": [2, 0]})]), 64)
    for call in (source.check, lambda: source.read(0, "mri", RNG)):
        with pytest.raises(UserError, match=r"row 'r0': .*a.png: values 0 to 4094, and MRI has no unit.* in 'span'"):
            call()


def test_what_is_said_is_part_of_what_a_set_holds(tmp_path):
    images = {"ct": picture(tmp_path, "a.png", 3)}
    kinds = [{}, {"scale": {"ct": [1, 0]}}, {"scale": {"ct": [1, -1]}}, {"span": {"ct": [0, 9]}}]
    assert len({contents(Manifest(write(tmp_path, [row(0, images=images, **k)]), 8)).fingerprint for k in kinds}) == 4


def test_how_another_manifest_would_name_it(tmp_path):
    images = {"ct": picture(tmp_path, "deep/a.png", 3)}
    source = Manifest(write(tmp_path, [row(0, images=images, text="t", scale={"ct": [2, -1024.5]})]), 8)
    assert source.entry(0, "ct") == {"images": str(tmp_path / "deep/a.png"), "scale": [2, -1024.5]}
    assert source.entry(0, "text") is None and source.picture(0, "text") is None


BAD = [
    ({"scale": [1, 0]}, r"'scale' must map keys of 'images' to \[slope.*found \[1, 0\]"),
    ({"scale": {"mri": [1, 0]}}, "'scale' names 'mri', which is no key of 'images'"),
    ({"scale": {"ct": [0, 5]}}, r"'scale' of 'ct': expected \[slope, intercept\].* not 0, found \[0, 5\]"),
    ({"scale": {"ct": [1]}}, r"'scale' of 'ct': .*found \[1\]"),
    ({"scale": {"ct": [1, True]}}, "'scale' of 'ct': .*found a list of 2"),
    ({"scale": {"ct": ["Jane", 1]}}, "'scale' of 'ct': .*found a list of 2"),
    ({"scale": {"ct": "Jane"}}, "'scale' of 'ct': .*found a str"),
    ({"scale": {"ct": [1, float("nan")]}}, r"'scale' of 'ct': .*found \[1, nan\]"),
    ({"scale": {"ct": [10**400, 0]}}, "'scale' of 'ct': .*found a list of 2"),
    ({"span": {"ct": [5, 5]}}, r"'span' of 'ct': expected \[low, high\].*found \[5, 5\]"),
    ({"spacing": {"ct": [0, 1]}}, r"'spacing' of 'ct': .*above 0, found \[0, 1\]"),
    ({"orientation": {"ct": "LR"}}, "'orientation' of 'ct': expected two letters"),
    ({"orientation": {"ct": "PLH"}}, "'orientation' of 'ct': expected two letters.*found a str"),
    ({"orientation": {"ct": 5}}, "'orientation' of 'ct': expected two letters.*found 5"),
    ({"info": ["Jane"]}, "'info' must be a JSON object, found list"),
    ({"scale": {"xray": [1, 0]}}, "'scale' of 'xray': DICOM files say themselves"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_errors_name_file_and_line_and_nobody(tmp_path, fields, message):
    images = {"ct": picture(tmp_path, "x.png", 3), "xray": "x.dcm"}
    (tmp_path / "x.dcm").touch()
    with pytest.raises(UserError, match=f"manifest.jsonl:2: {message}") as error:
        Manifest(write(tmp_path, [row(0, text="t"), json.dumps(row(1, images=images, **fields))]), 8)
    assert "Jane" not in str(error.value) and "\n" not in str(error.value)
