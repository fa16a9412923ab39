"""Data sets of volumes as they lie on a disk, small: each written file by file in its exact layout, with its traps, by
nibabel, SimpleITK and pydicom themselves. Nothing of the package is in them.

The patient is an ellipsoid head with a skull, one bright ball on the RIGHT and a small one in FRONT, the same in the
scanner's coordinates whatever the grid, so that orientation, registration and pairs can be told from it.
"""

from pathlib import Path

import nibabel
import numpy as np
from dicom_files import dataset, placed, save

RADII = np.array([60.0, 75.0, 65.0])  # mm, to the right, the front, the head
#            air    brain  skull  right  front
TISSUE = {
    "ct": (-1000, 40, 900, 300, -90),
    "t1": (0, 500, 120, 850, 300),
    "t1ce": (0, 480, 110, 990, 320),
    "t2": (0, 420, 60, 200, 900),
    "pd": (0, 600, 90, 350, 780),
    "flair": (0, 450, 80, 700, 250),
    "cine": (0, 210, 90, 380, 150),
}


def grid(shape, spacing, code="RAS", centre=(0.0, 0.0, 0.0)) -> np.ndarray:
    """The affine of a grid around `centre`, its axes going where the code says; shape and spacing along i, j, k."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for n, letter in enumerate(code):
        axis = next(a for a, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[axis, n] = spacing[n] * (1 if letter in "RAS" else -1)
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def head(
    kind: str, shape, affine: np.ndarray, seed: int = 0, size: float = 1.0, noise: float = 0.01, face: bool = False
) -> np.ndarray:
    """The patient on a grid, int16; `seed` of the noise and of how this head differs from others.

    face: with a jaw, a nape and ventricles: turned and stretched, an ellipsoid can lie on itself, a head cannot.
    """
    at = (affine @ np.append(np.indices(shape).reshape(3, -1), np.ones((1, np.prod(shape))), 0))[:3]
    mm = at.T / (RADII * size * (1 + 0.05 * np.random.default_rng(seed).uniform(-1, 1, 3)))
    air, brain, skull, right, front = TISSUE[kind]
    far = np.linalg.norm(mm, axis=1)
    wave = 1 + 0.15 * np.sin(4 * mm[:, 0] + seed) * np.cos(5 * mm[:, 1]) + 0.1 * np.sin(6 * mm[:, 2])
    values = np.where(far < 0.85, brain * wave, np.where(far < 1, skull, air))
    if face:
        for middle, half, value in (
            ((0.0, 0.75, -0.75), (0.35, 0.3, 0.35), brain), ((0.1, -0.7, -0.8), (0.3, 0.25, 0.5), skull),
            ((0.2, 0.0, 0.2), (0.08, 0.4, 0.3), front), ((-0.2, -0.1, 0.2), (0.08, 0.45, 0.2), front),
            ((-0.5, -0.4, -0.2), (0.15, 0.2, 0.3), right),
        ):  # fmt: skip
            values[(np.abs(mm - middle) < half).all(1)] = value
    values[np.linalg.norm(mm - (0.45, 0.1, 0), axis=1) < 0.25] = right
    values[np.linalg.norm(mm - (-0.1, 0.6, 0.1), axis=1) < 0.15] = front
    spread = noise * (TISSUE[kind][2] if kind == "ct" else brain)
    inside = far < 1 if kind != "ct" else np.ones_like(far, bool)
    values = values + inside * np.random.default_rng([seed, len(kind)]).normal(0, spread, len(values))
    return values.reshape(shape).round().astype(np.int16)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def brats2020(root: Path) -> Path:
    """Three training cases of which one is packed and one has the mask by another name, one without its T2, one of the
    validation folder."""
    shape, training = (32, 32, 12), root / "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData"
    affine = grid(shape, (5, 5, 12), "LPS")
    names = {training: ("Training_001", "Training_002", "Training_004", "Training_355")}
    names[root / "BraTS2020_ValidationData/MICCAI_BraTS2020_ValidationData"] = ("Validation_001",)
    for folder, cases in names.items():
        for seed, case in enumerate(cases):
            name = f"BraTS20_{case}"
            end = ".nii.gz" if case == "Training_002" else ".nii"
            for kind in ("flair", "t1", "t1ce", "t2"):
                if (case, kind) != ("Training_004", "t2"):
                    nifti(folder / name / f"{name}_{kind}{end}", head(kind, shape, affine, seed + len(case)), affine)
            mask = "W39_1998.09.19_Segm.nii" if case.endswith("355") else f"{name}_seg{end}"
            if "Training" in case:
                nifti(folder / name / mask, (head("t1", shape, affine) > 700).astype(np.uint8) * 4, affine)
    (training / "name_mapping.csv").write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID,"
        "BraTS_2020_subject_ID\nHGG,Brats17_A,Brats18_A,NA,BraTS19_A,BraTS20_Training_001\n"
        "LGG,NA,NA,TCGA-00-0000,NA,BraTS20_Training_355\n"
    )
    (training / "survival_info.csv").write_text(
        "Brats20ID,Age,Survival_days,Extent_of_Resection\nBraTS20_Training_001,60.4,289,GTR\n"
    )
    return root


def ixi(root: Path, turn: float = 0.1) -> Path:
    """Three subjects of three sites, T1 on a sagittal grid of its own; another without its PD; a DTI and an MRA."""
    one, two = (20, 40, 40), (40, 40, 20)
    first, second = grid(one, (7, 4.2, 4.2), "LAS"), grid(two, (4, 4, 7), "RAS", (3, -4, 5))
    moved = np.eye(4)
    c, s = np.cos(turn), np.sin(turn)
    moved[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]]
    moved[:3, 3] = (6, -5, 4)
    subjects = (("IXI002-Guys-0828", "GUYS"), ("IXI014-HH-1236", "HH"), ("IXI035-IOP-0873", "IOP"))
    for seed, (name, _) in enumerate((*subjects, ("IXI040-Guys-0724", ""))):
        nifti(root / f"{name}-T1.nii.gz", head("t1", one, first, seed), first)
        for kind in ("t2", "pd"):
            if (seed, kind) != (3, "pd"):
                values = head(kind, two, np.linalg.inv(moved) @ second, seed)  # the head has moved since
                nifti(root / f"{name}-{kind.upper()}.nii.gz", values, second)
    nifti(root / "IXI002-Guys-0828-DTI-00.nii.gz", head("t2", two, second), second)
    nifti(root / "IXI002-Guys-0828-DTI-16.nii.gz", head("t2", two, second), second)
    nifti(root / "IXI002-Guys-0828-MRA.nii.gz", head("t2", two, second), second)
    (root / "IXI.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    return root


def gold_atlas(root: Path) -> Path:
    """Two patients: T2 of 6 slices, T1 of 5, known by its times alone in one, CT on a grid of its own, the CT deformed
    onto the T2, contours; file names that say nothing, stored values signed with an intercept, or unsigned."""
    for number, patient in enumerate(("1_01_P", "2_03_P")):
        folder = root / patient
        folder.mkdir(parents=True)
        rng = np.random.default_rng(number)
        shape, affine = (32, 28, 6), grid((32, 28, 6), (5, 5, 14), "LPS")
        t1 = (32, 28, 5), grid((32, 28, 5), (5, 5, 16), "LPS", (3, -2, 4))
        ct = (30, 30, 6), grid((30, 30, 6), (7, 7, 15), "LPS", (8, 5, -6))
        long = {"ScanningSequence": "SE", "RepetitionTime": "6000", "EchoTime": "96"}
        short = {"ScanningSequence": "SE", "RepetitionTime": "600", "EchoTime": "12"}
        wide = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "RescaleType": "HU"}
        series = [
            ("MR", "t2", shape, affine, {"SeriesDescription": "T2w" if number == 0 else "pelvis tra", **long}),
            ("MR", "t1", *t1, {"SeriesDescription": "AxT1" if number == 0 else "pelvis tra", **short}),
            ("CT", "ct", *ct, {"SeriesDescription": "CT", **wide}),
            ("CT", "ct", shape, affine, {"SeriesDescription": "CT deformed" if number == 0 else "", **wide}),
        ]
        files = rng.permutation(40)
        for n, (modality, kind, size, where, tags) in enumerate(series):
            stored = head(kind, size, where, number).astype(np.int32)
            if modality == "CT":
                stored = (stored + 1024).clip(0, 4095)
            stored = stored.astype(np.uint16 if (n + number) % 2 else np.int16)
            lps = np.diag([-1.0, -1, 1, 1]) @ where
            for k in range(size[2]):
                own = dict(Modality=modality, SeriesInstanceUID=f"1.2.{number}.{n}", SeriesNumber=str(n + 1), **tags)
                own["FrameOfReferenceUID"] = f"1.2.9.{number}"
                ds = dataset(np.ascontiguousarray(stored[:, :, k].T), **placed(lps, k), **own)
                save(ds, folder / f"{files[8 * n + k]:03d}.dcm")
        contours = dataset(np.zeros((2, 2), np.int16), Modality="RTSTRUCT", SeriesInstanceUID=f"1.2.{number}.8")
        for tag in ("Rows", "Columns", "PixelData", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"):
            delattr(contours, tag)
        contours.file_meta.MediaStorageSOPClassUID = contours.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
        save(contours, folder / "999.dcm")
    return root


def sliver07(root: Path) -> Path:
    """Two scans with masks, one of them big-endian and its mask without an origin; one scan of the test."""
    shape = (32, 32, 6)
    for number in (1, 2, 21):
        part = "training-part1" if number < 20 else "test"
        affine = grid(shape, (6, 6, 24), "LPS" if number == 1 else "LPI")
        values = head("ct", shape, affine, number)
        _mhd(root / part / f"liver-orig{number:03d}.mhd", values, affine, number == 2, True)
        if number < 20:  # the liver: in two slices in the middle, on the right
            mask = np.zeros(shape, np.uint8)
            mask[4:10, 10:20, 2:4] = 1
            _mhd(root / part / f"liver-seg{number:03d}.mhd", mask, affine, False, number == 1)
    return root


def _mhd(path: Path, values: np.ndarray, affine: np.ndarray, big: bool, origin: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    stored = values.astype(values.dtype.newbyteorder(">" if big else "<"))
    path.with_suffix(".raw").write_bytes(stored.tobytes(order="F"))
    said = " ".join(f"{x:g}" for x in lps[:3, 3] * origin)
    path.write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\n"
        f"BinaryDataByteOrderMSB = {big}\nElementByteOrderMSB = {big}\n"
        f"TransformMatrix = {' '.join(f'{x:g}' for x in (lps[:3, :3] / spacing).T.ravel())}\n"
        f"Offset = {said}\nElementSpacing = {' '.join(f'{x:g}' for x in spacing)}\n"
        f"DimSize = {' '.join(map(str, values.shape))}\n"
        f"ElementType = {'MET_SHORT' if values.dtype == np.int16 else 'MET_UCHAR'}\n"
        f"ElementDataFile = {path.with_suffix('.raw').name}\n"
    )


def acdc(root: Path) -> Path:
    """Two training patients, one test patient without a group, with the masks and the whole cycle beside."""
    shape = (24, 24, 4)
    for number, group in ((1, "DCM"), (2, "NOR"), (101, "")):
        name = f"patient{number:03d}"
        folder = root / "database" / ("training" if number < 100 else "testing") / name
        affine = grid(shape, (6, 6, 20), "LPS")
        for frame in (1, 12):
            values = head("cine", shape, affine, number + frame, size=1 if frame == 1 else 0.85)
            nifti(folder / f"{name}_frame{frame:02d}.nii.gz", values, affine)
            nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", (values > 300).astype(np.uint8) * 3, affine)
        nifti(folder / f"{name}_4d.nii.gz", np.stack([values] * 5, -1), affine)
        said = f"ED: 1\nES: 12\n{f'Group: {group}' if group else ''}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        (folder / "Info.cfg").write_text(said)
    return root


def brain_tumor(root: Path, useless: bool = False) -> Path:
    """Three pairs of files of six slices, spelt two ways, one CT slice blank; useless: most of them are."""
    shape, side = (64, 64, 6), "data(processed)"
    (root / side).mkdir(parents=True)
    for seed, split in enumerate(("train", "val", "test")):
        affine = grid(shape, (2.8, 2.8, 10), "LPS")
        both = [head(kind, shape, affine, seed).transpose(2, 1, 0).astype(np.float64) for kind in ("t1", "ct")]
        mri, ct = both[0] / 1000, (both[1] + 1000) / 2000
        ct[2 if split == "train" else 0 : (6 if useless else 3) if split == "train" else 6 if useless else 0] = 0
        for word, values in (("input", mri), ("output", ct)):
            name = f"{split}{word}.npy" if split == "val" else f"{split}_{word}.npy"
            np.save(root / side / name.replace("train_input", "Train_Input"), values)
    return root


def synthrad(root: Path, year: int) -> Path:
    """2023 in NIfTI, 2025 in MetaImage: two patients with their CT, one without; pictures beside."""
    import SimpleITK

    shape = (28, 30, 8)
    affine = grid(shape, (5.5, 5.5, 17), "LPS")
    end, region = (".nii.gz", "brain") if year == 2023 else (".mha", "AB")
    for seed, case in enumerate(("1BA001", "1BB002", "1BC003") if year == 2023 else ("1ABA001", "1ABB002", "1ABC003")):
        folder = root / "Task1" / region / case
        folder.mkdir(parents=True)
        values = {"mr": head("t1", shape, affine, seed), "ct": head("ct", shape, affine, seed)}
        values["mask"] = (head("t1", shape, affine, seed, 1.05) > 60).astype(np.uint8)
        for name, one in values.items():
            if (seed, name) == (2, "ct"):
                continue
            image = SimpleITK.GetImageFromArray(one.T)
            image.SetSpacing((5.5, 5.5, 17.0))
            image.SetOrigin((np.diag([-1.0, -1, 1, 1]) @ affine)[:3, 3].tolist())
            SimpleITK.WriteImage(image, str(folder / f"{name}{end}"))
    (root / "Task1" / region / "overview").mkdir()
    (root / "Task1" / region / "overview" / "1BA001_train.png").write_bytes(b"")
    return root
