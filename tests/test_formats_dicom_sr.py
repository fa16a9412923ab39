"""Reports as DICOM: Basic Text SR that other readers open, right by the standard's own checker, without a patient."""

import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from test_formats_dicom_out import NOTES, TOO_NEW

from medm2g_jax.data import formats
from medm2g_jax.data.formats import dicom, dicom_out, dicom_sr
from medm2g_jax.data.picture import Picture
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

REPORT = "large mass in the left upper lung . größer als 3 cm ."


def test_a_report_is_what_it_says_and_of_nobody(tmp_path):
    dicom_sr.write(tmp_path / "a.dcm", REPORT, NOTES)
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.11" and ds.Modality == "SR"
    comment, finding = ds.ContentSequence
    assert finding.TextValue == REPORT and finding.ConceptNameCodeSequence[0].CodeMeaning == "Finding"
    assert "SYNTHETIC" in comment.TextValue and ds.VerificationFlag == "UNVERIFIED" and ds.SyntheticData == "YES"
    assert ds.PatientID == "SYNTHETIC" and ds.PatientIdentityRemoved == "YES" and ds.PatientBirthDate == ""
    assert not any(element.tag.is_private for element in ds.iterall())
    assert "model 0badcafe, seed 3" in dicom.said(tmp_path / "a.dcm")
    dicom_sr.write(tmp_path / "b.dcm", " ", NOTES, {"PatientID": "P7"})
    other = pydicom.dcmread(tmp_path / "b.dcm")
    assert other.ContentSequence[1].TextValue == "(empty)" and other.PatientID == "P7"
    uids = "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"
    assert all(ds.get(uid) != other.get(uid) for uid in uids)
    with pytest.raises(UserError, match="patient's tag 'PatientAge': expected some of PatientName"):
        dicom_sr.write(tmp_path / "c.dcm", REPORT, NOTES, {"PatientAge": "040Y"})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.dcm", "b.dcm"]
    with pytest.raises(UserError, match="a.dcm"):  # it is no image
        formats.read(tmp_path / "a.dcm", 2**20)


@pytest.mark.parametrize("modality", ["ct", "mri", "xray"])
def test_a_picture_that_lies_nowhere_keeps_its_values_and_claims_no_place(tmp_path, modality):
    one = MODALITIES[modality]
    low, high = one.window
    values = np.linspace(low, high, 48, dtype=np.float32).reshape(6, 8)
    dicom_out.write_picture(tmp_path / "a.dcm", Picture(values, None, modality=one.dicom), NOTES)
    back = formats.read(tmp_path / "a.dcm", 2**20, one)
    np.testing.assert_allclose(back.pixels, values, atol=0.5 if one.unit == "HU" else 1e-4)
    assert back.modality == ("OT" if one.projection else one.dicom) and (back.span is None) == (one.unit == "HU")
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    assert ds.SOPClassUID.name == "Secondary Capture Image Storage" and ds.ImageType == ["DERIVED", "SECONDARY"]
    assert "PixelSpacing" not in ds and "ImagePositionPatient" not in ds and "FrameOfReferenceUID" not in ds


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy here: apt-get install dicom3tools")
def test_the_standards_checker_finds_no_error(tmp_path):
    dicom_sr.write(tmp_path / "report.dcm", REPORT, NOTES)
    dicom_sr.write(tmp_path / "own.dcm", REPORT, NOTES, {"PatientID": "P7", "PatientName": "Doe^Jane"})
    for code, values in (("CT", (-1000, 400)), ("MR", (0, 1)), ("DX", (0, 1)), ("", (0, 350))):
        pixels = np.linspace(*values, 48, dtype=np.float32).reshape(6, 8)
        picture = Picture(pixels, None if code else (0.0, 350.0), modality=code)
        dicom_out.write_picture(tmp_path / f"{code or 'std'}.dcm", picture, NOTES)
    for path in tmp_path.iterdir():
        said = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True).stderr
        errors = [line for line in said.splitlines() if line.startswith("Error")]
        assert errors == [TOO_NEW] * len(errors) and len(errors) <= 1, said
