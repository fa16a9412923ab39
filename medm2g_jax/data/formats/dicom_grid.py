"""Slices that each say where they lie -> one grid: sorted along their normal, gaps found, a tilt kept in the affine."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Num

from medm2g_jax.data.formats.content import check_count
from medm2g_jax.data.volume import LPS, Volume, checked
from medm2g_jax.errors import UserError

FILLED = "filled in from those on both sides"
_SAME = 1e-3  # mm: two slices nearer than this are at one place
_UNEVEN = 0.1  # of the step between slices, by which one may be off


@dataclasses.dataclass(frozen=True, eq=False)
class Slab:
    """One slice and where it lies, in DICOM's terms: LPS millimetres.

    Attributes:
      name: the file, for messages.
      values: rows and columns.
      padding: which of them are no measurement; None: all are.
      position: of the centre of the first pixel.
      axes: where a row goes (along its columns), then where a column goes.
      spacing: between rows, between columns.
      thickness: of a slice that is alone.
    """

    name: str
    values: Num[np.ndarray, "h w"]
    padding: Bool[np.ndarray, "h w"] | None
    position: tuple[float, ...]
    axes: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float


def stacked(name: str, slabs: Sequence[Slab], most_voxels: int) -> Volume:
    """The volume of slices, values (column, row, slice). Slices that are missing between others are filled in linearly,
    and said.

    Raises:
      UserError: slices of several geometries, several at one place, or at uneven distances.
    """
    first = slabs[0]
    for slab in slabs:
        if slab.values.shape != first.values.shape or not _alike(slab, first):
            raise UserError(f"{slab.name}: its slices differ in size, direction or spacing; expected one stack")
    across, down = np.reshape(first.axes, (2, 3))
    lengths = np.linalg.norm([across, down], axis=1)
    if not (np.abs(lengths - 1) < 0.05).all() or abs(across @ down) > 0.05:
        raise UserError(f"{first.name}: ImageOrientationPatient: expected two unit vectors at right angles")
    across, down = across / lengths[0], down / lengths[1]
    normal = np.cross(across, down)
    slabs = sorted(slabs, key=lambda slab: float(np.dot(slab.position, normal)))
    places = np.array([slab.position for slab in slabs])
    numbers, step, notes = _steps(name, places, normal, first.thickness)
    check_count(name, (numbers[-1] + 1, *first.values.shape), most_voxels)
    values = _filled([slab.values for slab in slabs], [slab.padding for slab in slabs], numbers)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * first.spacing[1], down * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, places[0]
    return checked(Volume(values.T, LPS @ affine, path=name, notes=notes))


def _alike(a: Slab, b: Slab) -> bool:
    return np.allclose(a.axes, b.axes, atol=1e-3) and np.allclose(a.spacing, b.spacing, rtol=1e-3, atol=0)


def _steps(
    name: str, places: np.ndarray, normal: np.ndarray, thickness: float
) -> tuple[list[int], np.ndarray, tuple[str, ...]]:
    """(which slice of an even stack each is, the way from one to the next, what is missing)."""
    if len(places) == 1:
        return [0], normal * thickness, ()
    gaps = np.diff(places @ normal)
    if again := int((gaps < _SAME).sum()):
        raise UserError(
            f"{name}: {len(places)} slices at {len(places) - again} places, as of several times, echoes or parts; "
            "expected one slice a place: give those of one alone"
        )
    step = float(gaps[gaps < 1.5 * gaps.min()].mean())
    counts = np.rint(gaps / step).astype(int)
    numbers = [0, *(int(n) for n in np.cumsum(counts))]
    way = (places[-1] - places[0]) / numbers[-1]
    off = np.linalg.norm(places - places[0] - np.outer(numbers, way), axis=1).max()
    missing = numbers[-1] + 1 - len(places)
    if off > _UNEVEN * step or missing > len(places):
        raise UserError(
            f"{name}: slices {gaps.min():.3g} to {gaps.max():.3g} mm apart, up to {off:.2g} mm off an even stack; "
            "expected even distances"
        )
    if not missing:
        return numbers, way, ()
    where = [f"{n - 1} between {a:.1f} and {b:.1f} mm" for n, a, b in zip(counts, *_ends(places @ normal), strict=True)
             if n > 1]  # fmt: skip
    more = f" and at {len(where) - 3} more places" if len(where) > 3 else ""
    note = f"{missing} slices are missing ({'; '.join(where[:3])}{more}), {FILLED}"
    return numbers, way, (note,)


def _ends(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return at[:-1], at[1:]


def _filled(
    slices: list[np.ndarray], paddings: list[np.ndarray | None], numbers: Sequence[int]
) -> Num[np.ndarray, "n h w"]:
    kind = np.result_type(*(values.dtype for values in slices))
    out = np.empty((numbers[-1] + 1, *slices[0].shape), kind)
    for values, number in zip(slices, numbers, strict=True):
        out[number] = values
    if any(padding is not None for padding in paddings):
        lowest = min(_lowest(v, p) for v, p in zip(slices, paddings, strict=True))
        for padding, number in zip(paddings, numbers, strict=True):
            if padding is not None:
                out[number][padding] = lowest
    for a, b in zip(numbers[:-1], numbers[1:], strict=True):
        for n in range(a + 1, b):
            between = out[a] + (out[b].astype(np.float64) - out[a]) * ((n - a) / (b - a))
            out[n] = between if kind.kind == "f" else np.rint(between)
    return out


def _lowest(values: np.ndarray, padding: np.ndarray | None) -> int | float:
    """The lowest value that is a measurement."""
    return (values if padding is None else values[~padding]).min().item()
