"""What is said of an image beside its file: the unit and the range of its values, and how it lies in the patient.

A PNG holds whole numbers and nothing about them. `scale` gives them a unit back, exactly: HU = slope * stored +
intercept. `span` says which values count as -1 and +1 where no unit does, as with MRI.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from medm2g_jax.data.picture import Picture, Span
from medm2g_jax.errors import UserError
from medm2g_jax.modality import Modality

_AXIS = {"L": 0, "R": 0, "A": 1, "P": 1, "H": 2, "F": 2}
_MOST = 1e30  # of a number; beyond, float32 ends


class Said(NamedTuple):
    """What is said of one image; None and "": nothing is.

    Attributes:
      scale: (slope, intercept): value = slope * stored + intercept, in the modality's unit or, with a span, in any.
      span: the values, after the scale, that count as -1 and +1.
      spacing, orientation: see `Picture`.
    """

    scale: tuple[float, float] | None = None
    span: Span | None = None
    spacing: tuple[float, float] | None = None
    orientation: str = ""

    def of(self, picture: Picture, modality: Modality) -> Picture:
        """The picture with all this; its pixels float32 where their values are said, so that nobody looks for a range.

        Raises:
          UserError: a scale alone leads out of the range of a modality that has no unit of its own; names the file.
        """
        pixels, span = picture.pixels, picture.span
        if self.scale is not None:
            slope, intercept = self.scale
            pixels, span = (pixels.astype(np.float64) * slope + intercept).astype(np.float32), None
        if self.span is not None:
            pixels, span = pixels.astype(np.float32), self.span
        elif self.scale is not None and modality.relative:
            low, high = modality.window
            if not low <= pixels.min() <= pixels.max() <= high:
                raise UserError(
                    f"{picture.path}: values {pixels.min():g} to {pixels.max():g}, and {modality.word} has no unit "
                    f"({low:g} to {high:g} of {modality.unit}); say in 'span' which count as -1 and +1"
                )
        return dataclasses.replace(
            picture,
            pixels=pixels,
            span=span,
            spacing=self.spacing or picture.spacing,
            orientation=self.orientation or picture.orientation,
        )

    def fields(self) -> dict[str, Any]:
        """What is said, as a manifest's row puts it: {"scale": [1, -1024]}."""
        return {name: _plain(value) for name, value in self._asdict().items() if value}


NOTHING = Said()


def parse(row: Mapping[str, Any], keys: Collection[str]) -> Mapping[str, Said]:
    """Image key -> what a row of a manifest says of it, of those of which it says something.

    Args:
      keys: the row's image keys.

    Raises:
      UserError: a field is not of its form, or is of no image; says which and what was found, no words of the row.
    """
    said: dict[str, Said] = {}
    for field, (form, read) in FIELDS.items():
        values = row.get(field)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{field!r} must map keys of 'images' to {form}, found {_kind(values)}")
        for key, value in values.items():
            if key not in keys:
                raise UserError(f"{field!r} names {key!r}, which is no key of 'images'")
            good = read(value)
            if good is None:
                raise UserError(f"{field!r} of {key!r}: expected {form}, found {_kind(value)}")
            said[key] = said.get(key, NOTHING)._replace(**{field: good})
    return said


def _pair(value: Any) -> tuple[float, float] | None:
    if type(value) is list and len(value) == 2:
        a, b = value
        if type(a) in (int, float) and type(b) in (int, float) and -_MOST < a < _MOST and -_MOST < b < _MOST:
            return float(a), float(b)  # never NaN, which is on no side of anything
    return None


def _paired(good: Callable[[float, float], bool]) -> Callable[[Any], tuple[float, float] | None]:
    return lambda value: pair if (pair := _pair(value)) and good(*pair) else None


def _orientation(value: Any) -> str | None:
    axes = [_AXIS.get(letter) for letter in value] if isinstance(value, str) else []
    return value if len(axes) == 2 and None not in axes and axes[0] != axes[1] else None


# Field -> its form in words, and what reads a value; None where it is not of that form.
FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "scale": ("[slope, intercept], two numbers, the slope not 0", _paired(lambda slope, _: slope != 0)),
    "span": ("[low, high], two numbers, low below high", _paired(lambda low, high: low < high)),
    "spacing": ("[mm from row to row, mm from column to column], above 0", _paired(lambda a, b: min(a, b) > 0)),
    "orientation": ('two letters of L R A P H F, of two axes, as in "PL"', _orientation),
}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _kind(value: Any) -> str:
    """What was found, without words that may be somebody's."""
    if isinstance(value, list):
        short = len(value) <= 4 and all(map(_printable, value))
        return f"[{', '.join(f'{x:g}' for x in value)}]" if short else f"a list of {len(value)}"
    return f"{value:g}" if _printable(value) else f"a {type(value).__name__}"


def _printable(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MOST)
