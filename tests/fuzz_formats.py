"""Damaged and hostile files by the thousand, in a process of their own: each is read, or refused in one line.

    python tests/fuzz_formats.py SEED COUNT FOLDER

Prints what became of them as JSON; a crash leaves the file that did it as FOLDER/now*.
"""

import gzip
import io
import json
import os
import resource
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from dicom_files import dataset, placed, save, series
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from medm2g_jax.data import formats
from medm2g_jax.data.picture import MOST_PIXELS
from medm2g_jax.errors import UserError

EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 0x7F800000, 0x7FC00000, 65535, 32767, 0x01000000)


def wholes(folder: Path) -> list[tuple[str, bytes]]:
    """(suffix, content) of small whole files of every format."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    values, affine = rng.integers(0, 2000, (7, 6, 5)).astype(np.int16), np.diag([1.0, 2, 3, 1])
    one, two, mgh = nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.MGHImage
    for name, kind in (("a.nii", one), ("b.nii.gz", one), ("c.nii", two), ("d.mgh", mgh), ("e.mgz", mgh)):
        nibabel.save(kind(values, affine), folder / name)
    image = sitk.GetImageFromArray(values.T.copy())
    for name, packed in (("f.mha", False), ("g.mha", True), ("h.nrrd", False), ("i.nrrd", True)):
        sitk.WriteImage(image, str(folder / name), packed)
    np.save(folder / "j.npy", values)
    ds = dataset(values[:, :, 0].T.copy(), **placed(affine, 0), RescaleSlope="1", RescaleIntercept="-1024")
    save(ds, folder / "k.dcm")
    ds.compress(RLELossless)
    save(ds, folder / "l.dcm")
    ds = dataset(values[:, :, 0].T.copy(), **placed(affine, 0))
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(folder / "m.dcm", ds, implicit_vr=True, little_endian=True, enforce_file_format=True)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(folder / "m2.dcm", ds, enforce_file_format=True)
    for n, name in enumerate(("MR_small_jpeg_ls_lossless", "MR_small_jp2klossless", "JPGExtended", "liver_1frame")):
        path = Path(get_testdata_file(f"{name}.dcm"))
        if path.stat().st_size < 200_000:
            (folder / f"n{n}.dcm").write_bytes(path.read_bytes())
    grey = Image.fromarray(values[:, :, 0].astype(np.uint16))
    for name in ("o.png", "p.tif"):
        grey.save(folder / name)
    grey.convert("L").save(folder / "q.jpg")
    return [("".join(path.suffixes), path.read_bytes()) for path in sorted(folder.iterdir())]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file cut, changed, filled up or with numbers at their extremes, most of it at its beginning."""
    packed = content[:2] == b"\x1f\x8b" and rng.random() < 0.7
    out = bytearray(gzip.decompress(content) if packed else content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, max(1, min(len(out), 600 if rng.random() < 0.7 else len(out)))))
        kind = rng.integers(6)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            for place in rng.integers(0, max(1, len(out)), rng.integers(1, 9)):
                if place < len(out):
                    out[place] ^= int(rng.integers(1, 256))
        elif kind == 2:
            number = int(EXTREMES[rng.integers(len(EXTREMES))]) & 0xFFFFFFFF
            wide = int(rng.choice([2, 4]))
            out[at : at + wide] = (number & (2 ** (8 * wide) - 1)).to_bytes(wide, str(rng.choice(["little", "big"])))
        elif kind == 3:
            out[at:at] = rng.bytes(rng.integers(1, 64))
        elif kind == 4:
            out[at : at + int(rng.integers(1, 200))] = b""
        else:
            out[at : at + 16] = bytes(16)
    return gzip.compress(bytes(out), 1) if packed else bytes(out)


def element(tag: int, kind: bytes, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    long = struct.pack("<HI", 0, size) if kind in (b"SQ", b"OW") else struct.pack("<H", size)
    return struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind) + long + value


def hostile(folder: Path) -> list[Path]:
    """What somebody made on purpose: bombs, depth, ways out, mixed series."""
    folder.mkdir()
    header = nibabel.Nifti1Header()
    header["magic"], header["vox_offset"], header["dim"][:4] = b"n+1\0", 352, [3, 645, 645, 645]
    bomb = header.binaryblock + bytes(4)
    for name, change in (
        ("bomb", {}),  # its values are there, packed a thousandfold, and just within the limit
        ("offset", {"vox_offset": 6e7}),
        ("huge", {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}),
        ("nan", {"sform_code": 1, "srow_x": [np.nan] * 4, "dim": [3, 2, 2, 2, 1, 1, 1, 1]}),
        ("flat", {"sform_code": 1, "srow_x": [0] * 4, "dim": [3, 2, 2, 2, 1, 1, 1, 1]}),
    ):
        other = nibabel.Nifti1Header(bomb[:348])
        for field, value in change.items():
            other[field] = value
        with gzip.open(folder / f"{name}.nii.gz", "wb", 1) as file:
            file.write(other.binaryblock + bytes(4))
            for _ in range(32):
                file.write(bytes(2**20))
    prefix = bytes(128) + b"DICM"
    meta = element(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0")
    start = prefix + element(0x00020000, b"UL", struct.pack("<I", len(meta))) + meta
    meta = element(0x00020010, b"UI", b"1.2.840.10008.1.2.1.99")
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    with (folder / "deflated.dcm").open("wb") as file:
        file.write(prefix + element(0x00020000, b"UL", struct.pack("<I", len(meta))) + meta)
        for _ in range(3000):
            file.write(packer.compress(bytes(2**20)))
        file.write(packer.flush())
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    (folder / "deep.dcm").write_bytes(start + element(0x00081140, b"SQ", item, 2**32 - 1) * 20_000)
    (folder / "empty.dcm").write_bytes(start + bytes(2**25))  # elements (0000,0000) of length 0
    many = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 1_000_000
    (folder / "many.dcm").write_bytes(start + element(0x00081140, b"SQ", many))
    rows, long = element(0x00280010, b"US", b"\1\0"), element(0x7FE00010, b"OW", b"12", 2**32 - 2)
    (folder / "long.dcm").write_bytes(start + rows + long)
    secret = folder / "secret"
    secret.write_bytes(bytes(1000))
    inside = folder / "in"
    inside.mkdir()
    text = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = {}\n"
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\ndata file: {}\n\n"
    for n, name in enumerate(("../secret", str(secret), "LIST\n../secret", "..\\secret", "%d 1 1 1", "/etc/passwd")):
        (inside / f"out{n}.mhd").write_text(text.format(name))
        (inside / f"out{n}.nhdr").write_text(nrrd.format(name))
    series(folder / "mixed", np.zeros((4, 4, 3), np.int16), np.eye(4))
    series(folder / "mixed" / "b", np.zeros((4, 5, 3), np.int16), np.eye(4), 1)
    again = series(folder / "again", np.zeros((4, 4, 3), np.int16), np.eye(4))
    save(dataset(np.zeros((4, 4), np.int16), **placed(np.eye(4), 1)), again / "x")
    broken = series(folder / "broken", np.zeros((4, 4, 3), np.int16), np.eye(4))
    (broken / "0001").write_bytes((broken / "0001").read_bytes()[:400])
    (folder / "loop.dcm").symlink_to("loop.dcm")
    for name in ("pipe.nii.gz", "pipe.png", "pipe.dcm"):  # a reader would wait for it
        os.mkfifo(folder / name)
    for name, magic in (("sparse.png", b"\x89PNG\r\n\x1a\n"), ("sparse.dcm", prefix)):
        with (folder / name).open("wb") as file:
            file.write(magic)
            file.truncate(2**40)  # bytes, of which the disk holds a few
    deep_json = io.BytesIO()
    np.lib.format.write_array(deep_json, np.zeros((2, 2)))
    (folder / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", 60000) + b"(" * 60000)
    (folder / "b.npy").write_bytes(deep_json.getvalue().replace(b"(2, 2)", b"(2,-2)"))
    return [p for p in (*folder.iterdir(), *inside.iterdir()) if p not in (secret, inside)]


def main(seed: int, count: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    rng, became, slowest = np.random.default_rng(seed), Counter(), (0.0, "")
    base, made = wholes(folder / "whole"), hostile(folder / "hostile")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(count):
        if n < len(made):
            path = made[n]
        else:
            suffix, content = base[rng.integers(len(base))]
            path = folder / f"now{suffix}"
            path.write_bytes(damaged(content, rng))
        start = time.process_time()
        try:
            found = formats.load(path, MOST_PIXELS if path.suffix in (".png", ".jpg", ".tif") else 2**28)
            became["read"] += 1
            if n < len(made):
                became[f"taken: {path.name}"] += 1
            del found
        except UserError as error:
            said = str(error)
            if path.name.partition(".")[0] not in said or "\n" in said or "Doe" in said:
                raise AssertionError(f"{n}: {said}") from error
            became["refused"] += 1
        took = time.process_time() - start
        slowest = max(slowest, (took, f"{n} {path.name}"))
        if n >= len(made):
            path.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(json.dumps(dict(became=became, slowest=slowest, grown=grown)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
