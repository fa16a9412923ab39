"""MetaImage and NRRD: values and places as SimpleITK has them, and no file but those beside the header."""

import sys

import numpy as np
import pytest
import SimpleITK as sitk
from test_formats_nifti import HU, by_itk
from test_volume import AFFINE, CANONICAL, CODES, turned

from medm2g_jax.data import formats
from medm2g_jax.data.formats import itk
from medm2g_jax.data.volume import LPS, Volume, slices
from medm2g_jax.errors import UserError

NOTES = {"Description": "Synthetic, made by medm2g_jax.", "Provenance": "model 0badcafe"}


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_what_is_written_is_where_it_was_to_every_reader(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for code in CODES:
        volume = turned(code)
        formats.write_volume(path, volume, NOTES)
        back, (values, affine) = formats.read_volume(path), by_itk(path)
        for found, where in ((back.values, back.affine), (values, affine)):
            np.testing.assert_array_equal(found, volume.values)
            np.testing.assert_allclose(where, volume.affine, atol=1e-4)
        assert back.notes == ()
        np.testing.assert_array_equal(slices(back)[0].pixels[:, 0], CANONICAL[-1, ::-1, 0])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    formats.write_volume(path, Volume(HU, AFFINE, "HU"), NOTES)
    assert formats.read_volume(path).values.dtype == np.int16
    np.testing.assert_array_equal(formats.read_volume(path).values.ravel(), [-1024, -1000, -1, 0, 3071, 32767])
    assert suffix == ".mha" or b"Synthetic" in path.read_bytes()
    tilted = AFFINE.copy()
    tilted[1, 2] = 1.0
    formats.write_volume(path, Volume(CANONICAL, tilted), NOTES)
    np.testing.assert_allclose(formats.read_volume(path).affine, tilted, atol=1e-4)


def test_no_second_line_leads_elsewhere(tmp_path):
    """What one reader takes for the line that names the file, another may not."""
    (tmp_path / "in").mkdir()
    for n, lines in enumerate((
        b"elementdatafile = LOCAL\nElementDataFile = ../secret",
        b"ElementDataFile : ../secret",
        b"Comment = x" + b" " * 2**16 + b"\nElementDataFile = ../secret",
        b"Comment = " + b"x" * (2**16 - 100) + b"\nElementDataFile = a/../../../../../../../../../../../../../secret",
    )):  # fmt: skip
        path = tmp_path / "in" / f"{n}.mhd"
        path.write_bytes(b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_CHAR\n" + lines)
        with pytest.raises(UserError, match="its values are in|begins as none of"):
            formats.read_volume(path)
    for n, lines in enumerate((b"data file: a\ndatafile: ../b", b"content: " + b"x" * 2**16 + b"\ndata file: ../b")):
        path = tmp_path / "in" / f"{n}.nhdr"
        path.write_bytes(b"NRRD0004\ntype: char\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n" + lines)
        with pytest.raises(UserError, match="its values are in|begins as none of"):
            formats.read_volume(path)


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_values_in_a_file_beside_and_nowhere_else(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.ascontiguousarray(CANONICAL.T))
    image.SetDirection((LPS[:3, :3] @ np.eye(3)).ravel())
    path = tmp_path / "in" / f"a{suffix}"
    path.parent.mkdir()
    sitk.WriteImage(image, str(path))
    np.testing.assert_array_equal(formats.read_volume(path).values, CANONICAL)
    data = next(p for p in path.parent.iterdir() if p != path)
    text = path.read_text()
    (tmp_path / data.name).write_bytes(data.read_bytes())
    (path.parent / "link").symlink_to(tmp_path / data.name)
    for other in (f"../{data.name}", str(tmp_path / data.name), "link", "LIST", "a%03d.raw 1 3 1", ".."):
        path.write_text(text.replace(data.name, other))
        with pytest.raises(UserError, match=f"a{suffix}: its values are in .*; expected in itself, or"):
            formats.read_volume(path)


def test_what_is_no_single_volume_is_refused(tmp_path):
    for image, message in (
        (sitk.Image([4, 5, 6, 2], sitk.sitkInt16), "4-D, 4 x 5 x 6 x 2; expected one volume"),
        (sitk.Image([4, 5, 6], sitk.sitkVectorUInt8, 3), "voxels of vector of 8-bit unsigned integer; expected grey"),
    ):
        sitk.WriteImage(image, str(tmp_path / "a.mha"))
        with pytest.raises(UserError, match=f"a.mha: {message}"):
            formats.read_volume(tmp_path / "a.mha")
    flat = sitk.Image([4, 5], sitk.sitkInt16)
    sitk.WriteImage(flat, str(tmp_path / "a.nrrd"))
    volume = formats.read_volume(tmp_path / "a.nrrd")
    assert volume.values.shape == (4, 5, 1) and volume.notes == (itk._NO_ORIENTATION,)
    with pytest.raises(UserError, match="4 x 5 voxels, more than the 19"):
        formats.read_volume(tmp_path / "a.nrrd", 19)
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\nNDims = 3\nDimSize = 50000 50000 50000\n"
                                     b"ElementType = MET_SHORT\nElementDataFile = LOCAL\n")  # fmt: skip
    with pytest.raises(UserError, match="50000 x 50000 x 50000 voxels, more than"):
        formats.read_volume(tmp_path / "a.mha")
    for content in (b"", b"nothing", b"a = b\n" * 999):
        (tmp_path / "a.mha").write_bytes(content)
        with pytest.raises(UserError, match="a.mha: (empty, not one|begins as none) of MetaImage, NRRD"):
            formats.read_volume(tmp_path / "a.mha")


def test_without_simpleitk_its_name_and_how_to_install_it(tmp_path, monkeypatch):
    formats.write_volume(tmp_path / "a.mha", turned("RAS"), {})
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for act in (lambda: formats.read_volume(tmp_path / "a.mha"),
                lambda: formats.write_volume(tmp_path / "b.nrrd", turned("RAS"), {})):  # fmt: skip
        with pytest.raises(UserError, match=r"read and written by SimpleITK; pip install 'medm2g-jax\[itk\]'"):
            act()
