"""train/abstract: a stage in shapes is what the trainer has, and what is compiled ahead is what it then runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from micro import micro, micro_stage

from medm2g_jax import rounds, run
from medm2g_jax.config import get_config, stage_config, stage_graph
from medm2g_jax.recipes import rows_of
from medm2g_jax.train import abstract, loop, results, setup, sharding

STAGES = list(rounds.graph(rounds.LISTINGS["default"]).stages)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return run.open_data(micro_stage("ct_mri"), epath.Path(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("stage", STAGES)
def test_an_abstract_batch_is_the_pipelines(stage, data):
    config = micro_stage(stage)
    model = results.build_model(config, data.tokenizers.sizes, {})
    rows = rows_of(config, stage_graph(config))
    real = next(data.batches(rows, "train", 4, seed=0))
    shapes = abstract.abstract_batch(rows, 4, model)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("stage", ["image_vae", "align_text_ct", "ldm_mri", "text_ct", "ct_mri"])
def test_the_abstract_step_is_placed_on_the_mesh(stage, data):
    """Every argument has a sharding, rows are split, the step gives back the state it took."""
    config = micro_stage(stage)
    config.mesh.fsdp = 2
    mesh = sharding.make_mesh(config.mesh)
    made, arguments = abstract.abstract_stage(config, data.tokenizers.sizes, mesh)
    state, frozen, batch, _ = arguments
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in jax.tree.leaves(arguments))
    assert {x.sharding.shard_shape(x.shape)[0] for x in jax.tree.leaves(batch)} == {config.batch // 8}
    assert {x.dtype for k, x in frozen.items() if k != "null/tokens"} <= {jnp.dtype("bfloat16")}
    assert {x.dtype for x in state.trainable.values()} == {jnp.dtype("float32")}
    stage_ = stage_graph(config).stage(stage)
    kept = {k for k in state.trainable if results.trains(stage_, k)}
    assert kept and not any(results.trains(stage_, k) for k in frozen)
    out, metrics = jax.eval_shape(made.train_step, *arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("listing", ["text_mri", ("text_mri",)])
def test_a_partner_on_no_grid_has_no_input_channels(listing, data):
    """A round of reports and of MRI, whose other contrasts lie on its grid: its step is traced."""
    config = micro("text_mri", listing=listing)
    made, arguments = abstract.abstract_stage(config, data.tokenizers.sizes, sharding.make_mesh(config.mesh))
    _, metrics = jax.eval_shape(made.train_step, *arguments)
    assert {"eps/mri", "eps/text"} <= metrics.keys()


def test_the_abstract_step_takes_what_the_trainer_gives(data, tmp_path, monkeypatch):
    """Names, shapes and dtypes of a real run's first step; on CPU, where both are float32."""
    seen = []
    make = setup.make_train_step

    def record(*args):
        step = make(*args)
        return lambda *a: seen.append(jax.tree.map(lambda x: (x.shape, x.dtype), a)) or step(*a)

    root = epath.Path(tmp_path)
    monkeypatch.setattr(setup, "make_train_step", record)
    config = micro("image_vae", steps=1)
    loop.run_stage(config, root, data)
    monkeypatch.undo()
    _, arguments = abstract.abstract_stage(config, data.tokenizers.sizes, sharding.make_mesh(config.mesh), "cpu")
    assert seen[0] == jax.tree.map(lambda x: (x.shape, x.dtype), arguments)


def test_the_papers_sizes_are_placed_without_a_weight():
    """sd15 in shapes only: 8 chips, parameters split, as many in the UNet as Stable Diffusion has."""
    config = get_config("text_ct", "sd15")
    config.mesh.fsdp = 8
    config.mesh.data = 1
    vocab = dict(clip=49408, bert=28996, gpt2=50260)
    _, (state, frozen, _, _) = abstract.abstract_stage(config, vocab, sharding.make_mesh(config.mesh))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    here = lambda tree: sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(tree))  # noqa: E731
    (of_ct,) = [m for m in rounds.members("text_ct") if m != "text"]
    unet = {k: v for k, v in frozen.items() if k.startswith(f"{of_ct}/unet/")}
    assert size(unet) / 1e6 == pytest.approx(859.5, abs=0.1)  # SD-1.5's UNet
    assert here(frozen) < 0.14 * size(frozen)
    assert all(k.startswith(f"{of_ct}/") for k in state.trainable)




def test_what_is_compiled_ahead_is_what_the_stage_runs(data, tmp_path, monkeypatch):
    """To the letter of the program, which is its key in the compilation cache; not before its autoencoder is done."""
    config, root = micro("ldm", "ct,tiny,alone", steps=2), epath.Path(tmp_path)
    seen: dict[str, list[str]] = {}

    def recording(name, program):
        def lower(*args):
            lowered = program.lower(*args)
            seen.setdefault(name, []).append(lowered.as_text())
            return lowered

        def call(*args):
            if len(seen.get(name, ())) < 2:
                lower(*args)
            return program(*args)

        call.lower = lower
        return call

    programs, fresh = setup.Setup.programs, results.fresh_program
    named = ("train", "eval")
    monkeypatch.setattr(setup.Setup, "programs", lambda *a: tuple(map(recording, named, programs(*a))))
    monkeypatch.setattr(results, "fresh_program", lambda *a: recording("fresh", fresh(*a)))
    assert not abstract.compile_ahead(config, root, data.source, data.vocab) and not seen
    whole = run.open_data(config, root)
    loop.run_stage(stage_config(config, "image_vae"), root, whole)
    seen.clear()
    assert abstract.compile_ahead(config, root, whole.source, whole.vocab)
    assert {name: len(texts) for name, texts in seen.items()} == {"fresh": 1, "train": 1, "eval": 1}
    loop.run_stage(config, root, whole)
    for name, (ahead, run_) in seen.items():
        assert ahead == run_, name
    config.remat = True  # a large network's compiler would take the memory that the stage before it uses
    assert not abstract.compile_ahead(config, root, whole.source, whole.vocab)
