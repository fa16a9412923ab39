"""Pieces of what a stage ends with; whole pictures are drawn in the tests of runs."""

import functools
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from micro import micro
from ml_collections import ConfigDict

from medm2g_jax.config import stage_graph
from medm2g_jax.data.phantom.report import parse
from medm2g_jax.data.pipeline import matching
from medm2g_jax.data.source import Record
from medm2g_jax.evaluate import report, show
from medm2g_jax.evaluate.figures import Figure, Reference, to_json
from medm2g_jax.inference import Model
from medm2g_jax.train import checkpoint, loop, results

MASS = "large left upper mass . the heart is enlarged ."


def source(name: str = "set", splits=("train", "val"), streams=("text", "ct", "mri"), **abilities):
    records = [Record(f"{s}{i}", f"{s}{i}", s, streams) for s in splits for i in range(8)]
    return SimpleNamespace(name=name, open=False, records=records, read=lambda *_: "", **abilities)


class Given(loop.Data):
    """Data whose batches are given, by split."""

    def fixed(self, rows, split, count, seed=0):
        return self.batches_by_split[split if self.holds(rows, split) else "train"]


def given(source, batches=None, tokenizers=None) -> loop.Data:
    data = Given.__new__(Given)  # without the checks of tokenizers: those here only decode
    for field, value in dict(source=source, tokenizers=tokenizers, lengths={}, size=8).items():
        object.__setattr__(data, field, value)
    object.__setattr__(data, "batches_by_split", batches)
    return data


def shown(config, data, flows=None, root="/nowhere") -> show.Shown:
    model = Model.__new__(Model)
    model.model, model.params = SimpleNamespace(flows=flows), {}
    return show.Shown(config, stage_graph(config), epath.Path(root) / config.stage, model, data)


def test_pairs_without_text_are_all_told_apart():
    """A batch begins with `about`, which is no row of anything."""
    image = np.zeros((5, 4, 4, 1), np.float32)
    batch = {"about": {"stream": {"mri": np.zeros(7, np.int32)}}, "ct": image, "mri": image}
    classes, protocol = show._classes(given(source()), batch)
    np.testing.assert_array_equal(classes, np.arange(5))
    assert protocol == "gallery, own partner"


def test_slow_samples_say_how_far_they_are(monkeypatch, capsys):
    now = iter([0.0, 30.0, 60.0, 90.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(now))
    config = ConfigDict(dict(stage="text_ct", batch=16))  # 2 for each of 8 devices
    made = show._in_parts(config, lambda part: part + 1, np.arange(5))
    np.testing.assert_array_equal(made, np.arange(1, 6))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  text_ct: {n} of 5 records, {left} s left" for n, left in ((2, 45), (4, 15))]


def test_the_report_puts_figures_between_floor_and_ceiling():
    common = dict(n=16, seed=0)
    bare = Figure(task="a & b", metric="PSNR dB", protocol="range1", value=float("nan"), **common)
    whole = Figure(task="CT -> report", metric="finding F1", protocol="findings", value=0.39, interval=(0.3, 0.45),
                   floor=Reference(0.33, "the best constant report"), ceiling=Reference(0.98, "the autoencoder"),
                   **common)  # fmt: skip
    page = report._figures([whole, bare])
    rows = [re.findall(r"\d+\.\d{4}|nan", row) for row in page.split("<tr>")[2:]]
    assert rows == [["0.3300", "0.3900", "0.3000", "0.4500", "0.9800"], ["nan"]]
    assert "the best constant report" in page and "a &amp; b" in page


def test_the_report_marks_findings_by_the_source_s_own_labeller():
    texts = {"real": [MASS], "generated": [MASS.replace("left", "right")]}
    page = report._texts(texts, parse)
    assert page.count("class=yes") == 4 and page.count("class=no") == 1 and "side" in page.split("class=no")[1]
    assert "class=" not in report._texts(texts, None)
    page = report._texts(texts, lambda text: {word for word in ("mass", "left") if word in text.split()})
    assert re.findall(r"class=(\w+)>&#\d+; (\w+)", page) == [("no", "left"), ("yes", "mass")]


@pytest.fixture(scope="module")
def embeddings():
    """Pairs that a network has learnt by heart, and held-out ones of which it knows nothing."""
    rng = np.random.default_rng(0)
    train, a, b = rng.normal(size=(3, 8, 6)).astype(np.float32)
    return {"train": {"ct": train, "mri": train}, "val": {"ct": a, "mri": b}}


def aligned(embeddings, splits=("train", "val")):
    """Figures of an alignment stage, by (task, metric)."""
    flow = SimpleNamespace(prompt=lambda params, x: SimpleNamespace(pooled=jnp.asarray(x)))
    data = given(source(splits=splits, streams=("ct", "mri")), embeddings)
    config = micro("align", "ct_mri,tiny,alone")
    figures = show._alignment(shown(config, data, {"ct": flow, "mri": flow}))
    return {(f.task, f.metric): f for f in figures}


def test_the_infonce_of_an_alignment_is_that_of_held_out_rows(embeddings):
    found = aligned(embeddings)

    def nats(a, b):
        a, b = (torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (a, b))
        logits, own = a @ b.T / 0.07, torch.arange(len(a))
        cross = torch.nn.functional.cross_entropy
        return float(cross(logits, own) + cross(logits.T, own)) / 2

    val, train = found["CT <-> MRI", "InfoNCE nats"], found["CT <-> MRI, training records", "InfoNCE nats"]
    assert val.value == pytest.approx(nats(**dict(zip("ab", embeddings["val"].values(), strict=True))), rel=1e-4)
    assert train.value < 0.5 < 2 < val.value
    assert val.floor == (pytest.approx(np.log(8)), "chance")
    assert found["CT <-> MRI, training records", "retrieval@1"].value == 1.0
    assert found["CT <-> MRI", "retrieval@1"].floor == (1 / 8, "chance")


def test_an_alignment_says_which_findings_it_tells_apart():
    """The shared space of this one holds a lesion's side, and neither kind nor size."""
    sides, kinds, sizes = (np.tile(np.repeat(x, n), 8 // n // 2) for x, n in (
        (("left", "right"), 1), (("mass", "consolidation"), 2), (("large", "small"), 4)))  # fmt: skip
    texts = [f"{size} {side} upper {kind} ." for size, side, kind in zip(sizes, sides, kinds, strict=True)]
    tokenizers = SimpleNamespace(decode=lambda ids: texts[int(ids[0])])
    data = given(source(labeller=parse), tokenizers=tokenizers)
    batch = {"text": {"gpt2": np.stack([np.zeros(8, int), np.arange(8)], 1)}}
    u = np.where((sides == "left")[:, None], (1.0, 0.0), (0.0, 1.0)).astype(np.float32)
    v = u + np.linspace(0, 0.1, 8)[:, None]  # the last of its side is the nearest
    found = {f.metric: f for f in show._told_apart(data, batch, "report <-> CT", u, u)}
    assert found["side of the nearest"].value == 1.0 and found["side of the nearest"].floor.value == 0.5
    assert found["kind of the nearest"].value == found["size of the nearest"].value == 0.5
    assert not {m for m in found if m.startswith(("level", "cardiomegaly"))}, "what all reports state alike"
    none = {f.metric: f for f in show._told_apart(data, batch, "report <-> CT", u, v[::-1])}
    assert none["side of the nearest"].value == 0.0
    assert show._told_apart(given(source(), tokenizers=tokenizers), batch, "report <-> CT", u, u) == []


def test_figures_of_training_records_say_so(embeddings):
    """Where a source holds out nothing, no figure looks as if it did."""
    found = aligned(embeddings, splits=("train",))
    assert {task for task, _ in found} == {"CT <-> MRI, training records"}
    for splits, which in ((("train",), "training records"), (("train", "val"), "held-out records")):
        data = given(source(splits=splits), {"train": {}, "val": {}})
        assert show._measured(data, show.Rows(require=("ct",)), 4)[1] == which
    assert (
        show._task("text", "ct", "prompt alone", "training records") == "report -> CT, prompt alone, training records"
    )
    assert matching(source(), show.Rows(require=("ct",)), "val").size == 8


def test_what_is_generated_has_the_figures_of_its_autoencoder_as_ceiling(tmp_path):
    config = micro("ldm", "xray,tiny")
    own = Figure(task="X-ray -> X-ray", metric="PSNR dB", protocol="range1", value=40.0, n=4, seed=0,
                 floor=Reference(3.0, "the mean image"))  # fmt: skip
    other = Figure(task="CT -> CT", metric="PSNR dB", protocol="range1", value=50.0, n=4, seed=0)
    meta = dict(shared=results.shared(config), figures=to_json([other, own]))
    root = epath.Path(tmp_path)
    at = functools.partial(show._of_autoencoder, shown(config, given(source()), root=root), "xray")
    assert at("held-out records") == []
    checkpoint.save_model(root / "image_vae", {"image/vae/x": jnp.ones(1)}, meta)
    assert at("held-out records") == [own] and at("training records") == []
    real = np.zeros((4, 8, 8, 1), np.float32)
    stage = shown(config, given(source()), root=root)
    made = show._compared(stage, "report -> X-ray", "xray", real, real + 0.2, [own])
    (figure,) = [f for f in made if f.metric == "PSNR dB"]
    assert figure.value == pytest.approx(20.0, abs=1e-4)  # 10 log10(4 / 0.04)
    assert (figure.floor, figure.ceiling) == (own.floor, (40.0, "the autoencoder"))


def test_a_folder_called_phantom_is_not_the_phantom():
    """What a source can do is its attribute: findings are read where it brings a labeller, whatever its name."""
    texts = SimpleNamespace(decode=lambda row: [MASS, MASS.replace("large left", "big left")][int(row[0])])
    batch = {"gpt2": np.asarray([[9, 0], [9, 1]])}

    def measured(source):
        data = given(source, tokenizers=texts)
        figures = show._compared(shown(micro("text_ct"), data), "CT -> report", "text", batch, [MASS, MASS], [])
        return {f.metric: f.value for f in figures}, show._classes(data, {"text": batch})

    values, (classes, protocol) = measured(source("phantom"))
    assert values == {"exact": 0.5} and protocol == "gallery, same words" and list(classes) == [1, 0]
    values, (classes, protocol) = measured(source("anything", labeller=parse))
    assert values == {"exact": 0.5, "finding F1": 1.0}
    assert protocol == "gallery, same findings" and list(classes) == [0, 0]
