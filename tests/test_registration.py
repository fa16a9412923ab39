"""Registration: a movement that is known is found again, whatever the contrast, and nothing is made worse unseen."""

import dataclasses

import numpy as np
import pytest
from look_alikes_volumes import RADII, grid, head
from scipy.spatial.transform import Rotation

from medm2g_jax.data import registration
from medm2g_jax.data.registration import along, register
from medm2g_jax.data.volume import Volume, on_one_grid
from medm2g_jax.errors import UserError

itk = pytest.importorskip("SimpleITK")

SHAPE, MM = (40, 44, 32), (4.0, 4.0, 5.0)
FIXED_GRID = grid(SHAPE, MM, "LPS")
MOVING_SHAPE, MOVING_GRID = (30, 36, 34), grid((30, 36, 34), (5, 5, 4.5), "RAS", (6, -5, 8))  # another field of view
FIXED = Volume(head("t1", SHAPE, FIXED_GRID, face=True), FIXED_GRID, path="fixed.nii")
# Middles of what can be told in the head: two balls, the jaw, the nape, both ventricles, and one on the left.
LANDMARKS = np.append(
    np.array([(0.45, 0.1, 0), (-0.1, 0.6, 0.1), (0, 0.75, -0.75), (0.1, -0.7, -0.8), (0.2, 0, 0.2), (-0.2, -0.1, 0.2),
              (-0.5, -0.4, -0.2)]) * RADII, np.ones((7, 1)), 1)  # fmt: skip


def motion(turn, shift, stretch=(1, 1, 1)) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = Rotation.from_rotvec(np.radians(turn)).as_matrix() @ np.diag(stretch)
    out[:3, 3] = shift
    return out


def moving(kind: str, move: np.ndarray) -> Volume:
    """The same head after `move`, in the scanner's coordinates."""
    values = head(kind, MOVING_SHAPE, np.linalg.inv(move) @ MOVING_GRID, face=True)
    return Volume(values, MOVING_GRID, "HU" if kind == "ct" else "", path="moving.nii")


def off(done, move: np.ndarray) -> float:
    """How far, mm, the furthest of the landmarks is from where it truly is in the moving volume."""
    found = [np.array(done.transform.TransformPoint((p[:3] * (-1, -1, 1)).tolist())) * (-1, -1, 1) for p in LANDMARKS]
    return float(np.linalg.norm(np.array(found) - (move @ LANDMARKS.T)[:3].T, axis=1).max())


@pytest.mark.parametrize(("kind", "turn", "shift"), [("t2", (4, -3, 6), (4, -6, 5)), ("ct", (-5, 6, -9), (12, 9, -8))])
def test_a_rigid_movement_is_found_to_within_a_voxel(kind, turn, shift):
    move = motion(turn, shift)
    done = register(moving(kind, move), FIXED, "rigid")
    assert off(done, move) < min(MM)
    assert on_one_grid(done.volume, FIXED) and done.volume.values.shape == SHAPE
    assert done.information[1] > 1.2 * done.information[0] and done.moved > 5
    assert kind == "ct" or done.edges[1] > done.edges[0] + 0.05  # a CT's strongest edge is another: skull to air


def test_an_affine_movement_is_found_to_within_a_voxel_and_the_same_each_time():
    move = motion((3, -4, 6), (4, -6, 5), (1.06, 0.95, 1.04))
    one, again = (register(moving("t2", move), FIXED, "affine") for _ in range(2))
    assert off(one, move) < max(MM)
    np.testing.assert_array_equal(one.volume.values, again.volume.values)
    assert one.information == again.information and one.moved == again.moved


def test_volumes_of_different_sessions_are_found_from_their_middles():
    far = np.eye(4)
    far[:3, 3] = (400, -300, 200)
    volume = moving("t2", np.eye(4))
    volume = dataclasses.replace(volume, affine=far @ volume.affine)
    with pytest.raises(UserError, match="different sessions"):
        register(volume, FIXED, "grid")
    done = register(volume, FIXED, "rigid")
    assert off(done, far) < min(MM) and done.information[0] < 0.05


def test_grid_resamples_through_the_scanners_coordinates():
    volume = moving("t1", np.eye(4))
    done = register(volume, FIXED, "grid")
    assert done.moved == 0 and done.information[0] == done.information[1]
    inside = np.zeros(SHAPE, bool)
    inside[12:28, 12:32, 9:23] = True
    assert np.abs(done.volume.values - FIXED.values)[inside].mean() < 25  # of 500, interpolated
    same = register(dataclasses.replace(FIXED, path="same.nii"), FIXED, "grid")
    np.testing.assert_allclose(same.volume.values, FIXED.values, atol=1e-3)


def test_where_nothing_was_measured_is_the_lowest_value():
    small = dataclasses.replace(moving("ct", np.eye(4)), values=moving("ct", np.eye(4)).values[:, :, :10])
    done = register(small, FIXED, "grid")
    assert (done.volume.values[:, :, -1] == small.values.min()).all()


def test_another_scan_of_its_grid_goes_the_same_way():
    move = motion((0, 0, 8), (5, 0, 0))
    done = register(moving("t2", move), FIXED, "rigid")
    other = along(moving("pd", move), FIXED, done.transform)
    assert other.moved == done.moved and other.information[1] > other.information[0]


def test_what_got_worse_is_refused(monkeypatch):
    away = itk.Euler3DTransform()
    away.SetTranslation((30.0, 0.0, 0.0))
    monkeypatch.setattr(registration, "_search", lambda *_: away)
    with pytest.raises(UserError, match=r"moving.nii: rigid registration made it worse and is refused \(mutual"):
        register(moving("t2", np.eye(4)), FIXED, "rigid")


def test_a_way_that_is_none_and_a_library_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="--register bspline: expected one of none, grid, rigid, affine"):
        register(FIXED, FIXED, "bspline")
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(UserError, match=r"pip install 'medm2g-jax\[itk\]'"):
        register(FIXED, FIXED, "grid")


def test_grids_are_one_to_half_a_voxel():
    def shifted(mm, volume=FIXED):
        affine = volume.affine.copy()
        affine[0, 3] += mm
        return dataclasses.replace(volume, affine=affine)

    assert on_one_grid(FIXED, shifted(1.9)) and not on_one_grid(FIXED, shifted(2.1))
    turned = dataclasses.replace(FIXED, affine=motion((0, 0, 2), (0, 0, 0)) @ FIXED.affine)
    assert not on_one_grid(FIXED, turned)  # its middle lies where it did, its corners do not
    assert not on_one_grid(FIXED, dataclasses.replace(FIXED, values=FIXED.values[:-1]))
