"""DICOM out: on the source's grid to every reader, standard by the standard's own checker, and marked as synthetic."""

import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, series
from scipy.spatial.transform import Rotation
from test_formats_dicom import AFFINE, STORED, itk_series
from test_formats_nifti import SHARED, by_itk
from test_volume import CODES, turned

from medm2g_jax.data import formats
from medm2g_jax.data.formats import dicom, dicom_out
from medm2g_jax.data.picture import normalised
from medm2g_jax.data.volume import Volume, from_slices, ranged, slices, stack, stack_affine
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

CT, MRI, XRAY = MODALITIES["ct"], MODALITIES["mri"], MODALITIES["xray"]
NOTES = {"Description": "Synthetic, made by medm2g_jax.", "Provenance": "model 0badcafe, seed 3"}
# The tool is older than Synthetic Data (0008,001C), which the standard has since 2022.
TOO_NEW = "Error - </(0008,001c)> - Attribute with an even group number is not a recognized standard attribute"


def same_place(a: Volume, b: Volume, plane: str = "axial", most: float = 0.5) -> None:
    """The same voxels at the same place in the patient, in whatever order: to half a voxel and half an HU."""
    np.testing.assert_allclose(stack(a, plane), stack(b, plane), atol=most)
    assert np.abs(stack_affine(a, plane) - stack_affine(b, plane)).max() < 1e-3


@pytest.mark.parametrize("code", CODES)
def test_a_ct_is_on_its_sources_grid_however_that_is_stored(tmp_path, code):
    patient = turned(code, STORED[:4, :5, :4].astype(np.float32) - 1024.3)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", [10, -20, 5], degrees=True).as_matrix()
    source = Volume(patient.values, turn @ patient.affine, "HU", modality="CT")
    formats.write_volume(tmp_path / "out", source, NOTES)
    same_place(formats.read_volume(tmp_path / "out"), source)
    values, affine = itk_series(tmp_path / "out")
    same_place(Volume(values, affine), source)


def test_a_series_in_and_out_lies_on_itself(tmp_path):
    """Sent through unchanged: the same voxels, places and frame of reference; other identifiers, no patient."""
    folder = series(tmp_path / "in", STORED, AFFINE, RescaleSlope="1", RescaleIntercept="-1024")
    source = formats.read_volume(folder)
    made = from_slices(stack(source, "axial").astype(np.float32) + 0.3, source, CT)
    formats.write_volume(tmp_path / "out", made, NOTES)
    back = formats.read_volume(tmp_path / "out")
    np.testing.assert_array_equal(back.values, source.values)
    np.testing.assert_allclose(back.affine, source.affine, atol=1e-4)
    assert back.frame == source.frame and back.unit == "HU"
    assert back.notes == (dicom.SYNTHETIC,)
    given = [pydicom.dcmread(path) for path in folder.iterdir()]
    headers = [pydicom.dcmread(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len({ds.SOPInstanceUID for ds in headers}) == 4 and len({ds.SeriesInstanceUID for ds in headers}) == 1
    old = {ds.get(tag) for ds in given for tag in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")}
    assert not old & {ds.get(tag) for ds in headers for tag in ("SOPInstanceUID", "SeriesInstanceUID")}
    for ds in headers:
        assert ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL"] and ds.SyntheticData == "YES"
        assert ds.BurnedInAnnotation == "NO" and ds.PatientIdentityRemoved == "YES" and ds.PatientID == "SYNTHETIC"
        assert "Not for clinical use" in ds.ImageComments and "model 0badcafe" in ds.ImageComments
        assert "SYNTHETIC" in ds.SeriesDescription and len(ds.SeriesDescription) <= 64
        assert ds.ContributingEquipmentSequence[0].Manufacturer == "medm2g_jax"
        assert not any(element.tag.is_private or element.tag.group >> 8 == 0x60 for element in ds)
        assert SECRET not in str(ds)


def test_a_patient_only_where_asked_for(tmp_path):
    volume = Volume(np.zeros((3, 4, 1), np.int16), AFFINE, "HU", modality="CT", frame="Doe^Jane")  # no identifier
    dicom_out.write(tmp_path / "a.dcm", volume, NOTES, {"PatientID": "P7", "PatientName": "Doe^Jane"})
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    assert ds.FrameOfReferenceUID.is_valid and ds.FrameOfReferenceUID.startswith("2.25.")
    assert ds.PatientID == "P7" and ds.PatientName == "Doe^Jane" and "PatientIdentityRemoved" not in ds
    with pytest.raises(UserError, match="patient's tag 'OverlayData': expected some of PatientName"):
        dicom_out.write(tmp_path / "b.dcm", volume, NOTES, {"OverlayData": "x"})


def test_an_mri_keeps_its_values_to_a_step_of_16_bits(tmp_path):
    source = turned("LPS")
    made = from_slices(np.random.default_rng(0).random((6, 5, 4)), source, MRI)
    formats.write_volume(tmp_path / "out", made, NOTES)
    back = formats.read_volume(tmp_path / "out")
    same_place(back, made, most=1e-5)
    assert back.modality == "MR" and ranged(back, MRI).span is None  # in the modality's own unit
    assert pydicom.dcmread(tmp_path / "out" / "slice_0001.dcm").SOPClassUID.name == "MR Image Storage"


def test_an_xray_is_a_secondary_capture_of_its_window(tmp_path):
    values = np.linspace(0.2, 0.9, 20).reshape(1, 5, 4).transpose(2, 0, 1)[:, ::-1]
    film = Volume(values, np.diag([-0.2, 1, -0.1, 1]), XRAY.unit, modality="DX")
    (shown,) = slices(film, "coronal")
    formats.write_volume(tmp_path / "a.dcm", film, NOTES)
    back = formats.read(tmp_path / "a.dcm", 100, XRAY)
    np.testing.assert_allclose(normalised(back, XRAY), shown.pixels * 2 - 1, atol=1e-4)
    assert back.orientation == "FL" and back.spacing == (0.1, 0.2)
    assert "ImagePositionPatient" not in pydicom.dcmread(tmp_path / "a.dcm")


def test_nothing_is_overwritten_and_what_dicom_cannot_say_is_refused(tmp_path):
    volume = Volume(STORED.astype(np.int16), AFFINE, "HU", modality="CT")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match="full: is there already; name a new folder"):
        formats.write_volume(tmp_path / "full", volume, NOTES)
    with pytest.raises(UserError, match="a.dcm: 4 slices, and DICOM has one a file; name a folder"):
        formats.write_volume(tmp_path / "a.dcm", volume, NOTES)
    sheared = AFFINE.copy()
    sheared[1, 0] = 0.3
    with pytest.raises(UserError, match="not at right angles, which DICOM cannot say"):
        formats.write_volume(tmp_path / "s", Volume(volume.values, sheared, "HU", modality="CT"), NOTES)
    tilted = AFFINE.copy()
    tilted[1, 2] = 0.5
    formats.write_volume(tmp_path / "t", Volume(volume.values, tilted, "HU", modality="CT"), NOTES)
    np.testing.assert_allclose(stack_affine(formats.read_volume(tmp_path / "t"), "axial"),
                               stack_affine(Volume(volume.values, tilted), "axial"), atol=1e-4)  # fmt: skip


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy here: apt-get install dicom3tools")
@pytest.mark.parametrize("modality", ["ct", "mri", "xray"])
def test_the_standards_checker_finds_no_error(tmp_path, modality):
    one = MODALITIES[modality]
    low, high = one.window
    values = np.linspace(low, high, 120).reshape(6, 5, 4)[..., : 1 if one.projection else 4]
    volume = Volume(values, AFFINE, one.unit, modality=one.dicom)
    formats.write_volume(tmp_path / "out", volume, NOTES)
    dicom_out.write(tmp_path / "out2", volume, NOTES, {"PatientID": "P7", "PatientName": "Doe^Jane"})
    for path in (*(tmp_path / "out").iterdir(), *(tmp_path / "out2").iterdir()):
        said = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True).stderr
        errors = [line for line in said.splitlines() if line.startswith("Error")]
        assert errors == [TOO_NEW] * len(errors) and len(errors) <= 1, said


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real volumes at {SHARED}")
def test_a_real_ct_slice_in_and_out(tmp_path):
    path = SHARED / "dcm_ct_head_693" / "693_UNCR.dcm"
    source = formats.read_volume(path)
    formats.write_volume(tmp_path / "a.dcm", from_slices(stack(source, "axial"), source, CT), NOTES)
    back = dicom.read(tmp_path / "a.dcm", 2**20)
    same_place(back, source)
    values, affine = by_itk(tmp_path / "a.dcm")
    np.testing.assert_array_equal(values, source.values)
    np.testing.assert_allclose(affine[:, [0, 1, 3]], source.affine[:, [0, 1, 3]], atol=1e-3)
