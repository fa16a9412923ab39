"""SynthRAD2023 and 2025: MR (or CBCT) and CT of one patient on one grid, with a mask of the body.

TASK/REGION/PATIENT/{mr,ct,mask}.nii.gz (2023) or .mha (2025): "Task1/brain/1BA001/mr.nii.gz",
"Task1/AB/1ABA001/mr.mha". Validation and test cases of the challenge come without their CT and are left out.
"""

from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.errors import UserError

_ACCESS = (
    "Zenodo, without registration. Non-commercial use alone; models that are trained on it inherit that. Cite the "
    "challenge's data paper (Thummerer et al. 2023, 2025)."
)


def _find(root: Root) -> Iterator[Case | Left]:
    found = sorted(name for end in (".nii.gz", ".mha") for name in root.files(f"**/mr{end}"))
    if not found:
        raise UserError(f"{root.path}: no mr.nii.gz or mr.mha in a patient's folder; expected TASK/REGION/PATIENT/")
    for mr in found:
        folder, _, end = mr.rpartition("mr")
        patient = folder.rstrip("/").rpartition("/")[2] or root.path.name
        if not root.has(f"{folder}ct{end}"):
            yield Left(patient, "no CT (of the challenge's validation or test)")
            continue
        mask = f"{folder}mask{end}"
        yield Case(
            id=patient,
            subject=patient,
            images={"ct": Image(f"{folder}ct{end}"), "mri": Image(mr)},
            mask=mask if root.has(mask) else "",
            info={"region": folder.rstrip("/").split("/")[-2] if folder.count("/") > 1 else ""},
        )


ADAPTERS = (
    Adapter(
        name="synthrad",
        title="SynthRAD2023 / SynthRAD2025, task 1 (MR to CT)",
        licence="CC BY-NC 4.0",
        access=_ACCESS,
        find=_find,
        streams=("mri", "ct"),
    ),
)
