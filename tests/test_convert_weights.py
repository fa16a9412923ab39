"""Converted weights in a run: the values end in their shards, autoencoders count as done, and a run stands on them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import published
import pytest
import torch
from etils import epath
from micro import micro
from test_convert_sd import values
from test_convert_text import optimus_state
from test_text_unet import torch_text_unet

import medm2g_jax
from medm2g_jax import export, loading, run
from medm2g_jax.convert import clip, converted, optimus, stable_diffusion, weights
from medm2g_jax.convert.files import Output, open_tensors, write_safetensors
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.errors import UserError
from medm2g_jax.model import init_group
from medm2g_jax.train import checkpoint, loop, results, sharding

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WORDS = ["findings : no mass . heart size is normal .", "impression : effusion in the left lower lung ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All four converted folders of one tiny model, tokenizers included."""
    import transformers

    path = tmp_path_factory.mktemp("weights")
    tokenizers = Tokenizers.train(WORDS, path / "tokenizers", 600)
    sizes = tokenizers.sizes
    published.diffusers_folder(path / "sd")
    stable_diffusion.convert(path / "sd", path / "all")
    theirs = published.clip(sizes["clip"])
    theirs.save_pretrained(path / "clip")
    for file in (path / "tokenizers" / "clip").iterdir():
        (path / "clip" / file.name).write_bytes(file.read_bytes())
    clip.convert(path / "clip", path / "all")
    torch.manual_seed(4)
    oracles.scramble(torch_text_unet(**published.SIZES, latent=24)).save_pretrained(path / "vd" / "text_unet")
    published.unet().save_pretrained(path / "vd" / "image_unet")
    optimus.convert_vd(path / "vd", path / "all")
    bert = transformers.BertConfig(
        vocab_size=sizes["bert"],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    gpt2 = transformers.GPT2Config(vocab_size=sizes["gpt2"], n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=48)
    state = optimus_state(transformers.BertModel(bert), transformers.GPT2LMHeadModel(gpt2))
    torch.save(state, path / "optimus-vae.pth")
    names = {name: str(path / "tokenizers" / name) for name in ("bert", "gpt2")}
    optimus.convert_optimus(path / "optimus-vae.pth", path / "all", **names)
    # Optimus's file tells no number of heads (12 are published); this one has 4.
    meta = path / "all" / "optimus" / "convert.json"
    record = json.loads(meta.read_text())
    record["net"]["text_vae"]["heads"] = 4
    meta.write_text(json.dumps(record))
    return path / "all"


def config_of(folder, target="text_ct", **own):
    """The config of a stage with the sizes of the converted networks."""
    config = micro(target, steps=2, **own)
    config.weights = str(folder)
    for part in ("sd15", "clip", "vd", "optimus"):
        for name, sizes in converted.read(folder, part).meta["net"].items():
            for field, value in sizes.items() if isinstance(sizes, dict) else ():
                config.net[name][field] = tuple(value) if isinstance(value, list) else value
    config.net.width = 32
    config.net.clip_text.length = 77
    config.net.image_context.heads = config.net.text_context.heads = 2
    config.image_size = 16
    config.upstream = "init"
    return config


def place(name, shape):
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    return sharding.param_sharding(name, shape, mesh)


def test_every_tensor_lands_in_its_shards(folder):
    config = config_of(folder)
    vocab = Tokenizers.load(epath.Path(folder).parent / "tokenizers").sizes
    groups = ("ct/flow", "mri/flow", "text/flow", "ct/clip", "text/clip", "image/vae", "text/vae")
    params, lineage, scales, fresh = results.stand_in(config, groups, place, jnp.bfloat16, vocab)
    assert scales == {"image": 0.18215, "text": 1.0}
    # Nothing else is ours: the embedding of contrasts, and prompt_in, which was not fitted here.
    assert set(fresh) == {"mri/unet/stream/embedding", *(f"{m}/prompt_in/kernel" for m in ("ct", "mri", "text"))}
    for ours, part, theirs in (
        ("ct/unet", "sd15", "unet"),
        ("mri/unet", "sd15", "unet"),
        ("text/unet", "vd", "unet"),
        ("ct/clip", "clip", "vision"),
        ("text/clip", "clip", "text"),
        ("image/vae", "sd15", "vae"),
        ("text/vae", "optimus", "vae"),
    ):
        flat = values(folder, part, f"{theirs}/")
        mine = {n[len(ours) + 1 :]: v for n, v in params.items() if n.startswith(f"{ours}/") and n not in fresh}
        assert {f"{theirs}/{n}" for n in mine} == set(flat)
        for name, value in mine.items():
            np.testing.assert_array_equal(value, flat[f"{theirs}/{name}"].astype(jnp.bfloat16))
    kernel = params["ct/unet/mid/res_0/conv_1/kernel"]
    assert kernel.sharding == place("ct/unet/mid/res_0/conv_1/kernel", kernel.shape)
    assert kernel.addressable_shards[0].data.size < kernel.size
    assert lineage["ct/flow"]["weights"] == "sd15" and lineage["mri/flow"]["fresh"] == [
        "mri/prompt_in/kernel",
        "mri/unet/stream/embedding",
    ]


def test_what_does_not_fit_is_told(folder, tmp_path):
    config = config_of(folder)
    vocab = Tokenizers.load(epath.Path(folder).parent / "tokenizers").sizes
    config.net.image_unet.heads = 4
    with pytest.raises(UserError, match="image_unet.heads is 2, config.net.image_unet.heads is 4"):
        results.stand_in(config, ("ct/flow",), place, jnp.float32, vocab)
    config = config_of(folder)
    with pytest.raises(UserError, match=r"the tokenizers: text/token/embedding \(expected \[9, 32\]"):
        results.stand_in(config, ("text/clip",), place, jnp.float32, vocab | {"clip": 9})
    config.weights = str(tmp_path)
    with pytest.raises(UserError, match=rf"no converted weights there.*\n  medm2g convert vd .* --to {tmp_path}"):
        results.stand_in(config, ("text/flow",), place, jnp.float32, vocab)
    with pytest.raises(UserError, match=r"no tokenizer there"):
        weights.tokenizers(str(tmp_path))


def test_converted_autoencoders_count_as_done(folder, tmp_path):
    root = epath.Path(tmp_path)
    config = config_of(folder, upstream="train")
    config.upstream = "train"
    plan = dict(loop.plan_stages(config, root))
    assert plan["image_vae"] == plan["text_vae"] == "done" and plan["align_text_ct"] == "train"
    config.upstream = "init"
    plan = dict(loop.plan_stages(config, root))
    assert plan["ldm_ct"] == "initialised" and "text_xray" not in plan and plan["text_ct"] == "train"
    assert dict(loop.plan_stages(config_of(folder, "image_vae"), root))["image_vae"] == "train"
    config.weights = ""
    assert dict(loop.plan_stages(config, root))["image_vae"] == "initialised"


def test_load_stays_callable_once_its_module_is_imported(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="no finished round"):
            medm2g_jax.load(str(tmp_path))


def test_a_model_finds_its_weights_where_they_are_now(folder, tmp_path, monkeypatch):
    """Where they were, else where MEDM2G_SD_WEIGHTS says; what they hold decides."""
    config = config_of(folder)
    net = results.tuples(json.loads(config.net.to_json_best_effort()))
    vocab = Tokenizers.load(epath.Path(folder).parent / "tokenizers").sizes
    model = results.build_model(config, vocab, {})
    shapes = {
        n: x.shape
        for n, x in jax.eval_shape(lambda k: init_group(model, k, ("ct/clip", "text/clip")), jax.random.key(0)).items()
    }
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    groups = ["ct/clip", "text/clip"]
    want, origins, _ = results.converted_params(config, groups, shapes, lambda *_: here, jnp.float32)

    def read(recorded, now=""):
        monkeypatch.setenv("MEDM2G_SD_WEIGHTS", str(now))
        meta = {"shared": {"weights": str(recorded), "net": net}, "from": origins, "stage": "text_ct"}
        return loading._converted(epath.Path("run"), meta, model, lambda name: True, groups, jnp.float32)

    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "moved")
    shutil.copytree(folder / "clip", tmp_path / "other" / "clip")
    converted_again(tmp_path / "other" / "clip")
    for places in ((folder, ""), (tmp_path / "gone", tmp_path / "moved"), ("gone", "moved"), ("other", "moved")):
        found = read(*places)
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[n], want[n]) for n in want)
    with pytest.raises(UserError, match="gone/clip is not there any more.*MEDM2G_SD_WEIGHTS=FOLDER"):
        read(tmp_path / "gone")
    with pytest.raises(UserError, match="other/clip was converted again, from other files.*MEDM2G_SD_WEIGHTS=FOLDER"):
        read(tmp_path / "gone", tmp_path / "other")


def converted_again(folder):
    """The same tensors of other values, and the CRCs that belong to them."""
    values = {n: np.ascontiguousarray(t.read() * 2) for n, t in open_tensors(folder / converted.WEIGHTS).items()}
    made = {n: Output(v.shape, v.dtype, lambda v=v: v) for n, v in values.items()}
    meta = json.loads((folder / converted.META).read_text())
    meta["crc32"] = write_safetensors(folder / "again", made, {})
    (folder / "again").rename(folder / converted.WEIGHTS)
    (folder / converted.META).write_text(json.dumps(meta))


@pytest.mark.full
def test_a_round_stands_on_converted_weights(folder, tmp_path, monkeypatch):
    """upstream="init": guides of both train, since the X-ray round is absent; the result loads, generates, exports."""
    config = config_of(folder)
    root = epath.Path(tmp_path / "run")
    data = run.open_data(config, root)
    meta = loop.run_stage(config, root, data)
    assert set(meta["trains"]) == {"text/guide", "ct/guide"} and meta["rounds"] == ["text_ct"]
    assert meta["from"]["ct/flow"]["weights"] == "sd15" and meta["scales"]["image"] == 0.18215
    assert "CreativeML OpenRAIL-M" in meta["licences"] and "ldm_ct" in meta["standing_in"]
    trained = checkpoint.load_model(root / "text_ct")
    assert {n.split("/")[1] for n in trained} >= {"context", "adapt", "unet"}
    moved = [n for n in trained if "/guide/out/" in n and np.any(np.asarray(trained[n]))]
    assert moved, "theta_c starts at zero"
    model = medm2g_jax.load(str(root))
    out = model.generate({"text": "no mass ."}, ["ct"], steps=1, seed=0)
    assert out.samples["ct"].shape == (1, 16, 16) and np.isfinite(out.samples["ct"]).all()
    flat = values(folder, "sd15", "unet/")
    np.testing.assert_array_equal(model.params["ct/unet/conv_in/kernel"], flat["unet/conv_in/kernel"])
    # One folder that needs nothing else, and says the same to the last bit.
    export.export(Path(root), tmp_path / "model", "safetensors")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "medical advice" in card and "ldm_ct" in card
    assert str(folder) not in (tmp_path / "model" / "model.json").read_text()
    again = medm2g_jax.load(str(tmp_path / "model")).generate({"text": "no mass ."}, ["ct"], steps=1, seed=0)
    np.testing.assert_array_equal(again.samples["ct"], out.samples["ct"])
    # And by its name, where it comes with the package; a result in a path of that name goes first.
    monkeypatch.setattr(loading, "BOX", epath.Path(tmp_path))
    monkeypatch.chdir(tmp_path / "model")
    assert loading.locate("model") == tmp_path / "model" and "model" in loading.in_the_box()
    (tmp_path / "model" / "model").mkdir()
    assert loading.locate("model") == tmp_path / "model"
    (tmp_path / "model" / "model").rmdir()
    with pytest.raises(UserError, match="no finished round or flow in it.*or take the model in the box"):
        loading.locate("other")
    # In fewer bytes: within half a step of int8 of each column, a half of float16.
    whole = sum(v.nbytes for v in model.params.values())
    for dtype, most in (("float16", 0.51), ("int8", 0.4)):
        export.export(Path(root), tmp_path / dtype, "safetensors", dtype=dtype)
        assert (tmp_path / dtype / "weights.safetensors").stat().st_size < most * whole + 2e5
        small = medm2g_jax.load(str(tmp_path / dtype))
        assert small.params.keys() == medm2g_jax.load(str(tmp_path / "model")).params.keys()
        for name, value in small.params.items():
            true = np.asarray(model.params[name])
            step = np.abs(true).reshape(-1, true.shape[-1]).max(0) / 127 if dtype == "int8" and true.ndim > 1 else 0
            assert (np.abs(true - value) <= 0.501 * step + 6e-4 * np.abs(true) + 1e-7).all(), name
    with pytest.raises(UserError, match="--dtype int4: expected one of float32, float16, int8"):
        export.export(Path(root), tmp_path / "int4", "safetensors", dtype="int4")
    with pytest.raises(UserError, match="--dtype int8: of --as safetensors alone"):
        export.export(Path(root), tmp_path / "pipe", "diffusers", "ct", dtype="int8")
    # And its CT flow as Stable Diffusion.
    from diffusers import StableDiffusionPipeline

    export.export(Path(root), tmp_path / "pipe", "diffusers", "ct")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True)
    weight = pipe.unet.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(weight, flat["unet/conv_in/kernel"])
    for kind, part in (("clip", "text_model"), ("bert", "encoder"), ("gpt2", "transformer")):
        export.export(Path(root), tmp_path / kind, kind, "ct")
        assert any(k.startswith(part) for k in open_tensors(tmp_path / kind / "model.safetensors"))
    meta["from"]["ct/guide"]["stage"] = "../text_ct"
    (root / "text_ct" / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="names a stage '../text_ct'.*not a file to trust"):
        medm2g_jax.load(str(root / "text_ct"))


@pytest.mark.full
def test_a_flow_starts_from_converted_weights(folder, tmp_path):
    """A learning rate of zero gives back Stable Diffusion's own weights."""
    config = micro("ldm", "ct,tiny", steps=1, lr=0.0)
    like = config_of(folder)
    with config.unlocked():
        config.net, config.weights, config.image_size = like.net, like.weights, like.image_size
    config.upstream = "init"
    root = epath.Path(tmp_path / "run")
    loop.run_stage(config, root, run.open_data(config, root))
    trained = checkpoint.load_model(root / "ldm_ct")
    for name, value in values(folder, "sd15", "unet/").items():
        np.testing.assert_allclose(trained[f"ct/{name}"], value, rtol=1e-5, atol=1e-7)  # the EMA's rounding
