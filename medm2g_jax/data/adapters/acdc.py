"""ACDC: cine MRI of the heart in short axis, of 150 people in five groups, at end-diastole and end-systole.

    database/training/patient001/Info.cfg                       ED: 1, ES: 12, Group: DCM, Height, NbFrame, Weight
                                 patient001_frame01.nii.gz      ED and ES, each with a mask, ..._gt.nii.gz
                                 patient001_4d.nii.gz           the whole cycle
    database/testing/patient101 ... 150

Each of both frames is a case; masks and the 4-D files are left alone. The official split is kept, validation is cut
from its training part. Test cases of older releases state no group. Every slice is kept: all show heart. Pixels are 0.7
to 1.9 mm, as they are; `--square 1.25` resamples them all to one size. The text is a template: "Cardiac short-axis cine
MRI, end-diastole, dilated cardiomyopathy."
"""

from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.errors import UserError

_PHASES = {"ED": "end-diastole", "ES": "end-systole"}
_GROUPS = {
    "NOR": "normal heart",
    "MINF": "systolic heart failure after myocardial infarction",
    "DCM": "dilated cardiomyopathy",
    "HCM": "hypertrophic cardiomyopathy",
    "RV": "abnormal right ventricle",
    "ARV": "abnormal right ventricle",
}
_SPLITS = {"training": "train", "testing": "test"}


def _find(root: Root) -> Iterator[Case | Left]:
    found = root.files("**/patient*/Info.cfg")
    if not found:
        raise UserError(f"{root.path}: no patient001/Info.cfg in it; expected database/training and database/testing")
    for config in found:
        folder = config.rpartition("/")[0]
        *above, patient = folder.split("/")
        lines = (line.partition(":") for line in root.text(config).splitlines())
        info = {key.strip(): value.strip() for key, _, value in lines}
        split = next((_SPLITS[word] for word in reversed([root.path.name, *above]) if word in _SPLITS), "")
        for phase, words in _PHASES.items():
            number = info.get(phase, "")
            frame = f"{folder}/{patient}_frame{int(number):02d}.nii" if number.isdecimal() else ""
            file = next((frame + end for end in (".gz", "") if frame and root.has(frame + end)), None)
            if file is None:
                yield Left(f"{patient}_{phase}", f"no file of its {words}")
                continue
            group = info.get("Group", "")
            yield Case(
                id=f"{patient}_{phase}",
                subject=patient,
                images={"mri": Image(file)},
                split=split,
                text=", ".join(filter(None, ["Cardiac short-axis cine MRI", words, _GROUPS.get(group)])) + ".",
                origin="template",
                info={"phase": phase} | ({"group": group} if group else {}),
            )


ADAPTERS = (
    Adapter(
        name="acdc",
        title="ACDC: automated cardiac diagnosis challenge, MICCAI 2017",
        licence="CC BY-NC-SA 4.0",
        access="By download from CREATIS, University of Lyon; not for commercial use. Cite Bernard et al. 2018.",
        find=_find,
        streams=("mri",),
        share=0.0,
    ),
)
