"""Gold Atlas, male pelvis: T1, T2 and CT of 19 patients from three hospitals, for radiotherapy (Nyholm et al. 2018).

    1_01_P/*.dcm    one folder for each patient, all its series mixed in it: T2, T1, CT, the CT deformed onto the T2,
                    contours (RTSTRUCT) of several observers

Series are told apart by their UIDs; T1 from T2 by what their descriptions, or their echo times, say (84 slices of T2
and 70 of T1 do not); contours are no images. The grid of the T2 counts. Of several CT the one that lies on it is taken,
then one whose description says that it was registered. The T1 is brought onto the T2 by affine registration, as
SynDiff's authors did. No official split; SynDiff took 15 patients, 9 / 2 / 4. CT are in HU here; figures of those who
divide them by their mean do not compare. Their rims, outside of the scanner's circle, are what the file holds.

Accelerated T2 or T1 as a source (the paper's "accelerated MRI to CT") is made while training, `data.kspace`, not here:
`--config=configs/finetune.py:mri_to_ct,full --config.data.source=manifest:OUT --config.accelerate=4` keeps one line of
k-space in four, `--config.keep_lines=block` the lowest, `density` lines that get sparser outwards. What SynDiff keeps,
a quarter in each of two directions by hearsay, is neither: say with a figure which it is of.
"""

from collections.abc import Iterator
from pathlib import Path

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.data.formats import dicom
from medm2g_jax.data.volume import MOST_VOXELS
from medm2g_jax.errors import UserError


def _find(root: Root) -> Iterator[Case | Left]:
    folders = [name for name in root.files("*") if (root.path / name).is_dir()]
    if not folders:
        raise UserError(f"{root.path}: no folders in it; expected one for each patient (unpacked), 1_01_P and the like")
    for patient in folders:
        if patient in root.closed:
            continue
        broken: list[Path] = []
        try:
            found = [one for one in dicom.series(root.path / patient, MOST_VOXELS, broken) if not one.localizer]
        except UserError:
            yield Left(patient, "its folder cannot be looked through (its rights, or too many files in it)")
            continue
        yield from [Left(path.relative_to(root.path).as_posix(), "a damaged DICOM file") for path in broken]
        mri = {f"mri:{one.contrast}": one for one in reversed(found) if one.modality == "MR" and one.contrast}
        t2 = mri.get("mri:t2")
        if t2 is None:
            yield Left(patient, "no series that says it is a T2")
            continue
        taken = {"mri:t2": t2} | ({"mri:t1": mri["mri:t1"]} if "mri:t1" in mri else {})
        ct = [one for one in found if one.modality == "CT"]
        if ct:
            taken["ct"] = max(ct, key=lambda one: (_lies_on(one, t2), one.deformed, len(one.files)))
        others = sum(1 for one in found if one not in taken.values())
        yield from [Left(f"{patient}/{n}", "a further series of the patient") for n in range(others)]
        images = {stream: Image(patient, one.uid) for stream, one in taken.items()}
        yield Case(patient, patient, images, info={"site": patient.split("_")[0]} if "_" in patient else {})


def _lies_on(one: dicom.Series, other: dicom.Series) -> bool:
    return one.shape == other.shape and len(one.files) == len(other.files) and one.grid == other.grid


ADAPTERS = (
    Adapter(
        name="gold_atlas",
        title="Gold Atlas - Male Pelvis - Gentle Radiotherapy (T1, T2, CT)",
        licence="Gold Atlas research licence (Zenodo 583096, on request)",
        access="On request, zenodo.org/records/583096; for research. Cite Nyholm et al. 2018.",
        find=_find,
        streams=("mri:t2", "mri:t1", "ct"),
        register="affine",
    ),
)
