"""The audit flags what it must and passes what it must: on synthetic sets whose truth is known, and through the verb.

`full`: models trained until they know 200 subjects by heart, beside ones trained as long on 5,000 (tests/memorised.py).
"""

import json

import numpy as np
import pytest
from micro import model_of, train
from PIL import Image

from medm2g_jax import audit, cli, fill
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import memorisation
from medm2g_jax.evaluate.memorisation import PIXELS, SPACE, Ask, Rows, judged
from medm2g_jax.evaluate.metrics import neighbours as near
from medm2g_jax.evaluate.samples import samples

ASK = Ask((), "ct")


class World:
    """Images of subjects, of a dozen numbers each: without noise what a model draws, with it what a scanner sees."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.pixels, self.space = self.rng.normal(size=(12, 256)) / 3, self.rng.normal(size=(12, 32))

    def draw(self, n):
        return self.rng.normal(size=(n, 12))

    def seen(self, subjects, noise=0.0):
        x, u = np.tanh(subjects @ self.pixels), subjects @ self.space
        u = u + noise * self.rng.normal(size=u.shape)
        return {
            PIXELS: x + noise * self.rng.normal(size=x.shape),
            SPACE: u / np.linalg.norm(u, axis=1, keepdims=True),
        }

    def rows(self, subjects, each=1, noise=0.2):
        whose = np.repeat(np.arange(len(subjects)), each)
        return Rows(tuple(range(len(whose))), whose, self.seen(subjects[whose], noise))


def verdict(seed, made_of, train=300, held=300, each=1, n=100, noise=0.2):
    """What is found of samples of the subjects made_of(world, training subjects, n)."""
    world = World(seed)
    known = world.draw(train)
    made = world.seen(made_of(world, known, n))
    real, pool, other = (world.rows(x, e, noise) for x, e in ((world.draw(n), 1), (known, each), (world.draw(held), 1)))
    return judged(ASK, made, real, pool, other, seed)


def copied(world, known, n, share=1.0):
    some = int(share * n)
    return np.concatenate([known[world.rng.integers(0, len(known), some)], world.draw(n - some)])


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_flagged_and_fresh_draws_pass(seed):
    """Also copies of a tenth, and of a training set of which most is in no pool; and draws that are much alike."""
    fresh = verdict(seed, lambda world, known, n: world.draw(n))
    assert fresh.reasons == [] and sum(pair.copy for pair in fresh.pairs) <= 1
    assert all(abs(figure.value - 1) < 0.1 for figure in fresh.figures if figure.metric == memorisation.BESIDE)
    whole = verdict(seed, copied)
    assert len(whole.reasons) == 4 and all(pair.copy for pair in whole.pairs if pair.space == PIXELS)
    assert [f.value < 0.8 for f in whole.figures if f.metric == memorisation.RATIO] == [True, True]
    tenth = verdict(seed, lambda *args: copied(*args, share=0.1))
    assert any("copies of" in reason for reason in tenth.reasons)
    assert {pair.sample for pair in tenth.pairs if pair.copy and pair.space == PIXELS} == set(range(10))
    large = verdict(seed, copied, train=3000, each=1)
    assert any("training subjects among 100 samples" in reason for reason in large.reasons)
    for train_, each in ((3000, 1), (300, 4)):  # nearer by chance alone, were the pools not equal
        assert verdict(seed, lambda world, known, n: world.draw(n), train=train_, each=each).reasons == []
    for spread in (0.0, 0.3):  # a model that draws one subject, or nearly so
        alike = verdict(seed, lambda world, known, n, s=spread: world.draw(1) + s * world.draw(n))
        assert alike.reasons == []
    one = verdict(seed, lambda world, known, n: np.repeat(known[:1], n, axis=0), noise=0.1)
    assert any("copies of 1 training subject among 100 samples" in reason for reason in one.reasons)


def test_the_larger_pool_is_nearer_by_chance_and_refused():
    rng = np.random.default_rng(0)
    x, many, few = (rng.normal(size=(n, 6)) for n in (50, 1000, 100))
    a, b = near.distances(x, many), near.distances(x, few)
    np.testing.assert_allclose(b[3, 4], np.sqrt(np.mean((x[3] - few[4]) ** 2)))
    assert np.mean(np.log(a.min(1) / b.min(1))) < -0.2 and abs(np.mean(near.log_ratios(a[:, :100], b))) < 0.1
    with pytest.raises(ValueError, match="pools of 1000 and 100 rows"):
        near.log_ratios(a, b)


def test_gaps_do_not_depend_on_the_pool_and_an_exact_copy_has_none():
    rng = np.random.default_rng(1)
    x, pool = rng.normal(size=(200, 8)), rng.normal(size=(4000, 8))
    d = near.distances(x, pool)
    assert near.gaps(d).mean() == pytest.approx(near.gaps(d[:, :200]).mean(), abs=0.03)
    exact = near.distances(pool[:3], pool)
    assert near.gaps(exact).max() < 1e-5 and near.copies(exact, d).all()
    assert np.isfinite(near.log_ratios(exact[:, :100], d[:3, :100])).all()
    whose = np.repeat(np.arange(1000), 4)
    np.testing.assert_array_equal(near.of_subjects(d, whose), d.reshape(200, 1000, 4).min(2))
    even = [near.exchanged(*(a[:, :9] for a in (d[:, 40 * i :], d[:, 9 + 40 * i :], d, d))) for i in range(12)]
    assert 0.2 < np.mean(even) < 0.8 and min(even) < 0.4 < 0.6 < max(even)  # no row is anything but a row
    assert near.by_chance(0, 9) == 1 and near.by_chance(1, 9) == 0.5 and near.by_chance(7, 200) < 0.01


# --- through the verb -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """CT and MRI, untrained: it knows nobody."""
    return model_of("ct_mri", "tiny,alone")


def data(tmp_path, licence="CC BY 4.0", test=36):
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(40 + test):
        images = {}
        for key in ("ct", "mri_t2"):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5), np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
            coarse.save(folder / f"{key}{i}.png")
            images[key] = f"{key}{i}.png"
        split = "train" if i < 40 else "test"
        rows.append(dict(id=f"secret{i}", subject=f"s{i}", split=split, images=images, license=licence))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"manifest:{folder}"


def line_of(spec, out, *more):
    return ["audit", "--model", "RUN", "--data", spec, "--make", "ct", "--out", str(out), *more]


@pytest.fixture
def loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("medm2g_jax.loading.load", lambda path: model)
    monkeypatch.setattr("medm2g_jax.loading.locate", lambda path: tmp_path)
    return model


def test_a_model_that_knows_nobody_passes(loaded, tmp_path, capsys):
    spec = data(tmp_path)
    cli.main(line_of(spec, tmp_path / "out"))
    said = capsys.readouterr().out
    assert "MRI t2 -> CT: 12 samples; 40 rows of 40 of 40 training subjects, 24 held-out" in said and "passes" in said
    told = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert told["verdict"] == "passes" and told["model"]["fingerprint"] == loaded.fingerprint
    assert {f["protocol"] for f in told["figures"]} == {"neighbours, pixels", "neighbours, aligned space"}
    assert (tmp_path / "out" / "audit-ct.png").exists() and "secret" not in json.dumps(told) + said
    # A sample's noise is a function of the seed and its number, whatever else is made.
    given = {"mri:t2": np.zeros((12, 32, 32, 1), np.float32)}
    first, later = (samples(loaded, given, ["ct"], 12, 0, first=n, register="made")["ct"] for n in (0, 4))
    np.testing.assert_allclose(first[4:], later[:8], atol=1e-5)


@pytest.mark.parametrize("licence", ["CC BY 4.0", "credentialed"])
def test_one_that_gives_back_training_rows_is_flagged_and_what_is_closed_is_not_shown(
    loaded, tmp_path, capsys, monkeypatch, licence
):
    spec = data(tmp_path, licence)
    source, rng = fill.data_of(loaded, spec), np.random.default_rng(0)

    def stolen(model, given, make, count, seed, first, register):
        return {"ct": np.stack([source.read((first + i) % 40, "ct", rng) for i in range(count)]) * 0.9}

    monkeypatch.setattr(memorisation, "samples", stolen)
    with pytest.raises(SystemExit) as left:
        cli.main(line_of(spec, tmp_path / "out"))
    assert left.value.code == 3
    said = capsys.readouterr().out
    assert "flagged: MRI t2 -> CT, pixels: copies of 12 training subjects among 12 samples" in said
    told = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert told["verdict"] == "flagged" and {c["train"] for c in told["copies"] if c["space"] == PIXELS} == set(
        range(12)
    )
    assert "secret" not in json.dumps(told) + said
    rows = 3 if source.open else 1
    assert Image.open(tmp_path / "out" / "audit-ct.png").height // 128 == rows


def test_what_cannot_be_audited_is_said(loaded, tmp_path, capsys):
    spec = data(tmp_path, test=20)
    assert audit.requests(loaded, fill.data_of(loaded, spec)) == [Ask((), "ct"), Ask((), "mri:t2")]
    with pytest.raises(UserError, match="40 training and 20 held-out subjects have ct; expected at least 30 of each"):
        audit.audit(loaded, fill.data_of(loaded, spec), tmp_path / "out", make=["ct"])
    with pytest.raises(UserError, match="--make text: audited is an image that the model makes.*: ct, mri:t2"):
        audit.audit(loaded, fill.data_of(loaded, spec), tmp_path / "out", make=["text"])
    with pytest.raises(SystemExit):
        cli.main(line_of(spec, tmp_path / "out", "--rows", "0"))
    assert "--rows: expected a whole number from 1" in capsys.readouterr().err


@pytest.mark.full
def test_two_hundred_learnt_by_heart_are_flagged_and_five_thousand_are_not(tmp_path):
    found = [
        json.loads(line) for line in train("memorised.py", str(tmp_path), seconds=7200).splitlines() if "{" in line
    ]
    verdicts = {(one["subjects"], one["seed"]): one["verdict"] for one in found}
    assert verdicts == {(n, s): word for n, word in ((200, "flagged"), (5000, "passes")) for s in range(3)}
