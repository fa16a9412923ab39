"""What a row of a manifest says of findings: the labels in its "info", as `medm2g prepare` writes them.

    {"labels": {"Edema": 1, "Fracture": 0, "Pneumonia": -1}}    CheXpert, MIMIC-CXR: -1 is uncertain, what is missing
                                                                was not mentioned and counts as absent
    {"labels": ["Cardiomegaly", "Effusion"]}                    ChestX-ray14: all that there is
    {"pneumothorax": true}, {"pneumonia": false}                SIIM, RSNA
"""

from collections.abc import Mapping
from typing import Any

FLAGS = ("pneumothorax", "pneumonia")


def stated(info: Mapping[str, Any]) -> dict[str, bool | None] | None:
    """{finding: is it there; None where that is uncertain}; None where nothing is said of findings."""
    labels, flags = info.get("labels"), {name: info[name] for name in FLAGS if isinstance(info.get(name), bool)}
    if isinstance(labels, list):
        return {str(name): True for name in labels} | flags
    if isinstance(labels, Mapping):
        return {str(name): None if value == -1 else value == 1 for name, value in labels.items()} | flags
    return flags or None


def in_words(found: Mapping[str, bool | None]) -> str:
    """A text that states these findings, to ask a model for an image where nobody has written a report."""
    names = [name.lower().replace("_", " ") for name, there in found.items() if there and name != "No Finding"]
    return f"Findings: {', '.join(names)}." if names else "No finding."
