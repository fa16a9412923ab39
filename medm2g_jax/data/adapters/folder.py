"""What people have on their disks without a name: folders of NIfTI (by BIDS's names, or by patterns), of DICOM, and of
pictures with a table.

A pattern is a path below the root with {subject}, and {session} or another word where one subject has several studies:
ct={subject}/ct.nii.gz. Files whose words agree belong together.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root, glob_of, matched
from medm2g_jax.data.formats import FORMATS, dicom, format_of
from medm2g_jax.data.source import SPLITS, stream_of
from medm2g_jax.data.volume import MOST_VOXELS
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, split_stream

_VOLUMES = tuple(suffix for suffix, kind in FORMATS.items() if kind.name in ("NIfTI", "MGH", "MetaImage", "NRRD"))
# BIDS's suffixes (MR data types) -> streams; and what else people write into names of files.
_BIDS = {"T1w": "mri:t1", "T2w": "mri:t2", "PDw": "mri:pd", "FLAIR": "mri:flair", "ct": "ct"}
_WORDS = {
    "t1": "mri:t1", "t1w": "mri:t1", "t1n": "mri:t1", "t2": "mri:t2", "t2w": "mri:t2", "pd": "mri:pd", "pdw": "mri:pd",
    "flair": "mri:flair", "fla": "mri:flair", "t2f": "mri:flair", "t1ce": "mri:t1ce", "t1c": "mri:t1ce",
    "t1gd": "mri:t1ce", "ct": "ct", "mr": "mri", "mri": "mri",
}  # fmt: skip

_ORDER = [stream for modality in MODALITIES.values() for stream in modality.streams]
_MASKS = {"mask", "seg", "segmentation", "dseg", "probseg", "label", "labels", "lesion", "gt"}
_SHOWN = {"xray": "xray", "cxr": "xray", "radiograph": "xray", "film": "xray"}  # in tables of pictures
_SPLITS = {"training": "train", "validation": "val", "validate": "val", "valid": "val", "dev": "val", "testing": "test"}


def _nifti(root: Root) -> Iterator[Case | Left]:
    yield from _by_pattern(root) if root.patterns else _by_name(root)


def _by_pattern(root: Root) -> Iterator[Case | Left]:
    """Files whose {words} agree are one case; {subject} alone says whose it is."""
    cases: dict[tuple, dict[str, str]] = {}
    whose: dict[tuple, str] = {}
    for stream, pattern in root.patterns.items():
        split_stream(stream)
        if "{subject}" not in pattern:
            raise UserError(f"--files {stream}={pattern}: no {{subject}} in it; splits are by subject")
        for name in root.files(glob_of(pattern)):
            words = matched(pattern, name)
            if words is None:
                continue
            key = tuple(sorted(words.items()))
            if stream in cases.setdefault(key, {}):
                yield Left(name, f"a second file of {stream} for one case")
            else:
                cases[key][stream], whose[key] = name, words["subject"]
    for stream, pattern in root.patterns.items():
        if not any(stream in files for files in cases.values()):
            raise UserError(f"--files {stream}={pattern}: fits no file below {root.path}")
    for key, files in sorted(cases.items()):
        words = dict(key)
        name = "_".join([words.pop("subject"), *words.values()])
        yield Case(name, whose[key], {stream: Image(files[stream]) for stream in root.patterns if stream in files})


def _by_name(root: Root) -> Iterator[Case | Left]:
    """BIDS, or words in the names of files; files of one folder (of one session) that agree but for that word."""
    cases: dict[tuple[str, str], dict[str, str]] = {}
    names = root.files("**/*")
    if not any(name.lower().endswith(_VOLUMES) for name in names) and not (root.closed or root.outside):
        expected = ", ".join(_VOLUMES)
        raise UserError(f"{root.path}: expected volumes, whose names end in {expected}, found {root.kinds()}")
    for name in names:
        if not name.lower().endswith(_VOLUMES) or (root.path / name).is_dir():
            continue
        if name.startswith("derivatives/"):
            yield Left(name, "derived (BIDS derivatives)")
            continue
        stem = re.sub(r"(\.nii|\.mg[hz]|\.mh[ad]|\.n(r|h)?rrd)?(\.gz)?$", "", name.rpartition("/")[2], flags=re.I)
        if _MASKS & {word.lower() for word in re.split(r"[-_. ]", stem)}:
            yield Left(name, "a mask, by its name")
            continue
        found = _stream(stem)
        if found is None:
            yield Left(name, "its name says no modality (--files STREAM=PATTERN does)")
            continue
        stream, rest = found
        folder = name.rpartition("/")[0]
        if bids := re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", name):
            session = re.search(r"ses-[A-Za-z0-9]+", name)
            key = (bids[1], f"{bids[1]}_{session[0]}" if session else bids[1])
        elif folder:
            key = (folder.split("/")[0], folder.replace("/", "_"))
        else:
            key = (rest, rest)
        if stream in cases.setdefault(key, {}):
            yield Left(name, f"a second {stream} for one study")
        else:
            cases[key][stream] = name
    for (subject, study), files in sorted(cases.items()):
        yield Case(study, subject, {s: Image(files[s]) for s in sorted(files, key=_ORDER.index)})


def _stream(stem: str) -> tuple[str, str] | None:
    """(stream that the name of a file says, the name without that word)."""
    suffix = stem.rpartition("_")[2]
    if stem.startswith("sub-"):
        contrast = suffix == "T1w" and re.search(r"_ce-(?!none)", stem)
        stream = "mri:t1ce" if contrast else _BIDS.get(suffix)
        return (stream, "") if stream else None
    words = re.split(r"[-_. ]", stem)
    fits = [n for n, word in enumerate(words) if word.lower() in _WORDS]
    if not fits:
        return None
    rest = "_".join(word for n, word in enumerate(words) if n != fits[-1])
    return _WORDS[words[fits[-1]].lower()], rest or stem


def _dicom(root: Root) -> Iterator[Case | Left]:
    """A folder in the root is a subject, whatever is in it. Series of one frame of reference (one session, as a rule)
    are a case; a second series of the same kind in it is a case of its own. Which contrast an MRI has is said by the
    series' description or its times, or not at all (`mri`)."""
    names = root.files("*")
    folders = [name for name in names if (root.path / name).is_dir()]
    loose = [name for name in names if name not in folders and dicom.is_dicom(root.path / name)]
    if not folders:
        found = f"{len(loose)} DICOM files" if loose else "no folder"
        raise UserError(f"{root.path}: expected a folder for each subject, with its DICOM files in it, found {found}")
    yield from [Left(name, "a DICOM file in no subject's folder") for name in loose]
    for subject in folders:
        if subject in root.closed:
            continue
        broken: list[Path] = []
        try:
            found = dicom.series(root.path / subject, MOST_VOXELS, broken)
        except UserError:
            yield Left(subject, "its folder cannot be looked through (its rights, or too many files in it)")
            continue
        yield from [Left(path.relative_to(root.path).as_posix(), "a damaged DICOM file") for path in broken]
        frames: dict[str, dict[str, Image]] = {}
        alone: list[tuple[str, str, Image]] = []
        for number, series in enumerate(found):
            stream = _stream_of(series)
            if stream is None or series.localizer:
                why = "a localizer" if series.localizer else f"a series of modality {series.modality or 'unknown'}"
                yield Left(f"{subject}/{number}", why)
                continue
            image = _series(root, subject, series)
            together = frames.setdefault(series.frame or f"no frame {number}", {})
            if stream in together:
                alone.append((f"{subject}-{stream.replace(':', '-')}-{number}", stream, image))
            else:
                together[stream] = image
        if not (found or broken):
            yield Left(subject, "a folder without DICOM images")
        for n, images in enumerate(frames.values()):
            order = sorted(images, key=_ORDER.index)
            yield Case(subject if len(frames) == 1 else f"{subject}-{n}", subject, {s: images[s] for s in order})
        for name, stream, image in alone:
            yield Case(name, subject, {stream: image})


def _stream_of(series: dicom.Series) -> str | None:
    if series.modality in ("CR", "DX", "DR"):
        return "xray"
    modality = next((m for m in MODALITIES.values() if m.dicom and m.dicom == series.modality), None)
    if modality is None:
        return None
    return f"{modality.name}:{series.contrast}" if series.contrast in modality.contrasts else modality.name


def _series(root: Root, subject: str, series: dicom.Series) -> Image:
    if len(series.files) == 1:
        return Image(series.files[0].relative_to(root.path).as_posix())
    return Image(subject, series.uid)


def _images(root: Root) -> Iterator[Case | Left]:
    """`metadata.csv` or `.jsonl` beside pictures, or in a folder for each split, as Hugging Face's image folders have
    it: file_name, text, and, where there are, modality (or image_modality), subject (or patient_id), split. MINIM's
    path, Text, modality as well. Where no subject is named, each picture is taken for another's."""
    tables = root.files("**/metadata.jsonl") + root.files("**/metadata.[ct]sv") or root.files("*.csv")[:1]
    if not tables:
        raise UserError(f"{root.path}: no metadata.csv or metadata.jsonl in it; one row a picture: file_name, modality")
    for table in tables:
        folder = table.rpartition("/")[0]
        above = next((w for w in folder.lower().split("/") if _SPLITS.get(w, w) in SPLITS), "")
        for number, row in enumerate(_rows(root, table), 1):
            lower = {str(k).lower(): str(v) for k, v in row.items() if v is not None}
            named = _first(lower, "file_name", "path", "image")
            if not named or format_of(named) is None:
                yield Left(f"{table}:{number}", "no file of a known format named (file_name)")
                continue
            file = next((f for f in (f"{folder}/{named}" if folder else named, named) if root.has(f)), None)
            if file is None:
                yield Left(named, "its file is missing")
                continue
            stream = _said(_first(lower, "modality", "image_modality") or next(iter(root.patterns), ""))
            if stream is None:
                yield Left(file, "of no modality that is known (a column `modality`, or --files STREAM=*)")
                continue
            subject = _first(lower, "subject", "patient_id", "subject_id") or file
            split = _first(lower, "split").lower() or above
            split = _SPLITS.get(split, split)
            text = _first(lower, "text", "caption", "report")
            name = file.rpartition(".")[0]
            yield Case(name, subject, {stream: Image(file)}, split if split in SPLITS else "", text, "caption")


def _rows(root: Root, table: str) -> Iterator[dict]:
    if not table.endswith(".jsonl"):
        yield from root.table(table)
        return
    for number, line in enumerate(root.text(table).splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{root.path / table}:{number}: not JSON ({type(error).__name__})") from None
        if row is not None and not isinstance(row, dict):
            raise UserError(f"{root.path / table}:{number}: expected a JSON object, found {type(row).__name__}")
        if row:
            yield row


def _first(row: dict[str, str], *names: str) -> str:
    return next((row[name].strip() for name in names if row.get(name, "").strip()), "")


def _said(words: str) -> str | None:
    """The stream that a table means: "Chest X-ray", "brain MRI T1", "mri_t2", "CT"."""
    if exact := stream_of(words.lower().replace(":", "_")):
        return exact
    found = re.split(r"[-_: ]+", words.lower().replace("x-ray", "xray").replace("x ray", "xray"))
    contrast = next((_WORDS[word] for word in found if _WORDS.get(word, "").startswith("mri:")), None)
    return contrast or next((s for word in found if (s := _WORDS.get(word) or _SHOWN.get(word))), None)


_YOURS = "Your own files: what may be done with them is yours to know; they are treated as not open."


def _own(name: str, title: str, find, streams: tuple[str, ...]) -> Adapter:
    return Adapter(name, title, "not stated", _YOURS, find, streams)


ADAPTERS = (
    _own("folder:nifti", "A folder of NIfTI, MGH, MetaImage or NRRD volumes", _nifti, ("ct", "mri")),
    _own("folder:dicom", "A folder of DICOM, a folder a subject", _dicom, ("ct", "mri", "xray")),
    _own("folder:images", "A folder of pictures with metadata.csv or .jsonl", _images, ("ct", "mri", "xray", "text")),
)
