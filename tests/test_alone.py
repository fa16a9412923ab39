"""A model of the modalities one has: CT-MRI pairs without text, contrasts of MRI that guide each other, CT alone."""

import dataclasses
import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest
from etils import epath
from micro import micro, train
from PIL import Image

from medm2g_jax import rounds, run
from medm2g_jax.config import get_config, stage_graph
from medm2g_jax.data import pipeline
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.pipeline import Rows, batches
from medm2g_jax.data.source import Record
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import baselines, phantom, samples, synthesis
from medm2g_jax.evaluate.measure import measure
from medm2g_jax.evaluate.probes import FIELDS
from medm2g_jax.generate import Request
from medm2g_jax.loading import load, newest_result
from medm2g_jax.recipes import recipe, rows_of
from medm2g_jax.train import checkpoint, loop, results


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> epath.Path:
    """Run roots ct_mri, mri and ct: what tests/alone.py trains."""
    root = tmp_path_factory.mktemp("alone")
    train("alone.py", str(root), seconds=900)
    return epath.Path(root)


@pytest.fixture(scope="module")
def pair(roots):
    return load(str(roots / "ct_mri"))


@pytest.fixture(scope="module")
def contrasts(roots):
    return load(str(roots / "mri"))


# --- no text --------------------------------------------------------------------------------------------------------


def test_without_the_centre_there_is_nothing_of_it(roots, pair):
    for name in ("ct_mri", "ct"):
        assert not (roots / name / "tokenizers").exists() and not (roots / name / "text_vae").exists()
        done = {p.name for p in (roots / name).iterdir() if (p / "model.json").exists() and not rounds.tuned(p.name)}
        assert done == {*rounds.graph((name,)).stages}
    assert {n.split("/")[0] for n in pair.params} == {"ct", "mri", "image"}
    assert pair.tokenizers is None and pair.meta["vocab"] == pair.meta["lengths"] == {}
    assert pair.modalities == pair.givable == ("ct", "mri")


def test_each_of_the_two_from_the_other_and_both_from_nothing(pair):
    image = np.linspace(0, 1, 40 * 30).reshape(40, 30)
    out = pair.generate({"mri:t2": image}, ["ct"], seed=1)
    assert out.samples["ct"].shape == (1, 40, 30) and np.ptp(out.samples["ct"]) > 0
    assert -1000 <= out.samples["ct"].min() and out.samples["ct"].max() <= 400
    assert out.pairs == {"mri:t2 -> ct": "prompt tokens, guide tokens, registered"} and out.notes == ()
    both = pair.generate({}, ["ct", "mri"], seed=1)
    assert both.samples["ct"].shape == both.samples["mri"].shape == (1, 32, 32) and both.independent == ()
    assert both.pairs == {"mri -> ct": "guide tokens, registered", "ct -> mri": "guide tokens, registered"}
    with pytest.raises(UserError, match="'text' cannot be given: this model takes ct, mri there"):
        pair.generate({"text": "a"}, ["ct"])


def test_the_first_pair_trains_both_prompt_encoders(roots):
    trained = checkpoint.load_model(roots / "ct_mri" / "align_ct_mri")
    assert {n.split("/clip/")[0] for n in trained} == {"ct", "mri"}
    assert rounds.graph(("mri",)).stage("align_mri").trains == ("mri/clip",)


def test_the_null_prompt_is_a_token_that_starts_at_zero_and_trains(roots):
    """One a flow: read by every row of ldm_mri here, whose prompts are all dropped."""
    for root, modality in (("ct_mri", "mri"), ("ct", "ct")):
        stage = f"ldm_{modality}"
        token = np.asarray(checkpoint.load_model(roots / root / stage)[f"{modality}/null/token"])
        assert token.shape == (1, 32) and token.any(), stage
    config = micro("ldm", "ct,tiny,alone")
    model = results.build_model(config, {}, {})
    fresh = jax.jit(recipe(config, model, stage_graph(config)).init)(jax.random.key(0))
    assert not fresh["ct/null/token"].any()
    assert not any(name.startswith("text/") for name in fresh)


def test_one_modality_alone_is_made_from_noise(roots):
    model = load(str(roots / "ct"))
    assert model.modalities == ("ct",) and model.givable == () and model.meta["rounds"] == []
    out = model.generate({}, ["ct"], count=2, guidance=5.0)
    assert out.samples["ct"].shape == (2, 32, 32) and not np.allclose(*out.samples["ct"]) and out.pairs == {}
    # There is nothing to guide by, so no scale changes anything.
    np.testing.assert_array_equal(out.samples["ct"], model.generate({}, ["ct"], count=2, guidance=1.0).samples["ct"])
    with pytest.raises(UserError, match="'ct' cannot be given: this model takes nothing there"):
        model.generate({"ct": np.zeros((8, 8))}, ["ct"])
    with pytest.raises(UserError, match="this model makes ct by the guides of nobody"):
        measure(str(roots / "ct"), 4)


def test_a_flow_says_what_it_predicts_and_a_round_takes_it_from_there(roots):
    """eps, z0 and v: each trains to a sample of its own."""
    assert checkpoint.read_meta(roots / "mri" / "mri")["predict"] == {"mri": "sample"}
    assert checkpoint.read_meta(roots / "ct" / "ldm_ct")["predict"] == {"ct": "v"}
    for name, predict in (("ct_mri", "sample"), ("mri", "sample"), ("ct", "v")):
        model = load(str(roots / name))
        assert {flow.process.predict for flow in model.model.flows.values()} == {predict}
    with pytest.raises(
        UserError,
        match=r"ldm_ct was trained with config\.predict='v', this config has config\.predict="
        r"'eps'; type --config\.predict=v, or",
    ):
        loop.plan_stages(micro("ldm", "ct,tiny,alone", predict="eps"), roots / "ct")
    with pytest.raises(
        UserError,
        match=r"ldm_mri was trained with config\.predict='sample', this config has "
        r"config\.stages\.ldm_mri\.predict='eps'; type --config\.stages\.ldm_mri",
    ):
        config = micro("ct_mri", "tiny,alone")
        config.stages.ldm_mri.predict = "eps"
        loop.plan_stages(config, roots / "ct_mri")


def test_a_finetune_begins_from_another_run_and_ends_no_worse(roots):
    """On fewer subjects, in a run root of its own; the best of what was measured is kept."""
    meta = checkpoint.read_meta(roots / "tuned" / "tune_mri_to_ct_full")
    assert set(meta["trains"]) == {"ct/flow", "ct/guide", "ct/grid"} and meta["shared"]["data"]["train"] == 64
    assert {o["run"] for g, o in meta["from"].items() if g not in meta["trains"]} == {str(roots / "ct_mri")}
    saves = roots / "tuned" / "tune_mri_to_ct_full" / "checkpoints"
    measured = checkpoint.Checkpoints(saves)
    losses = {step: record["metric"] for step, record in measured._records.items()}
    measured.close()
    assert meta["step"] == min((s for s in losses if losses[s] is not None), key=losses.get)
    rows = [json.loads(x) for x in (roots / "tuned" / "tune_mri_to_ct_full" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "held out/loss" in r] == [0, 2, 4]
    model = load(str(roots / "tuned" / "tune_mri_to_ct_full"))
    assert model.modalities == model.givable == ("ct", "mri")  # MRI as the round left it
    out = model.generate({"mri:t2": np.full((32, 32), 0.5)}, ["ct"])
    assert out.pairs == {"mri:t2 -> ct": "prompt tokens, guide tokens, registered"}
    ceiling = json.loads((roots / "tuned" / "tune_mri_to_ct_full" / "ceiling.json").read_text())
    assert {f["task"] for f in ceiling} == {"CT -> CT"}


def test_low_rank_additions_are_merged_when_they_are_loaded(roots):
    folder = roots / "ct_mri" / "tune_mri_to_ct_lora"
    meta, stored = checkpoint.read_meta(folder), checkpoint.load_model(folder)
    assert meta["trains"] == ["ct/lora"]
    ranks = {x.shape[1] for n, x in stored.items() if n.endswith("/a")}
    assert all("/lora/" in n for n in stored) and ranks == {2}
    tuned, plain = load(str(folder)), load(str(roots / "ct_mri" / "ct_mri"))
    assert tuned.params.keys() == plain.params.keys()
    moved = {n for n in plain.params if not np.array_equal(tuned.params[n], plain.params[n])}
    added = {n.removesuffix("/a").replace("/lora/", "/unet/") for n in stored if n.endswith("/a")}
    # Not all: nothing was prompted in three steps. The best may be where it began.
    assert moved <= added and (moved or meta["step"] == 0)
    assert newest_result(roots / "ct_mri").name == "ct_mri"  # a fine-tune is named by whoever means it
    assert newest_result(roots / "tuned").name == "tune_mri_to_ct_full"


def test_where_no_record_names_a_grid_the_plan_says_so_and_nothing_is_called_registered(tmp_path):
    config = micro("ct_mri", "tiny,alone")
    source = Phantom(size=32, seed=0, train=8, val=2, test=2, pairs=(("ct", "mri"),))
    todo = [(name, "train") for name in stage_graph(config).plan("ct_mri")]
    note = "no record says that its images share one grid"
    assert note not in run.described(config, epath.Path(tmp_path), todo, source)
    assert pipeline.registers(source, "ct", "mri") and pipeline.registers(source, "mri", "mri")
    source.records = [dataclasses.replace(record, grid=()) for record in source.records]
    assert note in run.described(config, epath.Path(tmp_path), todo, source)
    assert not pipeline.registers(source, "ct", "mri")


def test_the_listing_that_is_named_serves_most(tmp_path):
    """One CT-MRI pair among many contrasts is no reason to train on pairs."""
    streams = [("mri:t1", "mri:t2")] * 20 + [("ct", "mri:t1")]
    source = Numbered(*streams)
    assert "configs/mri.py:tiny" in run._fitting_listing(micro("text_ct"), source)


# --- contrasts guide each other -------------------------------------------------------------------------------------


def request(given: tuple[str, ...], make: tuple[str, ...], **options) -> Request:
    pairs = dict(prompt_pairs=(("mri", "mri"),), guide_pairs=(("mri", "mri"), ("ct", "mri"), ("mri", "ct")))
    return Request(given, make, **(pairs | options))


def test_which_contrast_guides_which():
    ask = request(("mri:t1", "mri"), ("mri:t2", "ct"))
    assert ask.link("mri:t1", "mri:t2") == ask.link("mri:t2", "mri:t1") == "tokens"
    assert ask.link("mri:t2", "mri:t2") is None  # never itself
    assert ask.link("mri", "mri:t2") is None and ask.link("mri:t1", "mri") is None  # it may be the very same
    assert ask.link("mri", "ct") == ask.link("ct", "mri") == "tokens"  # of another modality, whatever it is
    untrained = request(("mri:t1",), ("mri:t2",), guide_pairs=())
    assert untrained.link("mri:t1", "mri:t2") is None
    untrained = request(("mri:t1",), ("mri:t2",), guide_pairs=(), guides="all")
    assert untrained.link("mri:t1", "mri:t2") is None  # a pooled token says nothing of anatomy
    several = request((), ("mri:t1", "mri:t2", "mri:pd"))
    assert {(a, b) for a, b in itertools.permutations(several.make, 2) if several.link(a, b)} == {
        *itertools.permutations(several.make, 2)
    }
    assert several.groups() == (("mri:t1", "mri:t2", "mri:pd"),)


def test_given_contrasts_guide_wanted_ones_and_these_each_other(contrasts):
    assert contrasts.meta["pairs"]["guide"] == [["mri", "mri"]]
    image = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    given = {"mri:t1": image, "mri:t2": image.T}
    one = contrasts.generate(given, ["mri:flair"], seed=3, eta=0.0)
    assert one.pairs == {f"{s} -> mri:flair": "prompt tokens, guide tokens, registered" for s in given}
    assert 0 <= one.samples["mri:flair"].min() and one.samples["mri:flair"].max() <= 1
    several = contrasts.generate(given, ["mri:flair", "mri:pd"], seed=3, eta=0.0)
    assert several.pairs["mri:pd -> mri:flair"] == several.pairs["mri:flair -> mri:pd"] == "guide tokens, registered"
    # In latents: three steps of training leave the guide's output near zero.
    assert not np.array_equal(one.latents["mri:flair"], several.latents["mri:flair"])
    other = contrasts.generate({**given, "mri:t1": 1 - image}, ["mri:flair"], seed=3, eta=0.0, prompts="none")
    same = contrasts.generate(given, ["mri:flair"], seed=3, eta=0.0, prompts="none")
    assert not np.array_equal(other.latents["mri:flair"], same.latents["mri:flair"]), "the guide alone carries T1"


def test_synthesis_is_measured_against_what_costs_nothing(roots, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 4)
    monkeypatch.setattr(synthesis, "MEAN_OF", 20)
    monkeypatch.setattr(synthesis, "DRAWS", 2)
    judge = lambda x: dict.fromkeys(FIELDS, np.zeros(len(x), int))  # noqa: E731
    monkeypatch.setattr(phantom, "train_probe", lambda *_: judge)  # what it reads is not the question here
    asked = [(("mri:t1", "mri:t2"), "mri:flair"), (("mri:t2",), "ct")]  # the second has never been trained
    out = tmp_path / "out"
    how = dict(task="mri", findings=False, regression=2, out=str(out))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "fit_adversarial", stop)
        with pytest.raises(KeyboardInterrupt):
            measure(str(roots / "mri"), 4, 0, asked, **how)
    before = json.loads((out / "mri.json").read_text())["rows"]
    # Goes on at the row: of what is there nothing is made again but the draw that the last one is compared with.
    drawn, draw = [], synthesis.samples
    monkeypatch.setattr(synthesis, "samples", lambda *a, **k: drawn.append(a) or draw(*a, **k))
    figures = measure(str(roots / "mri"), 4, 0, asked, **how)
    after = json.loads((out / "mri.json").read_text())["rows"]
    assert len(drawn) == 1 and after[:-1] == before and after[-1]["row"].endswith("by pix2pix, 2 steps")
    stem = "mri_mri-t1_mri-t2_to_mri-flair"
    assert {p.name for p in out.iterdir()} == {"mri.json", "mri.csv", "mri.md", f"{stem}.png"}
    assert measure(str(roots / "mri"), 4, 0, asked, **how) == figures and len(drawn) == 1
    with pytest.raises(UserError, match=r"mri\.json holds \d+ rows of another evaluation: seed 0, now 1; name another"):
        measure(str(roots / "mri"), 4, 1, asked, **how)
    psnr = {f.task: f for f in figures if f.metric.startswith("PSNR dB") and f.n == 4}
    beside = {*baselines.IMAGES, "inpainting without guidance", "regression, 2 steps", "pix2pix, 2 steps"}
    assert set(psnr) == {
        "MRI flair -> MRI flair, beside MRI t1 + MRI t2",
        "MRI t1 + MRI t2 -> MRI flair",
        "MRI t1 + MRI t2 -> MRI flair, mean of 2 draws",
        "MRI t2 -> MRI flair",
        "MRI t1 + MRI t2 of another subject -> MRI flair",
        "MRI t2 taken for MRI flair",
        "MRI t1 + MRI t2 -> MRI flair, beyond MRI t2 alone",
        "MRI t1 + MRI t2 -> MRI flair in one step",
        *(f"MRI t1 + MRI t2 -> MRI flair{how}{name}" for how in (" by ", ", beyond ") for name in beside),
    }
    lesions = {f.metric: f for f in figures if f.task == "MRI t1 + MRI t2 -> MRI flair" and f.protocol == "probe"}
    assert set(lesions) >= {f"{field} right" for field in ("kind", "size", "side", "level")} | {"lesion seen"}
    ceiling = psnr["MRI flair -> MRI flair, beside MRI t1 + MRI t2"].value
    made = psnr["MRI t1 + MRI t2 -> MRI flair"]
    assert made.ceiling.value == ceiling and made.floor.what == "the mean image"
    gain = psnr["MRI t1 + MRI t2 -> MRI flair, beyond MRI t2 alone"]
    assert gain.value == pytest.approx(made.value - psnr["MRI t2 -> MRI flair"].value, abs=1e-3)
    # Identity needs no model: computed here from the images themselves.
    source = Phantom(size=32, seed=0, train=96, val=32, test=16, pairs=(("mri",),))
    held = [i for i, r in enumerate(source.records) if r.split == "test"]
    t2, flair = (source.images(held, s) for s in ("mri:t2", "mri:flair"))
    each = -10 * np.log10(np.mean(((t2 - flair) / 2) ** 2, axis=(1, 2, 3)))
    assert each.min() <= psnr["MRI t2 taken for MRI flair"].value <= each.max()
    assert sum(len(row["figures"]) for row in after) == len(figures)
    assert {p.name for p in out.iterdir()} == {
        "mri.json", "mri.csv", "mri.md", "mri_mri-t1_mri-t2_to_mri-flair.png"
    }  # fmt: skip
    table = (out / "mri.md").read_text()
    assert f"| MRI t1 + MRI t2 -> MRI flair | {made.value:#.4g} [" in table and "- range1: data_range:" in table


# --- what a row of such a round holds -------------------------------------------------------------------------------

PLACES = ("mri", "mri:t1", "mri:t2", "mri:pd", "mri:flair", "mri:t1ce")


class Numbered:
    """Pixels that say which record and stream they are of."""

    name, open = "numbered", True

    def __init__(self, *streams: tuple[str, ...]):
        self.records = [Record(str(i), str(i), "train", s) for i, s in enumerate(streams)]

    def read(self, index, stream, rng):
        assert stream in self.records[index].streams
        return np.full((4, 4, 1), number(index, stream), np.float32)


STREAMS = ("ct", *PLACES)


def number(index: int, stream: str) -> int:
    return 10 * (index + 1) + STREAMS.index(stream)


def drawn(rows: Rows, *streams: tuple[str, ...], count: int = 400):
    """(record, value of each modality, its stream, partner, [other contrasts that are there]) of so many rows."""
    found = batches(Numbered(*streams), rows, "train", count, 0, size=4)
    batch = next(found)
    found.close()
    about = batch["about"]
    for i in range(count):
        some = about["others"]["mri"]
        others = [int(x[0, 0, 0]) for x, has in zip(some["x"][i], some["has"][i], strict=True) if has]
        places = [PLACES[n] for n, has in zip(some["stream"][i], some["has"][i], strict=True) if has]
        record = int(about["record"][i])
        assert others == [number(record, s) for s in places]
        assert not some["x"][i][~some["has"][i]].any()
        yield record, batch, i, PLACES[about["stream"]["mri"][i]], bool(about["partner"]["mri"][i]), places


def test_a_target_is_guided_by_a_non_empty_subset_of_what_there_is_besides():
    rows = Rows(require=("ct", "mri"), contrasts=("mri",), others=3, identify=True)
    held = (
        ("ct", "mri", "mri:t1", "mri:t2"),
        ("mri", "mri:t1", "mri:t2", "mri:pd", "mri:flair", "mri:t1ce"),  # no CT
        ("ct", "mri:t1"),
        ("ct", "mri"),
    )
    seen = Counter()
    for record, batch, i, target, partner, others in drawn(rows, *held):
        about = batch["about"]
        assert about["has"]["mri"][i] and about["has"]["ct"][i] == ("ct" in held[record])
        assert batch["mri"][i][0, 0, 0] == number(record, target)
        assert batch["ct"][i][0, 0, 0] == (number(record, "ct") if "ct" in held[record] else 0)
        assert partner or others, "guided by nothing"
        assert not partner or "ct" in held[record]
        assert target not in others and len(others) <= 3 and len(set(others)) == len(others)
        assert set(others) <= {s for s in held[record] if s.startswith("mri:")}
        assert target != "mri" or not others, "an unstated contrast may be one of those beside it"
        seen[record, target, partner, tuple(sorted(others))] += 1
    # Of record 0 every subset comes, and of the record with a CT alone that alone.
    for target, other in (("mri:t1", "mri:t2"), ("mri:t2", "mri:t1")):
        assert all(seen[0, target, *rest] for rest in ((True, ()), (False, (other,)), (True, (other,))))
    assert {k[2:] for k in seen if k[0] in (2, 3)} == {(True, ())}
    assert {len(k[3]) for k in seen if k[0] == 1} == {1, 2, 3} and not any(k[1] == "mri" for k in seen if k[0] == 1)


def test_what_has_nothing_to_be_guided_by_is_not_drawn():
    rows = Rows(require=("ct", "mri"), contrasts=("mri",), others=3, identify=True)
    held = (("ct",), ("mri:t1",), ("mri", "mri:t1"), ("mri:t1", "mri:t2"))
    assert {record for record, *_ in drawn(rows, *held, count=20)} == {3}
    alone = Rows(require=("mri",), contrasts=("mri",), others=3, identify=True)
    held = (("ct", "mri:t1"), ("ct", "mri"), ("mri", "mri:t1", "mri:t2"))
    for record, _, _, target, partner, others in drawn(alone, *held, count=50):
        assert record == 2 and not partner and {target, *others} == {"mri:t1", "mri:t2"}


@pytest.fixture(scope="module")
def stage(roots):
    """Round ct_mri of contrasts and pairs, its parameters and one batch in which half of the rows have no CT."""
    config = micro("ct_mri", "tiny,alone")
    graph = stage_graph(config)
    meta = checkpoint.read_meta(roots / "ct_mri" / "ct_mri")
    spec = recipe(config, results.build_model(config, {}, meta["scales"]), graph)

    class Half(Phantom):
        def __init__(self):
            super().__init__(size=32, seed=0, train=16, val=1, test=1, pairs=(("ct", "mri"),))
            for i, r in enumerate(self.records):
                if i % 2:
                    streams = tuple(s for s in r.streams if s != "ct")
                    self.records[i] = Record(r.id, r.subject, r.split, streams, r.licence)

    found = batches(Half(), rows_of(config, graph), "train", 8, 0, size=32)
    batch = next(found)
    found.close()
    params = load(str(roots / "ct_mri")).params
    assert 0 < batch["about"]["has"]["ct"].sum() < 8
    return spec, params, batch


def test_what_stands_where_a_record_has_no_partner_counts_for_nothing(stage):
    spec, params, batch = stage

    @jax.jit
    def losses(batch):
        prepared = spec.prepare(params, batch, jax.random.key(3))
        features = spec.features(params, prepared)
        return {term: loss(features) for term, loss in spec.losses.items()}, prepared.counts

    lost = ~np.asarray(batch["about"]["has"]["ct"])

    def changed(rows):
        shape = (-1, 1, 1, 1)
        noise = np.random.default_rng(1).normal(size=batch["ct"].shape).astype(np.float32)
        return {**batch, "ct": np.where(rows.reshape(shape), noise, batch["ct"])}

    before, counts = losses(batch)
    np.testing.assert_array_equal(counts["ct"], ~lost)
    assert counts["mri"].all()
    after, _ = losses(changed(lost))
    assert set(before) == {"eps/ct", "eps/mri", "contrast/ct_mri"}
    for term, value in before.items():
        assert float(value) == float(after[term]), term
    after, _ = losses(changed(~lost))
    assert all(float(value) != float(after[term]) for term, value in before.items())


# --- data that one has ----------------------------------------------------------------------------------------------


def manifest(folder, streams: dict[str, tuple[str, ...]]) -> str:
    """A manifest of ten studies, eight of them to train on; "text" among the streams: a report."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(10):
        row = {"id": f"s{i}", "subject": f"p{i}", "split": "train" if i < 8 else "val", "images": {}}
        for stream in streams:
            if stream == "text":
                row |= {"text": f"findings : number {i} . impression : none .", "text_origin": "report"}
                continue
            file = f"{stream}_{i}.png"
            Image.fromarray(rng.integers(0, 255, (20, 24), np.uint8)).save(folder / file)
            row["images"][stream] = file
        lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return f"manifest:{folder}"


def test_pairs_without_any_text_are_enough(tmp_path):
    config = micro("ct_mri", "tiny,alone", batch=16)
    config.data.source = manifest(tmp_path, ("ct", "mri_t1"))
    source = run.source_of(config)
    lines = run.described(config, epath.Path(tmp_path / "run"), loop.plan_stages(config, epath.Path(tmp_path)), source)
    assert "records: 8 to train on, 2 held out, 0 to test" in lines
    *stages, note = lines[lines.index("   1.") :].splitlines()
    assert "no record says that its images share one grid" in note
    assert [line.split()[1] for line in stages] == [*rounds.graph(("ct_mri",)).stages]
    assert all("8 training records, fewer than its batch of 16: rows repeat" in line for line in stages)
    data = run.open_data(config, epath.Path(tmp_path / "run"), source)
    assert data.tokenizers is None and data.vocab == data.empty == data.lengths == {}
    for name in rounds.graph(("ct_mri",)).stages:
        own = run.stage_config(config, name)
        batch = next(data.batches(rows_of(own, stage_graph(own)), "train", 8, 0))
        assert all(x.shape[0] == 8 for x in jax.tree.leaves(batch))


def test_data_for_which_a_listing_is_too_large_name_the_one_that_fits(tmp_path):
    """Before anything is trained; and what is named resolves to a config whose stages these data serve."""
    for streams, target, words, needed in (
        (("ct", "text"), "text_ct", "tiny", "align_text_xray needs training records with text and xray"),
        (("ct", "mri_t1"), "text_ct", "tiny", "needs training records with any of text"),
        (("ct", "mri_t1", "text"), "text_ct", "tiny", "needs training records with text and xray"),
        (("ct",), "ct_mri", "tiny,alone", "align_ct_mri needs training records with ct and mri"),
        (("mri_t1", "mri_t2"), "ct_mri", "tiny,alone", "configs/mri.py:tiny,mri,alone"),
        (("xray", "ct"), "ct_mri", "tiny,alone", "configs/ldm.py:tiny,xray,alone"),
        (("text",), "text_ct", "tiny", "text"),
    ):
        folder = tmp_path / "_".join(streams)
        folder.mkdir()
        config = micro(target, words)
        config.data.source = manifest(folder, streams)
        with pytest.raises(UserError, match=needed) as error:
            run.run(config, str(folder / "run"))
        said = str(error.value)
        assert "\n" not in said and "8" in said and not (folder / "run" / "image_vae").exists()
        path, _, words = said.rpartition("--config=")[2].partition(":")
        fits = get_config(path.removeprefix("configs/").removesuffix(".py"), words)
        fits.data.source = config.data.source
        root = epath.Path(folder / "other")
        counts = run.served(fits, root, run.source_of(fits), loop.plan_stages(fits, root))
        assert list(counts.values()) == [8] * len(counts) and fits.stage in counts, said


def test_data_that_no_listing_fits_are_told_so_and_no_more(tmp_path):
    config = micro("ldm", "ct,tiny,alone")
    config.data.source = manifest(tmp_path, ("mri_t1",))
    with pytest.raises(UserError, match="needs training records with .*ct, and there are none; they hold mri:t1 8$"):
        run.run(config, str(tmp_path / "run"))


LISTINGS = (
    ("ct_mri",),
    ("mri",),
    ("ct",),
    ("mri", "xray"),
    ("text_mri",),
    ("text_ct", "ct_mri"),
    ("ct_mri", "text_ct"),
    *rounds.LISTINGS.values(),
)


@pytest.mark.parametrize("listing", LISTINGS, ids="+".join)
def test_the_words_that_are_printed_choose_the_same_stage_and_listing(listing):
    for stage in rounds.graph(listing).stages:
        verb, _, subject = stage.partition("_")
        asked = (verb, f"{subject},tiny,paper") if verb in ("align", "ldm") else (stage, "tiny,paper")
        config = get_config(*asked, listing)
        path, _, words = results.config_words(config, stage).partition(":")
        again = get_config(path.removeprefix("configs/").removesuffix(".py"), words)
        assert (again.stage, again.listing, again.preset, again.variant) == (stage, listing, "tiny", "paper")


def test_a_typed_listing_is_never_exchanged_for_another():
    with pytest.raises(UserError, match=r"unknown stage 'align_text_ct' in the listing \('text_xray', 'text_mri'"):
        get_config("align", "text_ct,tiny,text_mri")
    with pytest.raises(UserError, match="unknown stage 'align_ct_xray'"):
        get_config("align", "ct_xray,tiny")
    assert get_config("align", "ct_xray,tiny,alone").listing == ("ct_xray",)
    assert get_config("ldm", "ct,tiny,text_ct+ct_mri").listing == ("text_ct", "ct_mri")
