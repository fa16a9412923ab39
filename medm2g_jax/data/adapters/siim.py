"""SIIM-ACR pneumothorax (Kaggle, 2019): chest X-rays as DICOM, with masks of pneumothoraces and without reports.

    dicom-images-train/<study>/<series>/<ImageId>.dcm
    dicom-images-test/...                              of the challenge, without labels: left out
    train-rle.csv (or stage_2_train.csv)               ImageId, EncodedPixels: " -1" where there is none

Traps: the name of the second column and its values begin with a blank in Kaggle's file and not in others; an image may
have several rows. The masks (run lengths down the columns, each start counted from the last run's end) are not read:
what is kept is whether there is a pneumothorax (`info`), and in how many pieces. No table says which images are one
patient's: each counts as its own subject. No split of its own; MGCA's has the shares `--split 0.7,0.15,0.15`.
"""

from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root


def _find(root: Root) -> Iterator[Case | Left]:
    pieces: dict[str, list[str]] = {}
    for row in root.table("train-rle.csv", "stage_2_train.csv", columns=("ImageId", "EncodedPixels")):
        pieces.setdefault(row["ImageId"], []).append(row["EncodedPixels"])
    files = {name.rpartition("/")[2].removesuffix(".dcm"): name for name in root.files("dicom-images-train/**/*.dcm")}
    for image in sorted(pieces.keys() | files.keys()):
        if image not in files:
            yield Left(image, "its image is missing")
        elif image not in pieces:
            yield Left(image, "no row of the table is about it")
        else:
            runs = [code for code in pieces[image] if code not in ("", "-1")]
            info = {"pneumothorax": bool(runs), "pieces": len(runs)}
            yield Case(image, image, {"xray": Image(files[image])}, info=info)
    for name in root.files("dicom-images-test/**/*.dcm"):
        yield Left(name.rpartition("/")[2], "of the challenge's test, without labels")


ADAPTERS = (
    Adapter(
        name="siim",
        title="SIIM-ACR pneumothorax segmentation (2019), chest X-rays with labels",
        licence="SIIM-ACR challenge rules (Kaggle): non-commercial use",
        access="Kaggle, after accepting the challenge's rules.",
        find=_find,
        streams=("xray",),
    ),
)
