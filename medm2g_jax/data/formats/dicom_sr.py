"""DICOM out: a made report as a Basic Text SR document, which archives and viewers file beside images.

One finding, the report as it is, after a line that says what it is. UNVERIFIED, since nobody has read it; fresh UIDs
and no patient's data but what is asked for, as in `dicom_out`.
"""

import datetime
from collections.abc import Mapping
from typing import Any

from etils import epath

from medm2g_jax.data.formats.content import written
from medm2g_jax.data.formats.dicom_out import WARNING, checked_patient, dataset, document, save

_TITLE = "18748-4", "LN", "Diagnostic imaging report"
_COMMENT, _FINDING = ("121106", "DCM", "Comment"), ("121071", "DCM", "Finding")


def write(path: epath.PathLike, text: str, notes: Mapping[str, str], patient: Mapping[str, str] | None = None) -> None:
    """Write one report.

    Args:
      notes: name -> text, of what made it.
      patient: tags of `dicom_out.PATIENT`, by their keywords, of whoever it is to be filed under.

    Raises:
      UserError: another tag of a patient.
    """
    from pydicom.uid import BasicTextSRStorage, generate_uid

    now = datetime.datetime.now()
    tags = document("SR", notes, checked_patient(str(path), patient)) | dict(
        SpecificCharacterSet="ISO_IR 192",
        SOPClassUID=BasicTextSRStorage,
        SOPInstanceUID=str(generate_uid(prefix=None)),
        InstanceNumber="1",
        ContentDate=now.strftime("%Y%m%d"),
        ContentTime=now.strftime("%H%M%S"),
        CompletionFlag="COMPLETE",
        VerificationFlag="UNVERIFIED",
        ReferencedPerformedProcedureStepSequence=[],
        PerformedProcedureCodeSequence=[],
        ValueType="CONTAINER",
        ConceptNameCodeSequence=[_code(*_TITLE)],
        ContinuityOfContent="SEPARATE",
        ContentSequence=[_said(_COMMENT, WARNING), _said(_FINDING, text.strip() or "(empty)")],
    )
    report = dataset(tags)
    written(path, lambda part: save(report, part))


def _code(value: str, scheme: str, meaning: str) -> Any:
    return dataset(dict(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning))


def _said(concept: tuple[str, str, str], text: str) -> Any:
    tags = dict(
        RelationshipType="CONTAINS", ValueType="TEXT", ConceptNameCodeSequence=[_code(*concept)], TextValue=text
    )
    return dataset(tags)
