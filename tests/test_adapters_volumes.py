"""Sets of volumes as they lie on a disk -> manifest folders: what is found, what is left out and why, and that every
value stored is the one that an independent reader finds there."""

import errno
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import dataset, placed, save, series
from look_alikes_volumes import acdc, brain_tumor, brats2020, gold_atlas, grid, head, ixi, nifti, sliver07, synthrad
from PIL import Image as Pillow

from medm2g_jax.data import formats, marks
from medm2g_jax.data.adapters import ADAPTERS, adapter_of
from medm2g_jax.data.case import Adapter, Case, Image
from medm2g_jax.data.formats import raster
from medm2g_jax.data.volume import Volume
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import card
from medm2g_jax.prepare import Order, prepare


class Made:
    """A prepared folder, read without the package."""

    def __init__(self, root, out, name, patterns=None, **order):
        self.said: list[str] = []
        adapter = name if isinstance(name, Adapter) else adapter_of(name)
        order = {"workers": 1, "keep_ids": True} | order
        prepare(adapter, root, out, Order(**order), patterns, self.said.append)
        self.out = out
        self.rows = {row["id"]: row for row in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())}
        left = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        self.left = Counter((one["stream"], one["reason"]) for one in left)
        self.statistics = json.loads((out / "statistics.json").read_text())

    def values(self, row: str, key: str) -> np.ndarray:
        slope, intercept = self.rows[row].get("scale", {}).get(key, (1, 0))
        return np.asarray(Pillow.open(self.out / self.rows[row]["images"][key])) * slope + intercept

    def streams(self) -> dict[str, int]:
        return {key: one["images"] for key, one in self.statistics["streams"].items()}


def radiological(path) -> np.ndarray:
    """(slice from the feet, row from the front, column from the patient's right), by nibabel."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)


def files(folder) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".prepare" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_brats(tmp_path):
    root = brats2020(tmp_path / "down")
    made = Made(root, tmp_path / "out", "brats2020")
    assert made.left == {("", "without its t2"): 1}
    assert made.streams() == dict.fromkeys(("mri_flair", "mri_t1", "mri_t1ce", "mri_t2"), 40)
    assert made.statistics["cases"] == {"found": 4, "left_out_before": 1}
    assert sum(made.statistics["subjects"].values()) == 4 and min(made.statistics["subjects"].values()) == 1
    for case in ("BraTS20_Training_001", "BraTS20_Training_002", "BraTS20_Training_355", "BraTS20_Validation_001"):
        (folder,) = root.rglob(case)
        for kind in ("t1", "t1ce", "t2", "flair"):
            (file,) = folder.glob(f"*_{kind}.nii*")
            want = radiological(file)
            for n in (1, 6, 10):  # the first and the last show almost nothing of the head
                np.testing.assert_array_equal(made.values(f"{case}-{n:03d}", f"mri_{kind}"), want[n])
                assert made.rows[f"{case}-{n:03d}"]["registered"] is True
        assert f"{case}-000" not in made.rows and f"{case}-011" not in made.rows
    row = made.rows["BraTS20_Training_355-005"]
    assert row["text"] == "Brain MRI of a patient with low-grade glioma." and row["text_origin"] == "template"
    assert row["info"] == {"grade": "low-grade glioma"} and row["spacing"]["mri_t1"] == [5.0, 5.0]
    assert "1998" not in (tmp_path / "out/manifest.jsonl").read_text()


def test_brats_by_a_folder_in_it_and_an_empty_one(tmp_path):
    root = brats2020(tmp_path / "down") / "BraTS2020_ValidationData/MICCAI_BraTS2020_ValidationData"
    made = Made(root, tmp_path / "out", "brats2020", every=4)
    assert made.statistics["rows"] == {"train": 3, "val": 0, "test": 0}
    (tmp_path / "empty").mkdir()
    for name in ("brats2020", "ixi", "gold_atlas", "sliver07", "acdc", "brain_tumor", "synthrad", "folder:dicom"):
        with pytest.raises(UserError, match="expected") as error:
            Made(tmp_path / "empty", tmp_path / f"out of {name}", name)
        assert str(tmp_path / "empty") in str(error.value) and "\n" not in str(error.value)


def test_ixi_is_registered_to_its_t1(tmp_path):
    pytest.importorskip("SimpleITK")
    root = ixi(tmp_path / "down")
    (root / "IXI035-IOP-0873-T1.nii.gz").unlink()
    damaged = root / "IXI014-HH-1236-T2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    made = Made(root, tmp_path / "out", "ixi", register="rigid", every=4)
    assert made.left[("", "without its PD")] == made.left[("", "without its T1")] == 1
    assert made.left.total() == 3 and any(stream == "mri:t2" and "not a whole" in why for stream, why in made.left)
    assert made.statistics["registered"]["volumes"] == 3  # T2 and PD of one, PD alone of the other
    assert set(made.statistics["on_one_grid"]) == {"mri_pd + mri_t1 + mri_t2", "mri_pd + mri_t1"}
    moves = made.statistics["registered"]
    assert moves["mutual_information_after"][0] > moves["mutual_information_before"][0]
    row = next(row for row in made.rows.values() if len(row["images"]) == 3)
    assert row["license"] == "CC BY-SA 3.0" and row["info"]["site"] in ("Guys", "HH")
    assert row["spacing"] == dict.fromkeys(row["images"], [4.2, 4.2])  # square: the finer of T1's 7 x 4.2 mm
    assert any("3 volumes registered" in line for line in made.said)
    apart = Made(ixi(tmp_path / "again"), tmp_path / "apart", "ixi", register="none", limit=1)
    assert apart.left[("", "a pair that is not on one grid is cut apart (see --register)")] == 2
    first = next(name for name in apart.rows if name.startswith("IXI002-mri-t2-"))
    n = int(first.rpartition("-")[2])
    np.testing.assert_array_equal(
        apart.values(first, "mri_t2"), radiological(tmp_path / "again/IXI002-Guys-0828-T2.nii.gz")[n]
    )


def by_pydicom(folder, modality, contrast=None) -> dict[str, np.ndarray]:
    """UID -> slices from the feet; DICOM's own rows and columns, here to the back and to the left."""
    found = {}
    for path in folder.glob("*.dcm"):
        ds = pydicom.dcmread(path)
        if ds.Modality == modality and "PixelData" in ds:
            values = ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
            found.setdefault(ds.SeriesInstanceUID, []).append((ds.ImagePositionPatient[2], values))
    return {uid: np.array([v for _, v in sorted(pairs, key=lambda p: p[0])]) for uid, pairs in found.items()}


def test_gold_atlas_is_told_apart(tmp_path):
    pytest.importorskip("SimpleITK")
    root = gold_atlas(tmp_path / "down")
    made = Made(root, tmp_path / "out", "gold_atlas", register="grid")
    assert made.left == {("", "a further series of the patient"): 2}  # the CT on its own grid
    assert made.streams() == {"ct": 12, "mri_t1": 12, "mri_t2": 12}
    assert made.statistics["on_one_grid"] == {"ct + mri_t1 + mri_t2": 12}
    for number, patient in enumerate(("1_01_P", "2_03_P")):
        t2 = by_pydicom(root / patient, "MR")[f"1.2.{number}.0"]
        ct = by_pydicom(root / patient, "CT")[f"1.2.{number}.3"]
        for n in range(6):
            np.testing.assert_array_equal(made.values(f"{patient}-{n:03d}", "ct"), ct[n])  # HU
            np.testing.assert_array_equal(made.values(f"{patient}-{n:03d}", "mri_t2"), t2[n])
    assert made.rows["1_01_P-002"]["info"] == {"site": "1"}


def test_a_set_that_is_not_open_keeps_its_ids_to_itself(tmp_path):
    root = gold_atlas(tmp_path / "down")
    made = Made(root, tmp_path / "out", "gold_atlas", register="none", keep_ids=False)
    assert made.left[("", "a pair that is not on one grid is cut apart (see --register)")] == 2
    assert stat.S_IMODE(os.stat(tmp_path / "out").st_mode) == 0o700
    words = (content.decode() for name, content in files(made.out).items() if not name.endswith(".png"))
    told = "\n".join((*made.said[1:], *words))
    assert not any(word in told for word in ("1_01_P", "2_03_P", "Secret", "deformed", str(root)))
    with pytest.raises(UserError, match="was begun with register"):
        Made(root, tmp_path / "out", "gold_atlas", register="grid", keep_ids=False)


def test_sliver(tmp_path):
    itk = pytest.importorskip("SimpleITK")
    root = sliver07(tmp_path / "down")
    made = Made(root, tmp_path / "out", "sliver07")
    assert "SEGMENTATION only" in made.said[0] and "ask the organisers" in made.said[0]
    assert made.left == {("", "no mask of the liver (of the challenge's test)"): 1}
    assert sorted(made.rows) == ["liver001-002", "liver001-003", "liver002-002", "liver002-003"]
    for number in (1, 2):
        whole = itk.GetArrayFromImage(itk.ReadImage(str(root / f"training-part1/liver-orig00{number}.mhd")))
        whole = whole[::-1] if number == 2 else whole  # its file goes from the head to the feet
        for n in (2, 3):
            np.testing.assert_array_equal(made.values(f"liver00{number}-00{n}", "ct"), whole[n])
    assert made.rows["liver001-002"]["text"] == "Contrast-enhanced abdominal CT at the level of the liver."


def test_acdc(tmp_path):
    root = acdc(tmp_path / "down")
    (root / "database/training/patient002/patient002_frame12.nii.gz").unlink()
    made = Made(root, tmp_path / "out", "acdc")
    assert made.left == {("", "no file of its end-systole"): 1}
    assert made.statistics["rows"] == {"train": 8, "val": 4, "test": 8} or made.statistics["rows"] == {
        "train": 4, "val": 8, "test": 8}  # fmt: skip
    assert {row["subject"] for row in made.rows.values() if row["split"] == "test"} == {"patient101"}
    row = made.rows["patient001_ES-001"]
    assert row["text"] == "Cardiac short-axis cine MRI, end-systole, dilated cardiomyopathy."
    assert made.rows["patient101_ED-001"]["text"] == "Cardiac short-axis cine MRI, end-diastole."
    want = radiological(root / "database/testing/patient101/patient101_frame12.nii.gz")
    np.testing.assert_array_equal(made.values("patient101_ES-001", "mri"), want[1])


def test_brain_tumor_pairs(tmp_path):
    root = brain_tumor(tmp_path / "down")
    made = Made(root, tmp_path / "out", "brain_tumor")
    assert made.left == {("", "a pair whose CT is blank"): 1}
    assert made.statistics["rows"] == {"train": 5, "val": 6, "test": 6}
    assert made.statistics["on_one_grid"] == {"ct + mri": 17}
    mri, ct = (np.load(root / "data(processed)" / f"val{side}.npy") for side in ("input", "output"))
    for n in (0, 3):
        for key, whole in (("mri", mri), ("ct", ct)):
            step = np.ptp(whole[n]) / 65535
            np.testing.assert_allclose(made.values(f"val-{n:04d}", key), whole[n], atol=step)
    spans = {tuple(row["span"]["ct"]) for row in made.rows.values()}
    assert len(spans) == 1 and spans.pop()[1] > 0.9  # one for the set
    useless = brain_tumor(tmp_path / "useless", useless=True)
    with pytest.raises(UserError, match=r"16 of 18 pairs are of no use \(16 a pair whose CT is blank\)"):
        Made(useless, tmp_path / "none", "brain_tumor")


@pytest.mark.parametrize("year", [2023, 2025])
def test_synthrad(tmp_path, year):
    itk = pytest.importorskip("SimpleITK")
    root = synthrad(tmp_path / "down", year)
    made = Made(root, tmp_path / "out", "synthrad")
    assert made.left == {("", "no CT (of the challenge's validation or test)"): 1}
    case, end = ("1BA001", "nii.gz") if year == 2023 else ("1ABA001", "mha")
    assert {row["info"]["region"] for row in made.rows.values()} == {"brain" if year == 2023 else "AB"}
    (file,) = root.rglob(f"{case}/ct.{end}")
    want = itk.GetArrayFromImage(itk.ReadImage(str(file)))
    np.testing.assert_array_equal(made.values(f"{case}-004", "ct"), want[4])
    alone = Made(file.parent, tmp_path / "alone", "synthrad")  # the folder of one patient
    assert len(alone.rows) == sum(name.startswith(case) for name in made.rows)


CODES = ("RAS", "LPS", "PIR", "ASL", "IRP")


def test_every_orientation_is_stored_with_the_patients_right_on_the_left(tmp_path):
    """One head stored five ways, by nibabel: the same pixels, so that all but one are left out as copies."""
    affine = grid((36, 40, 6), (4, 4, 20))
    values = head("t1", (36, 40, 6), affine)
    for code in CODES:
        image = nibabel.Nifti1Image(values, affine)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(code)
        )
        folder = tmp_path / "down" / f"sub-{code}" / "anat"
        folder.mkdir(parents=True)
        nibabel.save(image.as_reoriented(turn), folder / f"sub-{code}_T1w.nii.gz")
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti")
    assert made.left == {("mri:t1", "the same pixels as another image"): len(made.rows) * (len(CODES) - 1)}
    middle = made.values(sorted(made.rows)[len(made.rows) // 2], "mri_t1")
    bright = np.argwhere(middle > 780)  # the ball on the right, alone that bright
    assert 10 < len(bright) and bright[:, 1].max() < 18
    dark = np.argwhere((middle > 270) & (middle < 330) & (np.indices(middle.shape)[0] < 14))
    assert len(dark) > 4  # the one in front, on top


def test_names_and_sessions_of_bids(tmp_path, monkeypatch):
    shape, affine = (24, 24, 4), grid((24, 24, 4), (6, 6, 20))
    names = (
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_ce-gad_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_FLAIR.nii.gz",
        "sub-02/anat/sub-02_run-1_T2w.nii.gz",
        "sub-02/anat/sub-02_run-2_T2w.nii.gz",
        "sub-02/anat/sub-02_desc-brain_mask.nii.gz",
        "sub-02/func/sub-02_bold.nii.gz",
        "derivatives/x/sub-02_T2w.nii.gz",
    )
    for seed, name in enumerate(names):
        nifti(tmp_path / "down" / name, head("t1", shape, affine, seed), affine)
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti", share=0.0)
    assert {row["subject"] for row in made.rows.values()} == {"sub-01", "sub-02"}
    assert {name.rpartition("-")[0] for name in made.rows} == {"sub-01_ses-a", "sub-01_ses-b", "sub-02"}
    assert set(made.rows["sub-01_ses-a-001"]["images"]) == {"mri_t1", "mri_t1ce"}
    assert set(made.rows["sub-01_ses-b-001"]["images"]) == {"mri_t1", "mri_flair"}
    assert made.left == {
        ("", "derived (BIDS derivatives)"): 1,
        ("", "a second mri:t2 for one study"): 1,
        ("", "a mask, by its name"): 1,
        ("", "its name says no modality (--files STREAM=PATTERN does)"): 1,
    }
    monkeypatch.setattr(card.pictures, "grid", lambda path, rows, captions, *rest: shown.update(rows=rows, of=captions))
    shown: dict = {}
    card.preview(made.out, tmp_path / "preview.png", shown=False)
    assert [stream for stream, _ in shown["rows"]] == ["mri:flair", "mri:t1", "mri:t1ce", "mri:t2"]
    assert set(shown["of"]) == {row["split"] for row in made.rows.values()} and len(shown["of"]) == 8


def test_what_a_model_made_stays_marked(tmp_path):
    shape, affine = (24, 24, 4), grid((24, 24, 4), (6, 6, 20))
    notes = marks.notes({"fingerprint": "0badcafe", "seed": 1})
    for name, kind, suffix in (("a", "t1", ".nii.gz"), ("a", "t2", ".mha"), ("b", "t1", ".nii")):
        volume = Volume(head(kind, shape, affine, seed=len(suffix)), affine)
        (tmp_path / "down" / name).mkdir(parents=True, exist_ok=True)
        formats.write_volume(tmp_path / "down" / name / f"{kind}{suffix}", volume, notes if kind == "t1" else {})
    ct = Volume(head("ct", shape, affine), affine, "HU", modality="CT")
    formats.write_volume(tmp_path / "dicom/a", ct, notes)
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti", share=0.0)
    assert {row["subject"]: row["synthetic"] for row in made.rows.values()} == {"a": ["mri_t1"], "b": ["mri_t1"]}
    assert made.statistics["synthetic"] == 8 and any("8 rows hold what a model made" in line for line in made.said)
    made = Made(tmp_path / "dicom", tmp_path / "out2", "folder:dicom", share=0.0)
    assert [row["synthetic"] for row in made.rows.values()] == [["ct"]] * 4
    real = Made(brats2020(tmp_path / "real"), tmp_path / "out3", "brats2020")
    assert real.statistics["synthetic"] == 0 and not any("synthetic" in row for row in real.rows.values())


def test_folders_that_may_not_be_read_are_said(tmp_path, monkeypatch):
    if not os.geteuid():  # whom no mode keeps out
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).stat().st_mode & 0o500 == 0o500)
    shape, affine = (24, 24, 4), grid((24, 24, 4), (6, 6, 20))
    for seed, name in enumerate("abc"):
        nifti(tmp_path / "down" / name / "t1.nii", head("t1", shape, affine, seed), affine)
    (tmp_path / "down/b").chmod(0)
    (tmp_path / "down/c").chmod(0o400)  # its files' names are seen
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti", share=0.0)
    assert {row["subject"] for row in made.rows.values()} == {"a"}
    assert made.left == {("", "a folder that may not be read (its rights)"): 2}
    (tmp_path / "down").chmod(0)
    with pytest.raises(UserError, match="down: a folder that may not be read; give yourself the right, chmod"):
        Made(tmp_path / "down", tmp_path / "out", "folder:nifti")
    (tmp_path / "down").chmod(0o700)
    for name in "bc":
        (tmp_path / "down" / name).chmod(0o700)


def test_links_pipes_and_what_macos_leaves_behind(tmp_path):
    shape, affine = (24, 24, 4), grid((24, 24, 4), (6, 6, 20))
    for seed, name in enumerate(("down/a", "down/b", "elsewhere")):
        nifti(tmp_path / name / "t1.nii", head("t1", shape, affine, seed), affine)
    (tmp_path / "down/a/._t1.nii").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    for name, target in (("c", "../../elsewhere/t1.nii"), ("d", "t1.nii"), ("e", "../.git/annex/objects/x")):
        (tmp_path / "down" / name).mkdir()
        (tmp_path / "down" / name / "t1.nii").symlink_to(target)
    (tmp_path / "down/f").mkdir()
    os.mkfifo(tmp_path / "down/f/t1.nii")
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti", share=0.0)
    assert {row["subject"] for row in made.rows.values()} == {"a", "b"}
    assert made.left == {
        ("", "lies outside of the root (a link, or a path with ..)"): 1,
        ("mri:t1", "is a link to a file that is not there"): 2,
        ("mri:t1", "cannot be read (no regular file)"): 1,
    }
    with pytest.raises(UserError, match="is in the downloaded set, .*down; name a folder beside that$"):
        Made(tmp_path / "down", tmp_path / "down/out", "folder:nifti")
    with pytest.raises(UserError, match=r"c: no case .*\(left out: 1 lies outside of the root"):
        Made(tmp_path / "down/c", tmp_path / "out2", "folder:nifti")


@pytest.mark.parametrize("name", ["folder:nifti", "folder:dicom", "folder:images", "ixi", "synthrad", "gold_atlas"])
def test_a_wrong_root_is_said_in_one_line(tmp_path, name):
    (tmp_path / "Doe.pdf").write_text("no volume")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: [^\n]*$") as error:
        Made(tmp_path, tmp_path.with_name("out"), name)
    assert "Doe" not in str(error.value)
    if name == "folder:nifti":
        assert "expected volumes, whose names end in .nii, .nii.gz" in str(error.value)
        assert "found 1 files .pdf" in str(error.value)


def test_patterns_and_a_ct_in_no_unit(tmp_path):
    shape, affine = (24, 24, 4), grid((24, 24, 4), (6, 6, 20))
    for seed, who in enumerate(("p1", "p2")):
        for visit in ("v1", "v2"):
            values = (head("ct", shape, affine, 7 * seed + int(visit[1])) + 1000) / 8
            nifti(tmp_path / f"down/{who}/{visit}/scan.nii", values.clip(0, 255).astype(np.uint8), affine)
    patterns = {"ct": "{subject}/{visit}/scan.nii"}
    with pytest.raises(UserError, match="4 not in HU"):
        Made(tmp_path / "down", tmp_path / "none", "folder:nifti", patterns)
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti", patterns, range="ct=0:255", share=0.0)
    assert len(made.rows) == 16 and {row["subject"] for row in made.rows.values()} == {"p1", "p2"}
    splits = {}
    for row in made.rows.values():
        splits.setdefault(row["subject"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    with pytest.raises(UserError, match="fits no file"):
        Made(tmp_path / "down", tmp_path / "none2", "folder:nifti", {"ct": "{subject}/ct.nii"})


def test_a_small_head_in_a_wide_field_is_not_lost(tmp_path):
    affine = grid((90, 90, 6), (6, 6, 20))
    nifti(tmp_path / "down/a/T1.nii.gz", head("t1", (90, 90, 6), affine, size=0.6), affine)
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti")  # its fullest slice is a twelfth head
    assert len(made.rows) == 4


def test_a_folder_of_dicom_of_all_kinds(tmp_path):
    shape = (24, 24, 4)
    affine = grid(shape, (6, 6, 20), "LPS")
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    late = {"ScanningSequence": "SE", "RepetitionTime": "5000", "EchoTime": "99"}
    for seed, (name, modality, kind, tags) in enumerate((
        ("t1", "MR", "t1", {"SeriesDescription": "AX T1 SE"}),
        ("t1post", "MR", "t1ce", {"SeriesDescription": "AX T1 POST GD"}),
        ("t2", "MR", "t2", {"SeriesDescription": "?", **late}),
        ("scout", "MR", "pd", {"ImageType": "ORIGINAL\\PRIMARY\\LOCALIZER"}),
        ("soft", "CT", "ct", {"RescaleIntercept": "-1024", "SeriesDescription": "Doe", "BurnedInAnnotation": "YES"}),
        ("bone", "CT", "ct", {"RescaleIntercept": "-1024", "SeriesDescription": "bone"}),
        ("dose", "PT", "pd", {}),
    )):  # fmt: skip
        stored = head(kind, shape, affine, seed).astype(np.int16)
        stored = stored + 1024 if modality == "CT" else stored
        own = dict(Modality=modality, SeriesInstanceUID=f"1.9.{seed}", SeriesNumber=str(seed), **tags)
        series(tmp_path / "down/anna" / name, stored, lps, seed, FrameOfReferenceUID="1.8", **own)
    film = dataset(head("t1", (60, 60, 1), grid((60, 60, 1), (3, 3, 3)))[:, :, 0].astype(np.uint16), Modality="DX",
                   SeriesInstanceUID="1.7", FrameOfReferenceUID=None, BitsStored=12)  # fmt: skip
    (tmp_path / "down/bert").mkdir()
    save(film, tmp_path / "down/bert/film")
    (tmp_path / "down/cleo").mkdir()
    (tmp_path / "down/cleo/notes.txt").write_text("nothing")
    (tmp_path / "down/dora").mkdir()
    whole = save(dataset(np.zeros((8, 8), np.int16), **placed(lps, 0)), tmp_path / "down/dora/x.dcm").read_bytes()
    (tmp_path / "down/dora/x.dcm").write_bytes(whole[:400])
    save(film, tmp_path / "down/loose")
    second = next(f for f in (tmp_path / "down/anna/t2").iterdir()
                  if np.isclose(pydicom.dcmread(f).ImagePositionPatient[2], lps[2, 3] + 20))  # fmt: skip
    second.write_bytes(second.read_bytes()[:400])
    made = Made(tmp_path / "down", tmp_path / "out", "folder:dicom", share=0.0)
    assert made.left == {
        ("", "a localizer"): 1,
        ("", "a series of modality PT"): 1,
        ("", "a folder without DICOM images"): 1,
        ("", "a damaged DICOM file"): 2,
        ("", "a DICOM file in no subject's folder"): 1,
        ("mri:t2", "slices that are missing, filled in from those on both sides"): 1,
    }
    assert set(made.rows["anna-001"]["images"]) == {"ct", "mri_t1", "mri_t1ce", "mri_t2"}
    assert made.rows["anna-001"]["info"] == {"burned_in_annotation": ["ct"]}
    assert made.statistics["burned_in_annotation"] == 4 and any("burned" in line for line in made.said)
    assert made.streams() == {"ct": 8, "mri_t1": 4, "mri_t1ce": 4, "mri_t2": 4, "xray": 1}
    soft = by_pydicom(tmp_path / "down/anna/soft", "CT")
    assert not soft  # its names end in nothing
    want = (head("ct", shape, affine, 4)).transpose(2, 1, 0)
    np.testing.assert_array_equal(made.values("anna-002", "ct"), want[2])
    assert "Doe" not in (tmp_path / "out/manifest.jsonl").read_text()


def test_a_folder_of_pictures(tmp_path):
    root = tmp_path / "down"
    for split, names in (("train", "ab"), ("test", "c")):
        (root / split).mkdir(parents=True)
        for name in names:
            pixels = np.random.default_rng(ord(name)).integers(0, 255, (20, 24), np.uint8)
            Pillow.fromarray(pixels).save(root / split / f"{name}.png")
    (root / "train/metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one", "modality": "Chest X-ray", "patient_id": 7}\n'
        '{"file_name": "b.png", "text": "two", "modality": "Brain MRI T1"}\n'
        '{"file_name": "gone.png", "text": "", "modality": "CT"}\n'
        '{"file_name": "a.exe", "modality": "CT"}\n{"file_name": "b.png", "modality": "ultrasound"}\n'
    )
    (root / "test/metadata.csv").write_text("file_name,text,modality\nc.png,three,CT\n")
    made = Made(root, tmp_path / "out", "folder:images", range="ct=0:255", split=(1.0, 0.0, 0.0))
    assert len(made.rows) == 3
    by_text = {row["text"]: row for row in made.rows.values()}
    assert set(by_text["one"]["images"]) == {"xray"} and by_text["one"]["split"] == "train"
    assert set(by_text["two"]["images"]) == {"mri_t1"} and by_text["three"]["split"] == "test"
    assert made.left == {
        ("", "its file is missing"): 1,
        ("", "no file of a known format named (file_name)"): 1,
        ("", "of no modality that is known (a column `modality`, or --files STREAM=*)"): 1,
    }


def test_the_same_bytes_again_resumed_and_by_two_processes(tmp_path):
    root = synthrad(tmp_path / "down", 2023)
    one = Made(root, tmp_path / "1/out", "synthrad")
    first = files(one.out)
    journal = one.out / ".prepare/journal.jsonl"
    kept = journal.read_text().splitlines(keepends=True)
    journal.write_text(kept[0] + kept[1][: len(kept[1]) // 2])  # as if killed while writing
    again = Made(root, one.out, "synthrad")
    assert any("1 cases were cut by an earlier run; 1 are left" in line for line in again.said)
    assert files(one.out) == first
    assert files(Made(root, tmp_path / "2/out", "synthrad", workers=2).out) == first


class Deadly:
    """Ends the process that takes it up, as one that asks for too much memory is ended."""

    def __reduce__(self):
        return os._exit, (9,)

    def __repr__(self):
        return "Deadly()"


def _deadly(root):
    for name in root.files("*.npy"):
        info = {"x": Deadly()} if name == "b.npy" else {}
        yield Case(name[0], name[0], {"mri": Image(name)}, info=info)


def test_a_full_disk_is_one_line_and_costs_no_case(tmp_path, monkeypatch):
    shape, affine = (24, 24, 4), grid((24, 24, 4), (6, 6, 20))
    for seed, name in enumerate("ab"):
        nifti(tmp_path / "down" / name / "t1.nii", head("t1", shape, affine, seed), affine)
    left = iter(range(5))  # slices that there is room for: the second volume's first is the last of them

    def write(path, picture, notes):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_png(path, picture, notes)

    write_png = raster.write_png
    with monkeypatch.context() as patched:
        patched.setattr(raster, "write_png", write)
        with pytest.raises(UserError, match="^--out .*: No space left on device; name another or mend it$"):
            Made(tmp_path / "down", tmp_path / "out", "folder:nifti", share=0.0)
    made = Made(tmp_path / "down", tmp_path / "out", "folder:nifti", share=0.0)
    assert len(made.rows) == 8 and not made.left
    assert any("1 cases were cut by an earlier run" in line for line in made.said)


def test_a_case_that_kills_its_process_is_left_out_and_the_others_go_on(tmp_path):
    (tmp_path / "down").mkdir()
    for n, name in enumerate("abc"):
        np.save(tmp_path / f"down/{name}.npy", np.random.default_rng(n).integers(0, 255, (16, 16), np.uint8))
    deadly = Adapter("deadly", "A set with a case that kills", "CC0", "", _deadly, ("mri",))
    made = Made(tmp_path / "down", tmp_path / "out", deadly, workers=2)
    assert sorted(made.rows) == ["a", "c"] and made.left == {("", "its process died (memory?)"): 1}


def test_the_list_of_sets_says_what_each_is():
    for adapter in ADAPTERS.values():
        assert adapter.title and adapter.licence and adapter.access and adapter.streams
        assert "\n" not in adapter.access
    assert not any(ADAPTERS[name].open for name in ("brats2020", "gold_atlas", "sliver07", "brain_tumor"))
