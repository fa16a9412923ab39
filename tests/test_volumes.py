"""A volume through a model: every slice where it was, left on the left, one noise for all; wrong input before a model.

What the untrained model makes is noise: where a test asks where things lie, decoding gives back what was given.
"""

import json

import nibabel
import numpy as np
import pytest
from dicom_files import SECRET, series
from micro import model_of
from test_formats_dicom import itk_series
from test_formats_nifti import by_itk
from test_volume import turned

from medm2g_jax import cli, volumes
from medm2g_jax.data import formats, marks
from medm2g_jax.data.picture import network_input
from medm2g_jax.data.volume import LPS, PLANES, Volume, slices, stack, stack_affine
from medm2g_jax.errors import UserError
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES

AFFINE = np.array([[2.0, 0, 0, -30], [0, 2, 0, -40], [0, 0, 5, 50], [0, 0, 0, 1]])
RAMP = np.linspace(0, 1, 20 * 24 * 5, dtype=np.float32).reshape(20, 24, 5)
QUIET = dict(say=lambda line: None)
MRI, CT = MODALITIES["mri"], MODALITIES["ct"]


@pytest.fixture(scope="module")
def model() -> Model:
    """CT and MRI, untrained."""
    return model_of("ct_mri", "tiny,alone")


class Echo(Model):
    """The same model, which makes of an MRI slice that very slice, as a CT: in place of its networks' sample."""

    def sample(self, request, given, keys, *rest):
        return {s: given["mri:t2"] for s in request.make}

    def decode(self, stream, z, rows=None, beams=1):
        return np.asarray(z)


@pytest.fixture
def echo(model) -> Model:
    return Echo(model.model, model.params, None, model.meta, model.defaults)


def head() -> np.ndarray:
    """A head (x to the right, y to the front, z to the head) that looks the same from nowhere: a bright left, and a
    front and a top that are brighter than back and bottom."""
    x, y, z = np.indices((32, 32, 6)) / np.array([31, 31, 5]).reshape(3, 1, 1, 1)
    return np.float32(0.1 + 0.5 * (x < 0.3) + 0.25 * (y > 0.8) + 0.1 * (z > 0.7))


def expected(values: np.ndarray) -> np.ndarray:
    return values * 1400 - 1000


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SRP"])
def test_left_stays_left_through_nifti(echo, tmp_path, code, plane):
    """By the source's own affine, as nibabel and SimpleITK have it, to half a voxel and half an HU."""
    source = turned(code, head(), np.diag([2.0, 2, 2, 1]))
    nibabel.save(nibabel.Nifti1Image(source.values, source.affine), tmp_path / "mr.nii.gz")
    made = volumes.translate(echo, {"mri:t2": tmp_path / "mr.nii.gz"}, ["ct"], plane=plane, **QUIET)
    formats.write_volume(tmp_path / "ct.nii.gz", made.mean["ct"], made.about[0])
    theirs = nibabel.load(tmp_path / "ct.nii.gz")
    values, affine = by_itk(tmp_path / "ct.nii.gz")
    for found, where in ((theirs.get_fdata(), theirs.affine), (values, affine)):
        assert np.abs(where - source.affine).max() < 1e-3
        if plane == "axial":  # squares of 32: nothing is resized
            np.testing.assert_allclose(found, expected(source.values), atol=0.51)
    left = theirs.get_fdata()[stack_values(source, 0.3)]
    assert left.mean() > theirs.get_fdata().mean() + 200


def stack_values(source: Volume, below: float) -> np.ndarray:
    """Which voxels lie in the patient's left part."""
    index = np.indices(source.values.shape).reshape(3, -1)
    x = (source.affine[:3, :3] @ index)[0] + source.affine[0, 3]
    return (x < x.min() + below * (x.max() - x.min())).reshape(source.values.shape)


def test_left_stays_left_through_a_dicom_series(echo, tmp_path):
    stored = np.uint16(head()[::-1, ::-1] * 4000)  # columns to the left, rows to the back
    affine = LPS @ np.array([[-2.0, 0, 0, 31], [0, -2, 0, 40], [0, 0, 3, 7], [0, 0, 0, 1]])
    folder = series(tmp_path / "mr", stored, affine, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    made = volumes.translate(echo, {"mri:t2": folder}, ["ct"], **QUIET)
    formats.write_volume(tmp_path / "ct", made.mean["ct"], made.about[0])
    values, where = itk_series(tmp_path / "ct")
    given, there = itk_series(folder)
    assert np.abs(where - there).max() < 1e-3
    span = made.mean["ct"].values.max()
    np.testing.assert_allclose((values + 1000) / (span + 1000), given / given.max(), atol=0.01)
    back = formats.read_volume(tmp_path / "ct")
    assert back.frame == "1.2.3.4" and back.unit == "HU"
    (first, *_) = slices(back)
    assert first.orientation == "PL" and first.pixels[:, -8:].mean() > first.pixels[:, :8].mean() + 200  # left: bright
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "ct").iterdir())
    assert {marks.mark_of(path).seed for path in (tmp_path / "ct").iterdir()} == {0}


def test_pixels_that_are_not_square_are_squared_and_brought_back(echo):
    """As the networks see it nothing is stretched, and what is made lies on the source's own voxels."""
    ramp = np.repeat(np.linspace(0, 1, 12, dtype=np.float32)[:, None, None], 33, 1).repeat(3, 2)
    source = Volume(ramp, np.diag([3.0, 1, 4, 1]), path="a.nii")
    cut = volumes.cut(source, "mri:t2")
    assert all(picture.pixels.shape == (33, 36) for picture in cut.pictures()) and len(cut) == 3
    assert "axial pixels of 1 x 3 mm, resampled to 1 x 1" in cut.pictures()[0].notes[0]
    made = volumes.translate(echo, {"mri:t2": source}, ["ct"], **QUIET)
    assert made.mean["ct"].values.shape == source.values.shape
    np.testing.assert_array_equal(made.mean["ct"].affine, source.affine)
    inside = np.s_[2:-2, 3:-3]  # of the rim that is padded to a square
    np.testing.assert_allclose(made.mean["ct"].values[inside], expected(ramp)[inside], atol=30)
    for shape in ((7, 30, 2), (30, 7, 2), (1, 50, 40), (13, 17, 4)):
        for affine in (np.diag([2.7, 1, 3, 1]), np.diag([1, 4.31, 0.9, 1])):
            for plane in PLANES:
                cut = volumes.cut(Volume(np.zeros(shape), affine), "ct", plane)
                back = cut.volume("ct", stack(cut.square, cut.plane).astype(np.float32))
                assert back.values.shape == shape and np.array_equal(back.affine, affine)


def test_slices_share_their_noise_and_depend_on_no_batch(model):
    """Slices that are alike become alike, whatever their number; draws differ; the batch is nobody's business."""
    alike = Volume(np.repeat(RAMP[:, :, :1], 5, 2), AFFINE)
    options = dict(draws=3, seed=4, **QUIET)
    one = volumes.translate(model, {"mri:t2": alike}, ["ct"], rows=16, **options)
    apart = np.ptp(stack(one.mean["ct"], "axial"), axis=0)
    assert apart.max() < 0.5 and one.std["ct"].values.min() >= 0 and one.std["ct"].values.mean() > 1
    other = volumes.translate(model, {"mri:t2": alike}, ["ct"], rows=4, **options)  # a slice at a time
    np.testing.assert_allclose(other.mean["ct"].values, one.mean["ct"].values, atol=0.5)
    np.testing.assert_allclose(other.std["ct"].values, one.std["ct"].values, atol=0.5)
    again = volumes.translate(model, {"mri:t2": alike}, ["ct"], **(options | dict(seed=5)))
    assert np.abs(again.mean["ct"].values - one.mean["ct"].values).mean() > 1
    values, cut = volumes.opened({"mri:t2": alike})
    kept = volumes.generate(model, values, cut, ["ct"], rows=4, draws=3, seed=4, **QUIET)
    assert kept.samples["ct"].shape == (15, 24, 20) and kept.latents["ct"].shape[0] == 15
    np.testing.assert_allclose(cut.volume("ct", kept.mean("ct")).values, one.mean["ct"].values, atol=0.5)
    best = volumes.generate(model, values, cut, ["ct"], rows=4, best_of=3, seed=4, **QUIET)
    assert best.samples["ct"].shape[0] == 5 and best.kept.shape == best.agreement.shape == (5,)
    assert "1 draw" not in one.about[0]["Provenance"] and "mean of 3 draws" in one.about[0]["Provenance"]


def test_nothing_is_made_of_empty_slices(echo):
    values = RAMP.copy()
    values[:, :, [0, 3]] = 0.5
    made = volumes.translate(echo, {"mri:t2": Volume(values, AFFINE)}, ["ct"], rows=2, draws=2, **QUIET)
    whole, std = stack(made.mean["ct"], "axial"), stack(made.std["ct"], "axial")
    assert (whole[[0, 3]] == -1000).all() and (std[[0, 3]] == 0).all()
    assert all(np.ptp(whole[n]) > 0 for n in (1, 2, 4))
    assert "2 slices of one value alone were left empty" in made.notes
    with pytest.raises(UserError, match="a.nii: every axial slice of it holds one value alone"):
        volumes.translate(echo, {"mri:t2": Volume(RAMP * 0, AFFINE, path="a.nii")}, ["ct"], **QUIET)


def test_a_volume_as_networks_read_it_is_its_slices(model):
    values, cut = volumes.opened({"mri:t2": Volume(RAMP * 900, AFFINE)})
    pictures = values["mri:t2"]
    assert len(pictures) == 5 and cut.holds("ct") and not cut.holds("xray")
    assert len({picture.span for picture in pictures}) == 1  # one range for the whole volume
    assert network_input(pictures[0], MRI, model.size).shape == (32, 32, 1)
    said = volumes.cut(Volume(np.zeros((60, 40, 3)), AFFINE), "ct").seen(32)
    assert "40 x 60 pixels, 80 x 120 mm" in said and "3.75 mm a pixel for 2" in said
    assert volumes.cut(Volume(RAMP, AFFINE), "ct").seen(32) == ""


def test_a_field_of_view_unlike_trainings_is_said(echo):
    volume = Volume(RAMP * 900, AFFINE)  # 40 x 48 mm
    cut = volumes.cut(volume, "mri:t2")
    for span in ((45, 60), (57, 90), (10, 40.1)):
        assert cut.unlike({"mri:t1": span, "ct": (1, 2)}) == "", span
    assert cut.unlike({}) == cut.unlike({"ct": (500, 500)}) == ""
    assert "48 x 40 mm; the images of training are 58 to 70 mm wide" in cut.unlike({"mri": (58, 70)})
    assert "larger to the networks" in (said := cut.unlike({"mri": (58, 70)})) and "pad the volume" in said
    assert "39 mm wide" in (said := cut.unlike({"mri": (39, 39)})) and "smaller" in said and "crop" in said
    echo.meta = echo.meta | {"extents": {"mri:t2": [10, 20]}}
    made = volumes.translate(echo, {"mri:t2": volume}, ["ct"], **QUIET)
    assert sum("10 to 20 mm wide" in note for note in made.notes) == 1
    values, cut = volumes.opened({"mri:t2": volume})
    made = volumes.generate(echo, values, cut, ["ct"], **QUIET)
    assert sum("10 to 20 mm wide" in note for note in made.notes) == 1


@pytest.fixture
def head_file(tmp_path):
    path = tmp_path / "mr.nii.gz"
    nibabel.save(nibabel.Nifti1Image(RAMP * 900, AFFINE), path)
    return path


@pytest.fixture
def loaded(model, monkeypatch):
    """What the command line loads: the model, whatever it is called; its description as model.json has it."""
    groups = {f"{m}/{part}": {} for m in ("ct", "mri") for part in ("flow", "guide")}
    meta = model.meta | dict(modalities={"ct": {}, "mri": {}}, **{"from": groups})
    monkeypatch.setattr("medm2g_jax.loading.load", lambda *_, **__: model)
    monkeypatch.setattr("medm2g_jax.volume_files.described", lambda path: (path, meta))
    return model


def test_translate_writes_what_it_is_asked_for_and_says_how_long_a_slice_takes(loaded, head_file, tmp_path, capsys):
    out, std = tmp_path / "new" / "ct.nii.gz", tmp_path / "std.mha"
    line = ["translate", "-i", str(head_file), "--model", "x", "--from", "mri:t2", "--draws", "3", "--seed", "7"]
    cli.main([*line, "-o", str(out), "--uncertainty", str(std)])
    said = capsys.readouterr().out
    assert "this model was trained on the phantom alone" in said
    assert "MRI t2, 20 x 24 x 5 voxels -> CT" in said and "s a slice" in said and "Not for clinical use" in said
    assert "counts from -1 to +1 over 0 to" in said and "mri:t2 -> ct: prompt tokens, guide tokens, registered" in said
    made, differ = nibabel.load(out), formats.read_volume(std)
    assert made.get_data_dtype() == np.int16 and differ.values.dtype == np.float32
    for affine in (made.affine, differ.affine):
        np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    assert {marks.mark_of(path) for path in (out, std)} == {marks.Mark(loaded.fingerprint, 7, "the file itself")}
    for suffix in (".mha", ""):
        cli.main([*line, "-o", str(tmp_path / f"other{suffix}")])
    one, other = (formats.read_volume(tmp_path / f"other{suffix}") for suffix in (".mha", ""))
    np.testing.assert_array_equal(stack(one, "axial"), stack(other, "axial"))
    np.testing.assert_allclose(stack_affine(one, "axial"), stack_affine(other, "axial"), atol=1e-3)
    cli.main([*line, "-o", str(tmp_path / "other.mha"), "--overwrite"])


def test_generate_takes_a_volume_and_gives_volumes(loaded, head_file, tmp_path):
    line = ["generate", "--model", "x", "--given", f"mri:t2={head_file}", "--make", "ct", "--draws", "3"]
    cli.main([*line, "--out", str(tmp_path / "out")])
    names = [f"ct{what}.nii.gz" for what in ("_000", "_001", "_002", "-mean_000", "-std_000")]
    (record,) = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert record["files"] == names and record["fingerprint"] == loaded.fingerprint
    for name in names:
        np.testing.assert_allclose(nibabel.load(tmp_path / "out" / name).affine, AFFINE, atol=1e-4)
    draws = [nibabel.load(tmp_path / "out" / name).get_fdata() for name in names[:4]]
    np.testing.assert_allclose(sum(draws[:3]) / 3, draws[3], atol=1.1)
    cli.main([*line, "--out", str(tmp_path / "out"), "--as", "dicom"])  # numbers on
    folders = {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert folders == {f"ct{what}" for what in ("_003", "_004", "_005", "-mean_003", "-std_003")}
    again, mean = formats.read_volume(tmp_path / "out" / "ct-mean_003"), Volume(draws[3], AFFINE)
    np.testing.assert_allclose(stack(again, "axial"), stack(mean, "axial"), atol=1.1)
    np.testing.assert_allclose(stack_affine(again, "axial"), stack_affine(mean, "axial"), atol=1e-3)
    cli.main([*line, "--out", str(tmp_path / "png"), "--as", "png"])
    assert len(list((tmp_path / "png").glob("*.png"))) == 15 + 2 * 5
    assert np.load(tmp_path / "png" / "ct_014.npy").shape == (24, 20)


def test_what_is_made_from_nothing_opens_as_dicom(loaded, tmp_path):
    cli.main(["generate", "--model", "x", "--make", "ct", "--count", "2", "--out", str(tmp_path), "--as", "dicom"])
    back = formats.read(tmp_path / "ct_001.dcm", 2**20, CT)
    assert back.span is None and back.modality == "CT" and back.pixels.shape == (32, 32)
    assert -1000 <= back.pixels.min() < back.pixels.max() <= 400
    assert marks.mark_of(tmp_path / "ct_001.dcm").model == loaded.fingerprint


def test_one_slice_with_a_place_is_a_picture_or_a_volume_as_is_asked(loaded, tmp_path):
    nibabel.save(nibabel.Nifti1Image(RAMP[:, :, :1], AFFINE), tmp_path / "one.nii")
    line = ["generate", "--model", "x", "--given", f"mri:t2={tmp_path / 'one.nii'}", "--make", "ct", "--draws", "3"]
    cli.main([*line, "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "ct_000.png").exists()
    cli.main([*line, "--out", str(tmp_path / "b"), "--as", "nifti"])
    np.testing.assert_allclose(nibabel.load(tmp_path / "b" / "ct_000.nii.gz").affine, AFFINE, atol=1e-4)


def wrong(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in line])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-i", "none.nii"], "none.nii"),
        ([], "mr.nii.gz: does not say what it is of; say it, --from one of ct, mri:t1"),
        (["--from", "xray"], "--from xray: no slices of a volume; expected one of ct, mri:t1"),
        (["--from", "pet"], "unknown stream 'pet'"),
        (["--from", "ct"], "--to: of ct this model makes mri:t1, mri:t2, mri:pd, mri:flair, mri:t1ce; say which"),
        (["--from", "ct", "--to", "text"], "--to text: this model makes no slices of it, but ct, mri:t1"),
        (["--from", "ct", "--to", "xray"], "--to xray: this model makes no slices of it"),
        (["--from", "mri", "--to", "mri"], "--to mri: given and wanted are the same"),
        (["--from", "mri", "-o", "there.nii"], "-o there.nii: is there already; name another, or add --overwrite"),
        (["--from", "mri", "-o", "full"], "full: is there already; name a new folder for the slices"),
        (["--from", "mri", "-o", "mr.nii.gz", "--overwrite"], "-o mr.nii.gz: the file that is given; name another"),
        (["--from", "mri", "-o", "a.png"], "a.png: volumes are not written as PNG; expected a name that ends in"),
        (["--from", "mri", "-o", "a.npy"], "-o a.npy: NumPy holds no word that it is synthetic"),
        (["--from", "mri", "-o", "a.foo"], "a.foo: volumes are not written as '.foo'; expected a name that ends in"),
        (["--from", "mri", "-o", "a.dcm"], "a.dcm: 5 slices, and DICOM has one a file; name a folder"),
        (["--from", "mri", "-o", "there.nii/a.nii"], "there.nii: expected a folder, found the file"),
        (["--from", "mri", "--uncertainty", "b.nii"], "--uncertainty b.nii: how far draws differ; ask for several"),
        (["--from", "mri", "--draws", "2", "--uncertainty", "a.nii"], "--uncertainty a.nii: the name of the output"),
        (["--from", "mri", "--draws", "2", "--uncertainty", "there.nii"], "--uncertainty there.nii: is there already"),
        (["--from", "mri", "--plane", "foo"], "plane 'foo': expected one of axial, coronal, sagittal"),
        (["--from", "mri", "--steps", "0"], "--steps: expected a whole number from 1 to 1000"),
    ],
)
def test_wrong_input_is_one_line_before_a_model_is_loaded(
    options, message, loaded, head_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("medm2g_jax.loading.load", lambda *_, **__: pytest.fail("loaded first"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.nii").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"x")
    line = {"-i": "mr.nii.gz", "-o": "a.nii", "--model": "x"}
    given = [word for option, value in line.items() if option not in options for word in (option, value)]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert message in wrong(capsys, "translate", *given, *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_dicom_says_what_it_is_of(loaded, tmp_path, capsys):
    stored = np.uint16(head() * 4000)
    affine = np.diag([2.0, 2, 3, 1])
    mr, ct = (series(tmp_path / code, stored, affine, Modality=code) for code in ("MR", "CT"))
    out = ["--model", "x", "-o", tmp_path / "out"]
    said = wrong(capsys, "translate", "-i", mr, *out)
    assert "MR: MRI, and not which contrast; say it, --from one of mri:t1" in said
    assert "says it is CT (CT), taken for MRI" in wrong(capsys, "translate", "-i", ct, "--from", "mri:t2", *out)
    assert "of ct this model makes mri:t1" in wrong(capsys, "translate", "-i", ct, *out)  # --from is not needed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "nifti", "--make", "ct"], "--as nifti: a volume's, and none is given"),
        (["--as", "foo", "--make", "ct"], "--as foo: expected one of png, dicom, nifti, mha, nrrd"),
        (["--given", "mri:t2=mr.nii.gz", "--make", "ct", "--count", "3"], "--count 3: a volume is given, of 5 slices"),
        (["--given", "mri:t2=mr.nii.gz", "--make", "ct", "--plane", "foo"], "plane 'foo'"),
        (
            ["--given", "mri:t2=mr.nii.gz", "--given", "mri:t1=b.nii", "--make", "ct"],
            "24 x 20 voxels; expected volumes",
        ),
        (["--given", "mri:t2=mr.nii.gz", "--given", "mri:t1=c.nii", "--make", "ct"], "up to 3 mm apart; expected"),
        (["--given", "mri:t2=mr.nii.gz", "--given", "mri:t1=d.png", "--make", "ct"], "mri:t1: pictures, and mri:t2 is"),
        (["--given", "mri:t2=mr.nii.gz", "--given", "mri:t2=b.nii", "--make", "ct"], "or make a volume of it with"),
        (
            ["--data", "phantom", "--as", "dicom", "--make", "missing"],
            "--as dicom: a data set is filled with png alone",
        ),
    ],
)
def test_what_generate_cannot_be_given(options, message, loaded, head_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nibabel.save(nibabel.Nifti1Image(RAMP[:, :, :4], AFFINE), "b.nii")
    moved = AFFINE.copy()
    moved[0, 3] += 3
    nibabel.save(nibabel.Nifti1Image(RAMP, moved), "c.nii")
    formats.FORMATS[".png"].write(
        tmp_path / "d.png", formats.raster.Picture(np.zeros((24, 20), np.uint8), (0, 255)), {}
    )
    assert message in wrong(capsys, "generate", "--model", "x", "--out", "out", *options)
