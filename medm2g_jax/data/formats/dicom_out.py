"""DICOM out: a made volume as a series that any viewer opens, on the source's grid, marked as synthetic in every file.

A CT becomes a CT Image Storage series in HU, an MRI an MR Image Storage one, everything else Secondary Capture, whose
standard asks for no acquisition that never was. A picture that lies nowhere, as what is made from text alone, is one
too, whatever it shows: it has no place and no size in the patient, and none is made up. UIDs are fresh; the frame of
reference is the source's where it has one, so that a viewer lays both on each other. No patient's data but what is
asked for: name and number say "synthetic".

Marks: ImageType DERIVED\\SECONDARY, SyntheticData YES, the notes in ImageComments and DerivationDescription, ourselves
as equipment with the same notes, BurnedInAnnotation NO. No private tags, no overlays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Num

import medm2g_jax
from medm2g_jax.data.formats.content import levels, storable, written
from medm2g_jax.data.picture import Picture, Span
from medm2g_jax.data.volume import LPS, PLANES, Volume, plane_of, stack, stack_affine
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

WARNING = "SYNTHETIC, made by medm2g_jax. Not for clinical use."
# What a caller may put into the files of a patient; all else is left empty.
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "StudyDate",
           "AccessionNumber")  # fmt: skip


def write(
    path: epath.PathLike, volume: Volume, notes: Mapping[str, str], patient: Mapping[str, str] | None = None
) -> None:
    """Write a volume: one file a slice into a folder that is new or empty; of one slice a file, if `path` ends in .dcm.

    Slices are those of the volume's last axis, turned as radiologists see them.

    Args:
      patient: tags of PATIENT, by their keywords, of whoever the images are to be filed under.

    Raises:
      UserError: the folder holds something, several slices for one file, axes that DICOM cannot say, or another tag.
    """
    path, name = epath.Path(path), str(path)
    check(path, volume)
    images = _images(volume, notes, checked_patient(name, patient))
    if _is_file(name):
        written(path, lambda part: save(images[0], part))
        return
    path.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, 1):
        written(path / f"slice_{number:04d}.dcm", lambda part, image=image: save(image, part))


def check(path: epath.PathLike, volume: Volume) -> None:
    """Can a volume on this one's grid be written there?

    Raises:
      UserError: the folder holds something, several slices for one file, or axes that DICOM cannot say.
    """
    path, name, plane = epath.Path(path), str(path), plane_of(volume)
    count = len(stack(volume, plane))
    if _is_file(name) and count > 1:
        raise UserError(f"{name}: {count} slices, and DICOM has one a file; name a folder (without .dcm)")
    if not _is_file(name) and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{name}: is there already; name a new folder for the slices")
    _, down, across = stack_affine(volume, plane)[:3, :3].T
    if abs(down @ across) > 1e-3 * np.linalg.norm(down) * np.linalg.norm(across):
        raise UserError(f"{name}: rows and columns are not at right angles, which DICOM cannot say; resample it")


def _is_file(name: str) -> bool:
    return name.lower().endswith((".dcm", ".dicom", ".ima"))


def write_picture(path: epath.PathLike, picture: Picture, notes: Mapping[str, str]) -> None:
    """Write a picture that does not say where it lies: a Secondary Capture of its values, as it is shown."""
    own = next((m.unit for m in MODALITIES.values() if m.dicom and m.dicom == picture.modality), "")
    whole = np.asarray(picture.pixels)[None]
    flat = Volume(whole, np.eye(4), own if picture.span is None else "", picture.span, picture.modality)
    pixels, scale = _pixels(flat, whole)
    tags = _shared(flat, scale, notes, {}, placed=False) | _pixels_of(pixels[0], 1)
    image = dataset(tags | dict(PatientOrientation=list(reversed(picture.orientation))))
    written(path, lambda part: save(image, part))


def checked_patient(name: str, patient: Mapping[str, str] | None) -> Mapping[str, str]:
    """The tags of a patient, {} for None.

    Raises:
      UserError: one that is not among PATIENT.
    """
    if unknown := sorted(set(patient or ()) - set(PATIENT)):
        raise UserError(f"{name}: patient's tag {unknown[0]!r}: expected some of {', '.join(PATIENT)}")
    return patient or {}


def save(image: Any, path: epath.Path) -> None:
    """Write what `dataset` made."""
    import pydicom

    with path.open("wb") as file:
        pydicom.dcmwrite(file, image, enforce_file_format=True)


def _pixels_of(values: Num[np.ndarray, "h w"], number: int) -> dict[str, Any]:
    """The tags of one slice that are its alone, wherever it lies."""
    from pydicom.uid import generate_uid

    return dict(
        SOPInstanceUID=str(generate_uid(prefix=None)),
        InstanceNumber=str(number),
        Rows=values.shape[0],
        Columns=values.shape[1],
        PixelData=np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"))).tobytes(),
    )


def _images(volume: Volume, notes: Mapping[str, str], patient: Mapping[str, str]) -> list[Any]:
    """A header with its pixels for each slice."""
    from pydicom.uid import UID, generate_uid

    affine = LPS @ stack_affine(volume, plane_of(volume))  # (slice, row, column, 1)
    down, across = affine[:3, 1], affine[:3, 2]
    spacing = np.linalg.norm(down), np.linalg.norm(across)
    pixels, scale = _pixels(volume, stack(volume, plane_of(volume)))
    shared = _shared(volume, scale, notes, patient) | dict(PixelSpacing=[_number(x) for x in spacing])
    frame = volume.frame if UID(volume.frame).is_valid else str(generate_uid(prefix=None))
    out = []
    for n, values in enumerate(pixels):
        own = _pixels_of(values, n + 1)
        if any(m.projection and m.dicom == volume.modality for m in MODALITIES.values()):  # it lies nowhere
            own |= dict(PatientOrientation=list(reversed(PLANES[plane_of(volume)][1:])))
        else:
            own |= dict(
                ImageOrientationPatient=[_number(x) for x in (*(across / spacing[1]), *(down / spacing[0]))],
                ImagePositionPatient=[_number(x) for x in (affine @ (n, 0, 0, 1))[:3]],
                SliceThickness=_number(np.linalg.norm(affine[:3, 0])),
                FrameOfReferenceUID=frame,
                PositionReferenceIndicator="",
                PatientOrientation="",
            )
        out.append(dataset(shared | own))
    return out


def _number(x: float | int) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(float(x), auto_format=True)


def _pixels(volume: Volume, whole: Num[np.ndarray, "n h w"]) -> tuple[Num[np.ndarray, "n h w"], tuple[float, float]]:
    """16-bit pixels, and the slope and intercept that give the values back: HU to the last one, all else in 65535
    steps from the lowest to the highest."""
    if volume.unit == "HU":
        return storable(volume, whole), (1.0, 0.0)
    if whole.dtype.kind in "iu" and 0 <= whole.min() and whole.max() <= 65535:
        return whole.astype(np.uint16), (1.0, 0.0)
    return levels(whole)


def _window(volume: Volume) -> Span:
    """The values that viewers show as black and white at first."""
    own = (m.window for m in MODALITIES.values() if m.dicom and m.dicom == volume.modality and m.unit == volume.unit)
    low, high = volume.span or next(own, (float(volume.values.min()), float(volume.values.max())))
    return low, high if high > low else low + 1


def document(code: str, notes: Mapping[str, str], patient: Mapping[str, str]) -> dict[str, Any]:
    """The tags that all we write have in common, an image or a report: of whom it is, fresh identifiers, our marks.

    Args:
      code: of the series' modality.
    """
    from pydicom.uid import generate_uid

    equipment = dict(Manufacturer="medm2g_jax", ManufacturerModelName="MedM2G", SoftwareVersions=medm2g_jax.__version__)
    purpose = dict(CodeValue="109102", CodingSchemeDesignator="DCM", CodeMeaning="Processing Equipment")
    contribution = dict(
        PurposeOfReferenceCodeSequence=[dataset(purpose)], ContributionDescription=_said(notes)[:1024], **equipment
    )
    tags: dict[str, Any] = dict(
        PatientName="SYNTHETIC^MEDM2G",
        PatientID="SYNTHETIC",
        PatientBirthDate="",
        PatientSex="",
        StudyInstanceUID=str(generate_uid(prefix=None)),
        StudyID="",
        StudyDate="",
        StudyTime="",
        AccessionNumber="",
        ReferringPhysicianName="",
        Modality=code,
        SeriesInstanceUID=str(generate_uid(prefix=None)),
        SeriesNumber="1",
        SeriesDescription=f"SYNTHETIC {code}, medm2g_jax, not for clinical use",
        SyntheticData="YES",
        ContributingEquipmentSequence=[dataset(contribution)],
        **equipment,
    )
    if not patient:
        tags |= dict(PatientIdentityRemoved="YES", DeidentificationMethod="Synthetic, no patient")
    return tags | dict(patient)


def _said(notes: Mapping[str, str]) -> str:
    return "\n".join([WARNING, *(f"{key}: {note}" for key, note in notes.items())])


def _shared(
    volume: Volume,
    scale: tuple[float, float],
    notes: Mapping[str, str],
    patient: Mapping[str, str],
    placed: bool = True,
) -> dict[str, Any]:
    """The tags that all slices have in common.

    Args:
      placed: they say where they lie.
    """
    from pydicom.uid import CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage

    said, signed = _said(notes), volume.unit == "HU"
    code = volume.modality if volume.modality in ("CT", "MR") else "OT"
    if code == "CT" and not signed:
        code = "OT"  # a CT image is in HU by its definition
    kind = code if placed else "OT"
    low, high = _window(volume)
    tags = document(code, notes, patient) | dict(
        WindowCenter=_number((low + high) / 2),
        WindowWidth=_number(high - low),
        VOILUTFunction="LINEAR_EXACT",
        SOPClassUID={"CT": CTImageStorage, "MR": MRImageStorage}.get(kind, SecondaryCaptureImageStorage),
        ImageType=["DERIVED", "SECONDARY", *{"CT": ["AXIAL"], "MR": ["OTHER"]}.get(kind, [])],
        Laterality="",
        DerivationDescription=said[:1024],
        ImageComments=said[:10240],
        BurnedInAnnotation="NO",
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=int(signed),
        RescaleSlope=_number(scale[0]),
        RescaleIntercept=_number(scale[1]),
        RescaleType="HU" if signed else "US",
    )
    # What each kind asks for; that it may be empty is the standard's type 2.
    return tags | {
        "CT": dict(KVP="", AcquisitionNumber="", PatientPosition=""),
        "MR": dict(ScanningSequence="RM", SequenceVariant="NONE", ScanOptions="", MRAcquisitionType="", EchoTime="",
                   EchoTrainLength="", RepetitionTime="", PatientPosition=""),
    }.get(kind, dict(ConversionType="SYN"))  # fmt: skip


def dataset(tags: Mapping[str, Any]) -> Any:
    """pydicom's dataset of these tags, by their keywords; with a file's own head where it is a whole document."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian

    out = Dataset()
    for tag, value in tags.items():
        setattr(out, tag, value)
    if "SOPInstanceUID" in out:
        out.file_meta = FileMetaDataset()
        out.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID
        out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
        out.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return out
