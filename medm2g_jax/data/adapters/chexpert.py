"""CheXpert (Stanford): chest X-rays with 14 labels and no reports; full size or "-small".

    CheXpert-v1.0-small/train.csv, valid.csv    Path,Sex,Age,Frontal/Lateral,AP/PA, and 14 labels: 1, 0, -1 or nothing
    CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg

Path begins with the name of the folder it was downloaded as, whatever it is called now. The test set is not public: the
official `valid`, which radiologists labelled, is test, as MGCA and others take it, and val is declared, of train's
patients.
"""

import re
from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root

_PATH = re.compile(r"(?:[^/]+/)?((?:train|valid)/(patient\d+)/(study\d+)/[^/]+)")
_ABOUT = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")


def _find(root: Root) -> Iterator[Case | Left]:
    table = root.one("train.csv", "*/train.csv")
    base = table.removesuffix("train.csv")
    for name, split in (("train", "train"), ("valid", "test")):
        for row in root.table(f"{base}{name}.csv", columns=_ABOUT):
            path = _PATH.fullmatch(row["Path"])
            if path is None:
                yield Left(row["Path"], "its row names no image as CheXpert has them")
                continue
            view = row["Frontal/Lateral"].lower()
            if root.options["views"] not in ("all", view):
                yield Left(path[1], f"a {view} view" if view in ("frontal", "lateral") else "of no known view")
                continue
            if why := root.lacks(base + path[1]):
                yield Left(path[1], f"its image {why}")
                continue
            labels = {k: float(v) for k, v in row.items() if k not in _ABOUT and re.fullmatch(r"-?[01](\.0)?", v)}
            info = {"view": row["AP/PA"] or view, "sex": row["Sex"], "age": row["Age"], "labels": labels}
            yield Case(path[1].rpartition(".")[0], path[2], {"xray": Image(base + path[1])}, split, info=info)


ADAPTERS = (
    Adapter(
        name="chexpert",
        title="CheXpert (Irvin et al. 2019), chest X-rays with labels",
        licence="Stanford University Dataset Research Use Agreement",
        access="Stanford AIMI, after registration. For research alone; not to be passed on.",
        find=_find,
        streams=("xray",),
        options={"views": ("frontal", "lateral", "all")},
    ),
)
