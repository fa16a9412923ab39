"""A volume, whatever its format: values on a grid of voxels, where that grid lies in the patient, and its slices.

Values are indexed (i, j, k) in the file's own order. The affine takes (i, j, k, 1) to millimetres in the patient, RAS+
as nibabel has it: x to the patient's right, y to the front, z to the head. DICOM and ITK count the other way in x and
y (LPS): a format turns the signs where it reads and writes (`LPS`), nothing else does.

Slices are what a radiologist looks at: the patient's right on the left of the picture, axial ones with the front on
top, sagittal ones with the face to the left. Cutting renames and turns axes and does nothing else, so that no value
changes and `from_slices` is its exact inverse. Oblique grids are cut along their own voxels, each axis
named by where it goes most.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Num

from medm2g_jax.data.picture import Picture, Span
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, Modality

MOST_VOXELS = 2**28  # read of one volume where nothing else is said: 1024 slices of 512 x 512
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS+ millimetres <-> those of DICOM and ITK

# Where slices follow each other, rows and columns go: to the patient's left or right, posterior or anterior, head or
# feet.
PLANES = {"axial": "HPL", "coronal": "PFL", "sagittal": "LFP"}
_TO = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "H": (2, 1), "F": (2, -1)}
_AXES = (("L", "R"), ("P", "A"), ("F", "H"))

_SAMPLE = 2**22  # voxels that stand for all where a percentile is asked for
_BODY = -500.0  # HU: above it is no air
_BOUND = 1e6  # mm: nothing in a scanner is further from its centre


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A grid of voxels in the patient.

    Attributes:
      values: (i, j, k), as stored or in `unit`.
      affine: (i, j, k, 1) -> millimetres, RAS+.
      unit: "HU" where the file says so, or a modality's own of what was made; "" where the file does not say.
      span: the values that count as -1 and +1, where no unit says it; None: in the unit, or not yet known (`ranged`).
      modality: DICOM's code for what the file says it is (CT, MR, PT); "" where it says nothing.
      frame: DICOM's frame of reference, an identifier: images of one frame lie on each other. "" outside of DICOM.
      path: the file or folder; "" of an array.
      notes: what its user should know, in words.
    """

    values: Num[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"]
    unit: str = ""
    span: Span | None = None
    modality: str = ""
    frame: str = ""
    path: str = ""
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm from one voxel to the next along i, j, k."""
        return tuple(float(x) for x in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Where i, j, k go, each the nearest of L R A P H F: "LPH" of most DICOM."""
        return orientation(self.affine)


def orientation(affine: Float[np.ndarray, "4 4"]) -> str:
    """Where the three voxel axes go, each of another pair of L R, A P, H F: the assignment with the least turn."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(itertools.permutations(range(3)), key=lambda p: sum(abs(axes[p[n], n]) for n in range(3)))
    return "".join(_AXES[axis][int(axes[axis, n] > 0)] for n, axis in enumerate(best))


def checked(volume: Volume) -> Volume:
    """The volume, if it can be used; what is odd but usable is said in its notes, what is no number becomes its lowest.

    Raises:
      UserError: it has no voxels or no finite values, or its affine is no grid in millimetres.
    """
    name, values, grid = volume.path or "the volume", volume.values, volume.affine[:3, :3]
    if not values.size:
        raise UserError(f"{name}: expected voxels, found shape {values.shape}")
    if not np.isfinite(volume.affine).all():
        raise UserError(f"{name}: its affine holds NaN or infinite values; expected millimetres in the patient")
    spacing = np.linalg.norm(grid, axis=0)
    if not (1e-4 < spacing.min() and spacing.max() < 1e3 and np.abs(volume.affine).max() < _BOUND):
        said = " x ".join(f"{x:.4g}" for x in spacing)
        raise UserError(f"{name}: voxels of {said} mm; expected an affine in millimetres, of a scanner's size")
    if abs(np.linalg.det(grid / spacing)) < 0.1:
        raise UserError(f"{name}: two axes of its affine are nearly parallel; expected three at about right angles")
    notes = list(volume.notes)
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.any():
            raise UserError(f"{name}: no value in it is a number")
        if count := int(values.size - finite.sum()):
            lowest = values[finite].min()
            values = np.where(finite, values, lowest)
            notes.append(f"{count} values that are no numbers became {lowest:g}, the lowest there is")
    if (lean := _lean(grid / spacing)) > 0.5:
        notes.append(f"its axes are {lean:.1f} degrees from right angles, as after a gantry tilt")
    return dataclasses.replace(volume, values=values, notes=tuple(notes))


def _lean(axes: np.ndarray) -> float:
    """How many degrees the pair of axes furthest from it is away from a right angle."""
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    return float(np.degrees(np.arcsin(min(1.0, cosine))))


def _turn(affine: np.ndarray, plane: str) -> tuple[list[int], tuple[slice, ...]]:
    """(axes of the values as slice, row, column; how each is then turned)."""
    if plane not in PLANES:
        raise UserError(f"plane {plane!r}: expected one of {', '.join(PLANES)}")
    codes = orientation(affine)
    order = [next(n for n, code in enumerate(codes) if _TO[code][0] == _TO[letter][0]) for letter in PLANES[plane]]
    turns = (1 if codes[n] == letter else -1 for n, letter in zip(order, PLANES[plane], strict=True))
    return order, tuple(slice(None, None, step) for step in turns)


def stack(volume: Volume, plane: str) -> Num[np.ndarray, "n h w"]:
    """All slices of a plane, a view of the values: axial ones from the feet to the head, coronal ones from the front to
    the back, sagittal ones from the patient's right to the left.

    Raises:
      UserError: no such plane.
    """
    order, turns = _turn(volume.affine, plane)
    return volume.values.transpose(order)[turns]


def single(volume: Volume, number: int, plane: str) -> Volume:
    """One slice of `stack`, as a volume that lies where the slice does.

    Raises:
      UserError: no such plane or slice.
    """
    order, turns = _turn(volume.affine, plane)
    count = volume.values.shape[order[0]]
    _numbers([number], count, plane)
    at = range(count)[turns[0]][number]
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, order[0]] * at
    return dataclasses.replace(volume, values=volume.values.take([at], order[0]), affine=affine)


def stack_affine(volume: Volume, plane: str) -> Float[np.ndarray, "4 4"]:
    """(slice, row, column, 1) of `stack` -> millimetres, RAS+."""
    order, turns = _turn(volume.affine, plane)
    turned = np.zeros((4, 4))
    turned[3, 3] = 1
    for n, (axis, turn) in enumerate(zip(order, turns, strict=True)):
        turned[axis, n] = turn.step
        turned[axis, 3] = volume.values.shape[axis] - 1 if turn.step == -1 else 0
    return volume.affine @ turned


def corners(shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "8 3"]:
    """Where the middles of a grid's eight outermost voxels lie, mm."""
    ends = np.array(list(itertools.product((0, 1), repeat=3)), float) * (np.array(shape) - 1)
    return ends @ affine[:3, :3].T + affine[:3, 3]


def apart(a: Volume, b: Volume) -> float:
    """How far, at most, a voxel of one lies from that of the other in the same place of the same slice, mm, in
    whichever order both are stored; inf where they have not as many."""
    shapes = [stack(volume, "axial").shape for volume in (a, b)]
    if shapes[0] != shapes[1]:
        return np.inf
    ends = [corners(shapes[0], stack_affine(volume, "axial")) for volume in (a, b)]
    return float(np.linalg.norm(ends[0] - ends[1], axis=1).max())


def on_one_grid(a: Volume, b: Volume) -> bool:
    """Do the slices of two volumes lie on each other, each voxel to half of its side?"""
    return apart(a, b) <= min(a.spacing) / 2


def plane_of(volume: Volume) -> str:
    """The plane its slices were taken in: across the one axis of a single voxel, else across the last."""
    single = [n for n, length in enumerate(volume.values.shape) if length == 1]
    axis = single[0] if len(single) == 1 else 2
    along = _TO[volume.orientation[axis]][0]
    return next(plane for plane, letters in PLANES.items() if _TO[letters[0]][0] == along)


def slices(volume: Volume, plane: str = "axial", chosen: Sequence[int] | None = None) -> list[Picture]:
    """Slices as pictures in radiological convention.

    Args:
      chosen: their numbers in `stack`; None for all.

    Raises:
      UserError: no such plane, or no such slice.
    """
    order, _ = _turn(volume.affine, plane)
    whole, spacing = stack(volume, plane), volume.spacing
    if whole.dtype == np.uint16:  # of which `data.check` would take the range of the set for the volume's own
        whole = whole.astype(np.int32)
    notes = volume.notes
    down, across = (spacing[n] for n in order[1:])
    if max(down, across) > 1.01 * min(down, across):
        notes += (f"pixels of {down:.3g} x {across:.3g} mm are not square; resample the volume to one spacing",)
    return [
        Picture(whole[n], volume.span, (down, across), PLANES[plane][1:], volume.path, volume.modality, notes)
        for n in _numbers(chosen, len(whole), plane)
    ]


def _numbers(chosen: Sequence[int] | None, count: int, plane: str) -> Sequence[int]:
    if chosen is None:
        return range(count)
    if wrong := [n for n in chosen if not 0 <= n < count]:
        raise UserError(f"slice {wrong[0]}: the volume has {count} {plane} slices, numbers 0 to {count - 1}")
    return chosen


def from_slices(
    made: Num[np.ndarray, "n h w"],
    source: Volume,
    modality: Modality,
    plane: str = "axial",
    chosen: Sequence[int] | None = None,
) -> Volume:
    """A volume of made slices on the source's own grid, each voxel where `stack` took it from.

    Args:
      made: in the modality's unit, on the grid of the source's slices (`images.undo` brings squares there).
      chosen: which of the source's slices they are; None for all. The others are empty, the window's lower end.

    Raises:
      UserError: they are not of the source's shape.
    """
    order, turns = _turn(source.affine, plane)
    shape = tuple(source.values.shape[n] for n in order)
    numbers = _numbers(chosen, shape[0], plane)
    if made.shape != (len(numbers), *shape[1:]):
        expected = " x ".join(map(str, (len(numbers), *shape[1:])))
        found = " x ".join(map(str, made.shape))
        raise UserError(f"made slices: expected {expected}, the {plane} slices of the source, found {found}")
    whole = np.full(shape, modality.window[0], np.float32)
    whole[list(numbers)] = made
    values = whole[turns].transpose(np.argsort(order))
    return Volume(values, source.affine, modality.unit, None, modality.dicom, source.frame)


def select(
    volume: Volume,
    plane: str = "axial",
    *,
    share: float = 0.0,
    first: int = 0,
    last: int | None = None,
    every: int = 1,
) -> list[int]:
    """Numbers of the slices, in `stack`, that are worth having.

    Args:
      share: at least this part of a slice is no background, see `shares`.
      first, last: the range; last is the number after the last one, None for the end.
      every: of those left, every so many-th.

    Raises:
      UserError: no such plane, or numbers that make no range.
    """
    covered = shares(volume, plane)
    last = len(covered) if last is None else last
    if not (0 <= first < last <= len(covered) and every >= 1 and 0 <= share <= 1):
        raise UserError(
            f"slices {first} to {last}, every {every}, share {share}: expected a range in the {len(covered)} {plane} "
            "slices, every from 1 and a share from 0 to 1"
        )
    return [n for n in range(first, last) if covered[n] >= share][::every]


def shares(volume: Volume, plane: str = "axial") -> Float[np.ndarray, "n"]:
    """Which part of each slice, in `stack`, is no background: above -500 HU, else above a tenth of the way from the 1st
    to the 99.5th percentile of the volume (the lowest value is often one odd voxel, of resampling or of padding)."""
    sample = _sample(volume.values)
    low, high = (float(x) for x in np.percentile(sample, (1, 99.5)))
    above = _BODY if volume.unit == "HU" else low + (high - low) / 10
    return np.array([(one > above).mean() for one in stack(volume, plane)])


def resample(volume: Volume, spacing: float | tuple[float, float, float]) -> Volume:
    """The volume on a grid of another spacing, the same middle and the same axes: linear, antialiased where it gets
    coarser. What it covers changes by less than a voxel.

    Args:
      spacing: mm, of all axes or of i, j, k.

    Raises:
      UserError: a spacing that is no length, or a grid of more than MOST_VOXELS.
    """
    new = np.broadcast_to(np.asarray(spacing, float), 3)
    if not (np.isfinite(new).all() and (new > 1e-3).all()):
        raise UserError(f"spacing {spacing}: expected millimetres above 0")
    old = np.asarray(volume.spacing)
    shape = [max(1, round(n * a / b)) for n, a, b in zip(volume.values.shape, old, new, strict=True)]
    if np.prod(shape, dtype=float) > MOST_VOXELS:
        raise UserError(f"spacing {spacing}: {' x '.join(map(str, shape))} voxels, more than {MOST_VOXELS}")
    values = volume.values.astype(np.float32)
    for axis, (count, step) in enumerate(zip(shape, new / old, strict=True)):
        weights = _weights(values.shape[axis], count, step)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    affine = volume.affine.copy()
    affine[:3, :3] *= new / old
    middle = (np.array(volume.values.shape) - 1) / 2
    affine[:3, 3] += volume.affine[:3, :3] @ middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return dataclasses.replace(volume, values=values, affine=affine)


def squared(volume: Volume, plane: str, mm: float = 0.0) -> Volume:
    """The volume with square pixels in the plane of its slices, whose number and places stay; itself where they are
    square.

    Args:
      mm: their side; 0 for the finer of both sides that it has.

    Raises:
      UserError: no such plane, or a grid of more than MOST_VOXELS.
    """
    order, _ = _turn(volume.affine, plane)
    spacing = np.array(volume.spacing)
    down, across = (float(spacing[n]) for n in order[1:])
    side = mm or min(down, across)
    if max(abs(down - side), abs(across - side)) <= 0.01 * side:
        return volume
    spacing[order[1:]] = side
    note = f"{plane} pixels of {down:.3g} x {across:.3g} mm, resampled to {side:.3g} x {side:.3g}"
    made = resample(volume, tuple(map(float, spacing)))
    return dataclasses.replace(made, notes=(*volume.notes, note))


def _weights(old: int, new: int, step: float) -> Float[np.ndarray, "new old"]:
    """How much each old sample counts for each new one: a tent as wide as the coarser of both grids."""
    at = (np.arange(new) - (new - 1) / 2) * step + (old - 1) / 2
    tent = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)) / max(step, 1))
    lost = tent.sum(1) == 0  # beyond the rim, where the new grid is wider by less than a voxel
    tent[lost, np.clip(np.round(at[lost]), 0, old - 1).astype(int)] = 1
    return (tent / tent.sum(1, keepdims=True)).astype(np.float32)


# Names of ways to find the values that count as -1 and +1 where the file's values have no unit (MRI).
PRESETS: Mapping[str, Callable[[np.ndarray], Span]] = {
    "mr.zero": lambda values: (0.0, _percentiles(values)[1]),  # a magnitude: what has no signal is 0, whatever is below
    "mr.maisi": lambda values: _percentiles(values),  # NV-Generate's: lowest to 99.5th percentile
    "mr.minmax": lambda values: (float(values.min()), float(values.max())),
}


def ranged(volume: Volume, modality: Modality | None, preset: str = "mr.zero") -> Volume:
    """The volume as one of a modality: with a span where its values are in no unit.

    A CT file without a unit is taken to be in HU, and a note says where it cannot be. Values of a modality that has
    none (MRI) count over the preset's range, one for the whole volume, never one a slice; those that lie in the
    modality's window as they are, as what was made does, count over it.

    Args:
      modality: what it is taken for; None for what nobody knows.

    Raises:
      UserError: the file says it is something else, or there is no such preset.
    """
    check_modality(volume, modality)
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if volume.span is not None or (volume.unit and (modality is None or volume.unit == modality.unit)):
        return volume
    low, high = float(volume.values.min()), float(volume.values.max())
    if modality is not None and not modality.relative:
        doubt = f"no value is below 0, so it is hardly in {modality.unit}" if modality.window[0] < 0 <= low else ""
        return dataclasses.replace(volume, notes=volume.notes + ((doubt,) if doubt else ()))
    if modality is not None and modality.window[0] <= low and high <= modality.window[1]:
        return volume
    low, high = PRESETS[preset](volume.values)
    high = high if high > low else low + 1
    note = f"counts from -1 to +1 over {low:g} to {high:g} ({preset}, of this file)"
    return dataclasses.replace(volume, span=(low, high), notes=(*volume.notes, note))


def check_modality(image: Picture | Volume, modality: Modality | None) -> None:
    """Is it taken for what the file says it is?

    Raises:
      UserError: the file says it is of another registered modality.
    """
    others = (m for m in MODALITIES.values() if m.dicom and m.dicom == image.modality)
    if modality is not None and image.modality != modality.dicom and (other := next(others, None)) is not None:
        raise UserError(f"{image.path}: says it is {other.word} ({image.modality}), taken for {modality.word}")


def _percentiles(values: np.ndarray) -> Span:
    """(lowest value, 99.5th percentile), of a fixed part of the voxels where there are many."""
    return float(values.min()), float(np.percentile(_sample(values), 99.5))


def _sample(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1, order="A")
    return flat[:: max(1, flat.size // _SAMPLE)]
