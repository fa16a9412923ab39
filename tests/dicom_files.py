"""DICOM files for tests, built tag by tag with pydicom; nothing of the package is in them."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SECRET = "Doe^Jane^Secret"


def dataset(stored: np.ndarray, **tags) -> Dataset:
    """One image of stored values (rows, columns), or frames of them; a tag of None is left out."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.PatientName, ds.PatientID, ds.SeriesDescription = SECRET, SECRET, SECRET
    ds.Modality, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "CT", "1.2.3", "1.2.3.4"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * stored.dtype.itemsize
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    for tag, value in tags.items():
        if value is None:
            delattr(ds, tag)
        else:
            setattr(ds, tag, value)
    ds.HighBit = ds.BitsStored - 1
    return ds


def save(ds: Dataset, path: Path) -> Path:
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def placed(affine: np.ndarray, k: int) -> dict:
    """Where slice k of a grid lies: `affine` takes (column, row, slice) to LPS millimetres."""
    across, down = (affine[:3, n] / np.linalg.norm(affine[:3, n]) for n in (0, 1))
    place = affine[:3, 3] + k * affine[:3, 2]
    return dict(
        ImagePositionPatient=[f"{x:.6f}" for x in place],
        ImageOrientationPatient=[f"{x:.8f}" for x in (*across, *down)],
        PixelSpacing=[f"{np.linalg.norm(affine[:3, n]):.6f}" for n in (1, 0)],
    )


def series(folder: Path, stored: np.ndarray, affine: np.ndarray, seed: int = 0, **tags) -> Path:
    """A folder of slices (column, row, slice), under names that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(stored.shape[2])
    for k, name in enumerate(names):
        own = {tag: value[k] if isinstance(value, list) else value for tag, value in tags.items()}
        ds = dataset(np.ascontiguousarray(stored[:, :, k].T), **placed(affine, k), InstanceNumber=str(name), **own)
        save(ds, folder / f"{name:04d}")
    return folder
