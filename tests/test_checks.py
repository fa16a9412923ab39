"""Checks of images before they go into a set: each fault is found, and what is sound is not."""

import numpy as np
import pytest
from look_alikes_volumes import grid, head

from medm2g_jax.data import checks
from medm2g_jax.data.volume import Volume

SHAPE = (40, 44, 6)
AFFINE = grid(SHAPE, (4, 4, 16), "LPS")
CT, T1, T2 = (head(kind, SHAPE, AFFINE).astype(np.int32) for kind in ("ct", "t1", "t2"))


def slices(values):
    return values.transpose(2, 1, 0)


def test_blank():
    assert checks.blank(np.full((8, 8), 7)) == "blank (one value everywhere)"
    almost = np.zeros((64, 64))
    almost[3, 3] = 1
    assert checks.blank(almost).startswith("blank (fewer")
    almost[:3] = 1
    assert not checks.blank(almost) and not checks.blank(slices(T1)[3])


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (CT, ""),
        (np.where(CT < -900, -3024, CT), ""),  # a scanner's circle, outside of it
        (CT.clip(-150, 250), ""),  # windowed, still HU
        (CT - 1024, "applied twice"),
        ((CT + 1024).clip(0), "offset missing"),
        (np.full(SHAPE, -1000), "no tissue"),
        (((CT + 1000) / 8).clip(0, 255), "not in HU"),
        (T1, "not in HU"),
    ],
)
def test_hounsfield(values, found):
    said = checks.hounsfield(Volume(np.asarray(values), AFFINE, "HU"))
    assert found in said and bool(found) == bool(said)


def test_mutual_information_is_what_scikit_learns_histogram_gives():
    """Against the closed form of two normal variables, -log(1 - r^2) / 2, and a plain sum over a histogram."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(256, 256))
    assert checks.mutual_information(a, rng.normal(size=a.shape)) < 0.005
    for r in (0.5, 0.9):
        b = r * a + np.sqrt(1 - r * r) * rng.normal(size=a.shape)
        assert checks.mutual_information(a, b) == pytest.approx(-np.log(1 - r * r) / 2, rel=0.06)
    levels = rng.integers(0, 32, (512, 512))
    joint = np.histogram2d(levels.ravel(), (levels // 4).ravel(), (32, 8))[0] / levels.size
    p, q = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    exact = (joint[joint > 0] * np.log(joint[joint > 0] / (p * q)[joint > 0])).sum()
    assert checks.mutual_information(levels, levels // 4) == pytest.approx(exact, rel=0.02)
    assert checks.mutual_information(a, np.zeros_like(a)) == 0


def test_mutual_information_is_as_in_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    nats = checks.mutual_information(T1, T2)
    studholme = metrics.normalized_mutual_information(T1, T2, bins=32)  # (H(a) + H(b)) / H(a, b)
    entropies = []
    for x in (T1, T2):
        p = np.histogram(x, 32)[0] / x.size
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    joint = sum(entropies) / studholme
    assert nats == pytest.approx(sum(entropies) - joint, rel=0.25)  # its levels reach to the ends, ours to percentiles


def test_pairs():
    a, b, ct = slices(T1), slices(T2), slices(CT)
    assert not checks.pair(a, b) and not checks.pair(a, ct)
    other = np.random.default_rng(0).permutation(b.ravel()).reshape(b.shape)
    assert "nothing in common" in checks.pair(a, other)
    assert "nothing in common" in checks.pair(a, np.zeros_like(b))
    lopsided = [x.copy() for x in (a, ct)]  # half a head: what a flip cannot hide
    for x, air in zip(lopsided, (0, -1000), strict=True):
        x[:, :, 22:] = air
    assert not checks.pair(*lopsided)
    assert "left and right" in checks.pair(lopsided[0], lopsided[1][..., ::-1])


def test_flipped_in_each_plane():
    """Sagittal slices are flipped in their order."""
    a, b = (np.moveaxis(slices(x), 2, 0).copy() for x in (T1, T2))
    a[22:], b[22:] = 0, 0
    assert not checks.pair(a, b, "sagittal") and "left and right" in checks.pair(a, b[::-1], "sagittal")


def test_edges_tell_what_lies_on_each_other():
    assert checks.edge_overlap(T1, T1) == 1
    near, far = checks.edge_overlap(T1, T2), checks.edge_overlap(T1, np.roll(T2, (9, 9), (0, 1)))
    assert near > 0.7 > far + 0.2
    assert checks.edge_overlap(T1, np.zeros_like(T1)) == 0


def test_fingerprints_tell_copies_and_likeness_tells_relatives():
    from PIL import Image

    one, other = slices(T1)[3].astype(np.uint16), slices(T2)[3].astype(np.uint16)
    assert checks.fingerprint(one) == checks.fingerprint(one.copy()) != checks.fingerprint(one + np.uint16(1))
    assert checks.fingerprint(one) != checks.fingerprint(one.astype(np.int32))
    large = np.asarray(Image.fromarray(one.astype(np.float32)).resize((80, 88), Image.Resampling.BICUBIC))
    assert checks.fingerprint(large) != checks.fingerprint(one)
    apart = [
        np.count_nonzero(np.unpackbits(np.frombuffer(bytes.fromhex(checks.likeness(one)), np.uint8)
                                       ^ np.frombuffer(bytes.fromhex(checks.likeness(x)), np.uint8)))
        for x in (one * np.uint16(3), large, other)
    ]  # fmt: skip
    assert apart[0] == 0 and apart[1] <= 16 < apart[2]
