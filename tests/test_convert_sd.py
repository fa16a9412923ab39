"""Stable Diffusion 1.5 in every layout it is published in: converted, our networks say what torch's say."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch
from flax.traverse_util import unflatten_dict
from safetensors.torch import load_file, save_file

from medm2g_jax.cli import main
from medm2g_jax.convert import converted, rules, stable_diffusion, unet
from medm2g_jax.convert.files import Tensor
from medm2g_jax.errors import UserError
from medm2g_jax.nn.attention import context
from medm2g_jax.nn.clip import CLIPText
from medm2g_jax.nn.image_vae import ImageVAE
from medm2g_jax.nn.unet import UNet

KEYS = Path(__file__).parents[2] / "shared" / "facts" / "keys"
published_tables = pytest.mark.skipif(not KEYS.is_dir(), reason="the tables of published keys are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder, and its parts in torch."""
    path = tmp_path_factory.mktemp("sd") / "published"
    return path, published.diffusers_folder(path)


def values(weights: Path, part: str = "sd15", prefix: str = "") -> dict[str, np.ndarray]:
    read = converted.read(weights, part)
    return {n: t.read() for n, t in read.tensors.items() if n.startswith(prefix)}


def nested(flat: dict, prefix: str, dtype=np.float32) -> dict:
    cut = {n[len(prefix) + 1 :]: jnp.asarray(v, dtype) for n, v in flat.items() if n.startswith(f"{prefix}/")}
    return {"params": unflatten_dict(cut, sep="/")}


def check_outputs(weights: Path, parts: dict, limit: float = 1e-4) -> None:
    """UNet, autoencoder and text encoder against torch's, in float32."""
    flat = values(weights)
    rng = np.random.default_rng(0)
    z, prompt = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 12, 4), (2, 5, 32)))
    t, ids = np.array([3, 871]), np.array([[598, 4, 9, 599, 599], [598, 7, 3, 2, 599]], np.int32)
    x = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)

    def nchw(a):
        return torch.from_numpy(a.transpose(0, 3, 1, 2).copy())

    with torch.no_grad():
        eps = parts["unet"].float()(nchw(z), torch.tensor(t), torch.tensor(prompt)).sample.permute(0, 2, 3, 1)
        vae = parts["vae"].float()
        mean, image = vae.encode(nchw(x)).latent_dist.mean.permute(0, 2, 3, 1), vae.decode(nchw(z)).sample
        hidden = parts["text_encoder"].float()(torch.from_numpy(ids).long()).last_hidden_state
    ours = UNet(**published.SIZES)
    out = oracles.fast_jit(ours.apply)(nested(flat, "unet"), z, t, context(jnp.asarray(prompt)))
    assert oracles.relative_error(out, eps) <= limit
    own = ImageVAE(channels=(8, 16), layers=1, groups=4)
    params = nested(flat, "vae")
    encoded = oracles.fast_jit(lambda p, x: own.apply(p, x, method="encode")[0])(params, x)
    decoded = oracles.fast_jit(lambda p, z: own.apply(p, z, method="decode"))(params, z)
    assert oracles.relative_error(encoded, mean) <= limit
    assert oracles.relative_error(decoded, image.permute(0, 2, 3, 1)) <= limit
    text = nested(flat, "text")
    text["params"]["projection"] = {"kernel": jnp.eye(32)}
    tower = CLIPText(vocab=published.VOCAB, width=32, layers=2, heads=2, ff=64, projection=32)
    assert oracles.relative_error(oracles.fast_jit(tower.apply)(text, ids).hidden, hidden) <= limit


def test_diffusers_folder(folder, tmp_path, capsys):
    path, parts = folder
    main(["convert", "sd15", "--from", str(path), "--to", str(tmp_path)])
    out = capsys.readouterr().out
    assert "tensors" in out and "peak resident memory" in out
    assert "medical advice" in out and "OpenRAIL" in out
    assert "medical advice" in (tmp_path / "sd15" / "README.md").read_text()
    meta = converted.read(tmp_path, "sd15").meta
    assert meta["licence"] == "CreativeML OpenRAIL-M" and meta["scales"] == {"image": 0.18215}
    assert meta["net"]["image_unet"] == dict(
        channels=[8, 16, 16], attention=[True, True, False], layers=1, heads=2, groups=4
    )
    assert meta["sources"][0] == "text_encoder/model.safetensors"  # no path of this machine
    check_outputs(tmp_path, parts)


def test_half_precision_variant_and_bin(folder, tmp_path):
    """.fp16.safetensors keep their dtype; .bin goes through torch."""
    parts = published.diffusers_folder(tmp_path / "fp16", variant="fp16", dtype=torch.float16)
    stable_diffusion.convert(tmp_path / "fp16", tmp_path / "a")
    assert {v.dtype for v in values(tmp_path / "a").values()} == {np.dtype(np.float16)}
    check_outputs(tmp_path / "a", parts)
    published.diffusers_folder(tmp_path / "bin", safe=False)
    assert not list((tmp_path / "bin").rglob("*.safetensors"))
    stable_diffusion.convert(tmp_path / "bin", tmp_path / "b")
    stable_diffusion.convert(folder[0], tmp_path / "c")
    safe, pickled = values(tmp_path / "c"), values(tmp_path / "b")
    assert safe.keys() == pickled.keys() and all(np.array_equal(safe[n], pickled[n]) for n in safe)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_single_file(folder, tmp_path, kind):
    """Plain and EMA weights, buffers ignored; the EMA is taken where there is one."""
    path, parts = folder
    state = published.compvis_state(parts, ema=True)
    file = tmp_path / f"v1.{kind}"
    if kind == "ckpt":
        torch.save({"state_dict": state, "global_step": 3}, file)
    else:
        save_file(state, file)
    stable_diffusion.convert(path, tmp_path / "folder")
    stable_diffusion.convert(file, tmp_path / "plain", "plain")
    stable_diffusion.convert(file, tmp_path / "ema")
    folder_, plain, ema = (values(tmp_path / n) for n in ("folder", "plain", "ema"))
    assert folder_.keys() == plain.keys() == ema.keys()
    assert all(np.array_equal(folder_[n], plain[n]) for n in plain)
    for name in ema:
        np.testing.assert_array_equal(ema[name], plain[name] + np.float32(0.01) * name.startswith("unet/"))


def test_single_files_with_extras_and_in_wrappers(folder, tmp_path):
    """CLIP's scale and projection, an autoencoder's EMA, a compiled UNet, a program's module: the same weights."""
    path, parts = folder
    state = published.compvis_state(parts)
    extras = {"cond_stage_model.logit_scale": torch.ones(()), "cond_stage_model.text_projection": torch.ones(2, 2)}
    extras["cond_stage_model.transformer.text_projection.weight"] = torch.ones(2, 2)
    extras |= {"first_stage_model.model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    bare = {k.replace("transformer.text_model.", "transformer."): v for k, v in state.items()}
    compiled = {k.replace("diffusion_model.", "diffusion_model._orig_mod."): v for k, v in state.items()}
    forms = {"extras": compiled | extras, "program": {f"model.{k}": v for k, v in bare.items()}}
    stable_diffusion.convert(path, tmp_path / "folder")
    prints = converted.read(tmp_path / "folder", "sd15").meta["crc32"]
    for name, form in forms.items():
        save_file(form, tmp_path / f"{name}.safetensors")
        stable_diffusion.convert(tmp_path / f"{name}.safetensors", tmp_path / name)
        assert converted.read(tmp_path / name, "sd15").meta["crc32"] == prints
    torch.save({"module": state, "global_steps": 3}, tmp_path / "deepspeed.pt")
    stable_diffusion.convert(tmp_path / "deepspeed.pt", tmp_path / "deepspeed")
    assert converted.read(tmp_path / "deepspeed", "sd15").meta["crc32"] == prints
    save_file(state | {"control_model.time_embed.0.weight": torch.ones(1)}, tmp_path / "control.safetensors")
    with pytest.raises(UserError, match="a ControlNet file; bring the Stable Diffusion 1.5"):
        stable_diffusion.convert(tmp_path / "control.safetensors", tmp_path / "out")
    save_file({k: v for k, v in state.items() if "first_stage" not in k}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="no vae in it .*its keys are .*a diffusers folder"):
        stable_diffusion.convert(tmp_path / "part.safetensors", tmp_path / "out")


def test_old_names_of_the_vae_and_prefixed_text_encoder(folder, tmp_path):
    """VAE attention as query, key, value, proj_attn; text encoder with text_model. in front, as real files have it."""
    import shutil

    path, _ = folder
    shutil.copytree(path, tmp_path / "old")
    file = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, old in names.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in state.items()}
    assert any("proj_attn" in k for k in state)
    save_file(state, file)
    file = tmp_path / "old" / "text_encoder" / "model.safetensors"
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)}, file)
    stable_diffusion.convert(path, tmp_path / "a")
    stable_diffusion.convert(tmp_path / "old", tmp_path / "b")
    new, old = values(tmp_path / "a"), values(tmp_path / "b")
    assert new.keys() == old.keys() and all(np.array_equal(new[n], old[n]) for n in new)


def told(shapes: dict[str, tuple]) -> dict[str, Tensor]:
    return {k: Tensor(s, np.dtype(np.float32), lambda: None, Path("x")) for k, s in shapes.items()}


def table_of(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (KEYS / name).read_text().splitlines()[1:]]


@published_tables
@pytest.mark.parametrize("file", ["keys_sd15_unet.tsv", "keys_vd_text_unet.tsv"])
@pytest.mark.parametrize("column, layout", list(enumerate(unet.LAYOUTS)))
def test_published_unet_keys_are_covered_exactly(file, column, layout):
    shapes = {}
    for row in table_of(file):
        key = row[column].replace("(shared: diffuser.image.time_embed.)", "time_embed.")
        shapes[key.removeprefix("diffuser.image.").removeprefix("diffuser.text.")] = ast.literal_eval(row[3])
    found = told(shapes)
    sizes = unet.sizes_of(found, file)
    steps = rules.match(unet.table(sizes, layout), found, sizes.expected(), file)
    assert len(steps) == 686
    again = rules.back(unet.table(sizes, layout), {s.name: told({"x": s.shape})["x"] for s in steps}, file)
    assert {s.name: s.shape for s in again} == shapes


@published_tables
@pytest.mark.parametrize("column", [0, 1])
def test_published_vae_keys_are_covered_exactly(column):
    rows = table_of("keys_sd_vae.tsv")
    shapes = {r[column].removeprefix("first_stage_model."): ast.literal_eval(r[2 + column]) for r in rows}
    steps, sizes = stable_diffusion.vae_steps(told(shapes), "vae")
    assert len(steps) == 248 and sizes["channels"] == (128, 256, 512, 512) and sizes["layers"] == 2
    layout = ("compvis", "diffusers")[column]
    table = stable_diffusion.vae_table(4, 2, layout)
    again = rules.back(table, {s.name: told({"x": s.shape})["x"] for s in steps}, "vae")
    assert {s.name: s.shape for s in again} == shapes


def edited(folder: Path, to: Path, part: str, change) -> Path:
    """A copy of the folder with one part's tensors changed."""
    import shutil

    shutil.copytree(folder, to)
    file = next((to / part).glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file(state, file)
    return to


def test_missing_left_over_and_wrong_shape_are_listed(folder, tmp_path):
    def change(state):
        del state["mid_block.resnets.0.norm1.weight"]
        state["conv_in.wait"] = torch.zeros(1)
        state["up_blocks.1.resnets.0.conv1.bias"] = torch.zeros(7)

    path = edited(folder[0], tmp_path / "x", "unet", change)
    with pytest.raises(UserError) as error:
        stable_diffusion.convert(path, tmp_path / "out")
    text = str(error.value)
    assert "1 missing: mid_block.resnets.0.norm1.weight" in text and "1 left over: conv_in.wait" in text
    assert "up_blocks.1.resnets.0.conv1.bias (expected [16], found [7])" in text
    assert not (tmp_path / "out").exists()


def test_other_versions_are_refused(folder, tmp_path):
    path, parts = folder
    # 2.x: linear projections, another text encoder in the single file, v-prediction.
    square = edited(path, tmp_path / "linear", "unet", lambda s: s.update(
        {k: v[:, :, 0, 0].contiguous() for k, v in s.items() if k.endswith("proj_in.weight")}))  # fmt: skip
    with pytest.raises(UserError, match="2.x or XL UNet; expected version 1.5"):
        stable_diffusion.convert(square, tmp_path / "out")
    state = published.compvis_state(parts)
    for key, version in (
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "2.x"),
        ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "XL"),
    ):
        save_file(state | {key: torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=f"a Stable Diffusion {version} file; expected version 1.5"):
            stable_diffusion.convert(tmp_path / "other.safetensors", tmp_path / "out")
    edited(path, tmp_path / "xl", "unet", lambda s: s.update({"add_embedding.linear_1.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="XL UNet"):
        stable_diffusion.convert(tmp_path / "xl", tmp_path / "out")
    wide = edited(path, tmp_path / "inpaint", "unet", lambda s: s.update({"conv_in.weight": torch.zeros(8, 9, 3, 3)}))
    with pytest.raises(UserError, match="9 channels, expected 4: an in-painting"):
        stable_diffusion.convert(wide, tmp_path / "out")
    file = path / "scheduler" / "scheduler_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match="v_prediction.*expected 'epsilon'"):
        stable_diffusion.convert(path, tmp_path / "out")
    file.write_text(before)
    save_file(state | {"surprise": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="1 left over: surprise"):
        stable_diffusion.convert(tmp_path / "more.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_at_the_command(tmp_path, capsys):
    for arguments, message in (
        (["sd15", "--to", str(tmp_path)], "needs --from PATH"),
        (["sd15", "--from", "nowhere", "--to", str(tmp_path)], "nowhere: no such file"),
        (["sd15", "--from", str(tmp_path), "--to", str(tmp_path)], "no unet/diffusion_pytorch_model.safetensors"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", *arguments])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def converted_in_a_process_of_its_own(*arguments: str) -> tuple[float, float, float]:
    """(GB, seconds, GB of peak resident memory) as the command prints them."""
    line = [sys.executable, "-m", "medm2g_jax", "convert", *arguments]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = re.search(r"tensors, ([\d.]+) GB, ([\d.]+) s, peak resident memory ([\d.]+) GB", done.stdout)
    return tuple(map(float, found.groups()))


@pytest.mark.full
def test_full_size_takes_seconds_and_little_memory(tmp_path):
    """4.3 GB in at most 90 s and below 6 GB, either direction."""
    published.random_single_file(tmp_path / "v1.safetensors")
    weights, out = str(tmp_path / "w"), str(tmp_path / "out")
    for arguments in (
        ("sd15", "--from", str(tmp_path / "v1.safetensors"), "--to", weights),
        ("export", "--from", weights, "--to", out, "--as", "diffusers"),
    ):
        size, seconds, peak = converted_in_a_process_of_its_own(*arguments)
        assert size > 4.2 and seconds <= 90 and peak < 6


def test_safetensors_need_no_torch(folder, tmp_path):
    program = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); from pathlib import Path; "
        "from medm2g_jax import export; from medm2g_jax.convert import stable_diffusion; "
        f"stable_diffusion.convert(Path({str(folder[0])!r}), Path({str(tmp_path / 'w')!r})); "
        f"export.export(Path({str(tmp_path / 'w')!r}), Path({str(tmp_path / 'out')!r}), 'diffusers')"
    )
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "model_index.json").is_file(), done.stderr
