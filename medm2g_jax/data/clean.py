"""Reports as the literature reads them: the named ways to clean one, a table.

"none": white space alone. "mimic-sections": of a MIMIC-CXR report its findings and impression, as its authors' section
parser tells sections apart, in the words of the report; each under its name where it has both, so that what reads few
words can take the impression first. "r2gen": the findings as R2Gen and its followers train on and score them (Chen et
al., EMNLP 2020), lower case, numbers of lists gone, most punctuation gone, sentences set apart by " . ". "caption": a
figure's caption without the label before it ("Figure 2.").

Cleaning that has another name gives other figures.
"""

import difflib
import re
from collections.abc import Callable, Mapping

from medm2g_jax.errors import UserError

# What a header is, by the first of these words that is in it; one word that is spelt much like one of these is it.
_MEANINGS = {
    "impression": ("impression", "conclusion"),
    "indication": ("indication", "reason for"),
    "history": ("history", "clinical information"),
    "comparison": ("comparison", "reference exam"),
    "addendum": ("addendum",),
    "technique": ("technique", "procedure"),
    "findings": ("findings", "finding", "observation"),
    "examination": ("examination", "exam", "study"),
}
# A header that names a view ("PORTABLE AP CHEST:") is over what was seen.
_VIEW = re.compile(r"\b(?:chest|portable|ribs|(?:pa|ap|frontal|lateral|one|two) (?:and |views?\b|upright))")
# At the start of a line, after at most some blanks: capitals and a colon, " FINDINGS:".
_HEADER = re.compile(r"^[ \t]{0,3}([A-Z][A-Z /()&,-]{2,60}):", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*_{20,}[ \t]*$", re.MULTILINE)  # before an addendum
_TITLE = re.compile(r"^\s*(?:FINAL|PRELIMINARY|WET) (?:REPORT|READ)\b")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")

# Of R2Gen's character class, in which ":-[" is a range.
_DELETED = dict.fromkeys(map(ord, "\"'/\\.,?;*!%^&_+()]{}" + "".join(map(chr, range(ord(":"), ord("[") + 1)))))


def sections(report: str) -> dict[str, str]:
    """A report's sections that are not empty, by canonical name; of several of one name the last, as MIMIC-CXR's own
    parser has it. A section ends at a line of underscores, behind which addenda stand.

    Where neither findings nor impression is there, `last_paragraph` holds what follows the first blank line in the last
    section: many reports have one header and then the report. Of a report without headers, it is what follows its
    first blank line (before it stands a title), or all of it where it has none.
    """
    found: dict[str, str] = {}
    marks = list(_HEADER.finditer(report))
    ends = [mark.start() for mark in marks[1:]] + [len(report)]
    bodies = [report[mark.end() : end] for mark, end in zip(marks, ends, strict=False)]  # no mark: none
    for mark, body in zip(marks, bodies, strict=True):
        if text := _flat(_RULE.split(body)[0]):
            name = _name(" ".join(mark[1].lower().split()))
            found.pop(name, None)  # of equal names the last also stands last
            found[name] = text
    if not {"findings", "impression"} & found.keys():
        last = _RULE.split(bodies[-1] if bodies else report.strip())[0]
        parts = _BLANK_LINE.split(last if bodies else last.strip(), maxsplit=1)
        if last := _flat(parts[1] if len(parts) > 1 else "" if bodies else parts[0]):
            found["last_paragraph"] = last
    return found


def _name(header: str) -> str:
    for name, words in _MEANINGS.items():
        if any(word in header for word in words):
            return name
    if close := difflib.get_close_matches(header, _MEANINGS, 1, 0.8):
        return close[0]
    return "findings" if _VIEW.search(header) else header


def _flat(text: str) -> str:
    return " ".join(text.split())


def _none(report: str) -> str:
    return _flat(report)


def _caption(report: str) -> str:
    return re.sub(r"^(?:supplementary )?fig(?:ure)?s?\.? ?s?\d+[a-z]?\b[ .:)]*", "", _flat(report), flags=re.I)


def _mimic_sections(report: str) -> str:
    found = sections(report)
    parts = {name: found[name] for name in ("findings", "impression") if name in found}
    if len(parts) == 2:
        return " ".join(f"{name}: {text}" for name, text in parts.items())
    return next(iter(parts.values()), "") or found.get("last_paragraph", "")


def _r2gen(report: str) -> str:
    whole = _HEADER.search(report) is None and _TITLE.search(report) is None  # findings alone, as in annotation.json
    return r2gen(report if whole else sections(report).get("findings", ""))


def r2gen(findings: str) -> str:
    """R2Gen's cleaning of MIMIC-CXR findings, step by step as its tokenizer does it: "" of what holds no word.

    "2.5 cm" becomes "25 cm", "T11. " becomes "t1", a sentence of marks alone leaves " . . ", hyphens stay: so it is,
    and figures of that literature are of such text.
    """
    text = findings.replace("\n", " ")
    for sign in "_ .":
        text = re.sub(rf"\{sign}{{2,}}", sign, text)
    text = text.replace("1. ", "")
    for before in (". ", " "):
        for number in "2345":
            text = text.replace(f"{before}{number}. ", ". ")
    sentences = [sentence.translate(_DELETED) for sentence in text.strip().lower().split(". ")]
    text = _flat(" . ".join(sentences) + " .")
    return text if re.search(r"\w", text) else ""


CLEANINGS: Mapping[str, Callable[[str], str]] = {
    "none": _none,
    "mimic-sections": _mimic_sections,
    "r2gen": _r2gen,
    "caption": _caption,
}


def clean(report: str, how: str) -> str:
    """A report, cleaned; "" where nothing is left.

    Raises:
      UserError: no such way.
    """
    if how not in CLEANINGS:
        raise UserError(f"--clean {how}: expected one of {', '.join(CLEANINGS)}")
    return CLEANINGS[how](report)
