"""MIMIC-CXR-JPG (PhysioNet, 2.0.0 to 2.1.0) with the reports of MIMIC-CXR, or MIMIC-CXR's own DICOM.

    files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg     (or .dcm)
    files/p10/p10000032/s50414267.txt     of mimic-cxr-reports.zip, unpacked here or into mimic-cxr-reports/
    mimic-cxr-2.0.0-split.csv.gz          dicom_id, study_id, subject_id, split (train, validate, test)
    mimic-cxr-2.0.0-metadata.csv.gz       dicom_id, ViewPosition, ...
    mimic-cxr-2.0.0-chexpert.csv.gz       study_id and 14 labels; not needed
    cxr-record-list.csv.gz                of MIMIC-CXR, where there is no split

Tables may be unpacked. Each image is a case, the images of a study with the same report: R2Gen's convention.

Traps: the split is called `validate`; the reports are no part of MIMIC-CXR-JPG; a third of the studies has no FINDINGS
and some have no header at all (`--clean mimic-sections` takes the impression or the last paragraph then, `r2gen`
findings alone); the DICOM has neither split nor view in a table: put those of MIMIC-CXR-JPG beside it.
"""

import re
from collections.abc import Iterator, Mapping

from medm2g_jax.data.case import REPORT, Adapter, Case, Image, Left, Root
from medm2g_jax.errors import UserError

_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_VIEWS = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "LL": "lateral"}
_IMAGE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")
_NUMBER = re.compile(r"\d{8}")
_REPORTS = ("", "mimic-cxr-reports/", "reports/")
_NO_LABELS = ("subject_id", "study_id")
_LABEL = re.compile(r"-?[01](\.0)?")


def _find(root: Root) -> Iterator[Case | Left]:
    split = root.files("mimic-cxr-*-split.csv*")
    names = split or ["mimic-cxr-*-split.csv", "cxr-record-list.csv"]
    views, labels = _views(root), _labels(root)
    study, text = "", ""
    for row in root.table(*names, columns=("dicom_id", "study_id", "subject_id")):
        image, number, subject = row["dicom_id"], row["study_id"], row["subject_id"]
        if not (_IMAGE.fullmatch(image) and _NUMBER.fullmatch(number) and _NUMBER.fullmatch(subject)):
            yield Left(image, "its row has no ids as MIMIC-CXR has them")
            continue
        if split and row.get("split") not in _SPLITS:
            yield Left(image, "of no official split")
            continue
        view = views.get(image, "")
        kind = _VIEWS.get(view, "other")
        if root.options["views"] not in ("all", kind):
            yield Left(image, f"a {kind} view" if kind != "other" else "a view that is neither PA, AP nor lateral")
            continue
        folder = f"files/p{subject[:2]}/p{subject}/s{number}"
        jpg = f"{folder}/{image}.jpg"
        file = jpg if root.has(jpg) or not root.has(f"{folder}/{image}.dcm") else f"{folder}/{image}.dcm"
        if why := root.lacks(file):
            yield Left(image, f"its image {why}")
            continue
        if number != study:  # rows of a study follow each other
            study, text = number, ""
            report = next((name for base in _REPORTS if root.has(name := f"{base}{folder}.txt")), "")
            try:
                text = root.text(report, REPORT) if report else ""
            except UserError:
                yield Left(f"s{number}", "its report cannot be read", "text")
            if not report:
                yield Left(f"s{number}", "its report is missing", "text")
        info = {"view": view} | ({"labels": labels[number]} if number in labels else {})
        yield Case(image, f"p{subject}", {"xray": Image(file)}, _SPLITS.get(row.get("split"), ""), text, info=info)


def _views(root: Root) -> Mapping[str, str]:
    """dicom_id -> ViewPosition."""
    if not root.files("mimic-cxr-*-metadata.csv*"):
        if root.options["views"] == "all":
            return {}
        raise UserError(
            f"{root.path}: no mimic-cxr-2.0.0-metadata.csv(.gz) in it, which says what is frontal; put that of "
            "MIMIC-CXR-JPG there, or ask for --option views=all"
        )
    rows = root.table("mimic-cxr-*-metadata.csv*", columns=("dicom_id", "ViewPosition"))
    return {row["dicom_id"]: row["ViewPosition"].upper() for row in rows}


def _labels(root: Root) -> Mapping[str, Mapping[str, float]]:
    """study_id -> what CheXpert's labeller says of its report: 1, 0, -1 (uncertain)."""
    if not root.files("mimic-cxr-*-chexpert.csv*"):
        return {}
    rows = root.table("mimic-cxr-*-chexpert.csv*", columns=("study_id",))
    return {
        row["study_id"]: {k: float(v) for k, v in row.items() if k not in _NO_LABELS and _LABEL.fullmatch(v)}
        for row in rows
    }


ADAPTERS = (
    Adapter(
        name="mimic_cxr",
        title="MIMIC-CXR-JPG / MIMIC-CXR (Johnson et al.), chest X-rays with reports",
        licence="PhysioNet Credentialed Health Data License 1.5.0",
        access=(
            "PhysioNet, credentialed (a course and a data use agreement). Neither images nor reports may be passed on; "
            "models that are trained on it are usually shared under the same terms."
        ),
        find=_find,
        streams=("xray", "text"),
        clean="mimic-sections",
        options={"views": ("frontal", "lateral", "all")},
    ),
)
