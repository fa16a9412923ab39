"""The phantom: the physics against other people's numerics, the anatomy on the right side, nothing leaks."""

import pickle
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from medm2g_jax.data.phantom import render as phantom
from medm2g_jax.data.phantom.body import TISSUES, Subject, hounsfield, subject, tissues
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.phantom.report import KINDS, parse
from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

SIZE = 32


def stack(subjects):
    return Subject(*map(np.stack, zip(*subjects, strict=True)))


def render(modality, subjects, size=SIZE):
    return np.asarray(
        phantom._render(modality, stack(subjects), 0, np.arange(len(subjects), dtype=np.uint32), size), np.float64
    )


@pytest.fixture(scope="module")
def cohort():
    """64 subjects with a lesion, and their twins without."""
    ill = [s for s in (subject(3, i) for i in range(120)) if s.kind > 0][:64]
    return ill, [s._replace(kind=np.float32(0)) for s in ill]


@pytest.fixture(scope="module")
def small():
    return Phantom(SIZE, seed=0, train=60, val=9, test=12)


# --- physics --------------------------------------------------------------------------------------------------------


def test_beer_lambert_of_a_slab():
    # 10 cm of water with 2 cm of bone in the middle, in air; the film's two halves differ.
    def hu(y):
        slab = jnp.where(jnp.abs(y) < 5, 0.0, -1000.0) * jnp.ones((2, 3))
        return jnp.where((jnp.abs(y) < 1) & (jnp.arange(3) == 0), 700.0, slab)

    path = phantom.line_integral(hu, half_depth=10.0, steps=40)  # 0.5 cm: the slab's faces lie between samples
    transmitted = np.exp(-np.asarray(path))
    np.testing.assert_allclose(transmitted[:, 1:], np.exp(-0.19 * 10), rtol=1e-5)
    np.testing.assert_allclose(transmitted[:, 0], np.exp(-0.19 * (8 + 2 * 1.7)), rtol=1e-5)


def bloch(pd, t1, t2, tr, te, ti):
    """Signal of a repeated (180 - TI -) 90 - echo sequence: dM/dt integrated numerically up to the steady state."""

    def relax(m, ms):
        if ms == 0:
            return m
        return solve_ivp(lambda t, m: [(1 - m[0]) / t1, -m[1] / t2], (0, ms), m, rtol=1e-9, atol=1e-12).y[:, -1]

    m = np.array([1.0, 0.0])
    for _ in range(3):
        if ti:
            m = relax(np.array([-m[0], 0.0]), ti)
        echo = relax(np.array([0.0, m[0]]), te)[1]  # 90 degrees: what was along the field lies across it
        m = relax(np.array([0.0, 0.0]), tr - ti)  # TR >> T2: nothing across is left
    return abs(pd * echo)


@pytest.mark.parametrize("stream", phantom.CONTRASTS)
@pytest.mark.parametrize("tissue", ["fat", "soft", "blood", "fluid", "mass"])
def test_spin_echo_solves_bloch(tissue, stream):
    tr, te, ti, top = phantom.CONTRASTS[stream]
    _, pd, t1, t2 = TISSUES[tissue]
    expected = bloch(pd, t1, t2, tr, te, ti)
    assert abs(float(phantom.spin_echo(pd, t1, t2, tr, te, ti))) == pytest.approx(expected, rel=1e-4)
    assert 0.02 * top < expected < 1.1 * top  # the window fits


def test_mri_signal_in_the_heart():
    """Pixels of pure blood: closed form within bias, texture and noise, which average out over subjects."""
    quiet = np.ones((len(TISSUES), 3), np.float32)
    hearts = [subject(1, i)._replace(relaxation=quiet, slice=np.float32(-3.6), kind=np.float32(0)) for i in range(64)]
    images = render("mri", hearts)
    col = np.round((1.7 / phantom.HALF_AXIAL + 1) / 2 * SIZE - 0.5).astype(int)
    row = np.round((-2.2 / phantom.HALF_AXIAL + 1) / 2 * SIZE - 0.5).astype(int)
    for channel, (stream, (tr, te, ti, top)) in enumerate(phantom.CONTRASTS.items()):
        e1, e2, inverted = np.exp(-tr / 1400), np.exp(-te / 180), 2 * np.exp(-ti / 1400)
        expected = 0.85 * e2 * abs(1 - inverted + e1) / top
        got = (images[:, row, col, channel].mean() + 1) / 2
        assert got == pytest.approx(expected, rel=0.03), stream


def test_contrast_agent_brightens_the_mass_alone(cohort):
    masses = [s for s in cohort[0] if s.kind == 1 and s.size == 1]
    images = (render("mri", masses) + 1) / 2
    plain, enhanced = (images[..., list(phantom.CONTRASTS).index(s)] for s in ("mri:t1", "mri:t1ce"))
    g = phantom._grid(phantom.HALF_AXIAL, SIZE)
    x, y = g[None, :], g[:, None]
    for s, before, after in zip(masses, plain, enhanced, strict=True):
        distance = np.hypot(x - s.side * s.lesion_x, y - s.lesion_y)
        inside, outside = distance < 0.5 * s.lesion_r, distance > 1.5 * s.lesion_r
        assert after[inside].mean() > 1.7 * before[inside].mean()
        assert abs(after[outside].mean() - before[outside].mean()) < 0.01


# --- anatomy --------------------------------------------------------------------------------------------------------


def test_hu_of_known_tissues():
    s = subject(0, 1)._replace(
        kind=np.float32(1), side=np.float32(1), size=np.float32(1), lesion_r=np.float32(3), slice=np.float32(-4.6),
        lesion_x=np.float32(8.6), lesion_y=np.float32(3.2), cardiomegaly=np.float32(0), heart=np.float32(1),
        heart_x=np.float32(0),
    )  # fmt: skip

    def hu(x, y, z, s=s):
        return float(hounsfield(tissues(s, x, y, z)))

    assert hu(0.0, -17.0, 0.0) == -1000  # air in front
    assert hu(float(s.width - s.fat / 2), 0.0, -4.0) == pytest.approx(-100, abs=1)  # fat
    assert hu(1.7, -2.2, -3.6) == pytest.approx(45, abs=1)  # blood in the heart
    assert hu(8.6, 3.2, -4.6) == pytest.approx(45, abs=1)  # the mass
    assert hu(-8.6, 3.2, -4.6) < -700  # the other lung
    assert hu(-9.5, -4.5, 0.0) == pytest.approx(-800, abs=1)  # lung, in front
    assert hu(-6.5, -4.0, -13.0) == pytest.approx(40, abs=1)  # liver
    assert hu(0.0, 0.9, 7.0) == pytest.approx(-1000, abs=1)  # trachea
    fluid = s._replace(kind=np.float32(3), lesion_r=np.float32(4))
    assert hu(8.5, 5.6, -4.6, fluid) == pytest.approx(10, abs=1)  # effusion, at the back
    assert hu(8.5, -4.0, -4.6, fluid) == pytest.approx(-800, abs=1)  # and not in front


def test_fractions_sum_to_one():
    rng = np.random.default_rng(0)
    points = rng.uniform(-18, 18, (3, 4000)).astype(np.float32)
    for i in range(4):
        fractions = np.stack([np.broadcast_to(f, 4000) for f in tissues(subject(5, i), *points).values()])
        np.testing.assert_allclose(fractions.sum(0), 1, atol=1e-5)
        assert fractions.min() >= -1e-6


@pytest.mark.parametrize("modality", ["ct", "xray"])
def test_lesion_is_on_its_side(cohort, modality):
    """Patient left is image right. Against the twin without the lesion, only the lesion's half gets brighter."""
    ill, well = cohort
    change = (render(modality, ill) - render(modality, well))[..., 0]
    halves = change[:, :, SIZE // 2 :].sum((1, 2)) - change[:, :, : SIZE // 2].sum((1, 2))
    sides = np.array([s.side for s in ill])
    assert (np.sign(halves) == sides).all()
    per_half = np.abs(change).reshape(-1, SIZE, 2, SIZE // 2).max((1, 3))
    other = np.where(sides > 0, per_half[:, 0], per_half[:, 1])
    assert other.max() < 0.12  # noise, being Poisson, moves a little where lung is more dense


def test_heart_is_on_the_image_right(cohort):
    well = [s._replace(slice=np.float32(-4.6)) for s in cohort[1]]
    columns = np.arange(SIZE) - (SIZE - 1) / 2
    front = render("ct", well)[:, SIZE // 4 : SIZE // 2, :, 0] > 0.3  # soft tissue and blood, without the spine
    heart = front[:, :, SIZE // 4 : -SIZE // 4]
    assert ((heart * columns[SIZE // 4 : -SIZE // 4]).sum((1, 2)) / heart.sum((1, 2)) > 0.8).all()
    film = render("xray", well)[:, SIZE // 2 : int(0.68 * SIZE), :, 0]
    assert (film[:, :, SIZE // 2 :].mean((1, 2)) > film[:, :, : SIZE // 2].mean((1, 2))).all()


def test_slices_and_films_stand_upright(cohort):
    well = cohort[1]
    ct = render("ct", well)[..., 0].mean(0)
    middle = ct[:, SIZE // 2 - 1 : SIZE // 2 + 1].mean(1)
    assert middle.argmax() > SIZE // 2  # the spine is at the back: down
    film = render("xray", well)[..., 0].mean(0)
    right_lung = film[:, SIZE // 4 : SIZE // 3].mean(1)
    assert right_lung[SIZE // 3 : SIZE // 2].mean() < right_lung[-SIZE // 8 :].mean() - 0.5  # liver: down


def test_big_hearts_are_wider():
    base = [subject(2, i)._replace(kind=np.float32(0), ribs=np.float32(0), spine=np.float32(0)) for i in range(64)]
    film = render("xray", base)[:, SIZE // 2 : int(0.68 * SIZE), :, 0].mean((1, 2))
    big = np.array([s.cardiomegaly for s in base], bool)
    assert film[big].mean() > film[~big].mean() + 2 * film[~big].std() / np.sqrt(big.sum())
    assert min(s.heart for s in base if s.cardiomegaly) > 1.2 * max(s.heart for s in base if not s.cardiomegaly)


def test_frequencies():
    labels = [Phantom(8, seed=0, train=1, val=1, test=1).labels(i) for i in range(1500)]
    ill = [f for f in labels if f.kind != "none"]
    assert len(ill) / 1500 == pytest.approx(0.75, abs=0.04)
    assert np.mean([f.cardiomegaly for f in labels]) == pytest.approx(0.25, abs=0.04)
    for kind in KINDS[1:]:
        assert np.mean([f.kind == kind for f in ill]) == pytest.approx(1 / 3, abs=0.05)
    assert np.mean([f.side == "left" for f in ill]) == pytest.approx(1 / 2, abs=0.05)
    assert np.mean([f.level == "upper" for f in ill]) == pytest.approx(1 / 3, abs=0.05)
    assert all(f.side is None and f.level is None for f in labels if f.kind == "none")


# --- the source -----------------------------------------------------------------------------------------------------


def test_is_a_source(small):
    assert isinstance(small, Source) and small.name == "phantom" and small.open
    rng = np.random.default_rng(0)
    for stream in small.records[-1].streams:
        value = small.read(80, stream, rng)
        if stream == "text":
            assert parse(value) == small.labels(80)
        else:
            assert value.shape == (SIZE, SIZE, 1) and value.dtype == np.float32
            assert -1 <= value.min() < -0.9 and 0 < value.max() <= 1


def test_a_subject_is_the_same_everywhere(small):
    """However many subjects there are, in whatever order and chunk they are read."""
    other = Phantom(SIZE, seed=0, train=300, val=9, test=3)
    for stream, indices in {"ct": [1, 58, 2], "xray": [57, 0], "mri:t2": [2, 59]}.items():
        backwards = other.images(indices[::-1], stream)[::-1]
        np.testing.assert_allclose(small.images(indices, stream), backwards, atol=1e-3)  # one unit of float16
    assert [small.labels(i) for i in range(81)] == [other.labels(i) for i in range(81)]
    changed = Phantom(SIZE, seed=1, train=60, val=9, test=12)
    assert np.abs(changed.images([1], "ct") - small.images([1], "ct")).max() > 0.2
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(small)).images([1], "ct"), small.images([1], "ct"))


def test_splits_and_pairs_are_disjoint(small):
    records = small.records
    assert [r.split for r in records] == ["train"] * 60 + ["val"] * 9 + ["test"] * 12
    assert len({r.subject for r in records}) == len(records)
    pairs = [{s.partition(":")[0] for s in r.streams} for r in records]
    expected = [{"text", "xray"}, {"text", "ct"}, {"ct", "mri"}]
    assert pairs[:60] == expected * 20 and pairs[60:69] == expected * 3  # equal pools, one pair each
    assert all(set(MODALITIES["mri"].streams) <= set(r.streams) for r in records if "mri" in r.streams)
    every = {s for m in ("text", "xray", "ct", "mri") for s in MODALITIES[m].streams}
    assert all(set(r.streams) == every for r in records if r.split == "test")
    with pytest.raises(ValueError, match="no stream"):
        small.read(0, "ct", np.random.default_rng(0))


def test_other_listings_and_bad_pairs():
    other = Phantom(SIZE, seed=0, train=4, val=2, test=0, pairs=(("text", "xray"), ("text", "mri")))
    assert other.records[1].streams == ("text", *MODALITIES["mri"].streams)
    with pytest.raises(UserError, match="pet"):
        Phantom(SIZE, seed=0, pairs=(("text", "pet"),))


def test_unstated_contrast_is_any_contrast(small):
    index = 2
    known = np.stack([small.read(index, s, np.random.default_rng(0)) for s in phantom.CONTRASTS])
    drawn = [small.read(index, "mri", np.random.default_rng(i)) for i in range(40)]
    seen = {int(np.argmin(np.abs(known - d).max((1, 2, 3)))) for d in drawn}
    assert seen == set(range(len(phantom.CONTRASTS)))
    assert all(np.abs(known - d).max((1, 2, 3)).min() == 0 for d in drawn)


def test_a_chunk_is_rendered_once(monkeypatch):
    source = Phantom(SIZE, seed=0, train=90, val=3, test=3)
    calls = []
    inner = phantom._render
    monkeypatch.setattr(phantom, "_render", lambda *args: (calls.append(args[0]), inner(*args))[1])

    def read(first):
        for index in range(first, 90, 3):
            source.read(index, "ct", np.random.default_rng(0))

    threads = [threading.Thread(target=read, args=(1,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["ct"]  # 63 subjects show it: one chunk, whoever asks


def test_what_fits_the_memory_is_rendered_once(monkeypatch):
    """CT has one channel, MRI one a contrast: a place in the memory costs what its images take."""
    monkeypatch.setattr(phantom, "CHUNK", 2)
    rows = 12
    contrasts = len(MODALITIES["mri"].contrasts)
    monkeypatch.setattr(phantom, "MEMORY", rows * SIZE**2 * 2 * (1 + contrasts))
    source = Phantom(SIZE, seed=0, train=rows, val=0, test=0, pairs=(("ct", "mri"),))
    calls = []
    inner = phantom._render
    monkeypatch.setattr(phantom, "_render", lambda *args: (calls.append(args[0]), inner(*args))[1])
    rng = np.random.default_rng(0)
    for _ in range(3):
        for index in rng.permutation(rows):
            source.read(int(index), "ct", rng)
            source.read(int(index), "mri:t1", rng)
    assert sorted(calls) == ["ct"] * (rows // 2) + ["mri"] * (rows // 2)


def test_windows():
    assert MODALITIES["ct"].window == (-1000.0, 400.0)
    assert tuple(phantom.CONTRASTS) == MODALITIES["mri"].streams[1:]
    corner = render("ct", [subject(0, i) for i in range(64)])[:, :2].mean()
    assert corner == pytest.approx(-1 + 2 * 15 / 1400 / np.sqrt(2 * np.pi), abs=0.002)  # air, noise cut at -1000 HU
