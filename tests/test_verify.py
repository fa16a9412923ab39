"""Marks: every file that is written says what made it, in whatever format; others' files are not made to speak."""

import json

import numpy as np
import pytest
from dicom_files import SECRET, dataset, save
from PIL import Image
from test_volume import AFFINE

from medm2g_jax import cli
from medm2g_jax.data import formats, marks
from medm2g_jax.data.formats import FORMATS, dicom_sr
from medm2g_jax.data.picture import Picture
from medm2g_jax.data.volume import Volume
from medm2g_jax.data.write import write_samples
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated

RECORD = dict(fingerprint="0badcafe", seed=3)
NOTES = marks.notes(RECORD, "sample 0")
OURS = marks.Mark("0badcafe", 3, "the file itself")
GREY = np.arange(60, dtype=np.uint8).reshape(6, 10)
CUBE = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
SECRETS = {"Description": SECRET, "Comment": SECRET}


@pytest.mark.parametrize("suffix", sorted(suffix for suffix, format in FORMATS.items() if format.write))
def test_a_picture_says_what_made_it(tmp_path, suffix):
    write = FORMATS[suffix].write
    write(tmp_path / f"a{suffix}", Picture(GREY, (0, 255)), NOTES)
    assert marks.mark_of(tmp_path / f"a{suffix}") == OURS
    if suffix not in (".dcm", ".dicom", ".ima"):  # which this package marks whatever notes it is given
        write(tmp_path / f"b{suffix}", Picture(GREY, (0, 255)), SECRETS)
        assert marks.mark_of(tmp_path / f"b{suffix}") is None


@pytest.mark.parametrize("suffix", sorted({s for s, f in FORMATS.items() if f.write_volume} - {".npy"}))
def test_a_volume_says_what_made_it(tmp_path, suffix):
    one = Volume(CUBE[..., :1] if FORMATS[suffix].name == "DICOM" else CUBE, AFFINE)
    formats.write_volume(tmp_path / f"a{suffix}", one, NOTES)
    assert marks.mark_of(tmp_path / f"a{suffix}") == OURS


def test_a_long_comment_of_nifti_2_and_big_endian_headers_are_read(tmp_path):
    import nibabel

    for n, kind in enumerate((nibabel.Nifti1Image, nibabel.Nifti2Image)):
        image = kind(CUBE, AFFINE)
        if not n:
            image.header.set_data_dtype(np.int16)
            image = kind(CUBE, AFFINE, image.header.as_byteswapped(">"))
        words = "x" * 500 + "\n" + "\n".join(f"{key}: {note}" for key, note in NOTES.items())
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("dicom", b""))
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", words.encode()))
        nibabel.save(image, tmp_path / f"{n}.nii.gz")
        assert marks.mark_of(tmp_path / f"{n}.nii.gz") == OURS
    nibabel.save(nibabel.MGHImage(CUBE, AFFINE), tmp_path / "a.mgz")
    assert marks.mark_of(tmp_path / "a.mgz") is None


@pytest.fixture
def made(tmp_path):
    """A folder of all that a call writes: pictures, values, texts and reports."""
    images = np.linspace(-1000, 400, 80, dtype=np.float32).reshape(2, 5, 8)
    for form in ("png", "dicom"):
        write_samples(tmp_path / "out", Generated({"ct": images, "text": ["one", "two"]}, {}, 3), RECORD, form)
    return tmp_path / "out"


def test_what_has_no_text_fields_is_in_the_list_beside_it(made, tmp_path):
    listed = marks.Mark("0badcafe", 3, "generated.json")
    assert marks.mark_of(made / "text_000.txt") == listed and marks.mark_of(made / "ct_001.npy") == listed
    assert marks.mark_of(made / "text_002.dcm") == OURS
    records = json.loads((made / "generated.json").read_text())
    assert [record["texts"] for record in records] == [{"text": ["one", "two"]}] * 2
    (verdict,) = [v for v in marks.verify([made]) if v.mark == OURS]
    assert verdict.files == 6  # two PNG, two pictures and two reports in DICOM
    (tmp_path / "text_000.txt").write_text("one")  # away from its list it is anybody's
    assert marks.mark_of(tmp_path / "text_000.txt") is None
    (made / "generated.json").write_text('[{"files": 3}')
    assert marks.mark_of(made / "text_000.txt") is None


def test_a_record_of_a_filled_set_is_made_by_what_its_provenance_names(tmp_path):
    (tmp_path / "images" / "ct").mkdir(parents=True)
    file = tmp_path / "images" / "ct" / "000001.png"
    FORMATS[".png"].write(file, Picture(GREY, (0, 255)), {"Description": marks.NOTE})
    assert marks.mark_of(file) == marks.Mark("", None, "the file itself")
    (tmp_path / marks.PROVENANCE).write_text(json.dumps(RECORD))
    assert marks.mark_of(file) == marks.Mark("0badcafe", 3, "provenance.json")
    Image.fromarray(GREY).save(tmp_path / "images" / "ct" / "given.png")  # an original beside it
    assert marks.mark_of(file.with_name("given.png")) is None


def test_the_verb_prints_a_line_a_file_and_no_patient(made, tmp_path, capsys):
    save(dataset(CUBE[0], ImageComments=SECRET, DerivationDescription=SECRET), tmp_path / "theirs.dcm")
    dicom_sr.write(tmp_path / "report.dcm", "mass", NOTES, {"PatientName": SECRET})
    files = [str(tmp_path / name) for name in ("report.dcm", "theirs.dcm", "out/ct_000.png", "out/text_000.txt")]
    cli.main(["verify", *files])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("report.dcm: made by medm2g_jax, model 0badcafe, seed 3 (says the file itself)")
    assert lines[1].endswith("theirs.dcm: carries no mark of ours")
    assert lines[3].endswith("(says generated.json)") and len(lines) == 4
    cli.main(["verify", "--json", *files, str(made)])
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0] == dict(
        path=files[0], files=1, marked=True, model="0badcafe", seed=3, by="the file itself"
    ) and rows[1] == dict(path=files[1], files=1, marked=False, model=None, seed=None, by=None)
    assert sum(row["files"] for row in rows[4:]) == 12 and SECRET not in out


def test_what_cannot_be_read_is_said_at_its_place_and_by_the_exit_status(tmp_path, capsys):
    FORMATS[".png"].write(tmp_path / "a.png", Picture(GREY, (0, 255)), NOTES)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    (tmp_path / "cut.nii").write_bytes(b"\0" * 30)
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    (tmp_path / "empty").mkdir()
    names = ("a.png", "cut.png", "cut.nii", "b.pdf", "none.dcm", "none.txt", "empty")
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", *(str(tmp_path / name) for name in names)])
    said = capsys.readouterr()
    assert end.value.code == 2 and "6 of 7 could not be read" in said.err
    lines = said.out.splitlines()
    assert len(lines) == 7 and all(name in line for name, line in zip(names, lines, strict=True))
    with pytest.raises(UserError, match="none.txt.*no such file"):
        marks.mark_of(tmp_path / "none.txt")
