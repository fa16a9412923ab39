"""Latents that are kept train what latents made in the step train, and are never those of something else."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from micro import micro
from PIL import Image
from test_recipes import fresh

from medm2g_jax.config import get_config, stage_graph
from medm2g_jax.data import latents as stored
from medm2g_jax.data import pipeline
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.errors import UserError
from medm2g_jax.model import init_group
from medm2g_jax.recipes import rows_of
from medm2g_jax.train import abstract, checkpoint, latents, loop, results, sharding
from medm2g_jax.train.setup import assemble

LISTING = ("ct_mri",)
MRI = {"mri_t1": "mri:t1", "mri_t2": "mri:t2"}
KINDS = [("train", ("ct", *MRI))] * 9 + [("train", ("ct",))] * 2 + [("train", (*MRI,))] * 3
KINDS += [("val", ("ct", *MRI))] * 4 + [("test", ("ct", *MRI))] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A manifest of CTs and two contrasts of MRI, some of them missing, on one grid in some records."""
    out, rng, rows = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for i, (split, keys) in enumerate(KINDS):
        for key in keys:
            small = Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8))
            small.resize((32, 32), Image.Resampling.BICUBIC).save(out / f"{i}_{key}.png")
        images = {key: f"{i}_{key}.png" for key in keys}
        row = {"id": f"s{i}", "subject": f"p{i}", "split": split, "images": images, "registered": i % 2 == 0}
        rows.append(json.dumps(row))
    (out / "manifest.jsonl").write_text("\n".join(rows))
    return out


@pytest.fixture(scope="module")
def source(folder) -> Manifest:
    return Manifest(folder, 32)


class CtAlone(Manifest):
    """Its MRI could be another one each time."""

    steady = ("ct",)


def config_of(target: str, words: str = "tiny", **own):
    return micro(target, words, steps=3, listing=LISTING, upstream="init", log_every=1, eval_rows=4, **own)


def trained(config, root, source) -> tuple[list[dict], dict[str, np.ndarray]]:
    """(the rows of the log, what was learnt) of a stage on untrained upstream."""
    data = loop.Data(source, None, {}, 32)
    loop.run_stage(config, epath.Path(root), data)
    rows = [json.loads(line) for line in (root / config.stage / "log.jsonl").read_text().splitlines()]
    return rows, checkpoint.load_model(epath.Path(root) / config.stage)


@pytest.mark.parametrize(
    ("target", "words"), [("ldm", "ct,tiny"), pytest.param("ct_mri", "tiny", marks=pytest.mark.full)]
)
def test_kept_latents_train_what_the_steps_own_do(target, words, folder, source, tmp_path):
    """Losses, held-out losses and what was learnt, to what float16 rounds; of a round with one modality's as well."""
    config = config_of(target, words, latents="off")
    log, learnt = trained(config, tmp_path / "off", source)
    assert not (tmp_path / "off" / "latents").exists()
    sources = {"on": source} | ({"mixed": CtAlone(folder, 32)} if target == "ct_mri" else {})
    for name, own in sources.items():
        config.latents = "on"
        there, same = trained(config, tmp_path / name, own)
        kept = {path.name for path in (tmp_path / name / "latents").iterdir()}
        assert kept == ({"ct", "mri_t1", "mri_t2"} if (target, name) == ("ct_mri", "on") else {"ct"})
        assert [row.keys() for row in there] == [row.keys() for row in log]
        for a, b in zip(there, log, strict=True):
            for field in [f for f in a if f.startswith(("loss", "held out", "eps", "contrast"))]:
                assert a[field] == pytest.approx(b[field], rel=1e-3), (name, field)
        # Adam's first steps have the size of the learning rate, whatever the gradient's: only signs near zero differ.
        moved = [np.abs(np.asarray(same[n]) - np.asarray(x)).mean() for n, x in learnt.items()]
        assert np.mean(moved) < 0.02 * config.lr


@dataclasses.dataclass
class Maker:
    """`latents.make` of a round, with random weights for an autoencoder."""

    config: object
    source: object
    fingerprint: int = 1

    def __post_init__(self):
        graph, self.mesh = stage_graph(self.config), sharding.make_mesh(self.config.mesh)
        cached = latents.chosen(self.config, epath.Path("/"), graph, self.source)
        told = {m: "sample" for m in graph.modalities}
        slots = results.slots_of(graph, self.config.stage)
        self.setup = assemble(self.config, graph, self.mesh, {}, {}, told, slots, jnp.float32, cached)
        self.frozen = fresh(lambda key: init_group(self.setup.model, key, ("image/vae",)))

    def __call__(self, root) -> stored.Latents:
        lineage = {"image/vae": {"stage": "image_vae", "fingerprint": self.fingerprint}}
        return latents.make(self.config, epath.Path(root), self.setup, self.source, lineage, self.frozen, self.mesh)


@pytest.fixture(scope="module")
def maker(source) -> Maker:
    return Maker(config_of("ct_mri", latents="on"), source)


def contents(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_latents_are_the_posteriors_mean_of_what_the_stage_reads(maker, source, tmp_path):
    made = maker(tmp_path)
    assert made.blank.shape == (4, 4, 4) and made.blank.dtype == np.float16
    errors, values = [], []
    encode = jax.jit(lambda x: maker.setup.model.posterior(maker.frozen, "image", x)[0])
    for stream in ("ct", "mri:t1"):
        held = [i for i, r in enumerate(source.records) if stream in r.streams and r.split != "test"]
        x = np.stack([source.read(i, stream, np.random.default_rng(0)) for i in held])
        z = np.asarray(encode(x))
        read = stream != "ct" or np.asarray(["mri:t1" in source.records[i].streams for i in held])
        some = np.flatnonzero(np.broadcast_to(read, len(held)))
        found = np.stack([made(held[i], stream) for i in some]).astype(np.float32)
        errors.append(found - z[some])
        values.append(z[some])
    assert np.concatenate(errors).std() < 5e-4 * np.concatenate(values).std()
    part = np.load(tmp_path / "latents" / "ct" / "0000.npy")
    assert part.shape == (15, 4, 4, 4)  # of training and validation
    # CTs without an MRI serve no row of this round: nobody has encoded them, and nobody may read them.
    assert np.isnan(part).all(axis=(1, 2, 3)).sum() == 2
    for record in (9, len(KINDS) - 1):
        with pytest.raises(ValueError, match=f"no latent of ct of record {record}"):
            made(record, "ct")


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PART", 4)
    maker(tmp_path / "whole")
    write, calls = stored.Store.write, []

    def killed(self, *args):
        calls.append(args[0])
        if len(calls) == 3:
            (self.folder / "0002.npy.part").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(stored.Store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        maker(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "latents").rglob("*.npy"))) == 2
    maker(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and len(calls) == 3 + 10
    maker(tmp_path / "killed")  # nothing is left to do
    assert len(calls) == 13


def test_another_stage_adds_what_it_reads(maker, source, tmp_path):
    maker(tmp_path)
    before = np.load(tmp_path / "latents" / "ct" / "0000.npy")
    made = Maker(config_of("ldm", "ct,tiny", latents="on"), source)(tmp_path)
    after = np.load(tmp_path / "latents" / "ct" / "0000.npy")
    old = ~np.isnan(before)
    np.testing.assert_array_equal(after[old], before[old])
    assert np.isfinite(after).all() and np.isfinite(made(9, "ct")).all()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("autoencoder: expected 2, found 1", lambda m, root: setattr(m, "fingerprint", 2)),
        ("data: expected", lambda m, root: setattr(m, "source", Manifest(root / "less", 32))),
        ("image_size: expected 64, found 32", lambda m, root: setattr(m.config, "image_size", 64)),
        ("0000.npy: file: expected .* found 'a broken one", lambda m, root: _cut(root / "latents/mri_t1/0000.npy")),
        ("latents.json: file: expected 'JSON'", lambda m, root: _cut(root / "latents/ct/latents.json")),
        ("latents.json: file: expected .* found 'none'", lambda m, root: (root / "latents/ct/latents.json").unlink()),
    ],
)
def test_stale_latents_are_an_error_that_says_what_to_delete(field, change, maker, folder, tmp_path):
    maker(tmp_path)
    shutil.copytree(folder, tmp_path / "less")
    rows = (tmp_path / "less" / "manifest.jsonl").read_text().splitlines()
    (tmp_path / "less" / "manifest.jsonl").write_text("\n".join(rows[1:]))
    other = dataclasses.replace(maker, config=maker.config.copy_and_resolve_references())
    other.setup, other.frozen, other.mesh = maker.setup, maker.frozen, maker.mesh
    change(other, tmp_path)
    with pytest.raises(UserError, match=rf"{field}.*rm -r {tmp_path}/latents/"):
        other(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("stage", ["ldm_mri", "ct_mri"])
@pytest.mark.parametrize("cached", [("ct", "mri"), ("ct",)])
def test_the_plan_sees_the_same_batch(stage, cached, maker, tmp_path):
    config = config_of(*(("ldm", "mri,tiny") if stage == "ldm_mri" else ("ct_mri", "tiny")), latents="on")
    graph = stage_graph(config)
    rows = rows_of(config, graph, cached)
    made = maker(tmp_path)
    real = next(pipeline.batches(maker.source, rows, "train", 8, 0, size=32, latents=made))
    shapes = abstract.abstract_batch(rows, 8, maker.setup.model)
    seen = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert seen(real) == seen(shapes)
    _, arguments = abstract.abstract_stage(config, {}, sharding.make_mesh(config.mesh), "cpu", cached=cached)
    assert seen(arguments[2]) == seen(shapes)


def test_a_rounds_losses_are_the_same_with_latents_of_both_of_one_and_of_none(maker, source, tmp_path):
    """Where a row lacks a modality its latent stands for another blank, which must say nothing; one program after
    `prepare` serves all of them."""
    made, spec, config = maker(tmp_path), maker.setup.recipe, maker.config
    stage, rng = maker.setup.stage, np.random.default_rng(0)
    groups = tuple({*stage.reads, *stage.trains})
    params = fresh(lambda key: init_group(maker.setup.model, key, groups)) | maker.frozen
    loud = [n for n in params if "/guide/" in n and n.endswith("kernel")]  # fresh guides say nothing
    params |= {n: jnp.asarray(rng.normal(size=params[n].shape) * 0.2, jnp.float32) for n in loud}
    prepare = jax.jit(spec.prepare)
    losses = jax.jit(lambda prepared: [f(spec.features(params, prepared)) for f in spec.losses.values()])
    found, blank = {}, 0
    for cached in ((), ("ct",), ("ct", "mri")):
        rows = rows_of(config, stage_graph(config), cached)
        batch = next(pipeline.batches(source, rows, "train", 16, 1, size=32, latents=made))
        blank += int((~batch["about"]["has"]["ct"]).sum())
        found[cached] = np.asarray(losses(prepare(params, batch, jax.random.key(0))))
    assert blank and len(found[()]) == 3
    for cached in found:
        np.testing.assert_allclose(found[cached], found[()], rtol=1e-3)


def test_rows_are_the_same_with_latents_and_without(maker, tmp_path):
    """Skipping an image must not shift what is drawn after it."""
    made, config = maker(tmp_path), maker.config
    graph = stage_graph(config)
    batch = {}
    for cached in ((), ("ct", "mri")):
        rows = rows_of(config, graph, cached)
        batch[cached] = next(pipeline.batches(maker.source, rows, "train", 8, 0, size=32, latents=made))
    plain, kept = batch.values()
    for field in ("record", "stream", "has", "partner", "grid"):
        jax.tree.map(np.testing.assert_array_equal, plain["about"][field], kept["about"][field])
    np.testing.assert_array_equal(plain["ct"], kept["ct"]["pixels"])
    assert kept["about"]["others"]["mri"]["x"].keys() == {"latent"}


def test_what_is_kept_is_asked_of_the_source_and_of_what_it_costs(source, tmp_path):
    root = epath.Path(tmp_path)
    config = config_of("ct_mri")

    def chosen(source=source, root=root, **fields):
        for field, value in fields.items():
            config[field] = value
        return latents.chosen(config, root, stage_graph(config), source)

    assert config.latents == "auto" and chosen() == ()  # patches of 8 x 8: cheap
    phantom = Phantom(32, 0, train=2, val=1, test=0, pairs=(("ct", "mri"),))
    assert chosen(latents="on") == ("ct", "mri") and chosen(phantom) == ("ct",)  # an unstated contrast is drawn
    assert chosen(latents="off") == ()
    config.net.image_vae.patch = 1
    assert chosen(latents="auto", steps=10) == ("ct", "mri") and chosen(steps=1) == ()
    config.steps = 10
    bucket = epath.Path("gs://bucket/run")
    assert chosen(root=bucket) == ()
    with pytest.raises(UserError, match=r"config\.latents='on', but the run root gs://bucket/run"):
        chosen(root=bucket, latents="on")
    # Undersampled images are drawn, whoever has them.
    tune = micro("finetune", "mri_to_ct,full,tiny", listing=LISTING, latents="on", accelerate=4)
    assert latents.chosen(tune, root, stage_graph(tune), source) == ("ct",)
    assert get_config("image_vae", "tiny").latents == "auto" and "latents" in loop.FREE
    vae = micro("image_vae", "tiny", listing=LISTING, latents="on")
    assert latents.chosen(vae, root, stage_graph(vae), source) == ()
