"""Reports as the literature reads them, on the cases that its figures hang on."""

import pytest

from medm2g_jax.data.clean import clean, r2gen, sections
from medm2g_jax.errors import UserError

RULE = " " + "_" * 78


def report(*lines: str) -> str:
    """In MIMIC-CXR's form: each line after a blank, blank lines too."""
    return "\n".join(f" {line}" for line in ("                            FINAL REPORT", *lines)) + "\n"


@pytest.mark.parametrize(
    "given, expected",
    [
        ("The lungs are clear.\nNo effusion.", "the lungs are clear . no effusion ."),
        ("A 2.5 cm nodule.", "a 25 cm nodule ."),
        ("XXXX and XXXX are normal.", "xxxx and xxxx are normal ."),
        ("A right-sided port-a-cath; x-ray.", "a right-sided port-a-cath x-ray ."),
        ("1. Clear lungs.  2. No effusion.", "clear lungs . no effusion ."),
        ("Clear lungs 2. No effusion", "clear lungs . no effusion ."),
        ("Fracture at T11. Stable.", "fracture at t1stable ."),  # "1. " goes wherever it is
        (
            "Compared to ____, the 'heart' is (mildly) enlarged/normal?",
            "compared to the heart is mildly enlargednormal .",
        ),
        ("Pressure <10 @ 5=5; [see] {note}: yes", "pressure 10 55 see note yes ."),
        ("Clear... No effusion..", "clear . no effusion ."),
        ("Clear. ?. Normal.", "clear . . normal ."),  # a sentence of marks alone stays, empty
        ("___ .", ""),
        ("", ""),
    ],
)
def test_r2gen(given, expected):
    assert r2gen(given) == expected


def test_r2gen_takes_findings_alone():
    whole = report("INDICATION: cough.", "", "FINDINGS:", "", "Clear lungs.", "", "IMPRESSION: Normal.")
    assert clean(whole, "r2gen") == "clear lungs ."
    assert clean("Clear lungs.", "r2gen") == "clear lungs ."  # findings as annotation.json has them
    assert clean(report("IMPRESSION: Normal."), "r2gen") == ""
    assert clean(report("CHEST, TWO VIEWS", "", "Clear lungs."), "r2gen") == ""


def test_findings_and_impression_stand_under_their_names():
    whole = report("FINDINGS:", "Clear", "lungs.", "", "IMPRESSION:  Normal.")
    assert clean(whole, "mimic-sections") == "findings: Clear lungs. impression: Normal."
    assert clean(report("IMPRESSION:  Normal."), "mimic-sections") == "Normal."
    assert clean(report("FINDINGS:", "", "IMPRESSION:  Normal."), "mimic-sections") == "Normal."


@pytest.mark.parametrize(
    "header, name",
    [
        ("FINDINGS", "findings"),
        ("FINDING", "findings"),
        ("FINDINDGS", "findings"),
        ("CONCLUSION", "impression"),
        ("IMPRESSON", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("PORTABLE AP CHEST", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PA AND LATERAL VIEWS", "findings"),
        ("REASON FOR EXAM", "indication"),
        ("CLINICAL HISTORY", "history"),
        ("COMPARISONS", "comparison"),
        ("COMPARISION", "comparison"),
        ("TYPE OF EXAMINATION", "examination"),
        ("RECOMMENDATION(S)", "recommendation(s)"),
    ],
)
def test_headers(header, name):
    assert sections(report(f"{header}: Some words.")).get(name) == "Some words."


def test_a_header_is_capitals_at_the_beginning_of_a_line():
    found = sections(report("IMPRESSION: Tube at T4: unchanged.", "Seen on AP: yes. FINDINGS: inside a line."))
    assert found == {"impression": "Tube at T4: unchanged. Seen on AP: yes. FINDINGS: inside a line."}


def test_the_last_section_of_a_name_counts():
    found = sections(report("IMPRESSION: First.", "COMPARISON: ___.", "IMPRESSION: Second.", "IMPRESSION:"))
    assert found["impression"] == "Second."


def test_an_addendum_is_no_part_of_the_section_before_it():
    text = report("FINDINGS: Clear.", "IMPRESSION: Normal.", "") + f"{RULE}\n FINAL ADDENDUM\n Told by telephone.\n"
    assert clean(text, "mimic-sections") == "findings: Clear. impression: Normal."
    corrected = text + " IMPRESSION: Not normal.\n"
    assert clean(corrected, "mimic-sections") == "findings: Clear. impression: Not normal."


def test_without_findings_and_impression_the_last_paragraph_counts():
    headed = report("INDICATION: cough.", "COMPARISON: ___.", "", "Clear lungs.", "", "Normal heart.")
    assert sections(headed) == {
        "indication": "cough.",
        "comparison": "___. Clear lungs. Normal heart.",
        "last_paragraph": "Clear lungs. Normal heart.",
    }
    assert clean(headed, "mimic-sections") == "Clear lungs. Normal heart."
    assert clean(report("", "Clear lungs."), "mimic-sections") == "Clear lungs."
    assert clean("Clear lungs.", "mimic-sections") == "Clear lungs."
    assert (
        clean(report("INDICATION: cough.", "COMPARISON: None."), "mimic-sections") == ""
    )  # says nothing of this image


@pytest.mark.parametrize("label", ["Figure 1. ", "Fig. 2A: ", "FIGURE 3 ", "Figs. 4 ", "Supplementary Figure S2. ", ""])
def test_a_caption_loses_its_label(label):
    assert clean(f"{label}Axial CT of\n the chest.", "caption") == "Axial CT of the chest."
    assert clean("Figures of speech.", "caption") == "Figures of speech."


def test_none_keeps_every_word():
    assert clean(" FINDINGS:\n a  b ", "none") == "FINDINGS: a b"
    with pytest.raises(UserError, match="--clean all: expected one of none, mimic-sections, r2gen, caption"):
        clean("a", "all")
