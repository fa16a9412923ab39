"""What a data set is to the rest: records, and a way to read one stream of one record. Readers share what is here."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

SPLITS = ("train", "val", "test")

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell one, and no encoding can write it
PLAIN = re.compile(r"[\w/-]+", re.ASCII).fullmatch  # names of which none is another one, written differently
_WHOLE = re.compile(r"([+-]?\d+)\.0*")
_OPEN = re.compile(r"(cc[ -]by|cc[ -]?0|apache|mit|bsd|public domain|synthetic)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)  # there may be millions
class Record:
    """One study: what there is to read of it. Splits are by subject.

    grid: the streams whose images share one grid, registered with each other pixel by pixel; () where nobody says so.
    synthetic: the streams that a model has made.
    """

    id: str
    subject: str
    split: str
    streams: tuple[str, ...]
    licence: str = ""
    grid: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()

    def registered(self, a: str, b: str) -> bool:
        """Do these two streams share a grid?"""
        return a in self.grid and b in self.grid


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


def present(source: Source) -> Callable[[int], Mapping[str, bool | None]] | None:
    """Which findings record number i shows, by name, `source.present`: True, False, None where it is uncertain; a name
    that a record does not have is False. None where nobody says so of any record."""
    return getattr(source, "present", None)


def masks(source: Source) -> Callable[[int, str], np.ndarray] | None:
    """Where the lesion lies in an image of record number i, `source.masks(i, stream)` -> bool (size size 1); None where
    the source has no masks."""
    return getattr(source, "masks", None)


def check(source: Source, cache: epath.PathLike | None, say: Callable[[str], Any]) -> None:
    """What the source looks at before training, `source.check`: that its files are whole; nothing where it has none.

    Args:
      cache: a file in which it may remember what it has seen.
      say: is given lines for the user.

    Raises:
      UserError: lists all that is broken.
    """
    if (own := getattr(source, "check", None)) is not None:
        own(cache, say)


def ranges(source: Source) -> dict[str, tuple[int | float, int | float]]:
    """The range of the source's 16-bit images by stream, `source.ranges`: stored values that count as -1 and +1."""
    return dict(getattr(source, "ranges", {}))


def extents(source: Source) -> dict[str, tuple[int | float, int | float]]:
    """How long the longer side of the source's images is, by stream, `source.extents`: least and most, mm; nothing of
    streams of which nobody knows."""
    return dict(getattr(source, "extents", {}))


def steady(source: Source, stream: str) -> bool:
    """Is an image of this stream the same whenever it is read, and does reading it draw nothing from `rng`?
    `source.steady` names those streams; none where it does not say."""
    return stream in getattr(source, "steady", ())


def shares(source: Source) -> Any:
    """How training rows are shared out among the parts of a mixture, `source.shares`: [(the index after the part's last
    record, weight), ...]; None where every record is drawn equally often."""
    return getattr(source, "shares", None)


def texts_of(source: Source) -> Iterator[str]:
    """The texts of all records, as they are."""
    for i, record in enumerate(source.records):
        for stream in record.streams:
            if not MODALITIES[stream.partition(":")[0]].is_image:
                yield str(source.read(i, stream, np.random.default_rng(0)))


def entry_of(source: Source, index: int, stream: str) -> Any:
    """How a row of a manifest has an image of a record, `source.entry`: {"images": its file, from the root, "scale":
    what else is said of it, ...}; None where it is in no file."""
    own = getattr(source, "entry", None)
    return None if own is None else own(index, stream)


def picture_of(source: Source, index: int, stream: str) -> Any:
    """An image as it is in its file, with the range that the source's files of the stream have, `source.picture`; None
    where it is in no file."""
    own = getattr(source, "picture", None)
    return None if own is None else own(index, stream)


def images_of(streams: Iterable[str]) -> tuple[str, ...]:
    """Those of the streams that are images."""
    return tuple(s for s in streams if MODALITIES[s.partition(":")[0]].is_image)


def identity(value: Any) -> str:
    """A subject or an id as the same string however it was written: 1, 1.0, "1", " 1" and "1.0" are one.

    Raises:
      UserError: it is no string and no whole number, or empty; says what it is, not its value.
    """
    if type(value) is str and PLAIN(value):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, float) and value.is_integer():  # never NaN
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        what = "a number that is not whole" if isinstance(value, float) else f"a {type(value).__name__}"
        raise UserError(f"expected a string or a whole number, found {what}")
    text = " ".join(unicodedata.normalize("NFC", str(value)).split())
    if whole := _WHOLE.fullmatch(text):
        text = whole[1]
    if not text or SURROGATE.search(text):
        raise UserError(f"expected a string or a whole number, found {'half a character' if text else 'nothing'}")
    return text


def stream_of(key: str) -> str | None:
    """The stream meant by an image key or a feature's name, "mri_t2" -> "mri:t2"; None where there is none."""
    stream = {"mri_t1gd": "mri_t1ce"}.get(key, key).replace("_", ":", 1)
    return stream if any(stream in modality.streams for modality in MODALITIES.values()) else None


def key_of(stream: str) -> str:
    """The image key, and the feature's name, of a stream: "mri:t2" -> "mri_t2"."""
    return stream.replace(":", "_")


def is_open(licence: str) -> bool:
    """Whether pictures and texts under `licence` may be shown in logs: only where it begins with an open licence."""
    return bool(_OPEN.match(licence.strip()))


class Subjects:
    """Holds each subject to one split."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str, Any]] = {}
        self._several: dict[str, dict[str, Any]] = {}

    def add(self, subject: str, split: str, where: Any) -> str:
        """Take note of a subject; where: what says, as a string, where it stands. Returns the subject as it was when it
        was first met, so that its rows can share one string."""
        found = self._first.get(subject)
        if found is None:
            found = self._first[subject] = subject, split, where
        first, its_split, its_place = found
        if its_split != split:
            self._several.setdefault(subject, {its_split: its_place}).setdefault(split, where)
        return first

    def check(self, name: str) -> None:
        """Raises:
        UserError: subjects are in several splits; says how many and where the first is, not who.
        """
        if self._several:
            # The one that was met first, and not the one that was first met again.
            places = next(self._several[subject] for subject in self._first if subject in self._several)
            first = " and ".join(f"{split} at {where}" for split, where in places.items())
            raise UserError(
                f"{name}: {len(self._several)} subjects are in more than one split (the first: {first}); a subject "
                "belongs to one split, else results are measured on patients seen in training"
            )


def check_subjects(name: str, places: Iterable[tuple[str, str, Any]]) -> None:
    """Hold each subject to one split; `places` are (subject, split, where it stands).

    Raises:
      UserError: see `Subjects.check`.
    """
    subjects = Subjects()
    for place in places:
        subjects.add(*place)
    subjects.check(name)
