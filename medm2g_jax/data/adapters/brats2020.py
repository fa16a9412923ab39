"""BraTS 2020: MRI of brains with glioma, four contrasts on one grid of 240 x 240 x 155 voxels of 1 mm, skull-stripped.

    MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_{flair,t1,t1ce,t2,seg}.nii
    MICCAI_BraTS2020_TrainingData/name_mapping.csv         Grade (HGG or LGG), BraTS_2020_subject_ID, older names
    MICCAI_BraTS2020_ValidationData/BraTS20_Validation_001/...

.nii.gz from the organisers, .nii from Kaggle; either of both folders, or what holds them, may be named. The challenge's
split is one for segmentation: its validation cases lack the masks, which nothing here needs, so that the cases of both
folders are split anew, by subject. Trap: the mask of case 355 has another name; masks are not read, by whatever name.
A slice is kept by how much of the brain it shows (`share`). The text is a template: "Brain MRI of a patient with
high-grade glioma."
"""

from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.errors import UserError

_STREAMS = {"mri:t1": "t1", "mri:t1ce": "t1ce", "mri:t2": "t2", "mri:flair": "flair"}
_GRADES = {"HGG": "high-grade glioma", "LGG": "low-grade glioma"}


def _find(root: Root) -> Iterator[Case | Left]:
    folders = [name for name in root.files("**/BraTS20_*_[0-9][0-9][0-9]") if (root.path / name).is_dir()]
    if not folders:
        raise UserError(f"{root.path}: no folder BraTS20_Training_001 or the like in it; expected one for each patient")
    grades: dict[str, str] = {}
    for table in root.files("**/name_mapping*.csv"):
        rows = root.table(table)
        grades |= {row.get("BraTS_2020_subject_ID", ""): _GRADES.get(row.get("Grade", "").upper(), "") for row in rows}
    for folder in folders:
        name = folder.rpartition("/")[2]
        images = {}
        for stream, word in _STREAMS.items():
            files = (f"{folder}/{name}_{word}{end}" for end in (".nii", ".nii.gz"))
            if file := next(filter(root.has, files), None):
                images[stream] = Image(file)
        if len(images) < len(_STREAMS):
            yield Left(name, f"without its {' and '.join(w for s, w in _STREAMS.items() if s not in images)}")
            continue
        grade = grades.get(name, "")
        yield Case(
            id=name,
            subject=name,
            images=images,
            text=f"Brain MRI of a patient with {grade or 'glioma'}.",
            origin="template",
            info={"grade": grade} if grade else {},
        )


ADAPTERS = (
    Adapter(
        name="brats2020",
        title="BraTS 2020: multimodal brain tumour segmentation challenge (training and validation cases)",
        licence="BraTS 2020 data agreement (research; not to be passed on)",
        access="By registration with the organisers (CBICA, University of Pennsylvania). Copies on Kaggle state CC0, "
        "which the organisers' agreement does not support. Cite Menze et al. 2015, Bakas et al. 2017 and 2018.",
        find=_find,
        streams=tuple(_STREAMS),
    ),
)
