"""MedICaT (Allen Institute for AI): figures of medical papers with their captions.

    release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl     a figure a line
    release/figures/{pdf_hash}_{fig_uri}                                      PNG

A line: pdf_hash, fig_uri, s2_caption, s2orc_caption (or null), radiology (bool), oa_info.oa.license. No field says
the modality. What is kept: figures that are flagged as radiology, whose caption names exactly one of CT, MRI and X-ray,
and which are not of several parts ("(A) ... (B) ..."; `--option compound=keep` keeps these). How many each filter took
stands in the data card. Where a caption names exactly one MR contrast, the image is of that contrast.

Traps: half of the figures are compound; captions begin with "Figure 2." (`--clean caption` takes it off); many images
are in colour (read as grey) and have arrows and letters burnt in. There is no split: papers, not figures, are divided.
Each figure has its paper's own licence.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root

_WORDS = {
    "ct": r"\b[Cc]omputed tomogra|\b(?:HR|CE|CB|MD|NC|PET[-/ ]?)?CT\b|\bCAT scan",
    "mri": r"\b[Mm]agnetic resonance|\bMRIs?\b|\bMR (?:[Ii]mag|[Ss]can|[Aa]ngio|[Cc]holangio|[Vv]eno)|\bFLAIR\b"
    r"|\b(?:T[12]|PD|[Pp]roton[- ]density)[- ]?(?:weighted|[wW]\b|[wW]I\b)",
    "xray": r"\b[Xx][- ]?[Rr]ay|\b[Rr]adiograph(?:s|y)?\b|\b[Rr]oentgenogra",
}
_OTHER = (
    r"\bPET\b|\bSPECT\b|[Uu]ltraso|[Ss]onogra|[Ss]cintigra|[Ee]chocardi|[Hh]istolog|[Mm]icrogra|[Mm]icro-?CT"
    r"|(?<!CT )(?<!MR )(?<!tomography )(?<!tomographic )(?<!resonance )[Aa]ngiogra"
)
_CE = r"(?:contrast|gadolinium|Gd)\b"
_CONTRASTS = {
    "mri:t1ce": rf"\b{_CE}.{{0,40}}\bT1|\bT1.{{0,40}}\b{_CE}",
    "mri:flair": r"\bFLAIR\b|[Ff]luid[- ]attenuated",
    "mri:t2": r"\bT2\b(?!\*)(?!.{0,12}FLAIR)|\bT2[wW]",
    "mri:pd": r"\bPD[- ]?[wW]|[Pp]roton[- ]density",
}
_COMPOUND = re.compile(
    r"\([aA]\).*\([bB]\)|(?:^|[\s.;])[aA][).:,]\s.*[\s.;][bB][).:,]\s|\([aA](?:[-–,]\s?[b-zB-Z])+\)"
    r"|\b(?:left|right|upper|lower|top|bottom|middle) (?:panel|row|column)",
    re.DOTALL,
)
_READ = 4000  # characters of a caption that are looked at


def _find(root: Root) -> Iterator[Case | Left]:
    table = root.one("*s2_full_figures*.jsonl", "*/*s2_full_figures*.jsonl", "*.jsonl", "release/*.jsonl")
    base = table.rpartition("/")[0]
    for number, line in enumerate(root.lines(table), 1):
        try:
            row = json.loads(line)
            paper, figure, radiology = str(row["pdf_hash"]), str(row["fig_uri"]), row.get("radiology")
        except (ValueError, LookupError, TypeError, RecursionError):
            yield Left(f"line {number}", "its line is no figure")
            continue
        name = f"{base}/figures/{paper}_{figure}".lstrip("/")
        caption = str(row.get("s2_caption") or row.get("s2orc_caption") or "")
        stream, why = _stream(caption[:_READ], radiology, root.options["compound"] == "keep")
        if not why and (lacks := root.lacks(name)):
            why = f"its image {lacks}"
        if why:
            yield Left(f"{paper}_{figure}", why)
            continue
        yield Case(
            id=f"{paper}_{figure}".rpartition(".")[0],
            subject=paper,
            images={stream: Image(name)},
            text=caption,
            origin="caption",
            licence=_licence(row) or "not stated",
        )


def _stream(caption: str, radiology: Any, compound: bool) -> tuple[str, str]:
    """(stream, "") of a figure, or ("", which filter it does not pass)."""
    if radiology is not True:
        return "", "filter 1: not flagged as radiology"
    if not caption.strip():
        return "", "filter 2: no caption"
    named = [name for name, words in _WORDS.items() if re.search(words, caption)]
    if not named:
        return "", "filter 3: its caption names neither CT, MRI nor X-ray"
    if len(named) > 1 or re.search(_OTHER, caption):
        return "", "filter 4: its caption names several modalities"
    if not compound and _COMPOUND.search(caption):
        return "", "filter 5: of several parts (--option compound=keep)"
    return (_contrast(caption) if named == ["mri"] else named[0]), ""


def _contrast(caption: str) -> str:
    found = [stream for stream, words in _CONTRASTS.items() if re.search(words, caption)]
    if "mri:t1ce" not in found and re.search(r"\bT1\b|\bT1[wW]", caption):
        found.append("mri:t1")
    return found[0] if len(found) == 1 else "mri"


def _licence(row: Any) -> str:
    for key in ("oa_info", "oa", "license"):
        row = row.get(key) if isinstance(row, dict) else None
    return row.strip() if isinstance(row, str) else ""


ADAPTERS = (
    Adapter(
        name="medicat",
        title="MedICaT (Subramanian et al. 2020), figures of papers with captions",
        licence="MedICaT: non-commercial research; each figure under its paper's licence",
        access="Allen Institute for AI, a direct download of about 104 GB. For non-commercial research alone.",
        find=_find,
        streams=("ct", "mri", "xray", "text"),
        clean="caption",
        options={"compound": ("leave", "keep")},
    ),
)
