"""Data sets as they lie on a disk after the download, in their exact layout with the traps they are known for; tiny,
drawn from a seed, of nobody. Each writer takes a folder that it makes, and fills it; nothing of the package is in here.

Names, ids and words that stand for a person's hold one of SECRETS: where nothing of a patient may show, none is found.
"""

import csv
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
from dicom_files import dataset, save
from PIL import Image

SECRETS = ("10000032", "10000764", "11000183", "11001469", "5041426", "Zanzibar", "Doe^Jane", "deadbee")


def picture(seed: int | str, shape: tuple[int, int], kind=np.uint8) -> np.ndarray:
    """An image of its own: smooth, no two alike."""
    rng = np.random.default_rng(zlib.crc32(str(seed).encode()))
    small = Image.fromarray(rng.integers(0, 256, (6, 5)).astype(np.float32)).resize(shape[::-1], Image.BILINEAR)
    return (np.asarray(small) * (np.iinfo(kind).max / 255)).astype(kind)


def save_picture(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def table(path: Path, rows: list[list], packed: bool = False) -> None:
    """A table of comma-separated values, its first row the names of columns; `packed` by gzip, as <path>.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        with gzip.open(f"{path}.gz", "wt", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def film(path: Path, pixels: np.ndarray, **tags) -> Path:
    """A chest X-ray as DICOM, with a patient's name in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = dict(Modality="CR", FrameOfReferenceUID=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.1")
    return save(dataset(pixels, **(about | tags)), path)


# Blank lines hold a blank, as they do in the set.
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough and Zanzibar fever.

 COMPARISON:  ___.

 FINDINGS:

 {findings}

 IMPRESSION:

 {impression}
""".replace("\n\n", "\n \n")
ADDENDUM = """ ______________________________________________________________________________
                                 FINAL ADDENDUM
 Dr. Zanzibar was told by telephone.
"""


def mimic_cxr(folder: Path, packed: bool = True, ending: str = ".jpg", apart: bool = False) -> Path:
    """Two groups of patients, two patients each, two studies each.

    One study is lateral alone, one has two images, one image has no view, one is in the split and not on the disk; one
    report has no FINDINGS, one is a bare paragraph, one has an addendum, one is missing.

    Args:
      packed: tables as .csv.gz, else unpacked.
      ending: .dcm for MIMIC-CXR's own images.
      apart: reports in a folder of their own.
    """
    clear = "The lungs are clear.\n No pleural effusion or pneumothorax."
    whole = REPORT.format(findings=clear, impression="1. No acute process.\n 2. Stable 2.5 cm nodule.")
    without = REPORT.format(findings="", impression="Mild edema.").replace(" FINDINGS:\n", "")
    bare = "                                 FINAL REPORT\n CHEST, TWO VIEWS\n \n Heart size is normal.  Lungs clear.\n"
    subjects, parts = SECRETS[:4], ("train", "train", "validate", "test")
    reports = [whole, without, bare, whole.replace("clear", "hazy") + ADDENDUM, None, whole.replace("2.5", "3.5")]
    reports += [whole.replace("1. No", "1. Probably no"), whole.replace("Stable", "New")]
    views = [["PA", "LATERAL"], ["AP"], ["PA"], ["AP"], ["PA"], ["LL"], [""], ["PA", "AP"]]
    split = [["dicom_id", "study_id", "subject_id", "split"]]
    about = [["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"]]
    labels = [["subject_id", "study_id", "Cardiomegaly", "Edema", "No Finding"]]
    records = [["subject_id", "study_id", "dicom_id", "path"]]
    for first, (subject, part) in enumerate(zip(subjects, parts, strict=True)):
        for n in (2 * first, 2 * first + 1):
            study, place = f"5041426{n}", f"files/p{subject[:2]}/p{subject}"
            labels.append([subject, study, "1.0", "-1.0", ""])
            if reports[n] is not None:
                text = (folder / "mimic-cxr-reports" if apart else folder) / place / f"s{study}.txt"
                text.parent.mkdir(parents=True, exist_ok=True)
                text.write_text(reports[n])
            for m, view in enumerate(views[n]):
                image = f"deadbee{n}-{n:08x}-{m:08x}-7bc16630-4e384014"
                split.append([image, study, subject, part])
                about.append([image, subject, study, "CHEST (PA AND LAT)", view, "80"])
                path = f"{place}/s{study}/{image}{ending}"
                records.append([subject, study, image, path.replace(ending, ".dcm")])
                if n == 7 and m == 1:
                    continue  # in the split, and not on the disk
                if ending == ".jpg":
                    save_picture(folder / path, picture(image, (80, 64)), quality=95)
                else:
                    film(folder / path, picture(image, (80, 64), np.uint16) // 16, BitsStored=12, PatientID=subject)
    table(folder / "mimic-cxr-2.0.0-split.csv", split, packed)
    table(folder / "mimic-cxr-2.0.0-metadata.csv", about, packed)
    table(folder / "mimic-cxr-2.0.0-chexpert.csv", labels, packed)
    if ending == ".dcm":
        table(folder / "cxr-record-list.csv", records, packed)
    return folder


def medicat(folder: Path) -> Path:
    """A figure for each filter and each modality; one is of colour, one has no file."""
    captions = [
        ("a" * 40, "2-Figure1-1.png", "Figure 1. Axial CT of the chest shows a mass.", True, "cc-by"),
        ("a" * 40, "3-Figure2-1.png", "Figure 2. T2-weighted image shows a bright lesion.", True, "cc-by"),
        ("b" * 40, "1-Figure1-1.png", "Fig. 1: Post-contrast T1-weighted MRI of the brain.", True, "cc-by-nd"),
        ("c" * 40, "1-Figure1-1.png", "Chest X-ray with a right-sided effusion.", True, None),
        ("d" * 40, "1-Figure1-1.png", "Histology of the resected mass.", False, "cc-by"),
        ("d" * 40, "1-Figure2-1.png", "Figure 2. (A) CT before and (B) CT after therapy.", True, "cc-by"),
        ("e" * 40, "1-Figure1-1.png", "CT and MRI of the liver.", True, "cc-by"),
        ("e" * 40, "1-Figure2-1.png", "Figure 2. Photograph of the patient.", True, "cc-by"),
        ("f" * 40, "1-Figure1-1.png", None, True, "cc-by"),
        ("f" * 40, "1-Figure2-1.png", "CT of the abdomen.", True, "cc-by"),
        ("f" * 40, "1-Figure3-1.png", "MRI of the knee, T1 and T2.", True, "cc-by-nc"),
        ("f" * 40, "1-Figure4-1.png", "Optical coherence tomography (OCT).", True, "cc-by"),
    ]
    lines = []
    for number, (paper, figure, caption, radiology, licence) in enumerate(captions):
        row = {"pdf_hash": paper, "fig_key": "Figure 1", "fig_uri": figure, "s2_caption": caption}
        row |= {"s2orc_caption": None, "s2orc_references": None, "radiology": radiology, "scope": "x"}
        row |= {"predicted_type": "Medical images", "oa_info": {"doi": "", "oa": {"is_oa": True, "license": licence}}}
        lines.append(json.dumps(row))
        if number != 9:
            grey = picture(f"medicat {number}", (40, 48))
            pixels = np.stack([grey, grey, grey // 2], -1) if number == 3 else grey
            save_picture(folder / "release" / "figures" / f"{paper}_{figure}", pixels)
    lines.insert(5, "{not a line")
    name = "s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
    (folder / "release" / name).write_text("\n".join(lines) + "\n")
    return folder


STUDIES = {
    "1": ("The cardiac silhouette is normal. XXXX are clear.", "Normal chest x-XXXX.", ("0001-3001", "0001-4001")),
    "2": ("", "No acute disease.", ("0002-1001",)),
    "3": ("Stable 2.5 cm nodule.", "Nodule.", ()),
    "4": ("Low volumes. No effusion.", "No acute <disease> & more.", ("0004-1001",)),
}


def openi_nlm(folder: Path) -> Path:
    """Four reports: of two images, without findings, without images, and one whose second image is missing; beside them
    one that makes entities and one that is cut off."""
    for uid, (findings, impression, images) in STUDIES.items():
        parts = {"COMPARISON": "", "INDICATION": f"XXXX-year-old {uid}", "FINDINGS": findings, "IMPRESSION": impression}
        abstract = "".join(
            f'<AbstractText Label="{k}">{v.replace("&", "&amp;").replace("<", "&lt;")}</AbstractText>'
            for k, v in parts.items()
        )
        names = [f"CXR{uid}_1_IM-{image}" for image in images] + ["CXR4_1_IM-0004-2001"] * (uid == "4")
        parents = "".join(f'<parentImage id="{name}"><caption>Xray</caption></parentImage>' for name in names)
        content = f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>{abstract}</Abstract></Article>
</MedlineCitation><MeSH><major>normal</major></MeSH>{parents}</eCitation>"""
        path = folder / "NLMCXR_reports" / "ecgen-radiology" / f"{uid}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        for image in images:
            name = f"CXR{uid}_1_IM-{image}.png"
            save_picture(folder / "NLMCXR_png" / name, picture(f"openi {uid} {image}", (48, 40)))
    hostile = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><eCitation><uId id="CXR8"/>'
    (path.parent / "8.xml").write_text(hostile + '<parentImage id="CXR1_1_IM-0001-3001"/>&b;</eCitation>')
    (path.parent / "9.xml").write_text("<eCitation><uId id=")
    return folder


def openi_kaggle(folder: Path) -> Path:
    reports = [["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"]]
    views = [["uid", "filename", "projection"]]
    for uid, (findings, impression, images) in STUDIES.items():
        reports.append([uid, "normal;Lung/x", "normal", "Xray", "XXXX", "", findings, impression])
        for n, image in enumerate(images):
            name = f"{uid}_IM-{image}.dcm.png"
            views.append([uid, name, "Lateral" if n else "Frontal"])
            save_picture(folder / "images" / "images_normalized" / name, picture(f"openi {uid} {image}", (48, 40)))
    views += [["4", "4_IM-0004-2001.dcm.png", "Frontal"], ["7", "7_IM-0007-1001.dcm.png", "Frontal"]]
    table(folder / "indiana_reports.csv", reports)
    table(folder / "indiana_projections.csv", views)
    return folder


def openi_r2gen(folder: Path) -> Path:
    found: dict[str, list] = {"train": [], "val": [], "test": []}
    for n in range(6):
        split, study = ("train", "train", "train", "train", "val", "test")[n], f"CXR{n + 10}_IM-{n:04d}"
        names = [f"{study}/{m}.png" for m in (0, 1)]
        report = f"The heart is normal in size. {n + 2}. No effusion, XXXX 2.5 cm."
        found[split].append({"id": study, "report": report, "image_path": names, "split": split})
        for name in names:
            save_picture(folder / "images" / name, picture(name, (48, 40)))
    (folder / "annotation.json").write_text(json.dumps(found))
    return folder


def chestxray14(folder: Path, kaggle: bool = False, old: bool = False) -> Path:
    """Six images of four patients, one RGBA, one missing, one in neither list.

    Args:
      kaggle: archives unpacked as Kaggle has them.
      old: the table of 2017, with ages that no one has and a comma at the end of each line.
    """
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    head += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]" + "," * old
    rows = [
        ("00000001_000.png", "Cardiomegaly", 0, 1, 57, "M", "PA"),
        ("00000001_001.png", "Cardiomegaly|Pleural_Thickening", 1, 1, 58, "M", "AP"),
        ("00000002_000.png", "No Finding", 0, 2, 411 if old else 80, "F", "PA"),
        ("00000003_000.png", "Hernia", 0, 3, 74, "F", "PA"),
        ("00000004_000.png", "Mass", 0, 4, 82, "M", "AP"),
        ("00000004_001.png", "Mass|Nodule", 1, 4, 82, "M", "AP"),
    ]
    lines = [",".join(map(str, row)) + ",2682,2749,0.143,0.143" + "," * old for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    name = "Data_Entry_2017.csv" if old else "Data_Entry_2017_v2020.csv"
    (folder / name).write_text("\r\n".join([head, *lines]) + "\r\n")
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,\r\n00000001_000.png,Cardiomegaly,1.5,2.5,30,40,,,\r\n"
    (folder / "BBox_List_2017.csv").write_text(boxes)
    (folder / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n00000002_000.png\n00000003_000.png")
    (folder / "test_list.txt").write_text("00000004_000.png\n")
    for n, row in enumerate(rows):
        place = folder / (f"images_{n % 2 + 1:03d}/images" if kaggle else "images")
        pixels = picture(row[0], (64, 64))
        if n == 1:
            pixels = np.dstack([pixels, pixels, pixels, np.full_like(pixels, 255)])
        if n != 3:
            save_picture(place / row[0], pixels)
    return folder


def chexpert(folder: Path) -> Path:
    """Patients of train and valid; a lateral view, one missing, one path that leads out."""
    base = folder / "CheXpert-v1.0-small"
    head = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Cardiomegaly", "Pleural Effusion"]
    rows = [
        ("train", "patient00001/study1/view1_frontal.jpg", "Frontal", "AP", "1.0", "", ""),
        ("train", "patient00002/study2/view1_frontal.jpg", "Frontal", "PA", "", "-1.0", "1.0"),
        ("train", "patient00002/study2/view2_lateral.jpg", "Lateral", "", "", "-1.0", "1.0"),
        ("train", "patient00003/study1/view1_frontal.jpg", "Frontal", "AP", "", "0.0", ""),
        ("train", "patient00004/study1/view1_frontal.jpg", "Frontal", "AP", "", "0.0", ""),
        ("train", "../../../outside.jpg", "Frontal", "AP", "", "0.0", ""),
        ("valid", "patient64541/study1/view1_frontal.jpg", "Frontal", "PA", "0.0", "1.0", "0.0"),
    ]
    for name in ("train", "valid"):
        own = [row for row in rows if row[0] == name]
        content = [[f"CheXpert-v1.0-small/{name}/{row[1]}", "Female", "68", *row[2:]] for row in own]
        table(base / f"{name}.csv", [head, *content])
    for n, row in enumerate(rows):
        if n not in (4, 5):
            save_picture(base / row[0] / row[1], picture(row[1], (60, 72)), quality=95)
    return folder


def siim(folder: Path) -> Path:
    """Two with a pneumothorax (one of two pieces), two without, one without a row, one without a file."""
    names = [f"1.2.276.0.7230010.3.1.4.{n}" for n in range(6)]
    rows = [["ImageId", " EncodedPixels"], [names[0], " 12 3 61 3"], [names[0], " 200 5"], [names[1], " -1"]]
    rows += [[names[2], "-1"], [names[3], " 9 2"], [names[5], " -1"]]
    table(folder / "train-rle.csv", rows)
    for name in names[:5]:
        film(folder / "dicom-images-train" / f"{name}.1" / f"{name}.2" / f"{name}.dcm", picture(name, (64, 64)))
    film(folder / "dicom-images-test" / "a" / "b" / "c.dcm", picture("test", (64, 64)))
    return folder


def rsna(folder: Path) -> Path:
    """One of two boxes, one of none, one that is stored inverted, one missing, one whose name leads out."""
    names = [f"0004cfab-14fd-4e49-80ba-63a80b6bddd{n}" for n in range(4)]
    rows = [["patientId", "x", "y", "width", "height", "Target"], [names[0], "264.0", "152.0", "213.0", "379.0", "1"]]
    rows += [[names[0], "562.0", "152.0", "256.0", "453.0", "1"], [names[1], "", "", "", "", "0"]]
    rows += [[names[2], "", "", "", "", "0"], [names[3], "", "", "", "", "0"], ["../outside", "", "", "", "", "0"]]
    table(folder / "stage_2_train_labels.csv", rows)
    classes = [[names[0], "Lung Opacity"]] * 2 + [[names[1], "Normal"]]
    table(folder / "stage_2_detailed_class_info.csv", [["patientId", "class"], *classes])
    for n, name in enumerate(names[:3]):
        kind = "MONOCHROME1" if n == 2 else "MONOCHROME2"
        path = folder / "stage_2_train_images" / f"{name}.dcm"
        film(path, picture(name, (64, 64)), PhotometricInterpretation=kind)
    film(folder / "outside.dcm", picture("outside", (64, 64)))
    film(folder / "stage_2_test_images" / "x.dcm", picture("test", (64, 64)))
    return folder
