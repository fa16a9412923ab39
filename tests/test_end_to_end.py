"""The whole chain at test size, from one config to samples: what is frozen stays, what was trained generates."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from micro import micro, train

import medm2g_jax
from medm2g_jax import rounds
from medm2g_jax.config import stage_graph
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import samples
from medm2g_jax.evaluate.measure import measure
from medm2g_jax.generate import blank_state, build_sampler, table_of, tell_flows, with_bridges
from medm2g_jax.loading import load, newest_result
from medm2g_jax.model import init_group
from medm2g_jax.train import checkpoint, results

REPORT = "findings : large mass in the left upper lung . heart size is normal . impression : large left upper mass ."


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> epath.Path:
    """text_ct with all it stands on."""
    root = tmp_path_factory.mktemp("chain") / "run"
    train("micro.py", "text_ct", str(root), seconds=900)
    return epath.Path(root)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> epath.Path:
    """The same, and ct_mri on top of it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(root, folder)
    ended = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.json")}
    train("micro.py", "ct_mri", str(folder), seconds=900)
    assert all(path.stat().st_mtime_ns == then for path, then in ended.items()), "a finished stage was touched"
    return epath.Path(folder)


@pytest.fixture(params=["text_ct", pytest.param("ct_mri", marks=pytest.mark.full)])
def finished(request) -> tuple[epath.Path, str]:
    """A run root, and the round that was trained last in it."""
    return request.getfixturevalue("root" if request.param == "text_ct" else "whole"), request.param


@pytest.fixture(scope="module")
def model(root):
    """Of text_ct: text, X-ray and CT."""
    return load(str(root / "text_ct"))


def test_a_stage_trains_its_own_groups_and_reads_the_others_bit_for_bit(finished):
    root, newest = finished
    assert newest_result(root).name == newest
    everything = load(str(root)).params
    graph = stage_graph(micro(newest))
    stages = {name: graph.stages[name] for name in graph.plan(newest)}
    last = {group: name for name, stage in stages.items() for group in stage.trains}
    assert last["ct/guide"] == "text_ct"
    if newest == "ct_mri":  # they have sources on their grids, and train on
        assert last["mri/flow"] == last["ct/flow"] == "ct_mri"
    assert stages.keys() == {p.name for p in root.iterdir() if (p / "model.json").exists()}
    for name, stage in stages.items():
        result = checkpoint.load_model(root / name)
        assert {rounds.group_of(leaf) for leaf in result} == set(stage.trains)
        for leaf, value in result.items():
            if last[rounds.group_of(leaf)] != name:
                continue
            assert np.array_equal(np.asarray(everything[leaf]), np.asarray(value)), leaf
    assert not any("projector" in n or n.startswith("pair/") for n in everything)


def test_a_round_changes_every_parameter_that_it_trains(finished):
    """But for what has no gradient at all: biases in front of a norm's mean, and embeddings of streams not drawn."""
    root, newest = finished
    config = micro(newest)
    meta = checkpoint.read_meta(root / newest)
    model = results.build_model(config, meta["vocab"], meta["scales"])
    fresh = jax.eval_shape(lambda k: init_group(model, k, meta["trains"]), jax.random.key(0))
    trained = checkpoint.load_model(root / newest)
    assert set(trained) == set(fresh)
    zero_at_first = [n for n in trained if n.endswith("/bias") or "/guide/out/" in n]
    assert len(zero_at_first) > 10
    still = [n for n in zero_at_first if not np.any(np.asarray(trained[n]))]
    assert not still, still


def test_any_to_any(model):
    assert model.modalities == ("text", "xray", "ct")
    out = model.generate(given={"text": REPORT}, make=["ct", "xray"], seed=1)
    assert out.samples["ct"].shape == (1, 32, 32) and -1000 <= out.samples["ct"].min() <= out.samples["ct"].max() <= 400
    assert out.pairs["text -> ct"] == "prompt tokens, guide tokens"
    assert "ct -> xray" not in out.pairs  # never paired
    out = model.generate(given={"ct": np.zeros((40, 30))}, make=["text"], seed=1)
    assert isinstance(out.samples["text"][0], str) and out.pairs["ct -> text"] == "prompt tokens, guide tokens"
    out = model.generate(given={}, make=["xray"], count=2)
    assert out.samples["xray"].shape == (2, 32, 32) and not np.allclose(*out.samples["xray"])


@pytest.mark.full
def test_joint_generation_of_every_image_from_one_checkpoint(whole):
    model = load(str(whole))
    assert model.modalities == ("text", "xray", "ct", "mri")
    out = model.generate(given={"text": REPORT}, make=["ct", "mri:t2", "xray"], seed=2)
    assert {k: v.shape for k, v in out.samples.items()} == {k: (1, 32, 32) for k in ("ct", "mri:t2", "xray")}
    # Each tells the other, on its grid; an X-ray has none to share.
    assert out.pairs["ct -> mri:t2"] == out.pairs["mri:t2 -> ct"] == "guide tokens, registered"
    assert not any("registered" in how for pair, how in out.pairs.items() if "xray" in pair)
    alone = model.generate(given={"text": REPORT}, make=["ct"], seed=2)
    assert not np.allclose(alone.samples["ct"], out.samples["ct"], atol=0.5), "a CT made with an MRI is another one"


def test_a_never_paired_source_uses_its_pooled_token(model):
    out = model.generate(given={"xray": np.full((40, 30), 0.5)}, make=["ct"])
    assert out.samples["ct"].shape == (1, 40, 30)  # on the grid of what was given
    assert out.pairs == {"xray -> ct": "prompt pooled"}
    out = model.generate(given={"xray": np.full((32, 32), 0.5)}, make=["ct"], guides="all")
    assert out.pairs == {"xray -> ct": "prompt pooled, guide pooled"}


def test_a_given_file_is_read_once(model, tmp_path, monkeypatch):
    from PIL import Image

    from medm2g_jax.data.formats import raster

    Image.fromarray(np.full((40, 30), 128, np.uint8)).save(tmp_path / "a.png")
    decode, read = raster.decode, []
    monkeypatch.setattr(raster, "decode", lambda *args: read.append(args) or decode(*args))
    out = model.generate(given={"xray": tmp_path / "a.png"}, make=["ct"], count=2)
    assert out.samples["ct"].shape == (2, 40, 30) and len(read) == 1


def test_flows_that_no_pair_links_take_the_text_along(model):
    assert with_bridges(model.request([], ["ct", "xray"])) == ("ct", "xray", "text")
    assert with_bridges(model.request(["text"], ["ct", "xray"])) == ("ct", "xray")
    assert with_bridges(model.request([], ["ct", "xray"], guides="none")) == ("ct", "xray")


def test_samples_are_a_function_of_seed_and_place(model):
    reports = [REPORT, REPORT.replace("left", "right"), "findings : both lungs are clear ."]
    three = model.generate(given={"text": reports}, make=["ct"], seed=5).samples["ct"]
    two = model.generate(given={"text": reports[:2]}, make=["ct"], seed=5).samples["ct"]
    np.testing.assert_allclose(three[:2], two, atol=0.5)  # HU
    other = model.generate(given={"text": reports[:2]}, make=["ct"], seed=6).samples["ct"]
    assert not np.allclose(two, other, atol=0.5)


def test_draws_are_of_one_sample_and_the_best_of_them_is_one(model):
    asked = dict(given={"text": [REPORT, REPORT.replace("left", "right")]}, make=["ct"], seed=5)
    one, three = model.generate(**asked), model.generate(**asked, draws=3, rows=4)
    drawn = three.samples["ct"].reshape(2, 3, 32, 32)
    np.testing.assert_allclose(drawn[:, 0], one.samples["ct"], atol=0.5)
    assert min(np.abs(drawn[:, i] - drawn[:, j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 5
    np.testing.assert_allclose(three.mean("ct"), drawn.mean(1), atol=1e-3)
    np.testing.assert_allclose(three.std("ct"), drawn.std(1, ddof=1), atol=1e-2)
    best = model.generate(**asked, best_of=3)
    texts, images = model.embed("text", asked["given"]["text"]), model.embed("ct", list(three.samples["ct"]))
    agreement = np.einsum("nd,nkd->nk", texts, images.reshape(2, 3, -1))
    np.testing.assert_allclose(best.agreement, agreement.max(1), atol=1e-3)
    np.testing.assert_allclose(best.samples["ct"], drawn[[0, 1], agreement.argmax(1)], atol=0.5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    again = model.encode("ct", list(one.samples["ct"]))
    assert again.shape == one.latents["ct"].shape and np.isfinite(again).all()
    # Reports alone are the best of several where nobody says how many; with images, or by guides alone, one draw.
    given, several = {"ct": np.zeros((32, 32))}, model.defaults["best_of_text"]
    usual, asked = model.generate(given, ["text"], seed=3), model.generate(given, ["text"], seed=3, best_of=several)
    assert several == 4 == usual.best_of and "each the best of 4 draws" in usual.notes[0]
    assert usual.samples == asked.samples and usual.agreement == asked.agreement and len(usual.samples["text"]) == 1
    x = np.asarray(model.model_input("ct", model.opened("ct", [given["ct"]])))
    assert samples.samples(model, {"ct": x}, ["text"], 1, 3, best_of=several) == usual.samples
    for make, options in ((["text", "xray"], {}), (["text"], dict(draws=2)), (["text"], dict(prompts="none"))):
        assert model.generate(given, make, steps=1, **options).kept is None


def test_reports_and_sets_of_images_are_measured_beside_what_needs_no_model(root, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 8)
    asked = dict(findings=False, reported=("ct",), cleaning="r2gen", sets=(("text", "ct"), ("mri:t2", "ct")))
    figures = measure(str(root / "text_ct"), 8, 0, task="mine", out=str(tmp_path), **asked)
    of = {(f.task, f.metric): f for f in figures}
    nearest = of["CT -> report of the nearest training image", "BLEU-4"]
    assert nearest.protocol == "words, r2gen" and 0 < nearest.value <= 1, "a report of the phantom is like another"
    constant = of["CT -> report by the most frequent training report", "distinct reports"]
    assert constant.value == pytest.approx(1 / 8)
    assert {task for task, metric in of if metric == "BLEU-1"} >= {"CT -> report", "CT -> report, guide alone"}
    real = of["real training CT", "KID @ours"]
    assert of["report -> CT", "KID @ours"].value > real.value, "noise is no nearer to real images than real ones"
    assert ("report -> CT", "FID @ours") not in of, "of eight rows there is no covariance"
    assert of["report -> CT", "MS-SSIM among draws, 2 scales"].n == 8
    assert {p.name for p in tmp_path.iterdir()} == {"mine.json", "mine.csv", "mine.md", "mine_text_to_ct.png"}


def test_guides_have_a_scale_of_their_own(model):
    """As one scale where both are alike, as no guide where it is 0, and no scale compiles anything anew."""
    asked = dict(given={"text": REPORT}, make=["ct"], seed=5, eta=0.0)
    one, both = (model.generate(**asked, guidance=2.0, guide_guidance=g).samples["ct"] for g in (None, 2.0))
    np.testing.assert_allclose(one, both, atol=1.0)
    silent = model.generate(**asked, guidance=2.0, guides="none").samples["ct"]
    known = len(model._samplers)
    none = model.generate(**asked, guidance=2.0, guide_guidance=0.0).samples["ct"]
    np.testing.assert_allclose(none, silent, atol=1.0)
    other = model.generate(**asked | dict(eta=0.5, seed=6), guidance=3.0, guide_guidance=1.0).samples["ct"]
    assert not np.allclose(other, none, atol=1.0) and len(model._samplers) == known


def test_half_precision_storage_gives_nearly_the_same_from_half_the_memory(root, model):
    """bfloat16 parameters, and in the compiled sampler no float32 copy of all of them."""
    half = load(str(root / "text_ct"), dtype="bfloat16")
    assert {p.dtype for p in half.params.values()} == {jax.numpy.dtype("bfloat16")}
    given = dict(given={"text": REPORT}, make=["ct"], eta=0.0, seed=3)
    ours, exact = (m.generate(**given).samples["ct"] for m in (half, model))
    assert 1e-4 < np.abs(ours - exact).mean() / exact.std() < 0.1
    request = half.request(["text"], ["ct"], steps=20)
    keys = jax.random.split(jax.random.key(0), 1)
    given = {"text": half.model_input("text", [REPORT])}
    told = jit(lambda *x: tell_flows(half.model, request, *x))(half.params, given, half.ids([""]), keys)
    copies = 4 * sum(p.size for n, p in half.params.items() if n.startswith("ct/unet"))

    def temporaries(save_memory):
        sample = jit(build_sampler(half.model, request), save_memory=save_memory)
        how = table_of(half.model, request), blank_state(half.model, request, 1), np.int32(0), np.int32(20)
        args = (half.params, told, keys, 2.0, 0.0, *how)
        return sample.lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(False) - temporaries(True) > 0.7 * copies


def test_guidance_one_is_the_conditional_prediction_and_zero_ignores_what_is_given(model):
    swapped = REPORT.replace("left", "right").replace("large", "small")
    zero = [model.generate({"text": t}, ["ct"], guidance=0.0, eta=0.0).samples["ct"] for t in (REPORT, swapped)]
    np.testing.assert_allclose(*zero, atol=0.5)
    one = [model.generate({"text": t}, ["ct"], guidance=1.0, eta=0.0).samples["ct"] for t in (REPORT, swapped)]
    assert not np.allclose(*one, atol=0.01)


def test_the_text_encoder_hears_the_prompt_only_where_it_is_given(model):
    silent = [model.generate({"text": t}, ["ct"], prompts="none", guides="none").samples["ct"] for t in (REPORT, "x")]
    np.testing.assert_allclose(*silent, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "make", "options", "message"),
    [
        ({"pet": "x"}, ["ct"], {}, "unknown stream 'pet'"),
        ({"text": REPORT}, ["mri"], {}, "'mri' cannot be made: this model makes text, xray, ct"),
        ({"text": REPORT}, [], {}, "nothing to make"),
        ({"text": REPORT}, ["text"], {}, "both given and wanted"),
        ({"text": REPORT}, ["ct"], {"guides": "some"}, "trained, all, none"),
        ({"ct": "/nowhere.png"}, ["text"], {}, "/nowhere.png"),
        ({"ct": np.zeros((3, 4, 4))}, ["text"], {}, r"expected an image \(h w\)"),
        ({"text": [REPORT] * 2, "xray": [np.zeros((8, 8))] * 3}, ["ct"], {}, "differ in number"),
        ({"text": REPORT}, ["ct"], {"steps": 0}, "steps"),
        ({}, ["ct"], {"best_of": 2}, "best_of=2 ranks .* nothing is given"),
        ({"text": REPORT}, ["ct"], {"best_of": 2, "draws": 2}, "best_of=2 keeps one of several draws"),
    ],
)
def test_bad_requests_are_one_line(model, given, make, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(given, make, **options)


def test_an_upstream_stage_trained_again_is_noticed(root, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(root, copy)
    meta = json.loads((copy / "ldm_text" / "model.json").read_text())
    name = next(n for n in meta["fingerprints"] if n.startswith("text/unet"))
    meta["fingerprints"][name] += 1
    (copy / "ldm_text" / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="text/flow has been trained again"):
        load(str(copy))


def test_nothing_finished_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"no finished round.*configs/text_ct\.py:tiny"):
        load(str(tmp_path))


def test_the_command_that_a_run_ends_with(root, tmp_path):
    """`medm2g generate`, as printed at the end of a run: files marked as synthetic."""
    line = [sys.executable, "-m", "medm2g_jax", "generate", "--model", str(root / "text_ct"), "--given",
            f"text={REPORT}", "--make", "ct,xray", "--out", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(line, cwd=Path(__file__).parent.parent, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Not for clinical use" in done.stdout and "text -> ct: prompt tokens, guide tokens" in done.stdout
    (record,) = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert record["files"] == ["ct_000.png", "xray_000.png"] and "Synthetic" in record["note"]
    from PIL import Image

    assert "Synthetic" in Image.open(tmp_path / "out" / "ct_000.png").text["Description"]
    assert np.load(tmp_path / "out" / "ct_000.npy").shape == (32, 32)
    line = [*line[:4], "--model", "/nowhere", "--make", "ct", "--out", "x"]
    bad = subprocess.run(line, text=True, capture_output=True, cwd=Path(__file__).parent.parent)
    assert bad.returncode == 2 and bad.stderr.startswith("error: /nowhere") and "Traceback" not in bad.stderr


def test_public_names():
    assert medm2g_jax.load is load and "mri" in medm2g_jax.MODALITIES and medm2g_jax.MedM2G
