"""Geometry: whatever way a grid lies, slices show the patient's right on the left, and go back where they came from."""

import dataclasses
import itertools

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from medm2g_jax.data import images
from medm2g_jax.data.picture import network_input, normalised
from medm2g_jax.data.volume import (
    PLANES,
    PRESETS,
    Volume,
    apart,
    checked,
    from_slices,
    on_one_grid,
    plane_of,
    ranged,
    resample,
    select,
    slices,
    stack,
    stack_affine,
)
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

CT, MRI = MODALITIES["ct"], MODALITIES["mri"]
CODES = [
    "".join(pair[k] for pair, k in zip(order, turn, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for turn in itertools.product((0, 1), repeat=3)
]
CANONICAL = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # x to the right, y to the front, z to the head
AFFINE = np.array([[2.0, 0, 0, -30], [0, 3, 0, -40], [0, 0, 5, 50], [0, 0, 0, 1]])


def turned(code: str, canonical=CANONICAL, affine=AFFINE) -> Volume:
    """The same patient, stored another way, by nibabel."""
    to = nibabel.orientations.axcodes2ornt(code)
    image = nibabel.Nifti1Image(canonical, affine).as_reoriented(nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), to))  # fmt: skip
    return Volume(np.asarray(image.dataobj), image.affine)


@pytest.mark.parametrize("code", CODES)
def test_every_orientation_gives_the_same_slices_and_takes_them_back(code):
    volume = turned(code)
    assert volume.orientation.translate(str.maketrans("HF", "SI")) == code
    x, y, z = CANONICAL.shape
    for plane, value, sides in (
        ("axial", lambda n, r, c: CANONICAL[x - 1 - c, y - 1 - r, n], (z, y, x)),
        ("coronal", lambda n, r, c: CANONICAL[x - 1 - c, y - 1 - n, z - 1 - r], (y, z, x)),
        ("sagittal", lambda n, r, c: CANONICAL[x - 1 - n, y - 1 - c, z - 1 - r], (x, z, y)),
    ):
        whole = stack(volume, plane)
        # The highest x is the patient's right: column 0 of axial and coronal slices.
        np.testing.assert_array_equal(whole, value(*np.indices(sides)))
        cut = slices(volume, plane)
        mm = {"axial": (3, 2), "coronal": (5, 2), "sagittal": (5, 3)}[plane]
        assert len(cut) == sides[0] and cut[0].spacing == pytest.approx(mm)
        assert cut[0].orientation == {"axial": "PL", "coronal": "FL", "sagittal": "FP"}[plane]
        np.testing.assert_array_equal(cut[2].pixels, whole[2])
        at = stack_affine(volume, plane) @ np.append(np.indices(sides).reshape(3, -1), np.ones((1, whole.size)), 0)
        back = np.rint(np.linalg.inv(AFFINE) @ at)[:3].astype(int)
        np.testing.assert_array_equal(CANONICAL[tuple(back)], whole.ravel())
        made = from_slices(whole.astype(np.float32), volume, CT, plane)
        np.testing.assert_array_equal(made.values, volume.values)
        np.testing.assert_array_equal(made.affine, volume.affine)
        assert made.unit == "HU" and made.modality == "CT"


@pytest.mark.parametrize("code", CODES)
def test_a_grid_is_one_however_its_voxels_are_stored(code):
    volume, other = turned("RAS"), turned(code)
    assert apart(volume, other) < 1e-9 and on_one_grid(volume, other)
    for share, one in ((0.4, True), (0.6, False)):
        moved = other.affine.copy()
        moved[0, 3] += share * min(volume.spacing)
        assert on_one_grid(volume, dataclasses.replace(other, affine=moved)) == one
    assert not on_one_grid(volume, dataclasses.replace(volume, values=volume.values[:-1]))
    mirrored = dataclasses.replace(volume, values=volume.values, affine=volume.affine @ np.diag([-1.0, 1, 1, 1]))
    assert not on_one_grid(volume, mirrored)


@pytest.mark.parametrize("seed", range(20))
def test_oblique_grids_are_cut_along_their_own_voxels(seed):
    rng = np.random.default_rng(seed)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(rng.uniform(-0.35, 0.35, 3)).as_matrix()  # up to 35 degrees
    turn[:3, 3] = rng.normal(size=3) * 100
    volume = turned(CODES[rng.integers(48)])
    volume = dataclasses.replace(volume, affine=turn @ volume.affine)
    theirs = "".join(nibabel.aff2axcodes(volume.affine)).translate(str.maketrans("SI", "HF"))
    assert volume.orientation == theirs
    for plane, letters in PLANES.items():
        affine = stack_affine(volume, plane)
        for n, letter in enumerate(letters):
            axis, sign = {"H": (2, 1), "P": (1, -1), "L": (0, -1), "F": (2, -1)}[letter]
            assert np.abs(affine[:3, n]).argmax() == axis and np.sign(affine[axis, n]) == sign
        np.testing.assert_array_equal(from_slices(stack(volume, plane) * 1.0, volume, CT, plane).values, volume.values)


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "ASL", "SRP"])
@pytest.mark.parametrize("shape", [(24, 40, 7), (41, 24, 7)])
def test_through_the_networks_square_and_back_every_pixel_is_where_it_was(code, shape):
    """At the side's own size to the rounding; at twice that, inside the rim, which mixes with the padding, to 2 HU."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    head = 300 * np.exp(-4 * ((x - 0.3) ** 2 + (y + 0.2) ** 2)) - 900 * np.exp(-9 * ((x + 0.3) ** 2 + y**2)) + 20 * z
    volume = turned(code, head.astype(np.float32))
    cut = slices(volume)
    for size, rim, most in ((max(shape), 0, 1e-3), (2 * max(shape), 3, 2.0)):
        seen = [network_input(picture, CT, size)[..., 0] for picture in cut]
        back = np.stack([images.undo(image, cut[0].pixels.shape) for image in seen])
        error = np.abs(stack(from_slices(CT.in_unit(back), volume, CT), "axial") - stack(volume, "axial"))
        assert error[:, rim : shape[1] - rim, rim : shape[0] - rim].max() < most


def test_slices_that_were_not_made_are_empty_and_shapes_are_held_to():
    volume = turned("LPS")
    made = from_slices(np.full((2, 5, 4), 7.0), volume, CT, chosen=[5, 1])
    planes = stack(made, "axial")
    assert [float(p.mean()) for p in planes] == [-1000, 7, -1000, -1000, -1000, 7]
    with pytest.raises(UserError, match="expected 6 x 5 x 4, the axial slices of the source, found 6 x 4 x 5"):
        from_slices(np.zeros((6, 4, 5)), volume, CT)
    with pytest.raises(UserError, match="slice 6: the volume has 6 axial slices, numbers 0 to 5"):
        slices(volume, chosen=[6])
    with pytest.raises(UserError, match="plane 'top': expected one of axial, coronal, sagittal"):
        stack(volume, "top")


def test_the_plane_of_a_single_slice_is_across_it():
    for n, plane in enumerate(("sagittal", "coronal", "axial")):
        values = np.moveaxis(np.zeros((1, 5, 6)), 0, n)
        assert plane_of(Volume(values, AFFINE)) == plane
    assert plane_of(turned("SRP")) == "coronal"  # stored with the last axis to the back


def test_pixels_that_are_not_square_are_said():
    cut = slices(turned("LPS"), "coronal")
    assert cut[0].notes == ("pixels of 5 x 2 mm are not square; resample the volume to one spacing",)


def test_resampling_keeps_positions_and_never_stretches():
    """A ramp in millimetres is the same ramp on any grid; the middle stays where it was."""
    shape = (20, 30, 10)
    ramp = np.array([0.5, -0.25, 2.0])
    for code in ("RAS", "PIL"):
        volume = turned(code, (AFFINE[:3, :3] @ np.indices(shape).reshape(3, -1)).T.dot(ramp).reshape(shape))
        for spacing in (1.0, 4.0, (2.0, 1.5, 7.0)):
            small = resample(volume, spacing)
            assert small.spacing == pytest.approx(np.broadcast_to(spacing, 3))
            assert small.orientation == volume.orientation
            for end in (-0.5, 0.5):  # the edges of both grids, within half a voxel of the new
                corners = [
                    v.affine[:3, :3] @ (end * np.array(v.values.shape)) + v.affine @ [*_middle(v), 1] @ np.eye(4)[:, :3]
                    for v in (volume, small)
                ]
                off = np.linalg.inv(small.affine[:3, :3]) @ (corners[1] - corners[0])
                assert np.abs(off).max() <= 0.5 + 1e-6
            inside = tuple(slice(2, -2) if n > 5 else slice(n // 2, n // 2 + 1) for n in small.values.shape)
            at = np.stack(np.meshgrid(*(np.arange(n) for n in small.values.shape), indexing="ij"), -1)
            mm = at @ small.affine[:3, :3].T + small.affine[:3, 3]
            expected = (mm - AFFINE[:3, 3]) @ ramp
            np.testing.assert_allclose(small.values[inside], expected[inside], atol=0.06)  # of up to 14 a voxel
    same = resample(volume, volume.spacing)
    np.testing.assert_allclose(same.values, volume.values, rtol=1e-6)
    with pytest.raises(UserError, match="spacing 0.01: .* voxels, more than"):
        resample(volume, 0.01)
    with pytest.raises(UserError, match="spacing -1.0: expected millimetres above 0"):
        resample(volume, -1.0)


def _middle(volume):
    return (np.array(volume.values.shape) - 1) / 2


def test_coarser_grids_are_antialiased():
    checker = (np.indices((40, 40, 4)).sum(0) % 2 * 2 - 1).astype(np.float32)
    assert np.abs(resample(Volume(checker, np.eye(4)), 4.0).values).max() < 0.1


def test_slices_are_chosen_by_what_is_in_them():
    values = np.full((10, 10, 8), -1000, np.int16)
    for n in range(2, 7):
        values[: n - 1, :, n] = 40
    volume = Volume(values, np.eye(4), "HU")
    assert select(volume) == list(range(8))
    assert select(volume, share=0.25) == [4, 5, 6] and select(volume, share=0.1, every=2) == [2, 4, 6]
    assert select(volume, first=3, last=6) == [3, 4, 5]
    signal = Volume(values + 1000, np.eye(4))
    assert select(signal, share=0.25) == [4, 5, 6]
    for wrong in (dict(first=5, last=3), dict(last=9), dict(every=0), dict(share=1.5)):
        with pytest.raises(UserError, match="expected a range in the 8 axial slices"):
            select(volume, **wrong)


def test_a_unit_or_a_range_for_the_whole_volume():
    hu = Volume(np.array([-2000, -300, 3000], np.int16).reshape(1, 1, 3), np.eye(4), "HU", modality="CT")
    assert ranged(hu, CT) is hu and ranged(hu, None) is hu
    cut = slices(ranged(dataclasses.replace(hu, unit="", modality=""), CT))
    np.testing.assert_allclose([normalised(p, CT)[0, 0] for p in cut], [-1, 0, 1])
    grey = Volume(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.eye(4), path="x.nii")
    assert ranged(grey, CT).notes == ("no value is below 0, so it is hardly in HU",)
    signal = np.arange(-50, 950, dtype=np.float32).reshape(10, 10, 10)
    volume = ranged(Volume(signal, np.eye(4)), MRI)
    assert volume.span == pytest.approx((0, np.percentile(signal, 99.5)))
    assert volume.notes == ("counts from -1 to +1 over 0 to 944.005 (mr.zero, of this file)",)
    assert ranged(Volume(signal, np.eye(4)), MRI, "mr.maisi").span[0] == -50
    assert ranged(Volume(signal, np.eye(4)), MRI, "mr.minmax").span == (-50, 949) and len(PRESETS) == 3
    made = Volume(np.linspace(0, 1, 8).reshape(2, 2, 2), np.eye(4))
    assert ranged(made, MRI).span is None  # as what a model made: in the modality's own unit
    assert ranged(Volume(np.full((2, 2, 2), 9.0), np.eye(4)), None).span == (0, 9)
    assert ranged(Volume(np.full((2, 2, 2), -9.0), np.eye(4)), None).span == (0, 1)
    with pytest.raises(UserError, match="preset 'mr': expected one of mr.zero, mr.maisi, mr.minmax"):
        ranged(grey, MRI, "mr")
    with pytest.raises(UserError, match=r"says it is CT \(CT\), taken for MRI"):
        ranged(hu, MRI)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__((0, 0), np.nan), "its affine holds NaN"),
        (lambda a: a.__setitem__((0, 0), 0), "voxels of 0 x 3 x 5 mm"),
        (lambda a: a.__setitem__((0, 0), 1e5), "voxels of 1e.05 x 3 x 5 mm"),
        (lambda a: a.__setitem__((0, 3), 1e9), "of a scanner's size"),
        (lambda a: a.__setitem__((slice(0, 3), 1), a[:3, 0]), "nearly parallel"),
    ],
)
def test_an_affine_that_is_no_grid_is_an_error(change, message):
    affine = AFFINE.copy()
    change(affine)
    with pytest.raises(UserError, match=f"x.nii: .*{message}"):
        checked(Volume(CANONICAL, affine, path="x.nii"))


def test_no_numbers_and_a_tilt_are_said():
    values = np.array([np.nan, 3, np.inf, 5]).reshape(2, 2, 1)
    volume = checked(Volume(values, AFFINE))
    np.testing.assert_array_equal(volume.values.ravel(), [3, 3, 3, 5])
    assert volume.notes == ("2 values that are no numbers became 3, the lowest there is",)
    with pytest.raises(UserError, match="the volume: no value in it is a number"):
        checked(Volume(values * np.nan, AFFINE))
    tilted = AFFINE.copy()
    tilted[1, 2] = 5 * np.tan(np.radians(12))
    note = "its axes are 12.0 degrees from right angles, as after a gantry tilt"
    assert checked(Volume(CANONICAL, tilted)).notes == (note,)
