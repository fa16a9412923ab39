"""The phantom's reports: written from exact findings, and read back to findings (section 4, report generation).

A report is lower case, words and " . , : " only, 20 to 35 tokens, with a findings and an impression section. `parse`
reads it back without a neural labeller, and it reads whatever a model writes, by four rules:

1. ". : ," and "and", "with", "but", "without" end a clause; "or" does not ("no mass or effusion" denies both).
2. "no", "not", "nor", "without" deny what follows them in their clause.
3. A clause about the heart gives the heart's size and nothing else; every other clause gives kind, side, size, level.
4. The first mention of a field wins; what nobody mentions is None. "no effusion" denies one kind, and states none.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("none", "mass", "opacity", "effusion")
SIDES = ("left", "right")
SIZES = ("small", "large")
LEVELS = ("upper", "middle", "lower")


class Findings(NamedTuple):
    """What a report states; None where it says nothing, or where nothing is to be said (the side of no lesion)."""

    kind: str | None = None
    side: str | None = None
    size: str | None = None
    level: str | None = None
    cardiomegaly: bool | None = None

    def facts(self) -> set[tuple]:
        """The positive findings: a kind of lesion, the side of this kind, size, level, cardiomegaly.

        A normal report has no facts, so a model cannot earn F1 by calling everybody healthy. The side counts together
        with the kind: the right side of the wrong lesion is no finding.
        """
        out: set[tuple] = set()
        if self.kind not in (None, "none"):
            out.add(("kind", self.kind))
            if self.side:
                out.add(("side", self.kind, self.side))
        out |= {(field, getattr(self, field)) for field in ("size", "level") if getattr(self, field)}
        return out | ({("cardiomegaly", True)} if self.cardiomegaly else set())


# --- writing --------------------------------------------------------------------------------------------------------

_NAMES = {
    "mass": ("mass", "tumor"),
    "opacity": ("opacity", "consolidation"),
    "effusion": ("effusion", "collection"),
}
_LEVEL_WORDS = {"upper": ("upper", "apical"), "middle": ("middle", "mid"), "lower": ("lower", "basal")}
_DENIABLE = {"mass": ("no mass",), "opacity": ("no consolidation",), "effusion": ("no effusion",)}

_LESION = (
    "there is a {size} {kind} in the {side} {level} lung .",
    "{size} {kind} in the {side} {level} zone .",
    "the {side} lung shows a {size} {kind} in the {level} zone .",
    "a {size} {side} {level} {kind} is seen .",
)
_EFFUSION = (
    "there is a {size} {side} pleural {kind} reaching the {level} zone .",
    "{size} pleural {kind} on the {side} up to the {level} zone .",
    "a {size} {side} pleural {kind} rises to the {level} zone .",
)
_CLEAR = ("the lungs are clear .", "no focal lung lesion is seen .", "both lungs are clear , no effusion .")
_HEART = {
    False: ("heart size is normal .", "the heart is not enlarged .", "normal heart .", "no cardiomegaly ."),
    True: ("the heart is enlarged .", "there is cardiomegaly .", "heart size is increased .", "enlarged heart ."),
}
_IMPRESSION = {  # by (lesion, cardiomegaly)
    (True, False): ("{size} {side} {level} {kind} .", "{side} {level} {kind} , {size} , without cardiomegaly ."),
    (True, True): ("{size} {side} {level} {kind} with cardiomegaly .", "cardiomegaly , {size} {side} {level} {kind} ."),
    (False, False): ("normal chest without focal lesion .", "no focal lesion , normal heart ."),
    (False, True): ("cardiomegaly without focal lung lesion .", "enlarged heart , clear lungs ."),
}


def write(findings: Findings, rng: np.random.Generator) -> str:
    """One of the many reports that state these findings (the phantom's labels: no field left open)."""

    def pick(options: Sequence[str]) -> str:
        return options[rng.integers(len(options))]

    lesion = findings.kind != "none"
    words = {}
    if lesion:
        words = {"size": findings.size, "side": findings.side}
        words |= {"kind": pick(_NAMES[findings.kind]), "level": pick(_LEVEL_WORDS[findings.level])}
        sentences = [pick(_EFFUSION if findings.kind == "effusion" else _LESION)]
        if rng.random() < 0.4:  # deny something that is not there
            other = pick([k for k in _DENIABLE if k != findings.kind])
            sentences.append(f"{pick(_DENIABLE[other])} .")
    else:
        sentences = [pick(_CLEAR)]
    sentences.append(pick(_HEART[findings.cardiomegaly]))
    impression = pick(_IMPRESSION[lesion, findings.cardiomegaly])
    return " ".join(["findings :", *sentences, "impression :", impression]).format(**words)


# --- reading --------------------------------------------------------------------------------------------------------

_NEGATIONS = {"no", "not", "nor", "without"}
_BREAKS = {".", ",", ":", ";", "and", "with", "but", "without"}
_HEART_WORDS = {"heart", "cardiac", "cardiomediastinal", "cardiomegaly"}
_BIG_HEART = {"cardiomegaly", "enlarged", "enlargement", "increased", "large", "big"}
_NORMAL = {"normal", "clear", "unremarkable"}
_LESION_WORDS = {"lesion", "lesions", "abnormality", "abnormalities", "disease"}
_LEXICON = {
    word: (field, value)
    for field, table in {
        "kind": {
            "mass": "mass masses nodule nodules tumor",
            "opacity": "opacity opacities consolidation consolidations infiltrate",
            "effusion": "effusion effusions fluid collection",
        },
        "side": {"left": "left", "right": "right"},
        "size": {"small": "small tiny", "large": "large big"},
        "level": {"upper": "upper apical", "middle": "middle mid", "lower": "lower basal"},
    }.items()
    for value, words in table.items()
    for word in words.split()
}


def _clauses(text: str) -> list[list[str]]:
    out: list[list[str]] = [[]]
    for word in re.findall(r"[a-z]+|[.,:;]", text.lower()):
        if word in _BREAKS:
            out.append([])
        if word not in _BREAKS or word in _NEGATIONS:
            out[-1].append(word)
    return out


def parse(text: str) -> Findings:
    """The findings a text states; never fails, whatever the text (rules: top of this file)."""
    found: dict[str, str | bool] = {}
    for clause in _clauses(text):
        denied = False
        heart = not _HEART_WORDS.isdisjoint(clause)
        for word in clause:
            denied = denied or word in _NEGATIONS
            if heart:
                if word in _BIG_HEART:
                    found.setdefault("cardiomegaly", not denied)
                elif word in _NORMAL:
                    found.setdefault("cardiomegaly", denied)
            elif word in _LEXICON and not denied:
                field, value = _LEXICON[word]
                found.setdefault(field, value)
            elif (word in _NORMAL and not denied) or (word in _LESION_WORDS and denied):
                found.setdefault("kind", "none")
    if found.get("kind") == "none":
        found = {k: v for k, v in found.items() if k in ("kind", "cardiomegaly")}
    return Findings(**found)


def swap_side(text: str) -> str:
    """The same report of the mirrored patient, for counterfactuals: left becomes right and right becomes left, in
    capitals as it was."""

    def other(found: re.Match) -> str:
        side = SIDES[found[0].lower() == "left"]
        return side.upper() if found[0].isupper() else side.capitalize() if found[0].istitle() else side

    return re.sub(r"\b(left|right)\b", other, text, flags=re.IGNORECASE)
