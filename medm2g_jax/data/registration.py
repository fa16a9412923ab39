"""Volumes that are not on one grid, brought onto one: by SimpleITK (extra `itk`), measured, refused where it got worse.

"grid" resamples through the scanner's coordinates and turns nothing: for scans of one session that lie on each other
already. "rigid" and "affine" find the transform that gives the most mutual information (Mattes et al. 2003), from
coarse to fine, from the best of three starts: the scanner's coordinates, the middles of both boxes, and the middles of
what is in them. "none" leaves volumes as they are.

The search looks at 8, 4 and 2 mm, at a fixed number of voxels, in one thread: what it finds is the same on every run
and every machine of a kind, and takes seconds whatever the volume. Values are resampled linearly, once.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from medm2g_jax.data.checks import edge_overlap, mutual_information
from medm2g_jax.data.volume import LPS, Volume, corners
from medm2g_jax.errors import UserError

HOW = ("none", "grid", "rigid", "affine")
_LEVELS = (8.0, 4.0, 2.0)  # mm
_SAMPLED = 20_000  # voxels in each step of the search
_SEED = 1  # of where they are
_BINS = 32  # of Mattes' histogram
_ITERATIONS = 40
_LOSS = 0.98  # what of the mutual information before must be there after: resampling alone takes a little
_OVERLAP = 0.1  # of the smaller box that both cover
_AIR, _METAL = -1000.0, 1500.0  # HU: what is beyond tells nothing of where a body lies


class Registered(NamedTuple):
    """A volume on another's grid, and what it has in common with it before and after.

    Attributes:
      information: (before, after), nats, before being through the scanner's coordinates.
      edges: (before, after), see `checks.edge_overlap`.
      moved: the furthest that a corner of the fixed volume was moved, mm; nothing where none was.
      transform: SimpleITK's, from the fixed volume's place to the moving one's; for `along`.
    """

    volume: Volume
    information: tuple[float, float]
    edges: tuple[float, float]
    moved: float
    transform: Any


def register(moving: Volume, fixed: Volume, how: str) -> Registered:
    """`moving` on the grid of `fixed`; where nothing was measured its lowest value.

    Raises:
      UserError: no such way, SimpleITK is not installed, the volumes do not overlap, or less is in common after the
        search than before.
    """
    if how not in HOW[1:]:
        raise UserError(f"--register {how}: expected one of {', '.join(HOW)}")
    itk = _itk()
    near = _overlap(moving, fixed) >= _OVERLAP
    if how == "grid" and not near:
        raise UserError(
            f"{moving.path}: less than a tenth of it lies in the other volume, in the scanner's coordinates, as of "
            "different sessions; --register rigid finds how they lie"
        )
    transform = itk.Transform(3, itk.sitkIdentity) if how == "grid" else _search(itk, moving, fixed, how, near)
    done = along(moving, fixed, transform)
    before, after = done.information
    if after < _LOSS * before:
        raise UserError(
            f"{moving.path}: {how} registration made it worse and is refused (mutual information {before:.3f} -> "
            f"{after:.3f})"
        )
    return done


def along(moving: Volume, fixed: Volume, transform: Any) -> Registered:
    """A volume brought onto the grid of `fixed` by a transform that is known, as that of another scan on its grid."""
    itk = _itk()
    after = _resampled(itk, moving, fixed, transform)
    still = transform.GetName() == "IdentityTransform"
    before = after if still else _resampled(itk, moving, fixed, itk.Transform(3, itk.sitkIdentity))
    measured = [
        tuple(of(fixed.values, volume.values) for volume in (before, after))
        for of in (mutual_information, edge_overlap)
    ]
    ends = corners(fixed.values.shape, LPS @ fixed.affine)
    moved = max(float(np.linalg.norm(np.subtract(transform.TransformPoint(end.tolist()), end))) for end in ends)
    return Registered(after, *measured, moved, transform)


def _itk() -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise UserError("registration needs SimpleITK: pip install 'medm2g-jax[itk]'") from None
    return SimpleITK


def _image(itk: Any, volume: Volume, values: Num[np.ndarray, "i j k"] | None = None) -> Any:
    values = volume.values if values is None else values
    image = itk.GetImageFromArray(np.ascontiguousarray(values.T.astype(np.float32)))
    affine = LPS @ volume.affine
    spacing = np.asarray(volume.spacing)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    u, _, v = np.linalg.svd(affine[:3, :3] / spacing)  # ITK takes right angles alone; a tilt is none
    image.SetDirection((u @ v).reshape(-1).tolist())
    return image


def _search(itk: Any, moving: Volume, fixed: Volume, how: str, near: bool) -> Any:
    """The best, by its mutual information on the finest level, of where the search began and of where each of its
    steps ended: on few or thick slices a step may lead away."""
    images = [_image(itk, volume, _seen(volume)) for volume in (fixed, moving)]
    levels = [[_coarse(itk, image, mm) for image in images] for mm in _LEVELS]
    ways = list(_starts(itk, *levels[0], near))
    found = max(ways, key=lambda one: _worth(itk, *levels[0], one))
    for pair, mm in zip(levels, _LEVELS, strict=True):
        found = _climbed(itk, *pair, itk.Euler3DTransform(found), mm)
        ways.append(found)
    if how == "affine":  # goes on from the best rigid one
        rigid = max(ways, key=lambda one: _worth(itk, *levels[-1], one))
        found = itk.AffineTransform(3)
        found.SetCenter(rigid.GetCenter())
        found.SetMatrix(rigid.GetMatrix())
        found.SetTranslation(rigid.GetTranslation())
        for pair, mm in zip(levels[1:], _LEVELS[1:], strict=True):
            found = _climbed(itk, *pair, itk.AffineTransform(found), mm)
            ways.append(found)
    return max(ways, key=lambda one: _worth(itk, *levels[-1], one))


def _seen(volume: Volume) -> Float[np.ndarray, "i j k"]:
    """The values as the search sees them: from 0, without the few that would take most of a histogram."""
    if volume.unit == "HU":
        low, high = _AIR, _METAL
    else:
        flat = volume.values.reshape(-1)
        low, high = (float(x) for x in np.percentile(flat[:: max(1, flat.size // 2**20)], (0.5, 99.5)))
    return (np.clip(volume.values, low, high) - low).astype(np.float32)


def _coarse(itk: Any, image: Any, mm: float) -> Any:
    """An image of means over bins of about so many mm; at least four voxels an axis stay where there are so many."""
    bins = [
        max(1, min(round(mm / side), count // 4))
        for side, count in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    return itk.BinShrink(image, bins) if max(bins) > 1 else image


def _starts(itk: Any, fixed: Any, moving: Any, near: bool) -> Iterator[Any]:
    of = itk.CenteredTransformInitializerFilter
    middle = itk.CenteredTransformInitializer(fixed, moving, itk.Euler3DTransform(), of.GEOMETRY)
    if near:
        still = itk.Euler3DTransform(middle)
        still.SetTranslation((0.0, 0.0, 0.0))
        yield still
    yield itk.Euler3DTransform(middle)
    yield itk.Euler3DTransform(itk.CenteredTransformInitializer(fixed, moving, itk.Euler3DTransform(), of.MOMENTS))


def _worth(itk: Any, fixed: Any, moving: Any, transform: Any) -> float:
    image = itk.Resample(moving, fixed, transform, itk.sitkLinear, 0.0, itk.sitkFloat32)
    return mutual_information(*(itk.GetArrayViewFromImage(x) for x in (fixed, image)))


def _climbed(itk: Any, fixed: Any, moving: Any, start: Any, mm: float) -> Any:
    """The transform at the top of the mutual information that is next to `start`."""
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, _SAMPLED / np.prod(fixed.GetSize(), dtype=float)), _SEED)
    method.SetInterpolator(itk.sitkLinear)
    method.SetOptimizerAsConjugateGradientLineSearch(
        1.0, _ITERATIONS, 1e-9, 10, 0.0, 4.0, 0.05, 8, method.EachIteration, mm / 2
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=True)
    method.SetGlobalDefaultNumberOfThreads(1)  # the same sums in the same order, whatever the machine
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        raise UserError(f"registration: found no way ({' '.join(str(error).split())[-120:]})") from None
    return start


def _resampled(itk: Any, moving: Volume, fixed: Volume, transform: Any) -> Volume:
    lowest = float(moving.values.min())
    image = itk.Resample(_image(itk, moving), _image(itk, fixed), transform, itk.sitkLinear, lowest, itk.sitkFloat32)
    values = itk.GetArrayFromImage(image).T
    return dataclasses.replace(moving, values=values, affine=fixed.affine, frame=fixed.frame)


def _overlap(a: Volume, b: Volume) -> float:
    """What part of the smaller box both cover, in the patient's coordinates."""
    boxes = [(ends.min(0), ends.max(0)) for ends in (corners(v.values.shape, v.affine) for v in (a, b))]
    shared = np.minimum(boxes[0][1], boxes[1][1]) - np.maximum(boxes[0][0], boxes[1][0])
    smaller = min(float(np.prod(high - low + 1e-3)) for low, high in boxes)
    return float(np.prod(np.maximum(shared + 1e-3, 0))) / smaller
