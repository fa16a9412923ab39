"""DICOM in: values and places as SimpleITK has them, HU to the last one; what is odd is said, what is broken named."""

import importlib.util
import os
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import SECRET, dataset, placed, save, series
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless
from test_formats_nifti import SHARED, by_itk
from test_volume import CODES, turned

from medm2g_jax.data import formats
from medm2g_jax.data.formats import dicom, dicom_pixels
from medm2g_jax.data.picture import MOST_PIXELS, Picture, normalised
from medm2g_jax.data.volume import LPS, MOST_VOXELS, Volume, stack
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

CT, XRAY = MODALITIES["ct"], MODALITIES["xray"]
AFFINE = np.array([[0.5, 0, 0, -10], [0, 0.75, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1]])  # LPS
RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 4096, (6, 5, 4)).astype(np.uint16)


def itk_series(folder) -> tuple[np.ndarray, np.ndarray]:
    """(values, affine RAS+) of a folder's one series, as SimpleITK reads it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


def one(path: Path, stored=STORED[:, :, 0].T, **tags) -> Path:
    """A file of one slice, with a place; without a tag that is None."""
    where = {tag: value for tag, value in placed(AFFINE, 0).items() if tag not in tags}
    tags = {tag: value for tag, value in tags.items() if value is not None or tag in ("Rows", "PixelData")}
    return save(dataset(np.ascontiguousarray(stored), **where, **tags), path)


@pytest.mark.parametrize("code", CODES)
def test_a_series_lies_where_it_lies_however_it_is_stored(tmp_path, code):
    patient = turned(code, STORED[:4, :5, :4] * np.uint16(1))
    folder = series(tmp_path / "s", patient.values, LPS @ patient.affine, RescaleSlope="1", RescaleIntercept="-1024")
    volume = formats.read_volume(folder)
    values, affine = itk_series(folder)
    np.testing.assert_array_equal(volume.values, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(stack(volume, "axial") + 1024, stack(patient, "axial"))
    assert volume.values.dtype == np.int16 and volume.unit == "HU" and volume.modality == "CT"
    assert volume.frame == "1.2.3.4" and volume.span is None and volume.notes == ()


def test_oblique_series(tmp_path):
    from scipy.spatial.transform import Rotation

    affine = AFFINE.copy()
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -15, 30], degrees=True).as_matrix() @ affine[:3, :3]
    folder = series(tmp_path / "s", STORED, affine)
    volume, (values, where) = formats.read_volume(folder), itk_series(folder)
    np.testing.assert_array_equal(volume.values, values)
    np.testing.assert_allclose(volume.affine, where, atol=1e-4)
    np.testing.assert_allclose(volume.affine, LPS @ affine, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize("scale", [("1", "0"), ("1", "-1024"), ("2", "-1000"), ("0.1", "-3.5"), (None, None)])
def test_values_are_exact_signed_or_not(tmp_path, dtype, scale):
    limit = np.iinfo(dtype)
    stored = RNG.integers(max(limit.min, -3000), min(limit.max, 4000), (4, 6), endpoint=True).astype(dtype)
    tags = {k: v for k, v in zip(("RescaleSlope", "RescaleIntercept"), scale, strict=True) if v}
    volume = formats.read_volume(one(tmp_path / "a.dcm", stored, **tags))
    slope, inter = (float(x or d) for x, d in zip(scale, (1, 0), strict=True))
    expected = stored.T.astype(np.float64) * slope + inter
    np.testing.assert_allclose(volume.values[..., 0], expected, rtol=1e-6)
    if slope == int(slope):
        assert volume.values.dtype == np.int16
        np.testing.assert_array_equal(volume.values[..., 0], expected)
    np.testing.assert_allclose(volume.values, by_itk(tmp_path / "a.dcm")[0], rtol=1e-6)


def test_bits_that_are_not_stored_do_not_count(tmp_path):
    stored = RNG.integers(0, 4096, (4, 6)).astype(np.uint16)
    overlaid = stored | np.uint16(0xA000)
    volume = formats.read_volume(one(tmp_path / "a.dcm", overlaid, BitsStored=12))
    np.testing.assert_array_equal(volume.values[..., 0].T, stored)
    signed = (stored.astype(np.int16) - 2048) & np.int16(0x0FFF)
    volume = formats.read_volume(one(tmp_path / "a.dcm", signed, BitsStored=12))
    np.testing.assert_array_equal(volume.values[..., 0].T, stored.astype(int) - 2048)


def test_padding_is_as_dark_as_the_darkest_measurement(tmp_path):
    stored = np.array([[-2000, 10, 500], [-1900, 20, -5]], np.int16)
    tags = dict(PixelPaddingValue=-2000, RescaleSlope="1", RescaleIntercept="-24")
    volume = formats.read_volume(one(tmp_path / "a.dcm", stored, **tags))
    np.testing.assert_array_equal(volume.values[..., 0].T, [[-1924, -14, 476], [-1924, -4, -29]])
    far = formats.read_volume(one(tmp_path / "a.dcm", np.array([[48, 7]], np.uint8), PixelPaddingValue=63536))
    np.testing.assert_array_equal(far.values.ravel(), [48, 7])  # no value that 8 bits can hold
    volume = formats.read_volume(one(tmp_path / "a.dcm", stored, PixelPaddingRangeLimit=-1900, **tags))
    np.testing.assert_array_equal(volume.values[..., 0].T, [[-29, -14, 476], [-29, -4, -29]])
    # Written as the bits of the other sign, as many are.
    ds = dataset(stored, **placed(AFFINE, 0))
    ds.add_new(0x00280120, "US", 2**16 - 2000)
    volume = formats.read_volume(save(ds, tmp_path / "a.dcm"))
    assert volume.values.min() == -1900


def test_enhanced_files_are_stacks_of_frames(tmp_path):
    frames = RNG.integers(0, 1000, (4, 5, 6)).astype(np.uint16)
    order, own = [2, 0, 3, 1], []
    for n in order:
        place, scale, item = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = placed(AFFINE, n)["ImagePositionPatient"]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = "1", str(-1024 - n), "HU"
        item.PlanePositionSequence, item.PixelValueTransformationSequence = [place], [scale]
        own.append(item)
    shared, turn, measures = Dataset(), Dataset(), Dataset()
    turn.ImageOrientationPatient = placed(AFFINE, 0)["ImageOrientationPatient"]
    measures.PixelSpacing, measures.SliceThickness = placed(AFFINE, 0)["PixelSpacing"], "2.5"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [turn], [measures]
    ds = dataset(frames[order], PerFrameFunctionalGroupsSequence=own, SharedFunctionalGroupsSequence=[shared])
    volume = formats.read_volume(save(ds, tmp_path / "a.dcm"))
    offsets = -1024 - np.arange(4)[:, None, None]
    np.testing.assert_array_equal(volume.values.T, frames + offsets)
    np.testing.assert_allclose(volume.affine, LPS @ AFFINE, atol=1e-4)
    assert volume.unit == "HU"
    ds.PerFrameFunctionalGroupsSequence = own[:3]
    with pytest.raises(UserError, match="a.dcm: 4 frames, 3 of which say where they lie; expected all"):
        formats.read_volume(save(ds, tmp_path / "a.dcm"))


def test_a_gantry_tilt_stays_in_the_affine(tmp_path):
    tilted = AFFINE.copy()
    tilted[1, 2] = 2.5 * np.tan(np.radians(12))
    volume = formats.read_volume(series(tmp_path / "s", STORED, tilted))
    np.testing.assert_allclose(volume.affine, LPS @ tilted, atol=1e-4)
    assert volume.notes == ("its axes are 12.0 degrees from right angles, as after a gantry tilt",)


def test_missing_slices_are_said_and_filled_in(tmp_path):
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint16) * 100, (6, 5, 12))
    folder = series(tmp_path / "s", ramp, AFFINE)
    for path in folder.iterdir():
        at = float(pydicom.dcmread(path).ImagePositionPatient[2])
        if at in (35.0, 45.0, 47.5):
            path.unlink()
    volume = formats.read_volume(folder)
    np.testing.assert_array_equal(volume.values, ramp)
    np.testing.assert_allclose(volume.affine, LPS @ AFFINE, atol=1e-4)
    said = "3 slices are missing (1 between 32.5 and 37.5 mm; 2 between 42.5 and 50.0 mm)"
    assert volume.notes == (f"{said}, filled in from those on both sides",)


def test_stacks_that_make_no_grid_are_refused(tmp_path):
    folder = series(tmp_path / "s", STORED, AFFINE)
    save(dataset(STORED[:, :, 0].T.copy(), **placed(AFFINE, 1)), folder / "again")
    with pytest.raises(UserError, match="s: 5 slices at 4 places, as of several times"):
        formats.read_volume(folder)
    save(dataset(STORED[:, :, 0].T.copy(), **placed(AFFINE, 1.4)), folder / "again")
    with pytest.raises(UserError, match="s: slices 1 to 2.5 mm apart, up to .* off an even stack"):
        formats.read_volume(folder)
    save(dataset(STORED[:, :, 0].T.copy(), **placed(AFFINE, 1e5)), folder / "again")
    with pytest.raises(UserError, match="off an even stack|voxels, more than"):
        formats.read_volume(folder)


def test_a_folder_of_several_series_lists_them_without_names(tmp_path):
    series(tmp_path / "a", STORED, AFFINE, SeriesInstanceUID="1.1", SeriesNumber="7")
    series(tmp_path / "b", STORED[:, :, :3], AFFINE, SeriesInstanceUID="1.2", SeriesNumber="3", Modality="MR")
    turn = AFFINE[:, [1, 0, 2, 3]] * [1, 1, -1, 1]
    series(tmp_path / "a" / "more", STORED[:4], turn, 1, SeriesInstanceUID="1.1", SeriesNumber="7")  # another geometry
    (tmp_path / "notes.txt").write_text("nothing")
    other = dataset(STORED[:, :, 0].T.copy(), Rows=None, PixelData=None, Modality="RTSTRUCT", SOPClassUID="1.2.3")
    other.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    save(other, tmp_path / "b" / "rt.dcm")
    with pytest.raises(UserError) as error:
        formats.read_volume(tmp_path)
    said = str(error.value)
    assert "3 series of images (0: MR, 3 files of 5 x 6; 1: CT, 4 files of 5 x 4; 2: CT, 4 files of 5 x 6)" in said
    assert SECRET not in said
    found = dicom.series(tmp_path, MOST_VOXELS)
    np.testing.assert_array_equal(dicom.read_series(found[2], MOST_VOXELS).values, STORED)
    np.testing.assert_array_equal(formats.read_volume(tmp_path / "b").values, STORED[:, :, :3])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no series of images; expected one"):
        formats.read_volume(tmp_path / "empty")


def test_links_copies_and_fifos(tmp_path):
    folder = series(tmp_path / "s", STORED, AFFINE)
    other = save(dataset(STORED[:, :, 0].T.copy(), **placed(AFFINE, 9)), tmp_path / "elsewhere.dcm")
    (folder / "out").symlink_to(other)
    (folder / "loop").symlink_to("loop")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    (folder / "copy").write_bytes((folder / "0000").read_bytes())
    volume = formats.read_volume(folder)
    np.testing.assert_array_equal(volume.values, STORED)
    assert volume.notes == (
        "1 links that lead out of the folder were passed over",
        "1 files that hold the same image as another were passed over",
    )


def film(tmp_path, stored, **tags) -> Picture:
    return dicom.read(save(dataset(stored, Modality="CR", FrameOfReferenceUID=None, **tags), tmp_path / "a.dcm"), 1000)


def test_films_are_bright_where_much_was_absorbed(tmp_path):
    stored = np.array([[0, 1000, 4095]], np.uint16)
    picture = film(tmp_path, stored, BitsStored=12, ImagerPixelSpacing=["0.2", "0.1"], PatientOrientation=["L", "F"])
    assert picture.pixels.dtype == np.uint16 and picture.span == (0, 4095) and picture.notes == ()
    assert picture.spacing == (0.2, 0.1) and picture.orientation == "FL" and picture.modality == "CR"
    np.testing.assert_array_equal(picture.pixels, stored)
    other = film(tmp_path, stored, BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(other.pixels, 4095 - stored)
    assert other.pixels.dtype == np.uint16 and other.span == (0, 4095)
    byte = film(tmp_path, stored.astype(np.uint8), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(byte.pixels, 255 - stored.astype(np.uint8))
    assert byte.pixels.dtype == np.uint8 and byte.span == (0, 255)
    assert film(tmp_path, stored, PixelSpacing=["0", "0"]).spacing is None
    flipped = film(tmp_path, stored, PatientOrientation=["R", "F"])
    assert flipped.orientation == "FR" and "right on the right" in flipped.notes[0]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_a_films_window_is_as_pydicom_applies_it(tmp_path, kind):
    from pydicom.pixels import apply_voi_lut

    stored = np.arange(0, 4096, 63, dtype=np.uint16)[None]
    for function in ("LINEAR", "LINEAR_EXACT"):
        tags = dict(WindowCenter=["2000", "1"], WindowWidth=["1500", "2"], VOILUTFunction=function, BitsStored=12)
        picture = film(tmp_path, stored, PhotometricInterpretation=kind, **tags)
        theirs = apply_voi_lut(stored, pydicom.dcmread(tmp_path / "a.dcm")).astype(float) / 4095 * 2 - 1
        ours = normalised(picture, XRAY)
        np.testing.assert_allclose(ours, theirs if kind == "MONOCHROME2" else -theirs, atol=2e-3)
        assert picture.notes == ("counts over the window that the file asks for",)


def test_a_films_padding_is_dark_after_inversion(tmp_path):
    stored = np.array([[0, 1000, 4000]], np.uint16)
    tags = dict(BitsStored=12, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    np.testing.assert_array_equal(film(tmp_path, stored, **tags).pixels, [[95, 3095, 95]])


def test_one_slice_is_a_picture_of_its_modality(tmp_path):
    one(tmp_path / "a.dcm", np.array([[0, 1024], [2048, 4000]], np.uint16), RescaleSlope="1", RescaleIntercept="-1024",
        WindowCenter="40", WindowWidth="80")  # fmt: skip
    picture = formats.read(tmp_path / "a.dcm", MOST_PIXELS, CT)
    np.testing.assert_array_equal(picture.pixels, [[-1024, 0], [1024, 2976]])
    np.testing.assert_allclose(normalised(picture, CT), [[-1, 3 / 7], [1, 1]])  # a CT's own window is not used
    assert picture.orientation == "PL" and picture.spacing == (0.75, 0.5)
    with pytest.raises(UserError, match=r"a.dcm: says it is CT \(CT\), taken for MRI"):
        formats.read(tmp_path / "a.dcm", MOST_PIXELS, MODALITIES["mri"])
    (tmp_path / "a.dcm").rename(tmp_path / "IM0001")  # the name says nothing
    assert formats.read(tmp_path / "IM0001", MOST_PIXELS, CT).pixels.shape == (2, 2)
    series(tmp_path / "s", STORED, AFFINE)
    with pytest.raises(UserError, match=r"s: a volume \(4 axial, 5 coronal, 6 sagittal slices\)"):
        formats.read(tmp_path / "s", MOST_PIXELS, CT)


def test_a_model_takes_a_slice_as_what_it_is(tmp_path):
    from types import SimpleNamespace

    from medm2g_jax.inference import Model

    model = SimpleNamespace(meta={"shared": {"data": {"most_pixels": MOST_PIXELS}}, "ranges": {}})
    path = one(tmp_path / "a.dcm", RescaleSlope="1", RescaleIntercept="-1024")
    picture = Model._picture(model, "ct", str(path))
    np.testing.assert_array_equal(picture.pixels, STORED[:, :, 0].T.astype(int) - 1024)
    with pytest.raises(UserError, match="taken for X-ray"):
        Model._picture(model, "xray", str(path))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (dict(Rows=None), "DICOM without an image"),
        (dict(PixelData=None), "a header without its image"),
        (dict(PixelData=b"12"), "not a whole DICOM file"),
        (dict(Rows=0), "1 x 0 x 6 pixels; expected lengths from 1"),
        (dict(NumberOfFrames="2000000000"), "2000000000 x 5 x 6 pixels, more than the"),
        (dict(NumberOfFrames="3"), "not a whole DICOM|3 frames, 0 of which"),
        (dict(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "an image in colour"),
        (dict(PhotometricInterpretation="PALETTE COLOR"), "an image in colour"),
        (dict(PixelSpacing=None), "no PixelSpacing; a slice needs"),
        (dict(ImageOrientationPatient=None), "no ImageOrientationPatient; a slice needs"),
        (dict(ImagePositionPatient=["1", "2"]), "ImagePositionPatient: expected 3 finite numbers"),
        (dict(ImagePositionPatient=["nan", "0", "0"]), "ImagePositionPatient: expected 3 finite numbers"),
        (dict(ImageOrientationPatient=["0"] * 6), "expected two unit vectors"),
        (dict(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]), "expected two unit vectors"),
        (dict(PixelSpacing=["0", "0"]), "voxels of 0 x 0"),
        (dict(RescaleSlope="inf"), "RescaleSlope: expected 1 finite number"),
        (dict(BitsStored=99), "not a whole DICOM file"),
        (dict(BitsAllocated=13), "not a whole DICOM file"),
    ],
)
def test_headers_that_are_wrong_are_named_without_a_patient(tmp_path, tags, message):
    one(tmp_path / "a.dcm", **tags)
    with pytest.raises(UserError, match=f"a.dcm: .*{message}") as error:
        formats.read(tmp_path / "a.dcm", MOST_PIXELS, CT)
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_pydicoms_warnings_quote_no_value(tmp_path, recwarn, caplog):
    path = one(tmp_path / "a.dcm", FrameOfReferenceUID="1.2.333.44.5")
    path.write_bytes(path.read_bytes().replace(b"1.2.333.44.5", b"Doe^Jane^199"))  # no UID: pydicom warns of it
    recwarn.clear()
    dicom_pixels._hush.cache_clear()  # each test has filters of its own
    assert formats.read_volume(path).values.shape == (6, 5, 1)
    assert not recwarn.list and "Doe" not in caplog.text


def test_compressed_frames_are_held_to_the_headers_size():
    assert dicom_pixels.frame_size(b"\xff\x4f\xff\x51" + bytes(4) + b"\0\0\1\0\0\0\2\0" + bytes(8)) == (512, 256)
    jpeg = b"\xff\xd8\xff\xe0\0\4ab\xff\xc0\0\x11\x08" + b"\2\0\1\0" + bytes(9)
    assert dicom_pixels.frame_size(jpeg) == (512, 256)
    assert dicom_pixels.frame_size(b"\xff\xd8" + b"\xff\xe0\0\0" * 9) is None and dicom_pixels.frame_size(b"") is None
    ds = pydicom.dcmread(get_testdata_file("JPEG2000.dcm"))
    ds.Rows, ds.Columns = 100, 100
    with pytest.raises(UserError, match="its compressed image is 1024 x 256, its header says 100 x 100"):
        dicom_pixels.stored("x", ds, MOST_PIXELS)


def test_a_missing_decoder_names_what_to_install(monkeypatch):
    path = get_testdata_file("MR_small_jpeg_ls_lossless.dcm")
    from pydicom.pixels.decoders import JPEGLSLosslessDecoder

    monkeypatch.setattr(type(JPEGLSLosslessDecoder), "is_available", False)
    with pytest.raises(UserError, match=r"JPEG-LS .* a decoder is missing: pip install 'medm2g-jax\[dicom\]'"):
        dicom.read(path, MOST_PIXELS)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    with pytest.raises(UserError, match="compressed as MPEG2 .*, which is not read here"):
        dicom_pixels.stored("x", ds, MOST_PIXELS)


@pytest.mark.parametrize(
    ("packed", "plain"),
    [
        ("MR_small_RLE", "MR_small"),
        ("MR_small_jp2klossless", "MR_small"),
        ("MR_small_jpeg_ls_lossless", "MR_small"),
        ("MR_small_bigendian", "MR_small"),
        ("MR_small_implicit", "MR_small"),
        ("MR_small_padded", "MR_small"),
        ("rtdose_rle_1frame", "rtdose_1frame"),
    ],
)
def test_compressed_files_hold_what_plain_ones_do(packed, plain):
    a, b = (dicom.read(get_testdata_file(f"{name}.dcm"), MOST_PIXELS) for name in (packed, plain))
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.affine, b.affine)


def test_deflated_files_hold_what_plain_ones_do_and_are_no_bombs(tmp_path):
    def deflated(path, content: bytes) -> Path:
        """The file of `written` with another data set in it."""
        whole = written.read_bytes()
        end = 144 + int.from_bytes(whole[140:144], "little")
        packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
        path.write_bytes(whole[:end] + packer.compress(content) + packer.flush())
        return path

    plain = one(tmp_path / "plain.dcm")
    header = pydicom.dcmread(plain)
    header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    written = tmp_path / "deflated.dcm"
    header.save_as(written)
    found, same = (dicom.read(path, MOST_PIXELS) for path in (written, plain))
    np.testing.assert_array_equal(found.values, same.values)
    np.testing.assert_array_equal(found.affine, same.affine)
    meta = b"\2\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"  # a second syntax inside: deflated twice
    for content, said in ((bytes(2**27), "bytes inflated"), (meta + bytes(99), "not a whole deflated")):
        with pytest.raises(UserError, match=said):
            dicom.read(deflated(tmp_path / "bad.dcm", content), 1000)
    whole = written.read_bytes()
    for cut in (len(whole) - 9, 200, 143):
        (tmp_path / "bad.dcm").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="bad.dcm: "):
            dicom.read(tmp_path / "bad.dcm", MOST_PIXELS)


def test_rle_by_pydicom_itself(tmp_path):
    ds = dataset(STORED[:, :, 0].T.copy(), **placed(AFFINE, 0))
    ds.compress(RLELossless)
    np.testing.assert_array_equal(formats.read_volume(save(ds, tmp_path / "a.dcm")).values[..., 0], STORED[:, :, 0])


def own_files() -> list[Path]:
    """pydicom's own test files, but for large compressed ones, which take seconds each."""
    roots = [Path(pydicom.__file__).parent / "data" / "test_files"]
    if spec := importlib.util.find_spec("data_store"):
        roots += map(Path, spec.submodule_search_locations or ())
    paths = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    return [
        p for p in paths if p.suffix not in (".py", ".pyc") and not (p.stat().st_size > 200_000 and "J2K" in p.name)
    ]


def test_every_file_of_pydicoms_own_is_read_or_refused_in_words():
    """What is read as one slice is what SimpleITK reads."""
    read, refused, compared = 0, 0, 0
    for path in own_files():
        try:
            image = dicom.read(path, MOST_PIXELS)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        read += 1
        if not isinstance(image, Volume) or image.values.shape[2] > 1 or image.modality == "RTDOSE":
            continue
        try:
            values, affine = by_itk(path)
        except RuntimeError:
            continue
        if values.shape == image.values.shape:
            known = image.values > image.values.min()  # padding apart
            np.testing.assert_allclose(image.values[known], values[known], rtol=1e-5, err_msg=str(path))
            np.testing.assert_allclose(image.affine[:, :2], affine[:, :2], atol=1e-3, err_msg=str(path))
            np.testing.assert_allclose(image.affine[:, 3], affine[:, 3], atol=1e-3, err_msg=str(path))
            compared += 1
    assert read >= 25 and refused >= 60 and compared >= 15, (read, refused, compared)


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real volumes at {SHARED}")
def test_real_files():
    ct = formats.read_volume(SHARED / "dcm_ct_head_693" / "693_UNCR.dcm")
    values, affine = by_itk(SHARED / "dcm_ct_head_693" / "693_UNCR.dcm")
    np.testing.assert_array_equal(ct.values, np.where(values == -3024, -1024, values))  # its padding
    np.testing.assert_allclose(ct.affine[:, [0, 1, 3]], affine[:, [0, 1, 3]], atol=1e-4)
    assert ct.unit == "HU" and ct.values.min() >= -1024
    packed = formats.read_volume(SHARED / "dcm_ct_head_693" / "693_J2KR.dcm")
    np.testing.assert_array_equal(packed.values, ct.values)
    mr = formats.read_volume(SHARED / "dcm_mr_philips" / "MR2_J2KR.dcm")
    assert mr.values.shape == (1024, 1024, 1) and mr.unit == ""
    with pytest.raises(UserError, match="10 frames that do not say where they lie"):
        formats.read_volume(SHARED / "dcm_mr_enhanced" / "emri_small.dcm")
    film = formats.read(SHARED / "dcm_cr_chest" / "RG1_J2KI.dcm", MOST_PIXELS, XRAY)
    assert film.pixels.shape == (1955, 1841) and film.orientation == "FL" and film.modality == "CR"
    assert film.spacing is None
