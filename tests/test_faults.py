"""Faults that were met once, each by its whole kind: the right value is asserted here."""

import dataclasses
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from micro import micro
from PIL import Image
from test_recipes import fresh

from medm2g_jax import rounds, run
from medm2g_jax.align import info_nce
from medm2g_jax.config import stage_graph
from medm2g_jax.convert import weights
from medm2g_jax.data import pipeline
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.pipeline import Rows, batches, fitting, matching
from medm2g_jax.data.source import Record
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.errors import UserError
from medm2g_jax.family import text_lengths
from medm2g_jax.generate import Request
from medm2g_jax.loading import load
from medm2g_jax.modality import MODALITIES, Modality, register
from medm2g_jax.model import init_group
from medm2g_jax.recipes import recipe
from medm2g_jax.train import checkpoint, loop, results, sharding


@pytest.fixture
def registry():
    """The registry as it was, afterwards."""
    before = dict(MODALITIES)
    yield MODALITIES
    MODALITIES.clear()
    MODALITIES.update(before)


# --- held-out records -----------------------------------------------------------------------------------------------


def pictures(folder, splits: tuple[str, ...]) -> Manifest:
    rows = []
    for i, split in enumerate(splits):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append({"id": f"s{i}", "subject": f"p{i}", "split": split, "images": {"ct": f"{i}.png"}})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Manifest(folder, 8)


def test_a_broken_held_out_image_is_an_error_and_never_a_training_row(tmp_path):
    source = pictures(tmp_path, ("train", "train", "val"))
    data, rows = loop.Data(source, None, {}, 8), Rows(require=("ct",))
    assert data.fixed(rows, "val", 4)["ct"][:, 0, 0, 0] == pytest.approx(20 / 127.5 - 1)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    broken = loop.Data(Manifest(tmp_path, 8), None, {}, 8)
    with pytest.raises(UserError, match="'s2'.*2.png"):
        broken.fixed(rows, "val", 4)


def test_where_nothing_is_held_out_training_rows_stand_in_and_one_line_says_so(tmp_path, capsys):
    loop._say_once.cache_clear()
    data = loop.Data(pictures(tmp_path, ("train", "train", "test")), None, {}, 8)
    for _ in range(3):
        assert len(data.fixed(Rows(require=("ct",)), "val", 4)["ct"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.strip() == "no record is held out (val) for ct: training records stand in for them"
    assert len(data.fixed(Rows(require=("ct",)), "test", 4)["ct"]) == 1 and not capsys.readouterr().out


# --- modalities of another process ----------------------------------------------------------------------------------


def finished(root, config, params, lineage, **texts):
    """A result of config.stage as a run writes it; `texts`: vocab and lengths, where there is text."""
    graph = stage_graph(config)
    data = SimpleNamespace(**{"vocab": {}, "lengths": {}, "source": Own(0)} | texts)
    rounds_ = tuple(r for r in config.listing if r in graph.plan(config.stage)[:-1])
    predict = results.predictions(config, graph.stages[config.stage].trains)
    upstream = results.Upstream({}, {}, lineage, (), (), rounds_, predict, {}, ())
    model = results.build_model(config, data.vocab, {})
    folder = root / config.stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json_best_effort())
    described = results.describe(config, graph, data, upstream, model) | {"figures": [], "finished": 0.0}
    checkpoint.save_model(folder, params, described)


def test_a_model_brings_its_modalities_and_refuses_others_of_their_name(tmp_path, registry):
    pet = register(Modality("pet", "image", "PET", contrasts=("fdg", "psma"), window=(0.0, 10.0), unit="SUV"))
    config = micro("ldm", "pet,tiny,alone")
    model = results.build_model(config, {}, {})
    groups = [g for stage in stage_graph(config).stages.values() for g in stage.trains]
    params = fresh(lambda key: init_group(model, key, groups))
    lineage = {g: {"stage": config.stage} for g in groups}
    finished(epath.Path(tmp_path), config, params, lineage)
    del registry["pet"]

    loaded = load(str(tmp_path))  # as a process that never heard of PET
    assert loaded.modalities == ("pet",) and registry["pet"] == pet
    assert loaded.in_units("pet:psma", np.zeros((1, 32, 32, 1))).max() == 5.0  # SUV
    assert loaded.request((), ("pet:psma",)).make == ("pet:psma",)

    # Embeddings belong to places: in another order they would be exchanged.
    registry["pet"] = dataclasses.replace(pet, contrasts=("psma", "fdg"))
    with pytest.raises(
        UserError, match=r"'pet' has contrasts \('fdg', 'psma'\), the one registered here \('psma', 'fdg'\)"
    ):
        load(str(tmp_path))
    registry["pet"] = dataclasses.replace(pet, window=(0.0, 20.0))
    with pytest.raises(UserError, match=r"'pet' has window \(0.0, 10.0\), the one registered here \(0.0, 20.0\)"):
        load(str(tmp_path))


# --- steps, and what is left when data fail -------------------------------------------------------------------------


class Own:
    """One's own data in Python: a name, whether it is open, records, and `read`."""

    name, open = "own", False

    def __init__(self, count: int = 24):
        self.records = [Record(f"r{i}", f"p{i}", "val" if i % 6 == 5 else "train", ("ct",)) for i in range(count)]
        self.bad: int | None = None

    def read(self, index, stream, rng):
        assert stream == "ct"
        if index == self.bad:
            raise UserError(f"row {self.records[index].id!r}: broken")
        return np.random.default_rng(index).uniform(-1, 1, (32, 32, 1)).astype(np.float32)


def test_data_of_ones_own_train_are_kept_when_they_fail_and_steps_are_counted_alike(tmp_path, monkeypatch):
    """Two micro-batches a step; what is logged, saved and copied is counted in steps."""
    config = micro("image_vae", "tiny,ct,alone", steps=5, accumulate=2, checkpoint_every=3, log_every=100)
    monkeypatch.setattr(run, "show", lambda **rest: [])
    folder, source = tmp_path / "image_vae", Own(36)
    copied, saved, at = [], [], []
    save, sync = checkpoint.Checkpoints.save, loop.Log.sync

    def saving(self, step, state, **rest):
        saved.append(step)
        at.append(int(state["step"]))
        save(self, step, state, **rest)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", saving)
    monkeypatch.setattr(loop.Log, "sync", lambda self: copied.extend(saved[-1:]) or sync(self))

    # A record that comes first in the fourth micro-batch, in the middle of the second step.
    seed = (config.seed + loop.salt("image_vae")) % 2**31
    index = [i for i, r in enumerate(source.records) if r.split == "train"]
    source.bad = int(np.random.default_rng([seed, 0, 1]).permutation(index)[3 * config.batch])
    with pytest.raises(UserError, match=f"row 'r{source.bad}': broken"):
        run.run(config, str(tmp_path), source=source)
    assert saved == [1] and at == [3] and copied == [1]
    assert {p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()} == {"1"}

    source.bad = None
    saved.clear(), at.clear(), copied.clear()
    run.run(config, str(tmp_path), source=source)
    assert saved == [3, 5] and at == [6, 10]  # every third step, and the last; it went on from the one saved
    assert copied == [3, 5, 5]  # and once more when it is closed
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {1, 5}
    meta = json.loads((folder / "model.json").read_text())
    assert meta["step"] == 5 and json.loads((tmp_path / "data.json").read_text())["source"] == "own:own"
    with pytest.raises(UserError, match="data 'own:own' were handed over in Python"):  # and nothing else is measured
        run.source_of(meta["shared"])
    assert not (tmp_path / "own.png").exists()  # not open: nothing of it is shown
    assert run.run(config, str(tmp_path), source=source) == epath.Path(tmp_path)  # done: nothing to do


# --- alike rows in a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", (1, 2, 4, 8))
def test_what_cannot_be_told_apart_is_no_negative(times):
    """n orthogonal pairs, each `times` in a batch of 8: -log(e^s / (e^s + 8 - times)), and 0 where all are the same."""
    place = np.repeat(np.arange(8 // times), times)
    x = jnp.eye(8)[place]
    same = jnp.asarray(place[:, None] == place[None, :])
    for scale in (0.0, 1.0, 3.0):
        expected = np.log1p((8 - times) * np.exp(-np.exp(scale)))
        assert float(info_nce(x, x, scale, same=same)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        # Without the mask there is a floor, however good the embeddings: ln of the repeats.
        unmasked = np.log(times + (8 - times) * np.exp(-np.exp(scale)))
        assert float(info_nce(x, x, scale)) == pytest.approx(unmasked, rel=1e-5, abs=1e-6)
    grads = jax.grad(lambda a: info_nce(a, x, 1.0, same=same))(x + 0.1)
    assert bool(jnp.any(grads != 0)) == (times < 8)


def test_one_record_drawn_twice_and_equal_captions_are_the_same():
    config = micro("align", "text_ct,tiny")
    vocab = dict.fromkeys(("clip", "bert", "gpt2"), 50)
    graph = stage_graph(config)
    spec = recipe(config, results.build_model(config, vocab, {}), graph)
    ids = np.asarray([[1, 2, 3], [1, 2, 4], [1, 2, 3], [5, 5, 5]], np.int32)
    text = {name: ids for name in vocab}
    about = {"record": np.asarray([0, 1, 2, 1], np.int32)}
    batch = {"text": text, "ct": np.zeros((4, 32, 32, 1), np.float32), "about": about}
    views = spec.prepare({}, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    expected = np.eye(4, dtype=bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    np.testing.assert_array_equal(views.same, expected)


# --- what is asked for together and what is given -------------------------------------------------------------------

REPORTS = ("findings : large mass in the left upper lung .", "findings : both lungs are clear . impression : none .")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model of text, X-ray and CT whose weights are drawn: (folder, loaded)."""
    root = epath.Path(tmp_path_factory.mktemp("whole"))
    config = micro("text_ct", "tiny", listing=("text_xray", "text_ct"))
    config.sample.steps = 1
    graph = stage_graph(config)
    tokenizers = Tokenizers.train(list(REPORTS) * 20, root / "tokenizers", 700)
    lengths = text_lengths(config.net)
    groups = [*dict.fromkeys(g for stage in graph.stages.values() for g in stage.trains)]
    model = results.build_model(config, tokenizers.sizes, {})
    params = fresh(lambda key: init_group(model, key, groups))
    params = {k: v + 0.1 if "/guide/out/kernel" in k else v for k, v in params.items()}
    lineage = {g: {"stage": config.stage} for g in groups}
    finished(root, config, params, lineage, vocab=dict(tokenizers.sizes), lengths=dict(lengths))
    return root, load(str(root))


def test_a_part_of_a_model_makes_what_the_whole_makes(whole):
    """From a report, and from nothing; what is made side by side and not linked is the same too, and is said to be."""
    root, model = whole
    part = load(str(root), modalities=("ct",))
    assert part.modalities == ("ct",) and part.givable == model.givable == ("text", "xray", "ct")
    assert not any(n.startswith(("text/unet", "xray/unet")) for n in part.params)

    both = model.generate({"text": REPORTS[0]}, ["ct", "xray"], seed=4)
    assert both.independent == (("ct",), ("xray",))
    assert any("independent of each other" in n and "ct | xray" in n and 'guides "all"' in n for n in both.notes)
    alone = part.generate({"text": REPORTS[0]}, ["ct"], seed=4)
    assert alone.independent == () and not any("independent" in n for n in alone.notes)
    np.testing.assert_allclose(alone.latents["ct"], both.latents["ct"], atol=1e-4)
    other = part.generate({"text": REPORTS[1]}, ["ct"], seed=4)
    assert not np.allclose(alone.latents["ct"], other.latents["ct"], atol=1e-3)

    bare = part.generate({}, ["ct"], seed=4)
    np.testing.assert_allclose(bare.latents["ct"], model.generate({}, ["ct"], seed=4).latents["ct"], atol=1e-4)
    assert bare.pairs == {} and not np.allclose(bare.latents["ct"], alone.latents["ct"], atol=1e-3)
    with pytest.raises(UserError, match="'xray' cannot be made: this model makes ct there"):
        part.generate({"text": REPORTS[0]}, ["xray"])


def test_what_no_pair_links_is_independent_unless_it_is_linked_through_the_aligned_space():
    pairs = rounds.graph(("text_xray", "text_ct")).trained_pairs(("text", "xray", "ct"), ("text_xray", "text_ct"))
    known = dict(prompt_pairs=pairs["prompt"], guide_pairs=pairs["guide"])
    assert Request(("text",), ("ct", "xray"), **known).groups() == (("ct",), ("xray",))
    linked = Request(("text",), ("ct", "xray"), guides="all", **known)
    assert linked.groups() == (("ct", "xray"),)
    assert linked.link("ct", "xray") == linked.link("xray", "ct") == "pooled"
    # Without the report they meet through the text flow, which is taken along.
    assert Request((), ("ct", "xray"), **known).groups() == (("ct", "xray"),)
    assert Request((), ("ct", "xray"), guides="none", **known).groups() == (("ct",), ("xray",))


# --- what trains on -------------------------------------------------------------------------------------------------


def test_an_open_partner_trains_on_from_float32(tmp_path):
    """Its weights are those of its last round, bit for bit; what is frozen beside it is held in half precision."""
    root = epath.Path(tmp_path)
    config = micro("text_ct", "tiny", freeze="partner_open", dtype="bfloat16")
    graph = results.graph_of(config, root)
    rng = np.random.default_rng(0)
    part = {"vae": "vae", "clip": "clip", "flow": "unet/conv_in", "guide": "context"}
    kept = {}
    for name in graph.plan("text_ct")[:-1]:
        groups = graph.stages[name].trains
        own = {
            f"{g.split('/')[0]}/{part[g.split('/')[1]]}/a": jnp.asarray(rng.normal(size=50), jnp.float32)
            for g in groups
        }
        meta = dict(stage=name, shared=results.shared(config), rounds=[], licences=[], scales={}, predict={})
        checkpoint.save_model(root / name, own, meta | {"from": {}})
        kept |= own
    local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    upstream = results.load_upstream(config, root, graph, lambda name, shape: local, jnp.bfloat16)
    trains = {n for n in upstream.params if results.trains(graph.stages["text_ct"], n)}
    assert trains == {"text/context/a"} and {"ct/unet/conv_in/a", "text/vae/a"} <= set(upstream.params)
    for name, value in upstream.params.items():
        assert value.dtype == (jnp.float32 if name in trains else jnp.bfloat16), name
        rounded = kept[name].astype(jnp.bfloat16).astype(jnp.float32)
        assert not np.array_equal(kept[name], rounded)
        np.testing.assert_array_equal(value.astype(jnp.float32), kept[name] if name in trains else rounded)

    # And so they begin.
    shapes = {n: jax.ShapeDtypeStruct((50,), jnp.float32) for n in ("text/context/a", "ct/context/a")}
    spec = SimpleNamespace(init=lambda key: {n: jnp.zeros(50) for n in shapes}, start=None)
    setup = loop.Setup.__new__(loop.Setup)
    parts = dict(recipe=spec, placed=dict.fromkeys(shapes, local), shapes=shapes, stage=graph.stages["text_ct"])
    vars(setup).update(parts)
    data, mesh = loop.Data(Own(), None, {}, 32), sharding.make_mesh(config.mesh)
    trainable, frozen = loop._parameters(config, setup, upstream, data, data.batches, jax.random.key(0), mesh)
    np.testing.assert_array_equal(trainable["text/context/a"], kept["text/context/a"])
    assert not trainable["ct/context/a"].any() and not set(trainable) & set(frozen)


# --- studies without a prompt ---------------------------------------------------------------------------------------


class Numbered:
    name, open = "numbered", True

    def __init__(self, *streams: tuple[str, ...]):
        self.records = [Record(str(i), str(i), "train", s) for i, s in enumerate(streams)]

    def read(self, index, stream, rng):
        return np.full((4, 4, 1), index + 1, np.float32)


@pytest.mark.parametrize("share", (0.1, 0.5, 1.0))
def test_studies_without_the_prompts_stream_train_a_flow_with_the_null_prompt(share):
    source = Numbered(*[("ct", "mri")] * 6, *[("ct",)] * 30, ("mri",))
    rows = Rows(require=("ct",), prompts=("mri",), unprompted=share)
    assert [len(index) for index in fitting(source, rows, "train")] == [6, 30]
    seen, without = Counter(), []
    found = batches(source, rows, "train", 100, 3, size=4)
    for batch in itertools.islice(found, 10):
        about = batch["about"]
        record = batch["ct"][:, 0, 0, 0].astype(int) - 1
        np.testing.assert_array_equal(about["present"]["mri"], record < 6)
        assert not about["prompt"]["mri"][record >= 6].any()  # what stands there is blank
        assert (about["prompt"]["mri"][record < 6, 0, 0, 0] == record[record < 6] + 1).all()
        without.append(np.mean(record >= 6))
        seen.update(record.tolist())
    found.close()
    assert np.mean(without) == pytest.approx(share, abs=0.05)
    assert len(set(seen) - set(range(6))) > 20 and (share == 1) == (not set(seen) & set(range(6)))


def test_a_share_of_zero_leaves_them_out_and_all_are_drawn_where_there_are_no_others():
    both = Numbered(*[("ct", "mri")] * 3, *[("ct",)] * 30)
    none = Rows(require=("ct",), prompts=("mri",), unprompted=0.0)
    assert [len(index) for index in fitting(both, none, "train")] == [3, 0]
    found = batches(both, none, "train", 60, 0, size=4)
    assert next(found)["about"]["present"]["mri"].all()
    found.close()
    bare = Numbered(*[("ct",)] * 5)
    with pytest.raises(UserError, match="ct and any of mri"):
        matching(bare, none, "train")
    some = dataclasses.replace(none, unprompted=0.1)
    assert list(matching(bare, some, "train")) == list(range(5))
    found = batches(bare, some, "train", 50, 0, size=4)
    batch = next(found)
    found.close()
    assert not batch["about"]["present"]["mri"].any()
    assert Counter(batch["ct"][:, 0, 0, 0].astype(int)) == dict.fromkeys(range(1, 6), 10)  # whole epochs
    held = pipeline.fixed(bare, some, "train", 9, 0, size=4)
    assert len(held["ct"]) == 5 and not held["about"]["present"]["mri"].any()


# --- what a network predicts ----------------------------------------------------------------------------------------


def test_a_stage_begun_with_one_prediction_is_not_resumed_with_another(tmp_path):
    root = epath.Path(tmp_path)
    begun = micro("ldm", "ct,tiny,alone", predict="eps")
    record = lambda config: loop._record(config, stage_graph(config), root / "ldm_ct")  # noqa: E731
    record(begun)
    (root / "ldm_ct" / "checkpoints").mkdir()
    record(micro("ldm", "ct,tiny,alone", predict="eps", steps=40))  # this may differ
    for predict in ("v", "sample"):
        with pytest.raises(UserError, match=rf"begun with config\.predict='eps', this command has '{predict}'"):
            record(micro("ldm", "ct,tiny,alone", predict=predict))
    with pytest.raises(UserError, match=r"begun with config\.predict='eps', this command has 'sample'"):
        record(micro("ldm", "ct,tiny,alone"))  # auto: what it means is compared, and said
    record(micro("ldm", "ct,tiny,alone", predict="eps"))


def test_weights_that_predict_eps_cannot_begin_a_flow_that_predicts_anything_else(monkeypatch):
    monkeypatch.setattr(weights, "offers", lambda folder, group: folder == "W" and group == "ct/flow")
    config = micro("ldm", "ct,tiny,alone", predict="v")
    config.weights = "W"
    with pytest.raises(UserError, match=r"config\.predict='v', but ldm_ct begins from the converted weights in W"):
        results.predictions(config, ("ct/flow",))
    for predict in ("eps", "auto"):
        config.predict = predict
        assert results.predictions(config, ("ct/flow", "ct/guide")) == {"ct": "eps"}
    config.weights = ""
    for predict, meant in (("auto", "sample"), ("v", "v")):
        config.predict = predict
        assert results.predictions(config, ("ct/flow",)) == {"ct": meant}
    upstream = micro("text_ct", "tiny")
    upstream.weights, upstream.stages.ldm_ct.predict = "W", "v"
    with pytest.raises(UserError, match=r"config\.stages\.ldm_ct\.predict='v'"):
        results.predictions(upstream, ("text/flow", "ct/flow"))


def test_where_no_signal_is_left_a_flow_that_predicts_eps_is_refused():
    config = micro("text_ct", "tiny")
    config.schedule = "zero_snr"
    assert results.predictions(config, ("text/flow", "ct/flow")) == {"text": "sample", "ct": "sample"}
    config.stages.ldm_ct.predict = "eps"
    with pytest.raises(UserError, match=r"ldm_ct predicts eps \(config\.stages\.ldm_ct\.predict='eps'\)"):
        results.predictions(config, ("text/flow", "ct/flow"))


def test_what_a_flow_predicts_is_told_to_all_that_stand_on_it(tmp_path):
    from medm2g_jax import plan
    from medm2g_jax.main import read_config

    told = "--config.stages.ldm_ct.predict=v"
    config = read_config(["--config=configs/text_ct.py:tiny", told])
    found = {n: a for n, _, a in plan.commands(config, "configs/text_ct.py:tiny", [told], str(tmp_path))}
    assert "--config.predict=v" in found["ldm_ct"] and told in found["text_ct"]
    assert not any(".predict=" in a for name in ("image_vae", "ldm_text", "text_xray") for a in found[name])
