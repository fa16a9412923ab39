"""Volumes that are not on one grid, brought onto one: by SimpleITK (extra `itk`), measured, refused where it got worse.

"grid" resamples through the scanner's coordinates and turns nothing: for scans of one session that lie on each other
already. "rigid" and "affine" find the transform that gives the most mutual information (Mattes et al. 2003), from
coarse to fine. "none" leaves volumes as they are.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from medm2g_jax.data.checks import mutual_information
from medm2g_jax.data.volume import LPS, Volume
from medm2g_jax.errors import UserError

HOW = ("none", "grid", "rigid", "affine")
_SAMPLED = 0.2  # of the voxels, in each step of the search; the same ones in every run
_BINS = 50  # of Mattes' histogram
_ITERATIONS = 200
_LOSS = 0.9  # what of the mutual information before must be there after


class Registered(NamedTuple):
    """A volume on another's grid, and what it has in common with it before and after.

    Attributes:
      information: (before, after), nats, before being through the scanner's coordinates.
      moved: the furthest that a corner of the fixed volume was moved, mm; nothing where none was.
    """

    volume: Volume
    information: tuple[float, float]
    moved: float


def on_one_grid(a: Volume, b: Volume) -> bool:
    """Do two volumes share a grid, each corner to half a voxel?"""
    if a.values.shape != b.values.shape:
        return False
    far = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    far[:, :3] *= np.array(a.values.shape) - 1
    apart = np.linalg.norm(((a.affine - b.affine) @ far.T)[:3], axis=0)
    return bool(apart.max() < 0.5 * min(a.spacing))


def register(moving: Volume, fixed: Volume, how: str) -> Registered:
    """`moving` on the grid of `fixed`; where nothing was measured its lowest value.

    Raises:
      UserError: no such way, SimpleITK is not installed, the volumes do not overlap, or less is in common after the
        search than before.
    """
    if how not in HOW[1:]:
        raise UserError(f"--register {how}: expected one of {', '.join(HOW)}")
    itk = _itk()
    still, moved = _image(itk, fixed), _image(itk, moving)
    identity = itk.Transform(3, itk.sitkIdentity)
    if _overlap(moving, fixed) < 0.1 and how == "grid":
        raise UserError(
            f"{moving.path}: overlaps {fixed.path} by less than a tenth in the scanner's coordinates; they are of "
            "different sessions: --register rigid finds how they lie"
        )
    before = _resampled(itk, moved, still, identity, moving)
    if how == "grid":
        information = mutual_information(fixed.values, before.values)
        return Registered(_placed(before, fixed), (information, information), 0.0)
    transform = _search(itk, still, moved, how)
    after = _resampled(itk, moved, still, transform, moving)
    information = mutual_information(fixed.values, before.values), mutual_information(fixed.values, after.values)
    if information[1] < _LOSS * information[0]:
        raise UserError(
            f"{moving.path}: {how} registration onto {fixed.path} made it worse (mutual information "
            f"{information[0]:.3f} -> {information[1]:.3f}); refused"
        )
    return Registered(_placed(after, fixed), information, _furthest(transform, fixed))


def _itk() -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise UserError("registration needs SimpleITK: pip install 'medm2g-jax[itk]'") from None
    return SimpleITK


def _image(itk: Any, volume: Volume) -> Any:
    image = itk.GetImageFromArray(np.ascontiguousarray(volume.values.T.astype(np.float32)))
    affine = LPS @ volume.affine
    spacing = np.asarray(volume.spacing)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    direction = affine[:3, :3] / spacing
    u, _, v = np.linalg.svd(direction)  # ITK takes right angles alone; a tilt is none
    image.SetDirection((u @ v).reshape(-1).tolist())
    return image


def _search(itk: Any, fixed: Any, moving: Any, how: str) -> Any:
    kind = itk.Euler3DTransform() if how == "rigid" else itk.AffineTransform(3)
    centred = itk.CenteredTransformInitializerFilter.GEOMETRY
    first = itk.CenteredTransformInitializer(fixed, moving, itk.Euler3DTransform(), centred)
    stages = [itk.Euler3DTransform(first)] if how == "rigid" else [itk.Euler3DTransform(first), kind]
    done = None
    for stage in stages:
        if done is not None:  # affine goes on where rigid ended
            stage.SetCenter(done.GetCenter())
            stage.SetMatrix(done.GetMatrix())
            stage.SetTranslation(done.GetTranslation())
        method = itk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(_BINS)
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(_SAMPLED)
        method.SetInterpolator(itk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, _ITERATIONS, relaxationFactor=0.6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        method.SetInitialTransform(stage, inPlace=True)
        method.SetGlobalDefaultNumberOfThreads(1)  # the same sums in the same order, whatever the machine
        try:
            method.Execute(fixed, moving)
        except RuntimeError as error:
            raise UserError(f"{how} registration: found no way ({_last(error)})") from None
        done = stage
    return done


def _last(error: Exception) -> str:
    return " ".join(str(error).split())[-120:]


def _resampled(itk: Any, moving: Any, fixed: Any, transform: Any, source: Volume) -> Volume:
    lowest = float(source.values.min())
    image = itk.Resample(moving, fixed, transform, itk.sitkLinear, lowest, itk.sitkFloat32)
    return dataclasses.replace(source, values=itk.GetArrayFromImage(image).T)


def _placed(volume: Volume, fixed: Volume) -> Volume:
    return dataclasses.replace(volume, affine=fixed.affine, frame=fixed.frame)


def _overlap(a: Volume, b: Volume) -> float:
    """What part of the smaller box both cover, in the patient's coordinates."""
    boxes = []
    for volume in (a, b):
        far = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
        far[:, :3] *= np.array(volume.values.shape) - 1
        corners = (volume.affine @ far.T)[:3]
        boxes.append((corners.min(1), corners.max(1)))
    shared = np.minimum(boxes[0][1], boxes[1][1]) - np.maximum(boxes[0][0], boxes[1][0])
    smaller = min(float(np.prod(high - low + 1e-3)) for low, high in boxes)
    return float(np.prod(np.maximum(shared + 1e-3, 0))) / smaller


def _furthest(transform: Any, fixed: Volume) -> float:
    far = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    far[:, :3] *= np.array(fixed.values.shape) - 1
    corners = (LPS @ fixed.affine @ far.T)[:3].T
    return max(float(np.linalg.norm(np.subtract(transform.TransformPoint(c.tolist()), c))) for c in corners)
