"""Files of pictures: what a viewer shows is read, and whatever is wrong with a file is one line that names it."""

import dataclasses
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from medm2g_jax.data.formats import FORMATS, format_of, raster, read
from medm2g_jax.data.picture import MOST_PIXELS, Picture
from medm2g_jax.errors import UserError

GREY = np.array([[0, 51, 255]], np.uint8)


def noise(shape, dtype=np.uint8, top=255):
    return np.random.default_rng(0).integers(0, top, shape, endpoint=True).astype(dtype)


def test_every_kind_of_png_and_jpeg_gives_its_grey_values(tmp_path):
    for mode in ("L", "RGB", "RGBA", "LA", "P"):
        Image.fromarray(GREY).convert(mode).save(tmp_path / "a.png")
        picture = read(tmp_path / "a.png", MOST_PIXELS)
        np.testing.assert_array_equal(picture.pixels, GREY)
        assert picture.pixels.dtype == np.uint8 and picture.span == (0, 255)
        assert picture.path == str(tmp_path / "a.png") and picture.spacing is None and not picture.orientation
    Image.fromarray(GREY > 100).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read(tmp_path / "1.png", MOST_PIXELS).pixels, [[0, 0, 255]])
    Image.fromarray(np.full((16, 16), 102, np.uint8)).save(tmp_path / "a.JPG", quality=95)
    np.testing.assert_allclose(read(tmp_path / "a.JPG", MOST_PIXELS).pixels, 102, atol=1)


def test_all_levels_of_16_bits_are_kept(tmp_path):
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for deep in (levels, levels * 16):
        Image.fromarray(deep).save(tmp_path / "a.png")
        picture = read(tmp_path / "a.png", MOST_PIXELS)
        np.testing.assert_array_equal(picture.pixels, deep)
        assert picture.pixels.dtype == np.uint16 and picture.span == (0, 65535)


def png(width, height, depth, colour, rows: bytes) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_is_refused_rather_than_cut_to_8(tmp_path):
    for colour, channels in ((2, 3), (4, 2), (6, 4)):
        (tmp_path / "a.png").write_bytes(png(2, 2, 16, colour, (b"\0" + bytes(range(4 * channels))) * 2))
        with pytest.raises(UserError, match=r"a.png: 16 bits of colour, of which 8 would be lost"):
            read(tmp_path / "a.png", MOST_PIXELS)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_what_a_viewer_shows(tmp_path, suffix, orientation):
    corner = np.zeros((40, 60), np.uint8)
    corner[:16, :24] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a{suffix}"
    Image.fromarray(corner).save(file, exif=exif)
    pixels = read(file, MOST_PIXELS).pixels
    turned = {  # the standard's words for where row 0 and column 0 are
        1: corner,
        2: corner[:, ::-1],
        3: corner[::-1, ::-1],
        4: corner[::-1],
        5: corner.T,
        6: corner.T[:, ::-1],
        7: corner.T[::-1, ::-1],
        8: corner.T[::-1],
    }[orientation]
    np.testing.assert_allclose(pixels, turned, atol=8)
    with Image.open(file) as image:
        np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(image)))


def test_16_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = noise((4, 6), np.uint16, 4095)
    Image.fromarray(deep).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "a.png", MOST_PIXELS).pixels, deep.T[:, ::-1])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_cut_anywhere_is_named(tmp_path, name):
    file = tmp_path / name
    Image.fromarray(noise((40, 40))).save(file)
    whole = file.read_bytes()
    for end in (0, 5, 20, 40, 60, 200, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:end])
        with pytest.raises(
            UserError, match=f"{name}: (not a whole|empty, not one of|begins as none of) .*(PNG|JPEG|TIFF)"
        ):
            read(file, MOST_PIXELS)
    for content in (b"GIF89a" + whole[6:], whole[:60] + bytes(200) + whole[260:]):
        file.write_bytes(content)
        if content[:3] == b"GIF" or name == "a.png":  # a JPEG has no checksum
            with pytest.raises(UserError, match=name):
                read(file, MOST_PIXELS)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "deep.png", "exif.jpg", "palette.png", "deep.tif"])
def test_changed_bytes_are_an_error_that_names_the_file_or_still_a_picture(tmp_path, name):
    """A PNG has checksums: there any changed byte is found."""
    file = tmp_path / name
    image = Image.fromarray(noise((24, 24), np.uint16, 4095) if "deep" in name else noise((24, 24)))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "some words"
    image = image.convert("P") if name == "palette.png" else image
    image.save(file, **({"exif": exif} if name == "exif.jpg" else {}))
    whole, rng, seen = file.read_bytes(), np.random.default_rng(1), 0
    for _ in range(300):
        changed = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 4)):
            changed[at] ^= int(rng.integers(1, 256))
        if bytes(changed) == whole:
            continue
        file.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of broken EXIF
            try:
                assert read(file, MOST_PIXELS).pixels.ndim == 2
            except UserError as error:
                assert name in str(error) and "\n" not in str(error)
                seen += 1
    assert seen > (290 if name.endswith("png") else 5)


@pytest.mark.parametrize("byteorder, compression", [("<", None), (">", None), ("<", "deflate")])
def test_16_bit_tiff_as_another_library_writes_it(tmp_path, byteorder, compression):
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    tifffile.imwrite(tmp_path / "a.TIFF", levels, byteorder=byteorder, compression=compression)
    picture = read(tmp_path / "a.TIFF", MOST_PIXELS)
    np.testing.assert_array_equal(picture.pixels, levels)
    assert picture.pixels.dtype == np.uint16 and picture.pixels.dtype.isnative and picture.span == (0, 65535)


@pytest.mark.parametrize(
    "array, options, message",
    [
        (np.zeros((3, 8, 8), np.uint16), {"photometric": "minisblack"}, "3 pages"),
        (np.zeros((8, 8), np.int16), {}, "signed or 32-bit"),
        (np.zeros((8, 8), np.float32), {}, "signed or 32-bit"),
        (np.zeros((8, 8), np.uint16), {"photometric": "miniswhite"}, "0 means white"),
        (np.zeros((8, 8, 3), np.uint16), {"photometric": "rgb"}, "16 bits of colour"),
    ],
)
def test_tiffs_that_are_no_windowed_picture_are_refused(tmp_path, array, options, message):
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    with pytest.raises(UserError, match=f"a.tif: {message}"):
        read(tmp_path / "a.tif", MOST_PIXELS)


def test_a_bomb_is_not_decoded(tmp_path):
    rows = (b"\0" + bytes(14000 // 8)) * 13000
    content = png(14000, 13000, 1, 0, rows)
    assert len(content) < 30_000
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(UserError, match=r"bomb.png: 14000 x 13000 pixels, more than the 67108864 .*most_pixels"):
        read(tmp_path / "bomb.png", MOST_PIXELS)
    Image.fromarray(noise((30, 20))).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png", 600).pixels.shape == (30, 20)
    with pytest.raises(UserError, match="20 x 30 pixels, more than the 599"):
        read(tmp_path / "a.png", 599)


def test_the_limit_is_ours_and_not_that_of_the_process(tmp_path, monkeypatch):
    Image.fromarray(noise((30, 20))).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what another library may have set
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "a.png", MOST_PIXELS).pixels.shape == (30, 20)


def test_files_that_are_not_there_or_of_no_format(tmp_path):
    with pytest.raises(UserError, match="gone.png'?: cannot be read .*No such file"):
        read(tmp_path / "gone.png", MOST_PIXELS)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png'?: cannot be read"):
        read(tmp_path / "folder.png", MOST_PIXELS)
    with pytest.raises(UserError, match=r"a.bmp: of no format .* ends in .png, .jpg, .jpeg"):
        read(tmp_path / "a.bmp", MOST_PIXELS)
    for name in ("\ud800.png", "a\0b.png"):
        with pytest.raises(UserError, match="cannot be read") as error:
            read(name, MOST_PIXELS)
        str(error.value).encode()


def test_suffixes_in_any_case(tmp_path):
    assert format_of("A.PNG") is FORMATS[".png"] and format_of("b.JpEg").name == "JPEG"
    assert format_of("png") is None and format_of("a.png.txt") is None


@pytest.mark.parametrize("suffix", sorted(suffix for suffix, format in FORMATS.items() if format.write))
def test_what_is_written_is_read_back_with_its_notes(tmp_path, suffix):
    file, notes = tmp_path / f"a{suffix}", {"Description": "Synthetic", "Window": "0 1"}
    pixels = np.kron(noise((4, 5)), np.ones((16, 16), np.uint8))
    FORMATS[suffix].write(file, Picture(pixels, (0, 255)), notes)
    back = read(file, MOST_PIXELS)
    assert back.pixels.dtype == np.uint8 or FORMATS[suffix].name == "DICOM"  # which counts over a window
    np.testing.assert_allclose(back.pixels, pixels, atol=0 if FORMATS[suffix].name != "JPEG" else 12)
    assert b"Synthetic" in file.read_bytes()
    deep = dataclasses.replace(back, pixels=back.pixels.astype(np.uint16) * 16)
    if FORMATS[suffix].name == "JPEG":
        with pytest.raises(ValueError, match="8 bits"):
            FORMATS[suffix].write(file, deep, notes)
    else:
        FORMATS[suffix].write(file, deep, notes)
        np.testing.assert_array_equal(read(file, MOST_PIXELS).pixels, deep.pixels)


def test_bytes_are_read_as_files_are(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(raster.decode(content, "example 3", 10).pixels, GREY)
    with pytest.raises(UserError, match="^example 3: not a whole"):
        raster.decode(content[:50], "example 3", 10)
