"""`medm2g evaluate`: which data it takes, and what it calls joint."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from micro import micro
from PIL import Image

from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import measure as measuring
from medm2g_jax.evaluate import phantom, synthesis
from medm2g_jax.evaluate.measure import measure
from medm2g_jax.evaluate.metrics import METRICS
from medm2g_jax.evaluate.probes import FIELDS
from medm2g_jax.generate import Request
from medm2g_jax.inference import Model
from medm2g_jax.train import checkpoint, results


def both(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (*pairs, *((b, a) for a, b in pairs))


TEXT_CT = both(("text", "xray"), ("text", "ct"))
ALL = TEXT_CT + both(("ct", "mri"))


@pytest.mark.parametrize(
    ("given", "make", "pairs", "options", "groups"),
    [
        (("text",), ("ct", "xray"), TEXT_CT, {}, [("ct",), ("xray",)]),
        ((), ("ct", "xray"), TEXT_CT, {}, [("ct", "xray")]),  # the text is made along, and links them
        (("text",), ("xray", "mri:t2", "ct"), ALL, {}, [("xray",), ("mri:t2", "ct")]),
        (("text",), ("ct", "xray"), TEXT_CT, {"guides": "all"}, [("ct", "xray")]),
        (("text",), ("mri", "ct"), ALL, {"guides": "none"}, [("mri",), ("ct",)]),
        (("text",), ("ct",), ALL, {}, [("ct",)]),
    ],
)
def test_what_guides_link(given, make, pairs, options, groups):
    assert list(Request(given, make, guide_pairs=pairs, **options).groups()) == groups


class Answering(Model):
    """Of a loaded model only what an evaluation asks it for beside samples."""

    def __init__(self, pairs):
        self.meta = {"pairs": {"guide": pairs}, "shared": {"seed": 0}}

    def request(self, given, make, **options):
        return Request(tuple(given), tuple(make), guide_pairs=self.meta["pairs"]["guide"], **options)


@pytest.fixture
def bench(monkeypatch):
    """An evaluation whose generator and judge answer at once: CT and MRI show the left, X-rays the right."""
    shown = {"ct": 0, "mri": 0, "xray": 1}
    monkeypatch.setattr(phantom.Bench, "images", lambda self, m, i: np.full((len(i), 1, 1, 1), shown[m]))
    monkeypatch.setattr(
        phantom.Bench,
        "generate",
        lambda self, given, make, **_: {m: np.full((len(self.indices), 1, 1, 1), shown[m]) for m in make},
    )
    judge = lambda x: dict.fromkeys(FIELDS, x[:, 0, 0, 0].astype(np.int32))  # noqa: E731
    monkeypatch.setattr(phantom, "train_probe", lambda *_: judge)

    source = Phantom(size=32, seed=0, train=6, val=2, test=40)
    return lambda pairs, rows=20: phantom.Bench(Answering(pairs), source, rows, 0)


def measured(bench) -> dict[str, float]:
    names = [(f.task, f.metric) for f in bench.figures]
    assert len(set(names)) == len(names), "a figure printed twice"
    return {task: f.value for (task, metric), f in zip(names, bench.figures, strict=True) if metric == "same side"}


def test_modalities_that_no_trained_pair_links_are_independent_and_measured_once(bench, capsys):
    one = bench(TEXT_CT)
    one.image_from_report("ct")
    one.together(["ct", "xray"])
    said = capsys.readouterr().out
    assert "no trained guide links CT with X-ray" in said and "independently" in said and "jointly" not in said
    assert measured(one) == {"report -> CT + X-ray, each on its own": 0.0}


def test_linked_modalities_are_made_jointly_beside_each_on_its_own(bench, capsys):
    one = bench(ALL)
    one.together(["xray", "ct", "mri"])
    assert "no trained guide links X-ray with CT + MRI" in capsys.readouterr().out
    assert measured(one) == {
        "report -> CT + MRI, jointly": 1.0,
        "report -> CT + MRI, each on its own": 1.0,
        "report -> X-ray + CT + MRI, X-ray independently, CT + MRI jointly": 0.0,
    }
    tasks = {f.task for f in one.figures if f.metric == "side right"}
    assert "report -> MRI, jointly with CT" in tasks and not any("X-ray, jointly" in t for t in tasks)


def test_from_nothing_each_pair_is_made_both_ways(bench):
    one = bench(ALL)
    one.from_nothing(["xray", "ct"])
    tasks = {(f.task, f.metric): f.value for f in one.figures if f.metric.endswith("kappa")}
    how = ("jointly", "one by one")
    assert set(tasks) == {(f"nothing -> X-ray + CT, {w}", f"{f} kappa") for w in how for f in ("side", "kind")}


def test_kappa_is_cohen_s():
    """By hand: 20 of 50 yes-yes, 15 no-no, 5 and 10 between; observed 0.70, by chance 0.50."""
    pairs = np.array([(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15)
    assert METRICS["kappa"](*pairs.T) == pytest.approx(0.4)
    assert METRICS["kappa"](pairs[:, 0], pairs[:, 0]) == 1 and METRICS["kappa"](0 * pairs[:, 0], 0 * pairs[:, 0]) == 0


def test_floor_and_ceiling_of_what_the_judge_reads(bench):
    one = bench(TEXT_CT)
    one.side_from_report("ct")
    (real, made) = [f for f in one.figures if f.metric == "side right"]
    left = float(np.mean(one.target["side"] == 0))
    assert (real.task, made.task) == ("real CT", "report -> CT")
    assert made.value == left and made.ceiling == (left, "the probe on real images")
    assert made.floor == (max(left, 1 - left), "the commonest answer")
    low, high = made.interval
    assert low < left < high and made.n == 20 and real.ceiling is None


def manifest(folder) -> str:
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    rows = [
        dict(id=s, subject=s, split=s, license="CC0", images={"ct": "a.png"}, text="large mass .", text_origin="report")
        for s in ("train", "val", "test")
    ]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"manifest:{folder}"


def shared(source: str) -> dict:
    config = micro("text_ct")
    config.data.source = source
    return results.shared(config)


def test_a_folder_called_phantom_has_no_exact_labels(tmp_path):
    trained = {f"{m}/{part}": {} for m in ("text", "ct") for part in ("flow", "guide")}
    about = {"modalities": {"text": {}, "ct": {}}, "from": trained, "pairs": {"guide": [["text", "ct"]]}}
    meta = dict(stage="text_ct", rounds=["text_ct"], shared=shared(manifest(tmp_path / "phantom")), **about)
    checkpoint.save_model(tmp_path / "text_ct", {"ct/guide/x": jnp.ones(1)}, meta)
    with pytest.raises(UserError, match=r"text_ct was trained on manifest:.*/phantom, whose findings have no exact"):
        measure(str(tmp_path / "text_ct"))


def test_the_phantom_is_opened_as_its_run_had_it():
    source = phantom.labelled_source(shared("phantom"), "RUN")
    assert [r.split for r in source.records].count("train") == 96 and source.size == 32
    streams = {r.streams for r in source.records if r.split == "train"}
    assert any("text" in s and "ct" in s for s in streams) and not any("text" in s and "mri" in s for s in streams)


def test_too_few_test_subjects(bench):
    with pytest.raises(UserError, match=r"--rows=999: phantom holds \d+ test subjects with a lesion"):
        bench(TEXT_CT, rows=999)
    with pytest.raises(UserError, match="--rows=-3: expected at least one"):
        measure("RUN", rows=-3)


def test_the_truth_lies_among_draws_of_its_own_distribution_as_often_as_it_should():
    rng = np.random.default_rng(0)
    x, drawn = rng.normal(size=(20, 16, 16, 1)), rng.normal(size=(8, 20, 16, 16, 1))
    figure = synthesis._coverage("a -> b", x, drawn, 0)
    assert figure.value == pytest.approx(7 / 9, abs=0.02) and figure.ceiling.value == pytest.approx(7 / 9)
    assert synthesis._coverage("a -> b", x, 0.1 * drawn, 0).value < 0.2  # draws that are too sure


def test_what_a_model_was_trained_on_is_no_test_of_it(tmp_path):
    """Another folder with the same records, split in another way."""
    own = manifest(tmp_path / "own")
    rows = [json.loads(row) for row in (tmp_path / "own" / "manifest.jsonl").read_text().splitlines()]
    assert any(row["split"] == "train" for row in rows)
    shutil.copytree(tmp_path / "own", tmp_path / "other")
    (tmp_path / "other" / "manifest.jsonl").write_text("\n".join(json.dumps(row | {"split": "test"}) for row in rows))
    trained = {f"{m}/{part}": {} for m in ("text", "ct", "mri") for part in ("flow", "guide")}
    about = {"modalities": {"ct": {}, "mri": {}}, "from": trained, "pairs": {"guide": [["mri", "ct"]]}}
    meta = dict(stage="ct_mri", rounds=["ct_mri"], shared=shared(own), **about)
    checkpoint.save_model(tmp_path / "ct_mri", {"ct/guide/x": jnp.ones(1)}, meta)
    asked = dict(synthesised=[(("mri",), "ct")], data=f"manifest:{tmp_path / 'other'}")
    with pytest.raises(UserError, match="test subjects are among those that the model was trained on"):
        measure(str(tmp_path / "ct_mri"), **asked)


def test_real_images_are_in_no_picture_of_data_that_are_not_open(tmp_path):
    manifest(tmp_path / "open")
    rows = (tmp_path / "open" / "manifest.jsonl").read_text()
    shutil.copytree(tmp_path / "open", tmp_path / "closed")
    closed = rows.replace("CC0", "PhysioNet Credentialed Health Data License")
    (tmp_path / "closed" / "manifest.jsonl").write_text(closed)
    sheets = [measuring._sheet("out", Manifest(tmp_path / name, 16), "x") for name in ("open", "closed")]
    assert sheets == [epath.Path("out/x.png"), None]


def test_findings_of_data_without_exact_labels_are_refused(tmp_path):
    trained = {f"{m}/{part}": {} for m in ("text", "ct") for part in ("flow", "guide")}
    about = {"modalities": {"text": {}, "ct": {}}, "from": trained, "pairs": {"guide": [["text", "ct"]]}}
    meta = dict(stage="text_ct", rounds=["text_ct"], shared=shared("phantom"), **about)
    checkpoint.save_model(tmp_path / "text_ct", {"ct/guide/x": jnp.ones(1)}, meta)
    with pytest.raises(UserError, match="have no exact labels to judge by; name a task that needs none"):
        measure(str(tmp_path / "text_ct"), data=manifest(tmp_path / "mine"))
