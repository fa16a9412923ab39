"""Reports as the literature reads them: the named ways to clean one, a table.

"none": white space alone. "mimic-sections": of a MIMIC-CXR report its findings and impression, as its authors' section
parser tells sections apart, in the words of the report. "r2gen": the findings as R2Gen and its followers train on and
score them (Chen et al., EMNLP 2020), lower case, numbers of lists gone, most punctuation gone, sentences set apart by
" . ". Cleaning that has another name gives other figures.
"""

import re
from collections.abc import Callable, Mapping

from medm2g_jax.errors import UserError

# What reports call a section -> the section. Written from the headers' plain meanings; MIMIC-CXR has some hundred
# spellings, of which those that are rarer than these are passed over as sections of their own.
_HEADERS = {
    "findings": "findings finding observations observation findingss findngs",
    "impression": "impression impressions conclusion conclusions impresson imprssion ipression",
    "comparison": "comparison comparisons comparision comparision",
    "indication": "indication indications history|reason for exam|reason for examination|clinical history",
    "technique": "technique|examination|exam|study|procedure",
}
_SECTION = {
    word: section
    for section, words in _HEADERS.items()
    for part in words.split("|")
    for word in (part.split() if section in ("findings", "impression", "comparison") else [part])
}
# At the start of a line, after at most a blank or two, capitals and a colon: " FINDINGS:".
_HEADER = re.compile(r"^[ \t]{0,3}([A-Z][A-Z /()&,-]{2,60}):", re.MULTILINE)
_RULE = re.compile(r"^\s*_{20,}\s*$", re.MULTILINE)

# Of R2Gen's character class, in which ":-[" is a range.
_DELETED = dict.fromkeys(map(ord, "\"'/\\.,?;*!%^&_+()]{}" + "".join(map(chr, range(ord(":"), ord("[") + 1)))))


def sections(report: str) -> dict[str, str]:
    """A report's sections, by canonical name; of several of one name the last, as MIMIC-CXR's own parser has it.

    Where neither findings nor impression is there, `last_paragraph` holds what follows the first blank line, so that a
    report without headers still says something.
    """
    found: dict[str, str] = {}
    marks = list(_HEADER.finditer(report))
    ends = [mark.start() for mark in marks[1:]] + [len(report)]
    for mark, end in zip(marks, ends, strict=False):
        name = " ".join(mark[1].lower().split())
        text = _flat(_RULE.sub(" ", report[mark.end() : end]))
        if text:
            found[_SECTION.get(name, name)] = text
    if not {"findings", "impression"} & found.keys():
        paragraphs = re.split(r"\n\s*\n", report.strip(), maxsplit=1)
        last = _flat(_HEADER.sub(" ", paragraphs[-1]))
        if last:
            found["last_paragraph"] = last
    return found


def _flat(text: str) -> str:
    return " ".join(text.split())


def _none(report: str) -> str:
    return _flat(report)


def _mimic_sections(report: str) -> str:
    found = sections(report)
    parts = [found[name] for name in ("findings", "impression") if name in found]
    return " ".join(parts) or found.get("last_paragraph", "")


def _r2gen(report: str) -> str:
    found = sections(report)
    text = found.get("findings", "") if _HEADER.search(report) else report
    return r2gen(text)


def r2gen(findings: str) -> str:
    """R2Gen's cleaning of MIMIC-CXR findings, step by step as its tokenizer does it: "" of what holds no word.

    "2.5 cm" becomes "25 cm", hyphens stay: so it is, and figures of that literature are of such text.
    """
    text = findings.replace("\n", " ")
    for sign in "_ .":
        text = re.sub(rf"\{sign}{{2,}}", sign, text)
    text = re.sub(r"(^|\s)[1-5]\. ", r"\1", text)
    sentences = [_flat(sentence.translate(_DELETED)) for sentence in text.strip().lower().split(". ")]
    sentences = [sentence for sentence in sentences if sentence]
    return " . ".join(sentences) + " ." if sentences else ""


CLEANINGS: Mapping[str, Callable[[str], str]] = {"none": _none, "mimic-sections": _mimic_sections, "r2gen": _r2gen}


def clean(report: str, how: str) -> str:
    """A report, cleaned; "" where nothing is left.

    Raises:
      UserError: no such way.
    """
    if how not in CLEANINGS:
        raise UserError(f"--clean {how}: expected one of {', '.join(CLEANINGS)}")
    return CLEANINGS[how](report)
