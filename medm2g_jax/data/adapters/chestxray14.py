"""ChestX-ray14 (NIH Clinical Center): frontal chest X-rays with labels that were read out of reports, without these.

    images/00000001_000.png         of the twelve archives of NIH's Box; Kaggle: images_001/images/00000001_000.png
    Data_Entry_2017_v2020.csv       or Data_Entry_2017.csv; BBox_List_2017.csv is not needed
    train_val_list.txt, test_list.txt     a file name a line; val is declared, of the patients of the first

Traps: names of columns hold commas (`OriginalImage[Width,Height]`), so that they count as two, as the values do: the
first seven are right as they stand. Boxes name six values under nine headings. A few PNG have four channels: they are
read as grey. Ages of the first release are up to 414: beyond 120 they are left out.

There are no reports. The text is a template of the labels and marked as one (`text_origin`), which the trainer leaves
out unless it is told otherwise: "PA chest X-ray, male, 57 years. Findings: cardiomegaly, effusion."
"""

import re
from collections.abc import Iterator, Mapping

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root

_PLACES = ("images/*.png", "images_*/images/*.png", "images_*/*.png", "*.png")
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
_SEX = {"M": "male", "F": "female"}
_OLDEST = 120


def _find(root: Root) -> Iterator[Case | Left]:
    files = {name.rpartition("/")[2]: name for place in reversed(_PLACES) for name in root.files(place)}
    lists = {name: split for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test"))}
    official = {
        line.strip(): split for name, split in lists.items() if root.has(name) for line in root.text(name).split("\n")
    }
    for row in root.table("Data_Entry_2017_v2020.csv", "Data_Entry_2017*.csv", columns=_COLUMNS):
        name, patient = row["Image Index"], row["Patient ID"]
        if not patient:
            yield Left(name, "its row is cut off")
        elif name not in files:
            yield Left(name, "its image is missing")
        elif official and name not in official:
            yield Left(name, "in neither official list")
        else:
            labels = [label for label in row["Finding Labels"].split("|") if label and label != "No Finding"]
            info = {"view": row["View Position"], "labels": labels}
            split = official.get(name, "")
            image = {"xray": Image(files[name])}
            yield Case(name.removesuffix(".png"), patient, image, split, _text(row, labels), "template", info=info)


def _text(row: Mapping[str, str], labels: list[str]) -> str:
    years = int("".join(re.findall(r"\d", row["Patient Age"])) or _OLDEST + 1)
    about = [f"{row['View Position']} chest X-ray".strip(), _SEX.get(row["Patient Gender"], "")]
    about += [f"{years} years"] if years <= _OLDEST else []
    found = ", ".join(label.lower().replace("_", " ") for label in labels)
    return f"{', '.join(filter(None, about))}. {f'Findings: {found}.' if found else 'No finding.'}"


ADAPTERS = (
    Adapter(
        name="chestxray14",
        title="ChestX-ray14 (NIH Clinical Center, Wang et al. 2017), chest X-rays with labels",
        licence="NIH Clinical Center: use unrestricted, credit asked",
        access=(
            "NIH's Box or Kaggle, without registration. Name the NIH Clinical Center and the paper. There are no "
            "reports: texts are templates of the labels."
        ),
        find=_find,
        streams=("xray", "text"),
    ),
)
