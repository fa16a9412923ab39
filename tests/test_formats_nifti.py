"""NIfTI, Analyze and MGH: values and geometry as nibabel and SimpleITK read them, and back; bombs stay packed."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.testing import data_path
from test_volume import AFFINE, CANONICAL, CODES, turned

from medm2g_jax.data import formats
from medm2g_jax.data.formats import nifti
from medm2g_jax.data.volume import LPS, MOST_VOXELS, Volume, slices
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

SHARED = Path(__file__).parents[2] / "shared" / "data" / "volumes"
HU = np.array([-1024, -1000.4, -0.6, 0.5, 3071, 40000], np.float32).reshape(1, 2, 3)
NOTES = {"Description": "Synthetic, made by medm2g_jax.", "Provenance": "model 0badcafe"}


def by_itk(path) -> tuple[np.ndarray, np.ndarray]:
    """(values (i j k), affine RAS+), as SimpleITK reads a file."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


@pytest.mark.parametrize("code", CODES)
def test_what_is_written_is_where_it_was_to_every_reader(tmp_path, code):
    volume = turned(code)
    formats.write_volume(tmp_path / "a.nii.gz", volume, NOTES)
    back = formats.read_volume(tmp_path / "a.nii.gz")
    other, affine = by_itk(tmp_path / "a.nii.gz")
    theirs = nibabel.load(tmp_path / "a.nii.gz")
    for values, where in ((back.values, back.affine), (other, affine), (theirs.get_fdata(), theirs.affine)):
        np.testing.assert_array_equal(values, volume.values)
        np.testing.assert_allclose(where, volume.affine, atol=1e-4)
    right = slices(back)[0].pixels[:, 0]  # the patient's right is column 0
    np.testing.assert_array_equal(right, CANONICAL[-1, ::-1, 0])


def test_hu_is_written_as_int16_and_said_to_be_synthetic(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        formats.write_volume(tmp_path / name, Volume(HU, AFFINE, "HU"), NOTES)
        image = nibabel.load(tmp_path / name)
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(image.get_fdata().ravel(), [-1024, -1000, -1, 0, 3071, 32767])
        assert image.header["descrip"].item() == b"Synthetic, made by medm2g_jax."
        assert b"model 0badcafe" in image.header.extensions[0].get_content()
        formats.write_volume(tmp_path / f"float-{name}", Volume(HU, AFFINE), {})
        back = formats.read_volume(tmp_path / f"float-{name}")
        assert back.values.dtype == np.float32
        np.testing.assert_array_equal(back.values, HU)
    first = (tmp_path / "a.nii.gz").read_bytes()
    formats.write_volume(tmp_path / "a.nii.gz", Volume(HU, AFFINE, "HU"), NOTES)
    assert (tmp_path / "a.nii.gz").read_bytes() == first and len(list(tmp_path.iterdir())) == 4


def test_a_sheared_affine_is_kept(tmp_path):
    tilted = AFFINE.copy()
    tilted[1, 2] = 1.5
    formats.write_volume(tmp_path / "a.nii", Volume(CANONICAL, tilted), {})
    back = formats.read_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(back.affine, tilted, atol=1e-5)
    assert back.notes == ("its axes are 16.7 degrees from right angles, as after a gantry tilt",)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("scale", [(1, 0), (1, -1024), (0.1, 3.5), (2, 1)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_scaled_values_are_exact(tmp_path, dtype, scale, order):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (3, 4, 5)).astype(dtype)
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    header.set_data_shape(stored.shape)
    header["scl_slope"], header["scl_inter"] = scale
    header["magic"], header["vox_offset"] = b"n+1\0", 352
    header.set_sform(AFFINE, 1)
    content = header.binaryblock + bytes(4) + stored.astype(np.dtype(dtype).newbyteorder(order)).tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(content)
    volume = formats.read_volume(tmp_path / "a.nii")
    theirs = nibabel.load(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.values, theirs.get_fdata(), rtol=1e-6)
    whole = np.issubdtype(dtype, np.integer) and np.dtype(dtype).itemsize < 4 and scale[0] != 0.1
    assert volume.values.dtype.kind == ("i" if whole and scale != (1, 0) else volume.values.dtype.kind)
    if whole:
        np.testing.assert_array_equal(volume.values, stored.astype(int) * scale[0] + scale[1])


def test_headers_that_say_little_or_two_things(tmp_path):
    image = nibabel.Nifti1Image(CANONICAL, AFFINE)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "a.nii")
    assert formats.read_volume(tmp_path / "a.nii").notes == (nifti._FLIP,)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE @ np.diag([-1, -1, 1, 1]), 1)
    nibabel.save(image, tmp_path / "a.nii")
    assert "different orientations" in formats.read_volume(tmp_path / "a.nii").notes[0]
    np.testing.assert_allclose(formats.read_volume(tmp_path / "a.nii").affine, AFFINE)
    image = nibabel.Nifti1Image(CANONICAL, np.diag([1000, 1000, 1000, 1]) @ AFFINE)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii")
    volume = formats.read_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.affine, by_itk(tmp_path / "a.nii")[1], atol=1e-4)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    assert volume.notes == ("its coordinates are in microns, made millimetres",)


def test_pairs_analyze_and_mgh(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(CANONICAL, AFFINE), tmp_path / "pair.img")
    nibabel.save(nibabel.Nifti2Image(CANONICAL, AFFINE), tmp_path / "two.nii")
    nibabel.save(nibabel.MGHImage(CANONICAL, AFFINE), tmp_path / "a.mgz")
    nibabel.save(nibabel.MGHImage(CANONICAL.astype(np.float32), AFFINE), tmp_path / "a.mgh")
    nibabel.save(nibabel.AnalyzeImage(CANONICAL, AFFINE), tmp_path / "old.img")
    for name in ("pair.img", "pair.hdr", "two.nii", "a.mgz", "a.mgh", "old.img", "old.hdr"):
        volume = formats.read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.values, CANONICAL)
        old = name.startswith("old")
        np.testing.assert_allclose(volume.affine, nibabel.load(tmp_path / name).affine if old else AFFINE, atol=1e-4)
        assert volume.notes == ((nifti._FLIP,) if old else ())
    (tmp_path / "pair.img").unlink()
    with pytest.raises(UserError, match="pair.img'?: cannot be read"):
        formats.read_volume(tmp_path / "pair.hdr")
    with pytest.raises(UserError, match="not written as MGH; expected a name that ends in .dcm, .*.nii.gz"):
        formats.write_volume(tmp_path / "a.mgh", volume, {})


def test_what_holds_no_single_volume_is_refused(tmp_path):
    for values, message in (
        (np.zeros((2, 3, 4, 5), np.int16), "4-D, 2 x 3 x 4 x 5; expected one volume"),
        (np.zeros((2, 3, 4), np.complex64), "voxels of complex numbers; expected grey values"),
        (np.zeros((2, 3, 4), [(c, "u1") for c in "RGB"]), "voxels of colours; expected grey values"),
    ):
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), tmp_path / "a.nii")
        with pytest.raises(UserError, match=f"a.nii: {message}"):
            formats.read_volume(tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(CANONICAL[..., None, None], AFFINE), tmp_path / "a.nii")
    assert formats.read_volume(tmp_path / "a.nii").values.shape == CANONICAL.shape


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda f, n=-1: taken.append(n) or read(f, n))
    header = nibabel.Nifti1Header()
    header.set_data_shape((4, 5, 6))
    header["magic"], header["vox_offset"] = b"n+1\0", 352

    def bomb(**fields):
        other = header.copy()
        for field, value in fields.items():
            other[field] = value
        with gzip.open(tmp_path / "bomb.nii.gz", "wb") as file:
            file.write(other.binaryblock + struct.pack("<ii", 1, 2**31 - 16) + bytes(2**22))
        taken.clear()
        return tmp_path / "bomb.nii.gz"

    huge = [3, 30000, 30000, 30000, 1, 1, 1, 1]
    with pytest.raises(UserError, match=f"30000 x 30000 x 30000 voxels, more than the {MOST_VOXELS}"):
        formats.read_volume(bomb(dim=huge))
    assert sum(taken) < 1000
    with pytest.raises(UserError, match="its values start at byte 1000000000; expected 0 to 67108864"):
        formats.read_volume(bomb(vox_offset=1e9))
    assert sum(taken) < 1000
    with pytest.raises(UserError, match="4 x -5 x 6 voxels; expected lengths from 1"):
        formats.read_volume(bomb(dim=[3, 4, -5, 6, 1, 1, 1, 1]))
    with pytest.raises(UserError, match="ends after 2097.* of 16000000 values"):
        formats.read_volume(bomb(dim=[3, 1000, 1000, 16, 1, 1, 1, 1], bitpix=16, datatype=4))
    assert formats.read_volume(bomb()).values.size == 120 and sum(taken) < 2000  # and no extension of 2 GB


def test_one_slice_is_a_picture_and_a_volume_says_what_to_do(tmp_path):
    formats.write_volume(tmp_path / "one.nii", Volume(np.full((4, 5, 1), 40, np.int16), AFFINE, "HU"), {})
    picture = formats.read(tmp_path / "one.nii", 100, MODALITIES["ct"])
    assert picture.pixels.shape == (5, 4) and picture.span is None and picture.orientation == "PL"
    formats.write_volume(tmp_path / "all.nii", turned("LPS"), {})
    with pytest.raises(UserError, match=r"all.nii: a volume \(6 axial, 5 coronal, 4 sagittal slices\).*formats.pict"):
        formats.read(tmp_path / "all.nii", 1000, MODALITIES["ct"])
    cut = formats.pictures(tmp_path / "all.nii", MODALITIES["mri"])
    assert len(cut) == 6 and cut[0].span == cut[5].span == (0, np.percentile(CANONICAL, 99.5))
    with pytest.raises(UserError, match="4 x 5 x 6 voxels, more than the 119"):
        formats.read(tmp_path / "all.nii", 119)
    formats.FORMATS[".png"].write(tmp_path / "a.png", formats.Picture(np.zeros((2, 2), np.uint8), (0, 255)), {})
    with pytest.raises(UserError, match="a.png: one picture, which does not say where it lies"):
        formats.read_volume(tmp_path / "a.png")


def test_every_file_of_nibabels_own_is_read_or_refused():
    read = refused = 0
    for path in sorted(Path(data_path).glob("*.nii*")) + sorted(Path(data_path).glob("*.hdr")):
        try:
            volume = formats.read_volume(path)
        except UserError as error:
            assert str(path.name)[:-4] in str(error)
            refused += 1
            continue
        theirs = nibabel.load(path)
        np.testing.assert_allclose(volume.affine, theirs.affine)
        expected = theirs.get_fdata().reshape(volume.values.shape)
        known = np.isfinite(expected)
        np.testing.assert_allclose(volume.values[known], expected[known], rtol=1e-6)
        read += 1
    assert read >= 4 and refused >= 5


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real volumes at {SHARED}")
@pytest.mark.parametrize("path", sorted(SHARED.rglob("*.nii.gz")), ids=lambda p: p.name)
def test_real_volumes_are_what_simpleitk_reads(path, tmp_path):
    volume = formats.read_volume(path)
    values, affine = by_itk(path)
    np.testing.assert_allclose(volume.values, values, atol=1e-3)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
    formats.write_volume(tmp_path / "a.nii.gz", volume, NOTES)
    values, affine = by_itk(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.values, values, atol=1e-3)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
