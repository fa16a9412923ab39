"""A modality is a value, not code (section 3.2: text, CT, MRI and X-ray, text the centre).

Everything the rest of the package needs to know of a modality stands in its `Modality`; `kind` alone picks the classes
of its networks (`model.FAMILIES`). `register` adds one of your own: a PET flow is a value like these four.

A *stream* is what a user names: a modality, or one contrast of it ("mri:t2"). Contrasts share their modality's
weights and differ by one learned embedding; the bare name means that the contrast is not stated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Float

from medm2g_jax.errors import UserError

KINDS = ("text", "image")


@dataclass(frozen=True)
class Modality:
    """One modality.

    Attributes:
      name: a Python identifier; the first word of its parameters' names.
      kind: one of KINDS.
      word: what a person calls it, in captions and pictures.
      contrasts: streams beside the bare one; () where there is only one way to look.
      window: the values shown as -1 and +1 (`unit`); None for text.
      unit: of the values inside the window.
      dicom: DICOM modality code ("" for text).
      centre: the modality all others are aligned to; exactly one is.
      projection: its images are shadows of the whole body, which lie on no slice's grid.
    """

    name: str
    kind: str
    word: str
    contrasts: tuple[str, ...] = ()
    window: tuple[float, float] | None = None
    unit: str = ""
    dicom: str = ""
    centre: bool = False
    projection: bool = False

    @property
    def is_image(self) -> bool:
        """Is it something to look at?"""
        return self.window is not None

    @property
    def relative(self) -> bool:
        """Is its unit one of its own ("relative signal"), so that a scanner's values need a range to count over?"""
        return self.unit.startswith("relative")

    @property
    def streams(self) -> tuple[str, ...]:
        """All streams; index 0 is the bare one, and the index is what the networks embed."""
        return (self.name, *(f"{self.name}:{contrast}" for contrast in self.contrasts))

    def shares_grid(self, other: "Modality") -> bool:
        """Can an image of it lie on the grid of one of `other`, pixel by pixel? Whether it does is the data's to say
        (`Record.grid`)."""
        return self.is_image and other.is_image and self.projection == other.projection

    def normalise(self, values: Float[Any, "*shape"]) -> Float[Any, "*shape"]:
        """Values in the modality's unit -> [-1, 1] of its window; what lies outside is cut off."""
        low, high = self.window
        return ((values - low) / (high - low)).clip(0, 1) * 2 - 1

    def in_unit(self, values: Float[Any, "*shape"]) -> Float[Any, "*shape"]:
        """[-1, 1] -> the modality's unit."""
        low, high = self.window
        return (values + 1) / 2 * (high - low) + low


MODALITIES: dict[str, Modality] = {}


def register(modality: Modality) -> Modality:
    """Add a modality to the registry and return it.

    Raises:
      UserError: the name is taken by another modality, is no identifier, the kind is unknown, an image has no window or
        a text one, or it is a second centre.
    """
    if not modality.name.isidentifier() or modality.kind not in KINDS:
        raise UserError(f"modality {modality.name!r}: its name must be an identifier and its kind one of {KINDS}")
    if MODALITIES.get(modality.name, modality) != modality:
        raise UserError(f"modality {modality.name!r} is registered already, with other values")
    if modality.is_image != (modality.kind == "image"):
        raise UserError(f"modality {modality.name!r}: images have a window, texts have none; found {modality.window}")
    if modality.centre and any(m.centre and m.name != modality.name for m in MODALITIES.values()):
        raise UserError(f"modality {modality.name!r}: there is one centre, and {centre().name!r} is it")
    MODALITIES[modality.name] = modality
    return modality


def adopt(records: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Register the modalities that a model was trained with, as its model.json keeps them (`dataclasses.asdict`).

    Args:
      where: the file they are from.

    Raises:
      UserError: one is registered here with other values; networks embed a stream by its place, so that another order
        of contrasts would exchange them without a word.
    """
    for name, record in records.items():
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        ours = MODALITIES.get(name, Modality(**known))
        for field in fields(Modality):
            b = getattr(ours, field.name)
            a = known[field.name] if field.name in known else b  # trained before there was such a field
            if a != b:
                raise UserError(
                    f"{where}: its modality {name!r} has {field.name} {a!r}, the one registered here {b!r}; register "
                    "it as the model was trained with it"
                )
        register(ours)


register(Modality("text", "text", "report", centre=True))
register(
    Modality("xray", "image", "X-ray", window=(0.0, 1.0), unit="relative attenuation", dicom="DX", projection=True)
)
register(Modality("ct", "image", "CT", window=(-1000.0, 400.0), unit="HU", dicom="CT"))
register(
    Modality(
        "mri",
        "image",
        "MRI",
        contrasts=("t1", "t2", "pd", "flair", "t1ce"),
        window=(0.0, 1.0),
        unit="relative signal",
        dicom="MR",
    )
)


def centre() -> Modality:
    """The modality that the others are aligned to (section 3.2: text)."""
    (modality,) = (m for m in MODALITIES.values() if m.centre)
    return modality


def of_kind(kind: str) -> tuple[str, ...]:
    """Names of the registered modalities of one kind, in the order of registration."""
    return tuple(m.name for m in MODALITIES.values() if m.kind == kind)


def split_stream(stream: str) -> tuple[str, int]:
    """ "mri:t2" -> ("mri", 2): the modality and the stream's index in it.

    Raises:
      UserError: no registered modality has this stream; names those there are.
    """
    modality = MODALITIES.get(stream.partition(":")[0])
    if modality is None or stream not in modality.streams:
        known = ", ".join(s for m in MODALITIES.values() for s in m.streams)
        raise UserError(f"unknown stream {stream!r}; known streams: {known}")
    return modality.name, modality.streams.index(stream)


def stream_word(stream: str) -> str:
    """What a person calls a stream: "mri:t2" -> "MRI t2"."""
    name, _, contrast = stream.partition(":")
    return f"{MODALITIES[name].word} {contrast}".strip()
