import ast
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from medm2g_jax import rounds
from medm2g_jax.config import PRESETS, WEIGHT_FOLDERS, get_config, stage_config, stage_graph
from medm2g_jax.errors import UserError
from medm2g_jax.limits import CHOICES, check, numbers, range_of
from medm2g_jax.train import results

CONFIGS = Path(__file__).parents[1] / "configs"
# What each config file is called with, and the stage that this names.
STAGES = {
    "image_vae": {"": "image_vae"},
    "text_vae": {"": "text_vae"},
    "align": {pair: f"align_{pair}" for pair in ("text_xray", "text_ct", "ct_mri", "text_mri")},
    "ldm": {m: f"ldm_{m}" for m in ("text", "xray", "ct", "mri")},
    "text_xray": {"": "text_xray"},
    "text_ct": {"": "text_ct"},
    "ct_mri": {"": "ct_mri"},
    "mri": {"": "mri"},
    "text_mri": {"": "text_mri"},
    "finetune": {f"{task},{how}": f"tune_{task}_{how}" for task in rounds.TASKS for how in rounds.HOWS},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("MEDM2G_SD_WEIGHTS", "MEDM2G_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def weights(tmp_path):
    for folder in WEIGHT_FOLDERS:
        (tmp_path / folder).mkdir()
    return tmp_path


def load(name, words=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(words)


def from_flags(*argv):
    """What main's --config flag makes of a command line, locked."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=["main", *argv])
    values(["main", *argv])
    return values.config


def words_of(stage, *more):
    """(target, words) that name a stage."""
    verb, _, subject = stage.partition("_")
    return (verb, ",".join((subject, *more))) if verb in ("align", "ldm") else (stage, ",".join(more))


@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_config_file_names_its_stage(name):
    assert {p.stem for p in CONFIGS.glob("*.py")} - {"__init__", "tasks"} == set(STAGES)
    for subject, stage in STAGES[name].items():
        for preset in PRESETS:
            for variant in ((), ("paper",)):
                config = load(name, ",".join(w for w in (subject, preset, *variant) if w))
                assert (config.stage, config.preset, config.variant) == (stage, preset, "".join(variant))
                tune = stage if rounds.tuned(stage) else ""
                assert stage in rounds.graph(config.listing, tune=tune).stages
                assert config.steps > 0 and config.lr > 0 and all(w >= 0 for w in config.loss.values())
    imported = [n for n in ast.walk(ast.parse((CONFIGS / f"{name}.py").read_text())) if isinstance(n, ast.ImportFrom)]
    assert [n.module for n in imported] == ["medm2g_jax.config"]
    doc = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    assert f"python -m medm2g_jax.main --config=configs/{name}.py" in doc


def test_words_come_in_any_order():
    same = [load("ldm", w).to_dict() for w in ("ct,sd15,paper", "paper,ct,sd15", " sd15 , paper,ct,")]
    assert same[0] == same[1] == same[2]
    assert load("text_ct", None).to_dict() == load("text_ct", "").to_dict()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    (
        ("text_ct", "tinny", "unknown word 'tinny'.*tiny, base, sd15.*paper"),
        ("text_ct", "ct", "unknown word 'ct'"),
        ("text_ct", "tiny,sd15", "two presets"),
        ("ldm", "tiny", "configs/ldm.py needs one of ct, mri, text, xray.*found 'tiny'"),
        ("ldm", "", "configs/ldm.py:ct,tiny"),
        ("ldm", "ct,mri", "unknown word 'mri'"),
        ("align", "ct", "configs/align.py needs one of ct_mri, text_ct, text_mri, text_xray"),
        ("align", "text_ct,small", "unknown word 'small'"),
    ),
)
def test_unknown_words(name, words, message):
    with pytest.raises(UserError, match=message):
        load(name, words)


def test_a_round_of_another_listing_is_refused():
    with pytest.raises(UserError, match="unknown stage 'text_mri'"):
        get_config("text_mri", "tiny")
    assert load("text_mri", "tiny").listing == rounds.LISTINGS["text_mri"]
    assert load("align", "text_mri,tiny").listing == rounds.LISTINGS["text_mri"]
    assert load("align", "ct_mri,tiny").listing == rounds.LISTINGS["default"]
    own = get_config("ct_mri", "tiny", listing=("text_xray", "ct_mri"))
    assert own.listing == ("text_xray", "ct_mri") and "text_ct" not in own.stages


def test_rounds_with_sources_on_a_grid_look_the_same_from_every_stage():
    """Who trains what: a round's own fields say it, whichever stage asks."""
    config = get_config("ct_mri", "tiny", "text_mri")
    trains = lambda c: {s.name: set(s.trains) for s in stage_graph(c).stages.values()}  # noqa: E731
    of = lambda m, *groups: {f"{m}/{group}" for group in groups}  # noqa: E731
    assert trains(config)["text_mri"] == of("mri", "flow", "guide", "grid")
    assert trains(config)["ct_mri"] == of("ct", "flow", "guide", "grid") | of("mri", "flow", "grid")
    assert trains(stage_config(config, "text_mri")) == trains(config)
    config.stages.text_mri.open = "guide"
    assert trains(config)["text_mri"] == of("mri", "guide", "grid")
    config.freeze = "paper"
    assert trains(config)["ct_mri"] == of("ct", "flow", "guide", "grid")
    config.register = False
    assert trains(config)["ct_mri"] == of("ct", "guide") and not stage_graph(config).stages["ct_mri"].registered
    config.open = "flow"
    assert trains(config)["ct_mri"] == of("ct", "flow", "guide")
    printed = get_config("ct_mri", "tiny,paper")
    assert trains(printed)["ct_mri"] == of("mri", "guide") and not stage_graph(printed).opened
    for words, predict in (("tiny", "auto"), ("sd15", "auto"), ("tiny,paper", "eps")):
        stages = get_config("ct_mri", words).stages
        assert {s.predict for n, s in stages.items() if n.startswith("ldm_")} == {predict}


@pytest.mark.parametrize(("words", "rms"), [("tiny", 1.0), ("base", 1.0), ("tiny,paper", 64**-0.5)])
def test_a_fresh_flow_hears_prompts_as_loud_as_its_layers_expect(words, rms):
    """A token of the shared space has about unit norm, 1 / sqrt(width) a feature; `paper` leaves it there."""
    config = get_config("ldm", f"ct,{words},alone")
    width = config.net.width
    prompt_in = results.build_model(config, {}, {}).flows["ct"].prompt_in
    token = np.random.default_rng(0).normal(size=(1, 50, width)).astype(np.float32)
    token /= np.linalg.norm(token, axis=-1, keepdims=True)
    heard, _ = prompt_in.init_with_output(jax.random.key(0), token)
    assert np.sqrt(np.mean(np.square(heard))) == pytest.approx(rms, rel=1e-3)


@pytest.mark.parametrize(("preset", "pixels", "latents"), [("tiny", 64, 8), ("base", 256, 32), ("sd15", 512, 64)])
def test_a_preset_has_the_size_that_it_is_said_to_have(preset, pixels, latents):
    config = get_config("ct_mri", preset)
    vae = config.net.image_vae
    assert (config.image_size, config.image_size // (vae.patch * 2 ** (len(vae.channels) - 1))) == (pixels, latents)


def test_weights_folder_picks_the_preset(monkeypatch, weights):
    assert load("text_ct").preset == "tiny" and "not set" in load("text_ct").preset_reason
    monkeypatch.setenv("MEDM2G_SD_WEIGHTS", str(weights))
    found = load("text_ct")
    assert (found.preset, found.weights) == ("sd15", str(weights)) and str(weights) in found.preset_reason
    named = load("text_ct", "tiny")
    assert (named.preset, named.weights, named.preset_reason) == ("tiny", "", "named after the colon")
    assert load("text_ct", "sd15").weights == str(weights)
    (weights / "vd").rmdir()
    with pytest.raises(UserError, match="no folder vd/.*sd15, clip, vd, optimus"):
        load("text_ct")
    assert load("text_ct", "tiny").preset == "tiny"


def test_data_folder_picks_the_source(monkeypatch):
    config = load("text_ct", "tiny")
    assert config.data.source == "phantom" and "not set" in config.data_reason
    monkeypatch.setenv("MEDM2G_DATA", "/data/prepared")
    config = load("text_ct", "tiny")
    assert config.data.source == "manifest:/data/prepared" and "/data/prepared" in config.data_reason
    assert stage_config(config, "image_vae").data.source == "manifest:/data/prepared"


@pytest.mark.parametrize("words", (*PRESETS, "tiny,paper", "sd15,paper"))
@pytest.mark.parametrize("last", ("ct_mri", "text_mri"))
def test_an_upstream_stage_has_the_config_of_its_own_command(words, last):
    listing = "text_mri" if last == "text_mri" else "default"
    config = load(last, words)
    assert set(config.stages) == set(rounds.graph(config.listing).plan(last)[:-1])
    for name in config.stages:
        target, stage_words = words_of(name, words)
        assert stage_config(config, name).to_dict() == get_config(target, stage_words, listing).to_dict()


def test_stage_config_copies_what_is_shared_and_overrides_what_is_not():
    config = from_flags(
        f"--config={CONFIGS}/text_ct.py:tiny",
        "--config.seed=5",
        "--config.steps=11",
        "--config.net.width=96",
        "--config.mesh.fsdp=2",
        "--config.dtype=float32",
        "--config.data.train=100",
        "--config.loss.contrast=0.25",
        "--config.stages.image_vae.steps=7",
        "--config.stages.image_vae.loss.kl=0.5",
    )
    assert config.is_locked and config.steps == 11
    assert stage_config(config, "text_ct") is config
    vae, ldm = stage_config(config, "image_vae"), stage_config(config, "ldm_text")
    assert (vae.steps, vae.loss.kl, vae.loss.l1) == (7, 0.5, 1.0)
    assert ldm.steps == load("ldm", "text,tiny").steps and ldm.loss.to_dict() == {"eps": 1.0}
    for c in (vae, ldm):
        assert (c.seed, c.net.width, c.mesh.fsdp, c.dtype, c.data.train) == (5, 96, 2, "float32", 100)
        assert {f: c[f] for f in rounds.SHARED} == {f: config[f] for f in rounds.SHARED}
        assert "clean" not in c and "contrast" not in c.loss
    assert vae.is_locked
    # A copy: what is done to it is not done to the one it came from.
    ldm.net.width = 1
    vae.stages = {}
    assert config.net.width == 96 and set(config.stages) == set(rounds.graph(config.listing).plan("text_ct")[:-1])
    # An upstream stage reaches its own upstream stages, with their overrides.
    assert set(stage_config(config, "ldm_ct").stages) == {"image_vae", "align_text_xray"}
    assert stage_config(config, "ldm_ct").stages.image_vae.steps == 7


@pytest.mark.parametrize("field", ("config.batchsize=3", "config.stages.ct_mri.steps=3", "config.loss.l1=3"))
def test_configs_are_locked(field):
    with pytest.raises((AttributeError, KeyError)):
        from_flags(f"--config={CONFIGS}/text_ct.py:tiny", f"--{field}")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_variant_paper_switches_back_what_the_paper_does_not_print(preset):
    ours, paper = load("ct_mri", preset), load("ct_mri", f"{preset},paper")
    printed = dict(drop_prompt=1.0, clean=0.0, optimizer="adam", weight_decay=1e-4)
    assert {f: paper[f] for f in printed} == printed
    assert paper.loss.contrast == 0 and paper.sample.guide == "both"
    assert (ours.drop_prompt, ours.clean, ours.optimizer) == (0.7, 0.75, "adamw")
    assert ours.loss.contrast == 0.1 and ours.sample.guide == "cond"
    assert all(s.optimizer == "adam" for s in paper.stages.values())
    assert all(s.optimizer == "adamw" for s in ours.stages.values())
    # Section 3.3 is the paper's own, and so is null-prompt training of a single flow (classifier-free guidance).
    for stage in ("align_text_ct", "ldm_ct"):
        assert paper.stages[stage].loss == ours.stages[stage].loss
    assert paper.stages.ldm_ct.drop_prompt == ours.stages.ldm_ct.drop_prompt == 0.1


def test_sd15_has_the_paper_s_figures():
    config = load("ct_mri", "sd15,paper")
    image = [config.stages[f"ldm_{m}"] for m in ("xray", "ct", "mri")]
    assert {(s.lr, s.batch) for s in image} == {(2e-5, 256)}
    assert (config.stages.ldm_text.lr, config.stages.ldm_text.batch) == (5e-5, 1024)
    # Cross-attention layers: Adam, lr 1e-5, weight decay 1e-4.
    for s in (config, config.stages.text_xray, config.stages.text_ct):
        assert (s.optimizer, s.lr, s.lr_adapt, s.weight_decay) == ("adam", 1e-5, 1e-5, 1e-4)
    assert {s.barlow_lambda for n, s in config.stages.items() if n.startswith("align_")} == {0.0051}
    assert (config.sample.sampler, config.sample.steps) == ("ddim", 50)
    assert (config.sample.eta, config.sample.guidance) == (1.0, 2.0)
    net, vae = config.net, config.net.image_vae
    stride = vae.patch * 2 ** (len(vae.channels) - 1)
    assert (config.image_size // stride, config.image_size // stride, vae.latent) == (64, 64, 4)
    assert net.text_vae.latent == net.text_unet.latent == net.width == 768
    assert (net.clip_text.length, (net.clip_image.image // net.clip_image.patch) ** 2 + 1) == (77, 257)


def test_the_paper_s_noise_schedule():
    from medm2g_jax.diffusion import BETAS, T

    assert T == len(BETAS) == 1000
    assert (BETAS[0], BETAS[-1]) == (pytest.approx(0.00085), pytest.approx(0.0120))


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_fit_together(preset):
    config = load("ct_mri", preset)
    net = config.net
    for part, width in ((net.text_vae, "width"), (net.clip_text, "width"), (net.clip_image, "width")):
        assert part[width] % part.heads == 0
    for unet in (net.image_unet, net.text_unet):
        assert len(unet.channels) == len(unet.attention)
        assert all(c % unet.heads == 0 and c % unet.groups == 0 for c in unet.channels)
    assert net.clip_image.image % net.clip_image.patch == 0
    assert net.text_vae.latent == net.text_unet.latent
    assert net.bert_length <= net.text_vae.bert_positions
    assert net.gpt2_length < net.text_vae.gpt2_positions  # positions start at 1
    assert all(w % c.heads == 0 for c in (net.image_context, net.text_context) for w in (net.width,))


@pytest.mark.parametrize("words", (*PRESETS, "tiny,paper", "sd15,paper"))
def test_every_number_of_every_config_has_a_range_and_is_in_it(words):
    for name, stages in STAGES.items():
        for subject in stages:
            config = load(name, ",".join(filter(None, (subject, words))))
            check(config)
            assert not [field for field, _ in numbers(config) if range_of(field) is None]


def test_places_are_absolute_whatever_the_working_directory(monkeypatch, weights):
    monkeypatch.chdir(weights.parent)
    monkeypatch.setenv("MEDM2G_SD_WEIGHTS", weights.name)
    monkeypatch.setenv("MEDM2G_DATA", "prepared")
    config = load("text_ct")
    assert config.weights == str(weights) and config.data.source == f"manifest:{weights.parent / 'prepared'}"


def test_choices_are_the_tables():
    from medm2g_jax import diffusion, generate

    assert set(CHOICES["predict"]) == {"auto", *diffusion.PREDICTIONS}
    assert set(CHOICES["schedule"]) == set(diffusion.SCHEDULES)
    assert set(CHOICES["times"]) == set(diffusion.TIMES)
    assert set(CHOICES["sample.sampler"]) == set(diffusion.SAMPLERS)
    assert CHOICES["sample.spacing"] == diffusion.SPACINGS
    for field, value in (("predict", "x0"), ("freeze", "open"), ("optimizer", "sgd")):
        config = get_config("ldm" if field == "predict" else "text_ct", "ct,tiny" if field == "predict" else "tiny")
        config[field] = value
        with pytest.raises(UserError, match=rf"config\.{field}='{value}': expected one of {CHOICES[field][0]}"):
            check(config)
    config = get_config("text_ct", "tiny")
    config.stages.ldm_ct.predict = "x0"
    with pytest.raises(UserError, match=r"config\.stages\.ldm_ct\.predict='x0'"):
        check(config)
    assert generate.Request(("text",), ("ct",)).sampler in CHOICES["sample.sampler"]
