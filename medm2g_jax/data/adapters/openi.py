"""IU X-ray / OpenI (Indiana University, NLM): 3,955 reports of chest X-rays, in the three ways that people have it.

NLM's archives     ecgen-radiology/1.xml (of NLMCXR_reports.tgz), CXR1_1_IM-0001-3001.png (of NLMCXR_png.tgz), each
                   below the root or in a folder in it. Views are not said: all images are taken.
Kaggle's copy      indiana_reports.csv (uid, MeSH, findings, impression, ...), indiana_projections.csv (uid, filename,
                   projection), images/images_normalized/1_IM-0001-4001.dcm.png. Lateral views are left out unless asked
                   for (`--option views`); its labels of views are noisy.
R2Gen's            annotation.json {train: [{id, report, image_path: [two]}]}, images/CXR2384_IM-0942/0.png. Findings
                   alone; its split is the one that the literature reports on. Views are not said.

Each image is a case, with its study's report. Without R2Gen's file there is no split: one is declared, by report.
Words that were taken out are XXXX. XML with a document type is refused: the set has none, and entities can be made to
fill a memory or to read other files.
"""

import json
import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.parsers import expat

from medm2g_jax.data.case import REPORT, Adapter, Case, Image, Left, Root
from medm2g_jax.data.source import SPLITS
from medm2g_jax.errors import UserError

_SECTIONS = ("indication", "comparison", "findings", "impression")


def _find(root: Root) -> Iterator[Case | Left]:
    if root.has("annotation.json"):
        yield from _r2gen(root)
    elif root.has("indiana_reports.csv"):
        yield from _kaggle(root)
    elif reports := [name for depth in ("", "*/", "*/*/") for name in root.files(f"{depth}ecgen-radiology/*.xml")]:
        yield from _nlm(root, reports)
    else:
        raise UserError(
            f"{root.path}: expected ecgen-radiology/*.xml (NLM), indiana_reports.csv (Kaggle) or annotation.json "
            "(R2Gen) in it"
        )


def _text(parts: dict[str, str]) -> str:
    """A report with headers, as `data.clean` tells them apart."""
    flat = {name: " ".join(parts.get(name, "").split()) for name in _SECTIONS}
    return "\n".join(f"{name.upper()}: {text}" for name, text in flat.items() if text)


def _nlm(root: Root, reports: list[str]) -> Iterator[Case | Left]:
    files = {name.rpartition("/")[2]: name for depth in ("*/", "") for name in root.files(f"{depth}*.png")}
    for name in reports:
        try:
            tree = _parsed(root.text(name, REPORT))
            uid = tree.find(".//uId").attrib["id"]
            images = [one.attrib["id"] for one in tree.iterfind(".//parentImage")]
        except (UserError, expat.ExpatError, AttributeError, LookupError, ValueError):
            yield Left(name, "its XML cannot be read, or is no report")
            continue
        parts = tree.iterfind(".//AbstractText")
        text = _text({one.get("Label", "").lower(): "".join(one.itertext()) for one in parts})
        mesh = ["".join(one.itertext()).strip() for one in tree.iterfind(".//MeSH/major")]
        if not images:
            yield Case(uid, uid, {}, text=text, info={"mesh": mesh})
        for image in images:
            if f"{image}.png" in files:
                yield Case(image, uid, {"xray": Image(files[f"{image}.png"])}, text=text, info={"mesh": mesh})
            else:
                yield Left(image, "its image is missing")


def _parsed(content: str) -> ElementTree.Element:
    """XML of elements and text alone; a document type, in which entities are made, is an error.

    Raises:
      expat.ExpatError: it is no XML.
      ValueError: it has a document type.
    """
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refuse(*_) -> None:
        raise ValueError("a document type")

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(re.sub(r"^\s*<\?xml.*?\?>", "", content, flags=re.S), True)  # decoded already, whatever it declares
    return builder.close()


def _kaggle(root: Root) -> Iterator[Case | Left]:
    reports = {row["uid"]: row for row in root.table("indiana_reports.csv", columns=("uid", "findings", "impression"))}
    seen = set()
    for row in root.table("indiana_projections.csv", columns=("uid", "filename", "projection")):
        uid, name, view = row["uid"], row["filename"], row["projection"].lower()
        places = [f"{place}{name}" for place in ("images/images_normalized/", "images/", "")]
        file = next((place for place in places if root.has(place)), places[0])
        seen.add(uid)
        if uid not in reports:
            yield Left(name, "no report has its uid")
        elif root.options["views"] not in ("all", view):
            yield Left(name, f"a {view} view" if view in ("frontal", "lateral") else "of no known view")
        elif why := root.lacks(file):
            yield Left(name, f"its image {why}")
        else:
            info = {"view": view, "mesh": [term for term in reports[uid].get("MeSH", "").split(";") if term]}
            number = re.sub(r"(\.dcm)?\.png$", "", name)
            yield Case(number, f"CXR{uid}", {"xray": Image(file)}, text=_text(reports[uid]), info=info)
    for uid in sorted(reports.keys() - seen):
        yield Left(f"CXR{uid}", "a report without images")


def _r2gen(root: Root) -> Iterator[Case | Left]:
    try:
        found = json.loads(root.text("annotation.json"))
        rows = [(s, str(row["id"]), str(row["report"]), row["image_path"]) for s in SPLITS for row in found[s]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{root.path}/annotation.json: expected train, val and test, each a list of id, report and image_path "
            f"({type(error).__name__})"
        ) from None
    for split, study, report, images in rows:
        for number, name in enumerate(images if isinstance(images, list) else [images]):
            if why := root.lacks(file := f"images/{name}"):
                yield Left(f"{study}_{number}", f"its image {why}")
                continue
            subject = study.partition("_")[0]
            yield Case(f"{study}_{number}", subject, {"xray": Image(file)}, split, report)


ADAPTERS = (
    Adapter(
        name="openi",
        title="IU X-ray / OpenI (Demner-Fushman et al. 2016), chest X-rays with reports",
        licence="CC BY-NC-ND 4.0",
        access=(
            "NLM's Open-i, without registration. Non-commercial use; changed copies may not be passed on; credit the "
            "authors."
        ),
        find=_find,
        streams=("xray", "text"),
        clean="mimic-sections",
        options={"views": ("frontal", "lateral", "all")},
    ),
)
