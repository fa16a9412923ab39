"""RSNA pneumonia detection (Kaggle, 2018): chest X-rays as DICOM with boxes and without reports.

    stage_2_train_images/<patientId>.dcm
    stage_2_test_images/...                 of the challenge, without labels: left out
    stage_2_train_labels.csv                patientId,x,y,width,height,Target: a row a box
    stage_2_detailed_class_info.csv         patientId,class; not needed

Traps: an image has as many rows as boxes, and as many times its class; `patientId` is an image's id: no table says
which images are one patient's, and each counts as its own subject. Boxes (`info`) are in pixels of the file as
downloaded: x and y of the corner at the top left, width, height. No split of its own; MGCA's is by image, 5,337 each
for val and test: `--split 0.6,0.2,0.2`.
"""

import re
from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root

_BOX = ("x", "y", "width", "height")
_NUMBER = re.compile(r"\d+(\.\d+)?")


def _find(root: Root) -> Iterator[Case | Left]:
    boxes: dict[str, list[list[float]]] = {}
    for row in root.table("stage_2_train_labels.csv", columns=("patientId", *_BOX, "Target")):
        found = boxes.setdefault(row["patientId"], [])
        values = [row[side] for side in _BOX]
        if row["Target"] == "1" and all(_NUMBER.fullmatch(value) for value in values):
            found.append([float(value) for value in values])
    kinds: dict[str, str] = {}
    if root.has(name := "stage_2_detailed_class_info.csv") or root.has(f"{name}.gz"):
        kinds = {row["patientId"]: row["class"] for row in root.table(name, columns=("patientId", "class"))}
    for image in sorted(boxes):
        if why := root.lacks(name := f"stage_2_train_images/{image}.dcm"):
            yield Left(image, f"its image {why}")
            continue
        info = {"pneumonia": bool(boxes[image]), "boxes": boxes[image]}
        info |= {"class": kinds[image]} if image in kinds else {}
        yield Case(image, image, {"xray": Image(name)}, info=info)
    for name in root.files("stage_2_test_images/*.dcm"):
        yield Left(name.rpartition("/")[2], "of the challenge's test, without labels")


ADAPTERS = (
    Adapter(
        name="rsna",
        title="RSNA pneumonia detection challenge (2018), chest X-rays with boxes",
        licence="RSNA challenge rules (Kaggle): non-commercial use",
        access="Kaggle, after accepting the challenge's rules. The images are of ChestX-ray14: credit the NIH as well.",
        find=_find,
        streams=("xray",),
    ),
)
