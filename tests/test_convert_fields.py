"""What configs beside published weights say: the tables are the libraries' own, and no field is passed over."""

import functools
import inspect
import json
import shutil
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import save_file
from test_convert_text import TEXT, bert_gpt2  # noqa: F401  a fixture
from test_text_unet import torch_text_unet

from medm2g_jax import export
from medm2g_jax.cli import main
from medm2g_jax.convert import clip, converted, fields, optimus, stable_diffusion
from medm2g_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder, and its parts in torch."""
    path = tmp_path_factory.mktemp("sd") / "published"
    return path, published.diffusers_folder(path)


def changed(folder: Path, to: Path, file: str, **new) -> Path:
    """A copy of a folder with some fields of one config changed; ... takes a field away."""
    shutil.copytree(folder, to)
    config = json.loads((to / file).read_text())
    *_, last = [config, *(config[k] for k in ("text_config", "vision_config") if new.pop(k, None))]
    last.update(new)
    for field in [f for f, value in new.items() if value is ...]:
        del last[field]
    (to / file).write_text(json.dumps(config))
    return to


def library(kind: fields.Fields) -> dict:
    """field -> default of the library's class."""
    import diffusers
    import transformers

    name = kind.library
    if hasattr(diffusers, name):
        found = inspect.signature(getattr(diffusers, name).__init__).parameters
        return {k: p.default for k, p in found.items() if k != "self"}
    return getattr(transformers, name)().to_dict()


@pytest.mark.parametrize(
    "name", ["UNET", "VAE", "SCHEDULER", "CLIP", "CLIP_TEXT", "CLIP_VISION", "BERT", "GPT2"]
)  # fmt: skip
def test_the_tables_have_every_field_of_the_library_with_its_default(name):
    kind = getattr(fields, name)
    theirs = library(kind)
    groups = [set(kind.fixed), set(kind.taken), set(kind.told), set(kind.free)]
    assert sum(map(len, groups)) == len(set().union(*groups))  # each field stands once
    assert {f for f in theirs if f not in set().union(*groups) and not f.startswith("_")} == set()
    defaults = {f: d for f, (d, _) in kind.fixed.items()} | dict(kind.taken)
    assert {f: d for f, d in defaults.items() if f in theirs and theirs[f] != d and f != "clip_sample"} == {}
    assert len(set(theirs) & set().union(*groups)) >= 3


def test_the_schedulers_are_the_library_s():
    import diffusers

    known = {*fields.SCHEDULER.fixed, *fields.SCHEDULER.free}
    for name, own in fields.SCHEDULERS.items():
        if name == "DPMSolverSDEScheduler":  # needs a package that we do not
            continue
        theirs = {
            k: p.default
            for k, p in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
            if k != "self"
        }
        assert set(theirs) <= known, name
        for field, (default, _) in fields.SCHEDULER.fixed.items():
            if field in theirs and field != "clip_sample":
                assert theirs[field] == (own[field] if field in own else default), (name, field)


def test_the_latent_scale_is_taken_and_written_back(folder, tmp_path, capsys):
    """So are what the UNet was trained at and how the folder sampled, in a scheduler of another class."""
    from diffusers import EulerDiscreteScheduler

    path = changed(folder[0], tmp_path / "x", "vae/config.json", scaling_factor=0.13025)
    path = changed(path, tmp_path / "y", "unet/config.json", sample_size=96)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    ).save_pretrained(path / "scheduler")
    main(["convert", "sd15", "--from", str(path), "--to", str(tmp_path / "w")])
    out = capsys.readouterr().out
    assert "timestep_spacing 'trailing'" in out and "--config.image_size=192" in out and "read back: " in out
    assert converted.read(tmp_path / "w", "sd15").meta["scales"] == {"image": 0.13025}
    export.export(tmp_path / "w", tmp_path / "out", "diffusers")
    said = {p: json.loads((tmp_path / "out" / p / "config.json").read_text()) for p in ("unet", "vae")}
    assert said["vae"]["scaling_factor"] == 0.13025 and said["unet"]["sample_size"] == 96
    again = EulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert again.config.timestep_spacing == "trailing" and again.config.beta_schedule == "scaled_linear"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["scheduler"][1] == "EulerDiscreteScheduler"
    # The library's default where the field is absent; a number, or nothing.
    path = changed(folder[0], tmp_path / "old", "vae/config.json", scaling_factor=...)
    stable_diffusion.convert(path, tmp_path / "old_w")
    assert converted.read(tmp_path / "old_w", "sd15").meta["scales"] == {"image": 0.18215}
    for bad in (None, 0, -1.0, "0.2"):
        with pytest.raises(UserError, match="vae/config.json: scaling_factor"):
            stable_diffusion.convert(
                changed(folder[0], tmp_path / f"bad{bad}", "vae/config.json", scaling_factor=bad), tmp_path / "out2"
            )
    assert not (tmp_path / "out2").exists()


REFUSED = {
    "scheduler/scheduler_config.json": (
        dict(beta_schedule="linear"), dict(beta_schedule=...), dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_start=0.0001), dict(beta_start=...), dict(beta_end=0.02), dict(rescale_betas_zero_snr=True),
        dict(num_train_timesteps=4000), dict(prediction_type="v_prediction"), dict(prediction_type="sample"),
        dict(trained_betas=[0.1, 0.2]), dict(clip_sample=True), dict(thresholding=True),
        dict(_class_name="FlowMatchEulerDiscreteScheduler"),
    ),
    "unet/config.json": (
        dict(act_fn="gelu"), dict(norm_eps=1e-6), dict(attention_head_dim=[2, 4, 4]), dict(attention_head_dim=0),
        dict(cross_attention_dim=1024), dict(in_channels=9), dict(out_channels=8), dict(block_out_channels=[8, 16, 32]),
        dict(layers_per_block=2), dict(use_linear_projection=True), dict(class_embed_type="timestep"),
        dict(num_class_embeds=10), dict(addition_embed_type="text_time"), dict(only_cross_attention=True),
        dict(only_cross_attention=[False, True, False]), dict(dual_cross_attention=True), dict(flip_sin_to_cos=False),
        dict(freq_shift=1), dict(center_input_sample=True), dict(resnet_time_scale_shift="scale_shift"),
        dict(time_embedding_type="fourier"), dict(mid_block_type="UNetMidBlock2D"), dict(conv_in_kernel=5),
        dict(transformer_layers_per_block=[1, 2, 1]), dict(encoder_hid_dim=16), dict(time_cond_proj_dim=256),
        dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]), dict(sample_size="big"),
        dict(_class_name="UNetMotionModel"), dict(norm_num_groups=None), dict(downsample_padding=0),
    ),
    "vae/config.json": (
        dict(shift_factor=0.1159), dict(latents_mean=[0.1] * 4), dict(latents_std=[2.0] * 4), dict(latent_channels=16),
        dict(use_quant_conv=False), dict(act_fn="relu"), dict(mid_block_add_attention=False),
        dict(block_out_channels=[8, 32]), dict(_class_name="AsymmetricAutoencoderKL"),
    ),
    "text_encoder/config.json": (
        dict(hidden_act="gelu"), dict(layer_norm_eps=1e-6), dict(num_hidden_layers=1), dict(hidden_size=48),
        dict(intermediate_size=128), dict(max_position_embeddings=64), dict(vocab_size=601), dict(model_type="t5"),
        dict(num_attention_heads="many"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", REFUSED)
def test_what_is_not_ours_is_refused_by_name(folder, tmp_path, file, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "open_published", functools.cache(stable_diffusion.open_published))
    path = changed(folder[0], tmp_path / "x", file)
    config = json.loads((path / file).read_text())
    for change in REFUSED[file]:
        own = {k: v for k, v in (config | change).items() if v is not ...}
        (path / file).write_text(json.dumps(own))
        with pytest.raises(UserError, match=f"{file}.*{next(iter(change))} ") as error:
            stable_diffusion.convert(path, tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_changes_nothing_is_taken_and_what_nobody_knows_is_said(folder, tmp_path, capsys):
    path = changed(
        folder[0], tmp_path / "a", "unet/config.json", layers_per_block=[1, 1, 1], upcast_attention=True,
        act_fn="swish", only_cross_attention=[False] * 3, attention_head_dim=[2, 2, 2], dropout=0.1,
        future_field="twisted", norm_eps=..., another=False, _private=3,
    )  # fmt: skip
    path = changed(path, tmp_path / "b", "scheduler/scheduler_config.json", trained_betas=None, solver_order=2)
    main(["convert", "sd15", "--from", str(path), "--to", str(tmp_path / "w")])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "future_field='twisted'" in notes[0] and "unet/config.json" in notes[0]
    stable_diffusion.convert(folder[0], tmp_path / "plain")
    plain, same = (converted.read(tmp_path / w, "sd15").meta for w in ("plain", "w"))
    assert same["net"] == plain["net"] and same["crc32"] == plain["crc32"] and same["scales"] == plain["scales"]
    # A whole CLIP's config, whose text tower is the encoder; it says one head.
    nested = changed(folder[0], tmp_path / "nested", "text_encoder/config.json")
    tower = json.loads((nested / "text_encoder/config.json").read_text()) | {"num_attention_heads": 1}
    (nested / "text_encoder/config.json").write_text(json.dumps({"model_type": "clip", "text_config": tower}))
    stable_diffusion.convert(nested, tmp_path / "nested_w")
    assert converted.read(tmp_path / "nested_w", "sd15").meta["net"]["clip_text"]["heads"] == 1
    # A folder whose parts have no configs says so; the number of heads is then as published.
    shutil.copytree(folder[0], tmp_path / "bare")
    for file in (*(tmp_path / "bare").glob("*/config.json"), tmp_path / "bare/scheduler/scheduler_config.json"):
        file.unlink()
    made = stable_diffusion.convert(tmp_path / "bare", tmp_path / "bare_w")
    assert len(made.notes) == 4 and "noise schedule is assumed" in made.notes[3]
    net = converted.read(tmp_path / "bare_w", "sd15").meta["net"]
    assert (net["image_unet"]["heads"], net["image_unet"]["groups"], net["clip_text"]["heads"]) == (8, 32, 12)


def test_a_single_file_s_own_scale_and_schedule(folder, tmp_path):
    from medm2g_jax.diffusion import BETAS

    state = published.compvis_state(folder[1]) | {"betas": torch.tensor(BETAS, dtype=torch.float32)}
    save_file(state | {"scale_factor": torch.tensor(0.13025)}, tmp_path / "x.safetensors")
    stable_diffusion.convert(tmp_path / "x.safetensors", tmp_path)
    assert converted.read(tmp_path, "sd15").meta["scales"] == {"image": 0.13025}
    save_file(state | {"betas": torch.linspace(1e-4, 0.02, 1000)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="y.safetensors: betas from 0.0001 to 0.02: another noise schedule"):
        stable_diffusion.convert(tmp_path / "y.safetensors", tmp_path / "out")


def test_clip_folders(tmp_path):
    published.clip().save_pretrained(tmp_path / "clip")
    for i, (part, change) in enumerate((
        ("text_config", dict(layer_norm_eps=1e-6)), ("vision_config", dict(layer_norm_eps=1e-6)),
        ("vision_config", dict(hidden_act="gelu")), ("vision_config", dict(image_size=32)),
        ("vision_config", dict(patch_size=4)), ("vision_config", dict(num_channels=1)),
        ("text_config", dict(eos_token_id=5)), ("text_config", dict(num_attention_heads=5)),
        ("", dict(projection_dim=64)),
        ("vision_config", dict(num_hidden_layers=3)), ("text_config", dict(vocab_size=9)),
        ("vision_config", dict(num_attention_heads=...)),  # the library's default is 12
    )):  # fmt: skip
        path = changed(tmp_path / "clip", tmp_path / str(i), "config.json", **({part: True} if part else {}), **change)
        with pytest.raises(UserError, match=f"config.json.*{part}.*{next(iter(change))} "):
            clip.convert(path, tmp_path / "out")
    path = changed(tmp_path / "clip", tmp_path / "old", "config.json", text_config_dict=dict(hidden_act="gelu"))
    with pytest.raises(UserError, match="text_config: hidden_act 'gelu'"):
        clip.convert(path, tmp_path / "out")
    path = changed(tmp_path / "clip", tmp_path / "two", "config.json", text_config=True, eos_token_id=2)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.48145466, 0.4578275, 0.40821073]}))
    clip.convert(path, tmp_path / "out")
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(UserError, match="preprocessor_config.json: image_mean"):
        clip.convert(path, tmp_path / "out3")


def test_bert_and_gpt2_folders(bert_gpt2, tmp_path):  # noqa: F811
    path, _, _ = bert_gpt2
    for i, (name, change) in enumerate((
        ("bert", dict(layer_norm_eps=1e-5)), ("bert", dict(hidden_act="relu")), ("bert", dict(is_decoder=True)),
        ("bert", dict(position_embedding_type="relative_key")), ("bert", dict(vocab_size=51)),
        ("bert", dict(pad_token_id=1)), ("bert", dict(num_attention_heads=5)), ("bert", dict(type_vocab_size=3)),
        ("gpt2", dict(layer_norm_epsilon=1e-6)), ("gpt2", dict(activation_function="gelu")),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)), ("gpt2", dict(scale_attn_weights=False)),
        ("gpt2", dict(n_positions=21)), ("gpt2", dict(n_inner=65)), ("gpt2", dict(n_layer=3)),
    )):  # fmt: skip
        own = changed(path, tmp_path / str(i), f"{name}/config.json", **change)
        with pytest.raises(UserError, match=f"{name}/config.json.*{next(iter(change))} "):
            optimus.convert_bert_gpt2(own / "bert", tmp_path / "out", str(own / "gpt2"))
    assert not (tmp_path / "out").exists()


def test_versatile_diffusion_folders(tmp_path):
    torch_text_unet(**TEXT).save_pretrained(tmp_path / "vd" / "text_unet")
    published.unet().save_pretrained(tmp_path / "vd" / "image_unet")
    published.scheduler().save_pretrained(tmp_path / "vd" / "scheduler")
    for i, (file, change) in enumerate((
        ("text_unet/config.json", dict(norm_eps=1e-6)), ("image_unet/config.json", dict(attention_head_dim=4)),
        ("image_unet/config.json", dict(use_linear_projection=True)),
        ("scheduler/scheduler_config.json", dict(beta_schedule="linear")),
    )):  # fmt: skip
        path = changed(tmp_path / "vd", tmp_path / str(i), file, **change)
        with pytest.raises(UserError, match=f"{file}.*{next(iter(change))} "):
            optimus.convert_vd(path, tmp_path / "out")
    optimus.convert_vd(tmp_path / "vd", tmp_path / "out")
    assert converted.read(tmp_path / "out", "vd").meta["net"]["text_unet"]["heads"] == 2
