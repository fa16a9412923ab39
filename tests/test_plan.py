"""`medm2g plan`: mistakes are one line before any compiler starts; what is compiled is what the trainer runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from micro import micro_stage

from medm2g_jax import cli, plan, rounds
from medm2g_jax.config import get_config
from medm2g_jax.errors import UserError
from medm2g_jax.main import read_config
from medm2g_jax.train import results

HERE = Path(__file__).parent
LIBTPU = Path(os.environ.get("MEDM2G_LIBTPU_PYTHON") or plan.ROOT / ".venv-tpu" / "bin" / "python")
STAGES = list(rounds.graph(rounds.LISTINGS["default"]).stages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "unknown topology 'v9:2x2'"),
        (["--topology=v5e"], "as in v4:2x2x4, v5e:2x4"),
        (["--topology=v5e:2x4x1"], "unknown topology"),
        (["--topology=v4:2x2"], "unknown topology"),
        (["--topology=v5e:2x4", "--config.mesh.data=3"], "config.mesh: data=3, fsdp=1, tensor=1 does not fit 8"),
        (["--topology=v5e:2x4", "--config.batch=12"], "the nearest that fits is config.batch=16"),
        (["--topology=v5e:2x4", "--libtpu-python=nowhere/python"], "`make plan-env` installs libtpu"),
        (["--topology=v5e:2x4", f"--libtpu-python={sys.executable}"], "`make plan-env` makes one that has it"),
        (["--config.bacth=3"], "did you mean --config.batch?"),
        (["--config.batch=x"], "invalid literal"),
        (["--config.upstream=require"], "configs/image_vae.py:tiny"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE.parent)
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", "--config=configs/text_ct.py:tiny", f"--workdir={tmp_path}", *arguments])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "error: " in said and message in said


def test_commands_send_every_field_where_it_belongs(tmp_path):
    overrides = [
        "--config.net.width=32",
        "--config.steps=3",
        "--config.stages.ldm_text.steps=5",
        "--config.stages.ldm_text.loss.eps=2.0",
        "--config.upstream=require",
        "--config.mesh.fsdp=2",
        "--config.net.image_unet.channels=(16, 32)",
    ]
    config = read_config(["--config=configs/text_ct.py:tiny", *overrides])
    found = {
        name: arguments
        for name, _, arguments in plan.commands(config, "configs/text_ct.py:tiny", overrides, str(tmp_path))
    }
    assert list(found) == list(rounds.graph(config.listing).plan("text_ct"))
    for name, arguments in found.items():
        again = read_config([a for a in arguments if a.startswith("--config")])  # the trainer accepts them
        assert again.stage == name and again.upstream == "require" and again.preset == "tiny"
        assert again.net.width == 32 and again.mesh.fsdp == 2 and again.net.image_unet.channels == (16, 32)
        assert shlex.split(shlex.join(arguments)) == arguments
        assert results.shared(again) == results.shared(config)
    assert "--config.steps=3" in found["text_ct"] and "--config.steps=5" in found["ldm_text"]
    assert "--config.loss.eps=2.0" in found["ldm_text"]
    assert not any("steps" in a for name in ("image_vae", "ldm_xray", "text_xray") for a in found[name])


@pytest.mark.parametrize(
    ("message", "total", "room"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm.", 18.5, 15.75),
        ("temporaries (34.97G) exceeds available HBM (15.75G).", 34.97, 15.75),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)
def test_a_refusal_of_the_compiler_is_read(message, total, room):
    found = plan._too_much(message)
    assert found == ({} if total is None else {"total": total * plan.GIB, "room": room * plan.GIB})
    answer = dict(found, fits=False, trained=1, frozen=1, trace=0.0, compile=0.0)
    assert "DOES NOT FIT" in plan.report(get_config("text_ct", "tiny"), "v5e:2x4", answer)


@pytest.mark.skipif(not LIBTPU.exists(), reason="no environment with libtpu: make plan-env")
def test_the_tpu_compiler_compiles_a_test_size_stage():
    """A flow beside frozen encoders: in bfloat16 and nowhere in float32 too, gradients summed, parameters gathered."""
    config = micro_stage("ldm_ct", batch=8)
    config.mesh.data, config.mesh.fsdp = 2, 4
    answer = plan.ask(config, dict(clip=700, bert=300, gpt2=450), "v5e:2x4", LIBTPU)
    assert answer["device"] == "TPU v5 lite" and answer["fits"] and answer["flops"] > 1e6
    state = 4 * 4 * answer["trained"] / 4  # parameters, EMA and two moments in float32, over fsdp where they divide
    assert state < answer["arguments"] < 40 * state
    assert answer["total"] < plan.GIB
    assert answer["narrow"] and not answer["wide"]
    moved = {kind: x["bytes"] for kind, x in answer["collectives"].items()}
    gradients = 4 * answer["trained"]
    # Each gradient once between all chips, and parameters, frozen ones too, once a use; no image of a batch besides.
    assert sum(moved.values()) < 8 * gradients and moved["all-gather"] > 0
    with pytest.raises(UserError, match=r"topology v5e:3x5.*not divisible"):
        plan.ask(micro_stage("image_vae", batch=15), dict(clip=700, bert=300, gpt2=450), "v5e:3x5", LIBTPU)


@pytest.mark.skipif(not LIBTPU.exists(), reason="no environment with libtpu: make plan-env")
def test_attention_on_tpu_holds_no_scores_of_all_tokens():
    """And would, were they not taken in blocks."""
    env = dict(os.environ, PYTHONPATH=str(plan.ROOT), XLA_FLAGS="")
    line = [str(LIBTPU), str(HERE / "tpu_attention.py")]
    done = subprocess.run(line, env=env, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["blocks"] == [] and found["whole"]


@pytest.mark.full
@pytest.mark.parametrize("stage", ["ldm_ct", "text_ct"])
@pytest.mark.skipif(not LIBTPU.exists(), reason="no environment with libtpu: make plan-env")
def test_a_published_size_is_lean_on_tpu(stage):
    """No float32 copy of a frozen weight, no 4096 x 4096 scores; ten minutes of compiling and 12 GB each."""
    target, _, subject = stage.rpartition("_") if stage.startswith("ldm") else (stage, "", "")
    config = get_config(target, f"{subject},sd15" if subject else "sd15")
    config.batch, config.mesh.data, config.mesh.fsdp = 8, 1, 8
    answer = plan.ask(config, dict(clip=49408, bert=28996, gpt2=50260), "v5e:2x4", LIBTPU)
    print(f"\n{stage}: {json.dumps(answer, indent=1)}")
    assert answer["fits"] and answer["narrow"] > 100 and not answer["wide"] and not answer["squares"]


@pytest.mark.full
@pytest.mark.skipif(not LIBTPU.exists(), reason="no environment with libtpu: make plan-env")
def test_the_tiny_round_fits_a_v5e_slice(capsys, tmp_path):
    plan.show(get_config("text_ct", "tiny"), str(tmp_path), "v5e:2x4", str(LIBTPU))
    out = capsys.readouterr().out
    assert "of 16 GiB: fits" in out and "TFLOP/s a chip (vendor's" in out and "16 rows a step, 2 a chip" in out
