"""What is measured of made images beside PSNR, and the sentence where something beats the model in it."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import wilcoxon

from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.evaluate import extractors, table
from medm2g_jax.evaluate import judge as judging
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.judge import NEAREST, PAIRED, Judge, ahead
from medm2g_jax.evaluate.metrics import METRICS, published
from medm2g_jax.evaluate.metrics.intervals import signed_rank
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES


class Blind(Model):
    """A model without prompt encoders."""

    givable = ()

    def __init__(self):
        pass


@pytest.fixture(scope="module")
def source():
    return Phantom(size=32, seed=0, train=4, val=2, test=24)


@pytest.fixture(scope="module")
def judge(source):
    return Judge(Blind(), source, ("mri:t2",), "ct", 24, 0, np.zeros((1, 32, 32, 1)))


def test_the_phantom_knows_where_its_lesions_are(source):
    test = [i for i, r in enumerate(source.records) if r.split == "test"]
    for i in test:
        mask, found = source.masks(i, "ct")[..., 0], source.labels(i)
        assert mask.any() == (found.kind != "none")
        if mask.any():
            half = mask[:, 16:] if found.side == "left" else mask[:, :16]  # the patient's left is on the right
            assert half.sum() == mask.sum()
            ct = source.read(i, "ct", np.random.default_rng(0))[..., 0]
            assert ct[mask].mean() > ct[8:24][~mask[8:24]].min() + 0.2, "more than lung"


def test_an_error_inside_the_lesion_is_seen_there_alone(judge):
    ill = judge._lesion.any((1, 2, 3))
    made = judge.x - 0.1 * judge._lesion
    of = {f.metric: f for f in judge.figures("T2 -> CT", made)}
    assert 0 < ill.sum() < 24 and of["MAE, lesion"].n == of["bias, lesion"].n == ill.sum() and of["PSNR dB"].n == 24
    assert of["MAE, lesion"].value == pytest.approx(0.05) and of["bias, lesion"].value == pytest.approx(-0.05)
    assert of["MAE, lesion"].floor.what == of["PSNR dB"].floor.what == "the mean image"


def test_what_beats_the_model_in_psnr_is_said_with_what_the_two_have_beside_it(judge):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=judge.x.shape) * rng.uniform(0.1, 0.2, (24, 1, 1, 1))
    sharp = judge.x + np.where(judge._lesion, 0, noise)  # right in the lesion
    smooth = judge.x + rng.uniform(0.25, 0.35, (24, 1, 1, 1)) * noise + 0.4 * judge._lesion  # nearer elsewhere
    worse = judge.x + 2 * noise
    figures = judge.figures("T2 -> CT", sharp)
    for name, other in (("a regression", smooth), ("a table", worse)):
        figures += judge.figures(f"T2 -> CT by {name}", other) + judge.beyond(f"T2 -> CT, beyond {name}", sharp, other)
    (gain,) = (f for f in figures if f.task == "T2 -> CT, beyond a regression" and f.metric == PAIRED)
    x, a, b = (np.asarray(z, np.float64) for z in (judge.x, sharp, smooth))
    each = [10 * np.log10(np.mean((x[i] - b[i]) ** 2) / np.mean((x[i] - a[i]) ** 2)) for i in range(24)]
    assert gain.value == pytest.approx(np.mean(each)) and gain.p == pytest.approx(wilcoxon(each).pvalue)
    (sentence,) = ahead(figures)
    assert sentence.startswith(f"T2 -> CT: a regression beats the model in PSNR, by {-gain.value:.2f} dB")
    (wrong,) = (f for f in figures if f.task == "T2 -> CT by a regression" and f.metric == "MAE, lesion")
    assert f"MAE, lesion {wrong.value:.3f} (the model 0.000)" in sentence and abs(wrong.value - 0.2) < 0.01
    assert f"**{sentence}**" in table.markdown(figures, {}) and f", p {gain.p:.1g} |" in table.markdown(figures, {})
    closer = [f for f in figures if f.metric == "MAE, lesion, paired difference"]
    assert closer[0].value < 0 and closer[0].interval[1] < 0 and closer[0].p < 0.01


def test_what_public_evaluators_make_of_it(source, capsys):
    """Volumes are whole subjects in the order of their records; the phantom has one slice of each."""
    rng = np.random.default_rng(0)
    judge = Judge(Blind(), source, ("mri:t2",), "ct", 3, 0, np.zeros((1, 32, 32, 1)), protocols=(*judging.PUBLIC,))
    made = np.clip(judge.x + 0.1 * rng.normal(size=judge.x.shape), -1, 1)
    of = {f.metric: f for f in judge.figures("T2 -> CT", made)}
    hu = lambda x: MODALITIES["ct"].in_unit(x[..., 0]).astype(np.float64)  # noqa: E731
    masks = [published.body(volume) for volume in hu(judge.x)[:, None]]
    assert all(0.2 < mask.mean() < 0.9 and mask[0, 16, 16] for mask in masks), "lungs are inside the body"
    errors = [np.abs(a - b)[m[0]].mean() for a, b, m in zip(hu(judge.x), hu(made), masks, strict=True)]
    assert of["MAE HU, synthrad2025"].value == pytest.approx(np.mean(errors))
    assert of["MAE HU, synthrad2025"].protocol == "synthrad2025, slices" and of["MS-SSIM, synthrad2025"].n == 3
    values = published.selfrdb_psnr(judge.x, made, None, judge.subjects)
    assert of["PSNR dB, selfrdb"].value == pytest.approx(values.mean()) and "PSNR dB, syndiff" in of
    part = Judge(Blind(), source, ("ct",), "mri:t2", 4, 0, np.zeros((1, 32, 32, 1)), protocols=("synthrad2025",))
    assert not any("synthrad" in f.metric for f in part.figures("CT -> T2", part.x))
    assert "synthrad2025 is left out: relative signal, not HU" in capsys.readouterr().out


def test_perceptual_distance_is_there_where_an_extractor_is(source, monkeypatch):
    two = lambda x: [np.concatenate([x, 1 - x], -1)]  # noqa: E731
    monkeypatch.setattr(extractors, "there", lambda modality: ["xrv"] if modality.name == "ct" else [])
    monkeypatch.setattr(extractors, "load", lambda name: extractors.Loaded(two, None))
    judge = Judge(Blind(), source, ("mri:t2",), "ct", 6, 0, np.zeros((1, 32, 32, 1)))
    same, other = (
        next(f for f in judge.figures("T2 -> CT", x) if f.metric == "perceptual distance @xrv")
        for x in (judge.x, -judge.x)
    )
    assert same.value == pytest.approx(0, abs=1e-9) and other.value > 0.1
    assert same.floor.what == "the mean image" and same.floor.value > 0


def test_a_subject_of_which_a_slice_is_missing_is_no_volume(source, monkeypatch, capsys):
    test = [r for r in source.records if r.split == "test"]
    whose = {r.id: f"p{n // 6}" for n, r in enumerate(test)}
    several = [dataclasses.replace(r, subject=whose.get(r.id, r.subject)) for r in source.records]
    monkeypatch.setattr(source, "records", several)
    of = lambda rows: Judge(Blind(), source, ("mri:t2",), "ct", rows, 0, np.zeros((1, 32, 32, 1)))  # noqa: E731
    some = of(24)
    (mae, *_) = some.in_volumes("T2 -> CT", np.clip(some.x + 0.1, -1, 1))
    assert mae.n == 4 and 0 < mae.value < 0.05 * 4095
    # Four subjects, each of six slices, are four witnesses: of differences of one sign 2 of 16 signings are as far.
    gain, *_ = some.beyond("T2 -> CT, beyond b", some.x + 0.05, some.x + 0.1)
    assert gain.p == pytest.approx(2 / 16) and gain.n == 24
    few = of(3)
    assert few.in_volumes("T2 -> CT", few.x) == [] and "no subject has all its slices" in capsys.readouterr().out


def test_the_test_is_wilcoxon_s():
    """By hand: of 1 .. 5, all of one sign, two of the 32 signings are as far; equal pairs say nothing."""
    assert signed_rank(np.arange(1.0, 6.0)) == pytest.approx(2 / 32)
    assert signed_rank(np.zeros(5)) == 1.0


def test_cosine_with_the_sources_is_their_mean(monkeypatch):
    a, b = np.eye(3), np.roll(np.eye(3), 1, axis=0)
    assert METRICS["cosine with its source @ours"]([a, b], 2 * a) == pytest.approx(0.5)
    assert METRICS["cosine with its source @ours"]([a], -a) == pytest.approx(-1)


def test_what_the_probe_reads_is_counted_where_it_means_something(source):
    """A judge that always answers the first of each field: kind none."""
    reads = lambda x: dict.fromkeys(judging.FIELDS, np.zeros(len(x), int))  # noqa: E731
    judge = Judge(Blind(), source, ("mri:t2",), "ct", 24, 0, np.zeros((1, 32, 32, 1)), reads)
    of = {f.metric: f for f in judge.figures("T2 -> CT", judge.x) if f.protocol == "probe"}
    ill = int((judge._findings["kind"] != 0).sum())
    assert of["lesion seen"].value == 0 and of["lesion seen"].n == of["side right"].n == ill
    assert of["no lesion seen where none is"].value == 1 and of["no lesion seen where none is"].n == 24 - ill


def test_a_report_that_is_looked_up_and_better_is_said_to_be():
    def figure(task: str, value: float, metric: str = "finding F1") -> Figure:
        interval = (value - 0.02, value + 0.02)
        protocol = "findings" if metric == "finding F1" else "words, r2gen"
        return Figure(task=task, metric=metric, protocol=protocol, value=value, interval=interval, n=9, seed=0)

    near = f"CT -> report{NEAREST}"
    some = [figure("CT -> report", 0.5), figure(near, 0.6), figure("CT -> report", 0.5, "BLEU-4")]
    assert ahead([*some, figure(near, 0.53, "BLEU-4")]) == [
        "CT -> report: that of the nearest training image beats the model in finding F1, 0.600 [0.580, 0.620] over "
        "0.500 [0.480, 0.520]"
    ]
