"""Sets of X-rays and texts, as they are downloaded, made into manifests: what is kept, what is left out and why,
whether pixels and texts are those of the source, and that nothing of a patient shows where it must not."""

import json
import re
import stat
from collections import Counter
from pathlib import Path

import look_alikes
import numpy as np
import pydicom
import pytest
from PIL import Image

from medm2g_jax import cli, prepare
from medm2g_jax.data.adapters import adapter_of
from medm2g_jax.data.adapters.openi import _parsed
from medm2g_jax.data.case import Left, Root
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.errors import UserError

KEPT = prepare.Order(workers=1, keep_ids=True)
HIDDEN = prepare.Order(workers=1)


class Made:
    """A prepared set, opened."""

    def __init__(self, name: str, root: Path, out: Path, order: prepare.Order = KEPT, **options: str):
        self.said: list[str] = []
        file = prepare.prepare(adapter_of(name), root, out, order, None, self.said.append, options)
        self.out = out
        self.rows = {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}
        self.rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        self.reasons = dict(Counter(one["reason"] for one in self.rejected))
        self.statistics = json.loads((out / "statistics.json").read_text())
        self.source = Manifest(out, 32, template_text=True)

    def splits(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for row in self.rows.values():
            found[row["split"]].append(row["id"])
        return {split: sorted(names) for split, names in found.items()}

    def pixels(self, row: str, stream: str = "xray") -> np.ndarray:
        return np.asarray(Image.open(self.out / self.rows[row]["images"][stream]))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# MIMIC-CXR

FIRST = "deadbee0-00000000-00000000-7bc16630-4e384014"
CLEAR = (
    "findings: The lungs are clear. No pleural effusion or pneumothorax. "
    "impression: 1. No acute process. 2. Stable 2.5 cm nodule."
)


def mimic_id(study: int, image: int = 0) -> str:
    return f"deadbee{study}-{study:08x}-{image:08x}-7bc16630-4e384014"


@pytest.mark.parametrize("packed, apart", [(True, False), (False, True)])
def test_mimic(tmp_path, packed, apart):
    root = look_alikes.mimic_cxr(tmp_path / "root", packed, apart=apart)
    made = Made("mimic_cxr", root, tmp_path / "out")
    assert made.splits() == {
        "train": [mimic_id(n) for n in range(4)],
        "val": [mimic_id(4)],
        "test": [mimic_id(7)],
    }
    assert made.reasons == {
        "a lateral view": 2,
        "a view that is neither PA, AP nor lateral": 1,
        "its image is missing": 1,
        "its report is missing": 1,
    }
    texts = {n: made.rows[mimic_id(n)].get("text") for n in (0, 1, 2, 3, 4, 7)}
    assert texts == {
        0: CLEAR,
        1: "Mild edema.",
        2: "Heart size is normal. Lungs clear.",
        3: CLEAR.replace("clear", "hazy"),  # without its addendum
        4: None,
        7: CLEAR.replace("Stable", "New"),
    }
    assert made.rows[FIRST]["info"] == {"view": "PA", "labels": {"Cardiomegaly": 1.0, "Edema": -1.0}}
    assert made.rows[FIRST]["subject"] == "p10000032"
    file = root / f"files/p10/p10000032/s50414260/{FIRST}.jpg"
    np.testing.assert_array_equal(made.pixels(FIRST), np.asarray(Image.open(file)))
    assert made.statistics["rows"] == {"train": 4, "val": 1, "test": 1}
    assert made.statistics["cases"] == {"found": 6, "left_out_before": 4}  # the report that is missing takes no image
    assert made.statistics["rejected"]["text: its report is missing"] == 1
    assert made.statistics["texts"]["rows"] == {"train": 4, "val": 0, "test": 1}
    assert len(made.source.records) == 6 and not made.source.open


def test_mimic_views_and_cleaning_are_chosen(tmp_path):
    root = look_alikes.mimic_cxr(tmp_path / "root")
    order = prepare.Order(workers=1, keep_ids=True, clean="r2gen")
    made = Made("mimic_cxr", root, tmp_path / "out", order, views="all")
    assert len(made.rows) == 9 and made.reasons["report empty after cleaning (r2gen)"] == 2
    both = [made.rows[mimic_id(0, n)] for n in (0, 1)]  # two views of a study share its report
    assert {row["text"] for row in both} == {"the lungs are clear . no pleural effusion or pneumothorax ."}
    assert [row["info"]["view"] for row in both] == ["PA", "LATERAL"]
    assert "- option views: `all`" in (made.out / "README.md").read_text()
    with pytest.raises(UserError, match="was begun with option views 'all', now it is 'frontal'"):
        Made("mimic_cxr", root, tmp_path / "out", order)
    with pytest.raises(UserError, match="--option views=side: expected one of frontal, lateral, all"):
        Made("mimic_cxr", root, tmp_path / "o2", views="side")
    with pytest.raises(UserError, match="--option faces=x: mimic_cxr has no such option; its options: views"):
        Made("mimic_cxr", root, tmp_path / "o2", faces="x")


def test_mimic_dicom(tmp_path):
    root = look_alikes.mimic_cxr(tmp_path / "root", ending=".dcm")
    made = Made("mimic_cxr", root, tmp_path / "out")
    assert len(made.rows) == 6
    file = root / f"files/p10/p10000032/s50414260/{FIRST}.dcm"
    np.testing.assert_array_equal(made.pixels(FIRST), pydicom.dcmread(file).pixel_array)
    assert made.pixels(FIRST).dtype == np.uint16
    (root / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    made = Made("mimic_cxr", root, tmp_path / "declared")
    assert made.statistics["subjects"] == {"train": 2, "val": 1, "test": 1}
    (root / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(UserError, match="no mimic-cxr-2.0.0-metadata.csv.*--option views=all"):
        Made("mimic_cxr", root, tmp_path / "o2")
    assert len(Made("mimic_cxr", root, tmp_path / "o3", views="all").rows) == 9
    (root / "cxr-record-list.csv.gz").unlink()
    with pytest.raises(UserError, match="expected mimic-cxr-.*-split.csv.* or cxr-record-list.csv.* found .*files"):
        Made("mimic_cxr", root, tmp_path / "o4", views="all")


def hostile(root: Path, tmp_path: Path) -> None:
    """Add to a MIMIC look-alike what leads out of it."""
    secret = look_alikes.save_picture(tmp_path / "outside" / "secret.jpg", look_alikes.picture("secret", (40, 40)))
    with (root / "mimic-cxr-2.0.0-split.csv").open("a") as file:
        file.write("../../../../outside/secret,50414260,10000032,train\n")
        file.write("deadbeef-00000000-00000000-00000000-00000000,../../outside,10000032,train\n")
        file.write("deadbeef-00000000-00000000-00000000-00000001,50414260,10000032,train\n")
        file.write("deadbeef-00000000-00000000-00000000-00000002,50414260,10000032,train\n")
        file.write("deadbeef\n")
    with (root / "mimic-cxr-2.0.0-metadata.csv").open("a") as file:
        for n in (1, 2):
            file.write(f"deadbeef-00000000-00000000-00000000-0000000{n},10000032,50414260,,PA,80\n")
    study = root / "files/p10/p10000032/s50414260"
    (study / "deadbeef-00000000-00000000-00000000-00000001.jpg").symlink_to(secret)
    (study / "deadbeef-00000000-00000000-00000000-00000002.jpg").write_bytes(b"\xff\xd8\xff nothing more")


def test_what_leads_out_of_the_root_is_never_read(tmp_path):
    root = look_alikes.mimic_cxr(tmp_path / "root", packed=False)
    hostile(root, tmp_path)
    report = root / "files/p10/p10000764/s50414262.txt"
    (tmp_path / "outside" / "report.txt").write_text(" FINDINGS: secret words")
    report.unlink()
    report.symlink_to(tmp_path / "outside" / "report.txt")
    made = Made("mimic_cxr", root, tmp_path / "out")
    assert made.reasons["its row has no ids as MIMIC-CXR has them"] == 3
    assert made.reasons["its image lies outside of the root (a link, or a path with ..)"] == 1
    assert made.reasons["its report is missing"] == 2
    assert sum(n for reason, n in made.reasons.items() if reason.startswith("not a whole JPEG file")) == 1
    assert len(made.rows) == 6 and "secret" not in (made.out / "manifest.jsonl").read_text()


@pytest.mark.parametrize("ending", [".jpg", ".dcm"])
def test_nothing_of_a_patient_shows(tmp_path, capsys, ending):
    root = look_alikes.mimic_cxr(tmp_path / "root", packed=False, ending=ending)
    hostile(root, tmp_path)
    arguments = ["mimic_cxr", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert cli.main(["prepare", *arguments]) in (None, 0)
    shown = "".join(capsys.readouterr())
    out = tmp_path / "out"
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    for name in ("rejected.jsonl", "statistics.json", "README.md", "preview.png", "splits/train.txt"):
        shown += (out / name).read_bytes().decode("latin-1")
    held = (out / "manifest.jsonl").read_text()
    for secret in look_alikes.SECRETS:
        assert secret not in shown, secret
        assert secret not in re.sub(r'"text": ".*?"', "", held), secret
    assert "lungs" not in shown and "files/p1" not in shown
    ids = [json.loads(line)["id"] for line in held.splitlines()]
    assert all(re.fullmatch(r"[0-9a-f]{16}", name) for name in ids)
    assert not any(secret in name for secret in look_alikes.SECRETS for name in content(out))
    subjects = {json.loads(line)["subject"] for line in held.splitlines()}
    assert len(subjects) == 4


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    """And a rerun writes the same bytes, whatever the order of the folder."""
    root = look_alikes.mimic_cxr(tmp_path / "root")
    out, cut, done = tmp_path / "out", prepare.cut, []

    def killed(case, how):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(case.id)
        return cut(case, how)

    monkeypatch.setattr(prepare, "cut", killed)
    with pytest.raises(KeyboardInterrupt):
        Made("mimic_cxr", root, out, HIDDEN)
    journal = out / ".prepare" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    monkeypatch.setattr(prepare, "cut", lambda case, how: done.append(case.id) or cut(case, how))
    first = Made("mimic_cxr", root, out, HIDDEN)
    assert len(done) == 3 + 4 and len(first.rows) == 6  # the third's line was cut off
    assert any("2 cases were cut by an earlier run; 4 are left" in line for line in first.said)
    before = content(out)
    again = Made("mimic_cxr", root, out, HIDDEN)
    assert len(done) == 7 and content(out) == before
    next((out / "images").rglob("*.png")).unlink()
    assert Made("mimic_cxr", root, out, HIDDEN).rows == again.rows == first.rows
    assert len(done) == 8 and content(out).keys() == before.keys()


def test_the_order_of_a_folder_decides_nothing(tmp_path, monkeypatch):
    root = look_alikes.openi_nlm(tmp_path / "root")
    Made("openi", root, tmp_path / "a")
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: reversed(list(glob(self, pattern))))
    Made("openi", root, tmp_path / "b")
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} <= {".prepare/journal.jsonl", "preview.png"}


# OpenI


def test_openi_of_the_nlm(tmp_path):
    root = look_alikes.openi_nlm(tmp_path / "root")
    made = Made("openi", root, tmp_path / "out", HIDDEN)  # open: its ids stay
    assert made.rows["CXR1_1_IM-0001-3001"]["text"] == (
        "findings: The cardiac silhouette is normal. XXXX are clear. impression: Normal chest x-XXXX."
    )
    texts = {name: row["text"] for name, row in made.rows.items()}
    assert texts["CXR2_1_IM-0002-1001"] == "No acute disease."
    assert texts["CXR3"] == "findings: Stable 2.5 cm nodule. impression: Nodule."  # a report without images
    assert texts["CXR4_1_IM-0004-1001"].endswith("impression: No acute <disease> & more.")
    assert len(texts) == 5 and {row["subject"] for row in made.rows.values()} == {"CXR1", "CXR2", "CXR3", "CXR4"}
    assert made.reasons == {"its XML cannot be read, or is no report": 2, "its image is missing": 1}
    assert made.rows["CXR3"]["info"] == {"mesh": ["normal"]} and "images" not in made.rows["CXR3"]
    file = root / "NLMCXR_png/CXR1_1_IM-0001-4001.png"
    np.testing.assert_array_equal(made.pixels("CXR1_1_IM-0001-4001"), np.asarray(Image.open(file)))
    assert made.source.open and made.statistics["subjects"] == {"train": 2, "val": 1, "test": 1}
    r2gen = Made("openi", root, tmp_path / "r2gen", prepare.Order(workers=1, clean="r2gen"))
    assert r2gen.rows["CXR3"]["text"] == "stable 25 cm nodule ."
    assert r2gen.reasons["report empty after cleaning (r2gen)"] == 1 and len(r2gen.rows) == 5


def test_openi_of_kaggle(tmp_path):
    made = Made("openi", look_alikes.openi_kaggle(tmp_path / "root"), tmp_path / "out")
    assert sorted(made.rows) == ["1_IM-0001-3001", "2_IM-0002-1001", "4_IM-0004-1001"]
    assert made.reasons == {
        "a lateral view": 1,
        "its image is missing": 1,
        "no report has its uid": 1,
        "a report without images": 1,
    }
    assert made.rows["1_IM-0001-3001"]["info"] == {"view": "frontal", "mesh": ["normal", "Lung/x"]}
    assert len(Made("openi", tmp_path / "root", tmp_path / "all", views="all").rows) == 4


def test_openi_of_r2gen(tmp_path):
    root = look_alikes.openi_r2gen(tmp_path / "root")
    made = Made("openi", root, tmp_path / "out", prepare.Order(workers=1, clean="r2gen"))
    assert {split: len(names) for split, names in made.splits().items()} == {"train": 8, "val": 2, "test": 2}
    assert made.rows["CXR10_IM-0000_0"]["text"] == "the heart is normal in size . no effusion xxxx 25 cm ."
    assert made.reasons == {}
    (root / "annotation.json").write_text('{"train": [{"id": 1}]}')
    with pytest.raises(UserError, match="annotation.json: expected train, val and test"):
        Made("openi", root, tmp_path / "o2")
    with pytest.raises(UserError, match="expected ecgen-radiology.*indiana_reports.csv.*annotation.json"):
        Made("openi", tmp_path / "out" / "images", tmp_path / "o3")


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
        '<!DOCTYPE a [<!ENTITY x "1"><!ENTITY y "&x;&x;&x;&x;">]><a>&y;</a>',
        '<!DOCTYPE a SYSTEM "http://127.0.0.1/x.dtd"><a/>',
    ],
)
def test_xml_with_a_document_type_is_refused(text):
    with pytest.raises(ValueError, match="a document type"):
        _parsed(text)


# The others


def test_medicat(tmp_path):
    root = look_alikes.medicat(tmp_path / "root")
    made = Made("medicat", root, tmp_path / "out")
    streams = {next(iter(row["images"])): row["text"] for row in made.rows.values()}
    assert streams == {
        "ct": "Axial CT of the chest shows a mass.",
        "mri_t2": "T2-weighted image shows a bright lesion.",
        "mri_t1ce": "Post-contrast T1-weighted MRI of the brain.",
        "xray": "Chest X-ray with a right-sided effusion.",
        "mri": "MRI of the knee, T1 and T2.",
    }
    assert made.reasons == {
        "its line is no figure": 1,
        "filter 1: not flagged as radiology": 1,
        "filter 2: no caption": 1,
        "filter 3: its caption names neither CT, MRI nor X-ray": 2,
        "filter 4: its caption names several modalities": 1,
        "filter 5: of several parts (--option compound=keep)": 1,
        "its image is missing": 1,
    }
    licences = Counter(row["license"] for row in made.rows.values())
    assert licences == {"cc-by": 2, "cc-by-nd": 1, "cc-by-nc": 1, "not stated": 1}
    assert all(row["text_origin"] == "caption" and len(row["subject"]) == 40 for row in made.rows.values())
    colour = next(name for name, row in made.rows.items() if "xray" in row["images"])
    file = root / "release/figures" / f"{'c' * 40}_1-Figure1-1.png"
    np.testing.assert_array_equal(made.pixels(colour), np.asarray(Image.open(file).convert("L")))
    papers = {row["subject"]: set() for row in made.rows.values()}
    for row in made.rows.values():
        papers[row["subject"]].add(row["split"])
    assert all(len(splits) == 1 for splits in papers.values())
    assert len(Made("medicat", root, tmp_path / "all", compound="keep").rows) == 6


@pytest.mark.parametrize("kaggle, old", [(False, False), (True, True)])
def test_chestxray14(tmp_path, kaggle, old):
    root = look_alikes.chestxray14(tmp_path / "root", kaggle, old)
    made = Made("chestxray14", root, tmp_path / "out")
    assert made.splits()["test"] == ["00000004_000"] and len(made.rows) == 4
    assert made.reasons == {"its image is missing": 1, "in neither official list": 1}
    assert len(made.splits()["val"]) in (1, 2)  # one of the two patients of the official train and val
    texts = {name: row["text"] for name, row in made.rows.items()}
    assert texts == {
        "00000001_000": "PA chest X-ray, male, 57 years. Findings: cardiomegaly.",
        "00000001_001": "AP chest X-ray, male, 58 years. Findings: cardiomegaly, pleural thickening.",
        "00000002_000": f"PA chest X-ray, female{'' if old else ', 80 years'}. No finding.",
        "00000004_000": "AP chest X-ray, male, 82 years. Findings: mass.",
    }
    assert {row["text_origin"] for row in made.rows.values()} == {"template"}
    assert made.rows["00000001_001"]["info"] == {"view": "AP", "labels": ["Cardiomegaly", "Pleural_Thickening"]}
    np.testing.assert_array_equal(
        made.pixels("00000001_001"), look_alikes.picture("00000001_001.png", (64, 64))
    )  # of RGBA


@pytest.mark.parametrize("inner", ["", "CheXpert-v1.0-small"])
def test_chexpert(tmp_path, inner):
    root = look_alikes.chexpert(tmp_path / "root")
    look_alikes.save_picture(tmp_path / "outside.jpg", look_alikes.picture("outside", (40, 40)))
    made = Made("chexpert", root / inner, tmp_path / "out")
    assert made.reasons == {
        "a lateral view": 1,
        "its image is missing": 1,
        "its row names no image as CheXpert has them": 1,
    }
    assert {split: len(names) for split, names in made.splits().items()} == {"train": 2, "val": 1, "test": 1}
    (test,) = (row for row in made.rows.values() if row["split"] == "test")
    assert test["subject"] == "patient64541" and "text" not in test
    assert test["info"]["labels"] == {"No Finding": 0.0, "Cardiomegaly": 1.0, "Pleural Effusion": 0.0}
    assert test["info"]["view"] == "PA"


def test_siim(tmp_path):
    made = Made("siim", look_alikes.siim(tmp_path / "root"), tmp_path / "out")
    names = [f"1.2.276.0.7230010.3.1.4.{n}" for n in range(4)]
    assert sorted(made.rows) == names
    found = [(made.rows[name]["info"]["pneumothorax"], made.rows[name]["info"]["pieces"]) for name in names]
    assert found == [(True, 2), (False, 0), (False, 0), (True, 1)]
    assert made.reasons == {
        "its image is missing": 1,
        "no row of the table is about it": 1,
        "of the challenge's test, without labels": 1,
    }
    np.testing.assert_array_equal(made.pixels(names[0]), look_alikes.picture(names[0], (64, 64)))


def test_rsna(tmp_path):
    made = Made("rsna", look_alikes.rsna(tmp_path / "root"), tmp_path / "out")
    names = [f"0004cfab-14fd-4e49-80ba-63a80b6bddd{n}" for n in range(3)]
    assert sorted(made.rows) == names
    boxes = [[264.0, 152.0, 213.0, 379.0], [562.0, 152.0, 256.0, 453.0]]
    assert made.rows[names[0]]["info"] == {"pneumonia": True, "boxes": boxes, "class": "Lung Opacity"}
    assert made.rows[names[2]]["info"] == {"pneumonia": False, "boxes": []}
    np.testing.assert_array_equal(made.pixels(names[1]), look_alikes.picture(names[1], (64, 64)))
    np.testing.assert_array_equal(made.pixels(names[2]), 255 - look_alikes.picture(names[2], (64, 64)))
    assert made.reasons == {
        "its image is missing": 1,
        "its image lies outside of the root (a link, or a path with ..)": 1,
        "of the challenge's test, without labels": 1,
    }


@pytest.mark.parametrize("name", ["mimic_cxr", "medicat", "openi", "chestxray14", "chexpert", "siim", "rsna"])
def test_an_empty_folder_is_said_in_one_line(tmp_path, name):
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'root'))}: [^\n]*$"):
        Made(name, tmp_path / "root", tmp_path / "out")


WRITERS = {
    "mimic_cxr": look_alikes.mimic_cxr,
    "medicat": look_alikes.medicat,
    "openi": look_alikes.openi_nlm,
    "openi kaggle": look_alikes.openi_kaggle,
    "openi r2gen": look_alikes.openi_r2gen,
    "chestxray14": look_alikes.chestxray14,
    "chexpert": look_alikes.chexpert,
    "siim": look_alikes.siim,
    "rsna": look_alikes.rsna,
}


def damaged(content: bytes, how: int, rng: np.random.Generator) -> bytes:
    if how == 0:
        return content[: rng.integers(len(content))]
    if how == 1:
        out = bytearray(content)
        for at in rng.integers(len(out), size=20):
            out[at] = rng.integers(256)
        return bytes(out)
    if how == 2:
        return content.replace(b"\n", b"\0\n").replace(b",", b",,", 3)
    if how == 3:
        return b'"' * 200_000 + content
    return (b"", rng.bytes(500), b"[" * 100_000, b"\x1f\x8b" + content)[rng.integers(4)]


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_tables_are_an_error_of_one_line_or_rows_that_are_left_out(tmp_path, name):
    root, rng = WRITERS[name](tmp_path / "root"), np.random.default_rng(len(name))
    adapter = adapter_of(name.split()[0])
    kinds = (".csv", ".gz", ".jsonl", ".json", ".txt", ".xml")
    tables = sorted((p for p in root.rglob("*") if p.suffix in kinds), key=lambda p: (len(p.parts), p))
    errors = 0
    for path in tables[:4]:
        whole = path.read_bytes()
        for how in range(5):
            for _ in range(2):
                path.write_bytes(damaged(whole, how, rng))
                try:
                    for one in adapter.find(Root(root, options=adapter.chosen({}))):
                        assert isinstance(one, Left) or isinstance(one.text, str)
                except UserError as error:
                    errors += 1
                    assert "\n" not in str(error) and str(root) in str(error)
        path.unlink()
        path.mkdir()  # a folder of that name
        try:
            list(adapter.find(Root(root, options=adapter.chosen({}))))
        except UserError as error:
            assert "\n" not in str(error)
        path.rmdir()
        path.write_bytes(whole)
    assert errors or name in ("medicat", "openi")  # a line, or a report, is left out
