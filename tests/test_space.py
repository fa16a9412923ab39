"""The shared space by itself, and what is made jointly: who finds whom, of what is known."""

import numpy as np
import pytest
from etils import epath

from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.evaluate import joint, sets, space
from medm2g_jax.evaluate.measure import _can
from medm2g_jax.generate import Request
from medm2g_jax.inference import Model

PAIRS = (("text", "ct"), ("ct", "text"), ("ct", "mri"), ("mri", "ct"))


class Knowing(Model):
    """An image's vector is its subject's mean grey; a text's is what it is not: always the same."""

    givable = ("text", "ct", "mri")

    def __init__(self):
        self.meta = {"pairs": {"guide": PAIRS}}

    def ids(self, texts):
        return np.arange(len(texts), dtype=float)

    def embedded(self, stream, x):
        grey = np.zeros(len(x)) if stream == "text" else np.asarray(x).reshape(len(x), -1).mean(1)
        return np.stack([np.cos(3 * grey), np.sin(3 * grey)], 1)

    def request(self, given, make, **options):
        return Request(tuple(given), tuple(make), guide_pairs=PAIRS, **options)


def row(name, measure):
    return list(measure())


@pytest.fixture(scope="module")
def source():
    return Phantom(size=32, seed=0, train=2, val=2, test=24)


def test_the_space_by_itself(source, capsys):
    figures = space.in_space(Knowing(), source, (), ("text", "ct", "mri", "xray"), 24, 0, row=row)
    of = {(f.task, f.metric): f for f in figures}
    assert {f.task for f in figures if f.metric == "R@1"} >= {"report -> CT", "CT -> report", "MRI -> CT"}
    # Of texts that nothing tells apart as many are found as in a random order.
    one = of["CT -> report", "R@1"]
    assert one.value == pytest.approx(one.floor.value) and one.n == 24
    assert of["shared space of report, CT, MRI", "modality read"].n == 3 * 12
    assert "xray: this model has no prompt encoder of it" in capsys.readouterr().out


def test_what_is_made_jointly_finds_its_partner(source, monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)

    def samples(model, given, make, count, seed):
        """Jointly of one patient each, one by one of nobody in particular."""
        grey = np.random.default_rng(seed).permutation(np.linspace(-0.9, 0.9, count)) if len(make) > 1 else None
        values = {s: rng.uniform(-0.9, 0.9, count) if grey is None else grey for s in make}
        return {s: np.tile(v[:, None, None, None], (1, 8, 8, 1)) for s, v in values.items()}

    monkeypatch.setattr(joint, "samples", samples)
    sheet = epath.Path(tmp_path / "a.png")
    figures = joint.jointly(Knowing(), source, ("text",), ("ct", "mri"), 12, 0, row=row, sheet=sheet)
    of = {(f.task, f.metric): f.value for f in figures}
    together, alone = (
        of[f"report -> CT, {how} -> report -> MRI, {how}", "R@1"] for how in ("jointly", "each on its own")
    )
    assert together == 1 and alone < 0.5 and ("CT -> MRI", "R@1") in of and sheet.exists()
    assert "no trained guide links" not in capsys.readouterr().out


def test_of_what_is_made_jointly_one_is_guided_by_what_is_given():
    able = ("text", "ct", "mri")
    assert _can(PAIRS, able, (joint.jointly, ("text",), ("ct", "mri")))
    assert not _can(PAIRS, able, (joint.jointly, ("text",), ("mri", "ct", "xray"))), "it makes no X-ray"
    assert not _can(PAIRS, able, (joint.jointly, ("text",), ("mri",)))
    assert not _can(PAIRS, able, (sets.as_sets, ("text",), "mri"))
    assert _can(PAIRS, able, (space.in_space, (), ("text", "xray")))
