"""Fine-tunes: who trains, what stands by, and what k-space undersampling does to an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro, model_of

from medm2g_jax import rounds
from medm2g_jax.config import get_config, stage_config, stage_graph
from medm2g_jax.data import kspace, pipeline
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.errors import UserError
from medm2g_jax.limits import CHOICES
from medm2g_jax.modality import MODALITIES
from medm2g_jax.model import low_rank, merged
from medm2g_jax.recipes import rows_of


@pytest.mark.parametrize(
    ("words", "trains", "listing"),
    [
        ("report,full", {"text/flow", "text/guide"}, "default"),
        ("report,guide", {"text/guide"}, "default"),
        ("ct_report,lora", {"text/lora"}, "default"),
        ("mri_to_ct,guide", {"ct/guide", "ct/grid"}, "default"),
        ("mri_to_ct,full,alone", {"ct/flow", "ct/guide", "ct/grid"}, ("ct_mri",)),
        ("mri,full,alone", {"mri/flow", "mri/guide", "mri/grid"}, ("mri",)),
        ("mri,lora", {"mri/lora"}, "default"),
        ("mri_to_ct,full,paper", {"ct/flow", "ct/guide"}, "default"),
        ("ct,full", {"ct/flow", "ct/guide"}, "default"),  # a report lies on no grid
    ],
)
def test_the_target_alone_trains_and_everything_else_comes_from_the_rounds(words, trains, listing):
    config = get_config("finetune", f"tiny,{words}")
    stage = stage_graph(config).stage(config.stage)
    task = rounds.TASKS[rounds.tuned(config.stage)[0]]
    assert set(stage.trains) == trains and stage.target == task.target and config.weight_decay == 0
    assert config.listing == (rounds.LISTINGS[listing] if isinstance(listing, str) else listing)
    owners = stage_graph(config).owners(config.stage)
    assert set(stage.reads) <= set(owners) and owners[f"{task.target}/guide"] in config.listing
    sources = [m for m in stage.subjects if m != task.target]
    assert not any(f"{m}/flow" in stage.reads for m in sources)  # V is all that is read of them
    *before, last = stage_graph(config).plan(config.stage)
    assert last == config.stage and set(config.stages) == set(before)
    assert all(stage_config(config, s).stage == s for s in before)  # of later rounds that trained on, too


def test_a_fine_tune_may_go_on_practising_with_partners_of_other_rounds():
    config = get_config("finetune", "tiny,mri_to_ct,full")
    before = stage_graph(config).stage(config.stage)
    config.rehearse = 0.5
    stage = stage_graph(config).stage(config.stage)
    assert before.earlier == {} and stage.earlier == {"ct": ("text",)} and stage.trains == before.trains
    assert set(stage.reads) - set(before.reads) == {"text/vae", "text/guide"}
    rows = rows_of(config, stage_graph(config))
    assert rows.rehearse == 0.5 and rows.earlier == (("ct", ("text",)),)
    config = get_config("finetune", "tiny,ct,full")
    config.rehearse = 0.5
    stage = stage_graph(config).stage(config.stage)
    assert stage.earlier == {"ct": ("mri",)} and "ct/grid" in stage.reads and stage.registered == {}
    config = get_config("finetune", "tiny,xray,full")
    config.rehearse = 0.5
    with pytest.raises(UserError, match="tune_xray_full has nothing to go on practising: .* but text_xray pairs xray"):
        stage_graph(config).stage(config.stage)


def test_words_of_a_finetune():
    for words in ("report", "lora", "report,lora,full", ""):
        with pytest.raises(UserError, match=r"needs one of report, .* and one of full, guide, lora"):
            get_config("finetune", words)
    with pytest.raises(UserError, match="no round of the listing .* guides xray so; expected one with text_xray"):
        get_config("finetune", "xray,lora,tiny,text_ct+ct_mri")
    assert "accelerate" not in get_config("finetune", "report,lora,tiny")
    assert set(CHOICES["keep_lines"]) == set(kspace.LINES)


def test_low_rank_additions_start_at_nothing_and_merged_equal_applied():
    model = model_of("mri", listing=("mri",))
    flow = model.model.flows["mri"]
    own = low_rank({n: p.shape for n, p in model.params.items()}, "mri", 3, jax.random.key(0))
    kernels = [n for n in model.params if n.startswith("mri/unet/") and n.endswith("/kernel")]
    assert len(own) == 2 * len(kernels) and all(rounds.group_of(n) == "mri/lora" for n in own)
    assert {x.shape[n.endswith("/a")] for n, x in own.items()} == {3}
    rng = np.random.default_rng(0)
    z, t = jnp.asarray(rng.normal(size=(2, *flow.family.latent_shape)), jnp.float32), jnp.array([3, 700])
    prompt = _context(model, 2)
    run = jax.jit(lambda p: flow.predict(p, z, t, prompt, None, jnp.zeros(2, int)))
    before = run(model.params)
    np.testing.assert_array_equal(run(model.params | own), before)
    told = {n: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32) for n, x in own.items()}
    applied, inside = run(model.params | told), merged(model.params | told, "mri")
    assert not np.allclose(applied, before, atol=1e-3) and not any("/lora/" in n for n in inside)
    np.testing.assert_allclose(run(inside), applied, atol=1e-5)
    name = kernels[0]
    a, b = (told[name.replace("/unet/", "/lora/") + end] for end in ("/a", "/b"))
    expected = np.asarray(model.params[name]) + (np.asarray(a) @ np.asarray(b)).reshape(model.params[name].shape)
    np.testing.assert_allclose(inside[name], expected, atol=1e-5)


def _context(model, rows):
    from medm2g_jax.model import null_context

    return null_context(model.model.flows["mri"].null(model.params), rows)


# --- k-space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", kspace.LINES)
def test_undersampling_keeps_one_line_in_so_many_and_the_mean(lines):
    rng = np.random.default_rng(0)
    for side, factor in ((64, 4), (64, 8), (33, 3)):
        kept = kspace.mask(side, factor, lines, rng)
        assert kept.sum() == round(side / factor) and kept[side // 2]
    x = rng.uniform(-0.9, 0.9, (32, 48, 1)).astype(np.float32)
    np.testing.assert_allclose(kspace.undersampled(x, 1, "block", rng), x, atol=1e-5)
    flat = np.full((32, 48, 1), 0.3, np.float32)
    np.testing.assert_allclose(kspace.undersampled(flat, 4, lines, rng), flat, atol=1e-5)
    worse = [np.abs(kspace.undersampled(x, f, lines, rng) - x).mean() for f in (2, 4, 8)]
    assert 0 < worse[0] < worse[1] < worse[2]


def test_a_block_of_lines_is_a_low_pass_along_the_rows():
    """A wave below the cut comes through, one above it is gone: closed form."""
    columns = np.arange(64) / 64
    low, high = (np.tile(0.4 * np.cos(2 * np.pi * f * columns), (16, 1))[..., None] for f in (3, 20))
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(kspace.undersampled(low, 4, "block", rng), low, atol=1e-6)
    np.testing.assert_allclose(kspace.undersampled(high, 4, "block", rng), 0 * high, atol=1e-6)
    down = np.swapaxes(high, 0, 1)[:, :16]  # the other direction is sampled in full
    np.testing.assert_allclose(kspace.undersampled(down, 4, "block", rng), down, atol=1e-6)


def test_only_the_source_of_a_faster_acquisition_is_undersampled():
    config = micro("finetune", "mri_to_ct,full,tiny,alone", accelerate=4)
    source = Phantom(size=32, seed=0, train=8, val=4, test=2, pairs=(("ct", "mri"),))
    rows = rows_of(config, stage_graph(config))
    fast = next(pipeline.batches(source, rows, "train", 4, 0, size=32))
    config.accelerate = 1
    full = next(pipeline.batches(source, rows_of(config, stage_graph(config)), "train", 4, 0, size=32))
    np.testing.assert_array_equal(fast["ct"], full["ct"])
    assert np.abs(fast["mri"] - full["mri"]).mean() > 0.01


def test_a_fine_tune_of_named_streams_is_given_no_others():
    config = micro("finetune", "mri_to_ct,full,tiny,alone", streams="mri:t2")
    source = Phantom(size=32, seed=0, train=8, val=4, test=2, pairs=(("ct", "mri"),))
    rows = rows_of(config, stage_graph(config))
    about = next(pipeline.batches(source, rows, "train", 16, 0, size=32))["about"]
    assert set(about["stream"]["mri"]) == {MODALITIES["mri"].streams.index("mri:t2")}
    config.streams = "mri:t2,mri:dwi"
    with pytest.raises(UserError, match="unknown stream 'mri:dwi'; known streams: .*mri:t2"):
        rows_of(config, stage_graph(config))
    config.streams = "xray"
    with pytest.raises(UserError, match="config.streams='xray': expected streams of ct or mri for tune_mri_to_ct_full"):
        rows_of(config, stage_graph(config))


def test_a_fine_tune_may_make_one_contrast_of_the_others():
    config = micro("finetune", "mri,full,tiny,alone", streams="mri:t1,mri:t2,mri:pd", make="mri:pd")
    source = Phantom(size=32, seed=0, train=8, val=4, test=2, pairs=(("mri",),))
    rows = rows_of(config, stage_graph(config))
    about = next(pipeline.batches(source, rows, "train", 16, 0, size=32))["about"]
    index = {s: i for i, s in enumerate(MODALITIES["mri"].streams)}
    others = about["others"]["mri"]
    assert set(about["stream"]["mri"]) == {index["mri:pd"]}
    assert set(others["stream"][others["has"]]) == {index["mri:t1"], index["mri:t2"]}
    for wrong in ("ct", "mri:t1,mri:pd"):
        config.make = wrong
        with pytest.raises(UserError, match=f"config.make='{wrong}': expected one stream of mri for tune_mri_full"):
            rows_of(config, stage_graph(config))
