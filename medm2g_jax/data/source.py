"""What a data set is to the rest: records, and a way to read one stream of one record. Readers share what is here."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

SPLITS = ("train", "val", "test")

_OPEN = re.compile(r"(cc[ -]by|cc[ -]?0|apache|mit|bsd|public domain|synthetic)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """One study: what there is to read of it. Splits are by subject."""

    id: str
    subject: str
    split: str
    streams: tuple[str, ...]
    licence: str = ""


@runtime_checkable
class Source(Protocol):
    """A data set. `open`: its images and texts may be shown in logs and pictures.

    What else it can do is said by attributes that it may have, never by its name: see `labeller` and `labels`.
    """

    name: str
    open: bool
    records: Sequence[Record]

    def read(self, index: int, stream: str, rng: np.random.Generator) -> np.ndarray | str:
        """A text, or an image float32 (size size 1) in [-1, 1]; `rng` draws a paraphrase, or an unstated contrast."""
        ...


def labeller(source: Source) -> Callable[[str], Any] | None:
    """The source's own reader of the findings that a report states, `source.labeller`; None where it has none."""
    return getattr(source, "labeller", None)


def labels(source: Source) -> Callable[[int], Any] | None:
    """What there is to find in record number i, known exactly, `source.labels`; None where nobody knows."""
    return getattr(source, "labels", None)


def stream_of(key: str) -> str | None:
    """The stream meant by an image key or a feature's name, "mri_t2" -> "mri:t2"; None where there is none."""
    stream = {"mri_t1gd": "mri_t1ce"}.get(key, key).replace("_", ":", 1)
    return stream if any(stream in modality.streams for modality in MODALITIES.values()) else None


def is_open(licence: str) -> bool:
    """Whether pictures and texts under `licence` may be shown in logs: only where it begins with an open licence."""
    return bool(_OPEN.match(licence.strip()))


def check_subjects(name: str, places: Iterable[tuple[str, str, str]]) -> None:
    """Hold each subject to one split; `places` are (subject, split, where it stands).

    Raises:
      UserError: subjects are in several; says how many and where the first is, not who.
    """
    seen: dict[str, dict[str, str]] = {}
    for subject, split, where in places:
        seen.setdefault(subject, {}).setdefault(split, where)
    split_up = [splits for splits in seen.values() if len(splits) > 1]
    if split_up:
        first = " and ".join(f"{split} at {where}" for split, where in split_up[0].items())
        raise UserError(
            f"{name}: {len(split_up)} subjects are in more than one split (the first: {first}); a subject belongs to "
            "one split, else results are measured on patients seen in training"
        )
