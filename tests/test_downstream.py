"""Readers of generated and real images: who trains on what, scored as scipy does, labels as manifests have them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import mannwhitneyu

from medm2g_jax.data.findings import in_words, stated
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.phantom.body import subject
from medm2g_jax.data.phantom.render import HALF_AXIAL, Phantom
from medm2g_jax.data.source import Record, present
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import downstream
from medm2g_jax.evaluate.metrics import METRICS
from medm2g_jax.evaluate.metrics.labels import auroc
from medm2g_jax.inference import Model

MODEL = Model.__new__(Model)  # nobody asks it for anything: `samples` answers for it
now = lambda name, measure: measure()  # noqa: E731  every row is measured
PLAN = downstream.Plan(fractions=(0.5, 1.0), base=40, asked=30, steps=12, seeds=2)


def test_auroc_is_mann_whitney_s_and_weights_are_rows_drawn_again():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 2, 60).astype(float), rng.integers(0, 12, 60) / 12  # many are equal
    expected = lambda t, s: mannwhitneyu(s[t == 1], s[t == 0]).statistic / ((t == 1).sum() * (t == 0).sum())  # noqa: E731
    drawn = rng.integers(0, 60, (5, 60))
    weights = np.stack([np.bincount(rows, minlength=60) for rows in drawn]).astype(float)
    assert auroc(truth, scores, weights) == pytest.approx([expected(truth[r], scores[r]) for r in drawn], abs=1e-12)
    unknown = np.where(np.arange(60) < 10, np.nan, truth)
    once = np.ones((1, 60))
    assert auroc(unknown, scores, once)[0] == pytest.approx(expected(truth[10:], scores[10:]), abs=1e-12)
    assert np.isnan(auroc(np.ones(60), scores, once)[0])
    both = np.stack([truth, np.ones(60)], 1)  # of a finding that all show there is none
    assert METRICS["AUROC"](both, np.stack([scores, scores], 1)) == pytest.approx(expected(truth, scores), abs=1e-12)


def test_masks_of_the_phantom_are_as_large_as_its_lesions():
    source = Phantom(size=64, seed=0, train=0, val=0, test=60)
    areas = []
    for i in range(60):
        s, mask = subject(0, i), source.masks(i, "ct")
        if s.kind == 1:  # a mass is an ellipse in its slice, which lies in its middle
            areas.append(mask.sum() * (2 * HALF_AXIAL / 64) ** 2 / (np.pi * s.lesion_r**2 * s.squash))
        assert mask.any() == (s.kind != 0)
    assert len(areas) > 8 and 0.9 < np.mean(areas) < 1.2
    with pytest.raises(UserError, match="masks of lesions in axial slices, not in xray"):
        source.masks(0, "xray")


@pytest.fixture
def source():
    return Phantom(size=32, seed=0, train=240, val=0, test=40)


def parts(task: str, figures: list) -> dict[str, float]:
    return {f.task.partition(": ")[2]: f.value for f in figures if f.task.startswith(task) and "beyond" not in f.task}


def test_generated_images_that_are_the_real_ones_help_as_much(source, monkeypatch):
    """A generator that gives back the very subjects it is asked for is as good as "other real ones", and no better."""
    asked = {"xray": [], "ct": []}

    def perfect(model, given, make, count, seed, first, **options):
        (target,) = make
        streams = (*given, target)
        mine = [i for i, r in enumerate(source.records) if r.split == "train" and set(streams) <= set(r.streams)]
        index = mine[1::2][: PLAN.asked]
        chosen = [index[min(first + k, len(index) - 1)] for k in range(count)]
        asked[target] += chosen
        for stream, values in given.items():
            assert all(np.array_equal(v, downstream._read(source, i, stream))
                       for v, i in zip(values, chosen, strict=True))  # fmt: skip
        return {target: source.images(chosen, target)}

    monkeypatch.setattr(downstream, "samples", perfect)
    for how, given, target in ((downstream.classified, "text", "xray"), (downstream.segmented, "mri:t2", "ct")):
        figures = how(MODEL, source, (given,), target, 40, 0, row=now, plan=replace(PLAN, seeds=1))
        found = {metric: [f for f in figures if f.metric == metric] for metric in {f.metric for f in figures}}
        main = "AUROC" if target == "xray" else "Dice"
        for metric in set(found) - {f"{m}, paired difference" for m in found}:
            values = {f.task.partition(": ")[2]: f for f in found[metric] if "(20)" in f.task}
            assert set(values) == set(downstream.ARMS)
            made, other = (values[name] for name in ("generated, mixed in", "other real ones, mixed in"))
            assert made.value == other.value and made.interval == other.interval
            assert 0 < made.n < 40 if metric == "lesion pointed at" else made.n == 40  # where there is one
            assert metric != main or target == "ct" or made.value != values["real alone"].value  # a mask takes longer
        gains = {f.task: f for f in found[f"{main}, paired difference"]}
        assert len(gains) == 2 * (len(downstream.ARMS) - 1)
        one = gains[next(t for t in gains if "100 % real (40): generated, mixed in" in t)]
        plain = {f.task.partition(": ")[2]: f.value for f in found[main] if "(40)" in f.task}
        assert one.value == pytest.approx(plain["generated, mixed in"] - plain["real alone"], abs=1e-12)
        assert one.interval[0] <= one.value <= one.interval[1]
        assert sum("generated alone" in f.task for f in found[main]) == 1
        base = downstream._halves(source, (given, target), 40, PLAN).base
        assert not {source.records[i].subject for i in base} & {source.records[i].subject for i in asked[target]}


def test_a_reader_learns_where_the_lesion_is(source):
    index = [i for i, r in enumerate(source.records) if "ct" in r.streams and r.split == "train"]
    x, y = source.images(index, "ct"), np.stack([source.masks(i, "ct") for i in index]).astype(np.float32)
    trainer = downstream.Trainer(0, 100, x[0])
    test = [i for i, r in enumerate(source.records) if r.split == "test"]
    trained = trainer.train(downstream.Arm(), downstream.Pool(x.__getitem__, y), None, 0)
    read = trainer.read(trained, source.images(test, "ct"))
    truth = np.stack([source.masks(i, "ct") for i in test])
    ill = truth.any((1, 2, 3))
    assert METRICS["Dice"](truth[ill], read[ill] > 0.5) > 0.4


def test_augmented_masks_go_along_and_nothing_is_mirrored():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 32, 32, 1)), jnp.float32)
    same, mask = downstream._augmented(x, x, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(same, x)
    moved, mask = downstream._augmented(x, x, jax.random.key(0), 1.0)
    for one, image, new in zip(np.asarray(x), np.asarray(mask), np.asarray(moved), strict=True):
        shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)
                  if np.array_equal(np.roll(one, (i, j), (0, 1))[4:-4, 4:-4], image[4:-4, 4:-4])]  # fmt: skip
        assert len(shifts) == 1 and np.corrcoef(image.ravel(), new.ravel())[0, 1] > 0.9


def test_findings_as_manifests_have_them(tmp_path):
    assert stated({"labels": {"Edema": 1.0, "Fracture": 0.0, "Pneumonia": -1.0}, "view": "PA"}) == {
        "Edema": True, "Fracture": False, "Pneumonia": None}  # fmt: skip
    assert stated({"labels": ["Pleural_Thickening"]}) == {"Pleural_Thickening": True} and stated({"labels": []}) == {}
    assert stated({"pneumothorax": False, "pieces": 0}) == {"pneumothorax": False} and stated({"view": "AP"}) is None
    assert in_words({"Pleural_Thickening": True, "Edema": None, "Mass": True}) == "Findings: pleural thickening, mass."
    assert in_words({"No Finding": True, "Edema": False}) == "No finding."
    for k, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / folder / "x.png")
        rows = [dict(id="1", subject=f"{folder}{split}", split=split, images={"xray": "x.png"}, license="CC0",
                     info={"pneumothorax": bool(k)}) for split in ("train",)]  # fmt: skip
        (tmp_path / folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of = present(Manifest(tmp_path, 8))
    assert [of(0), of(1)] == [{"pneumothorax": False}, {"pneumothorax": True}]
    silent = Manifest(tmp_path / "a", 8)
    (tmp_path / "a" / "manifest.jsonl").write_text(json.dumps(rows[0] | {"info": {"view": "AP"}}))
    assert present(Manifest(tmp_path / "a", 8)) is None
    with pytest.raises(UserError, match="no record says which findings it shows"):
        downstream.classified(MODEL, Manifest(tmp_path / "a", 8), ("text",), "xray", 1, 0, row=now, plan=PLAN)
    with pytest.raises(UserError, match="a has no masks of lesions"):
        downstream.segmented(MODEL, silent, ("text",), "xray", 1, 0, row=now, plan=PLAN)


def test_too_few_subjects_are_said(source):
    source.records = source.records[:30] + source.records[-40:]
    with pytest.raises(UserError, match="10 training subjects with text, xray; expected 20 or more"):
        downstream._halves(source, ("text", "xray"), 40, PLAN)
    generated = [Record(r.id, r.subject, r.split, r.streams, "", r.grid, ("xray",)) for r in source.records]
    source.records = generated
    with pytest.raises(UserError, match="0 training subjects with xray"):
        downstream._halves(source, ("xray",), 40, PLAN)
