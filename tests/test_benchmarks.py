"""What the benchmarks count: shares of time, kinds of operations, rows of a table."""

import argparse

import numpy as np
import pytest

from benchmarks import common, demo, gpu, manifest, pipeline, profile

HLO = """
%fused_a (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %r = (f32[2]{0}, f32[2]{0}) reduce(%p, %p), dimensions={1}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %c.1 = f32[2]{0} convolution(%x, %w), metadata={op_name="jit(f)/transpose(jvp(UNet))/conv"}
  %f.1 = f32[2]{0} fusion(%c.1), kind=kLoop, calls=%fused_a, metadata={op_name="jit(f)/jvp(UNet)/norm"}
  %copy.1 = f32[2]{0} copy(%f.1)
  ROOT %m = f32[2]{0} multiply(%copy.1, %copy.1), metadata={op_name="jit(f)/mul"}
}
"""


def test_kinds_of_hlo_instructions():
    kinds = profile._hlo_kinds(HLO)
    assert {name: kinds[name] for name in ("c.1", "f.1", "copy.1", "m")} == {
        "c.1": "convolutions, backward",
        "f.1": profile.REDUCTION,
        "copy.1": profile.COPY,
        "m": profile.OPTIMIZER,
    }


def test_an_instant_is_shared_between_what_is_under_way():
    assert profile._shared([("a", 0, 4), ("b", 2, 4), ("b", 2, 6), ("a", 9, 10)]) == pytest.approx(
        {"a": 2 + 2 / 3 + 1, "b": 4 / 3 + 2}
    )


def test_ratios_are_of_pairs_and_goals_of_full_sizes_on_cpu():
    task = common.Task("x", "x", ours=None, torch=None, pairs=3, goals={"stock": 1.5})
    timed = dict(seconds=dict(ours=[1.0, 4.0, 3.0], torch=[1.0, 2.0, 3.0]), first=dict(ours=9.0, torch=1.0))
    timed |= dict(others=0.0, device="cpu", options={"xla_a": "1"})
    options = argparse.Namespace(device="cpu", dtype="float32", small=False)
    (row,) = common._rows(task, timed, options, "torch, stock MKL")
    assert row["ratio"] == {"median": 1.0, "least": 1.0, "most": 2.0} and row["met"]
    assert row["compile"] == {"ours": 6.0, "torch": 0.0}
    options.small = True
    assert "goal" not in common._rows(task, timed, options, "torch")[0]


@pytest.mark.parametrize("packed", [True, False])
def test_made_up_manifests_open(tmp_path, packed):
    manifest.write(tmp_path, 200, packed)
    found = manifest.measure(str(tmp_path))
    assert found["rows"] == 200 and 100 < found["indexed"] <= 200


def test_made_up_slices_reach_a_step_as_a_plain_loop_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr("medm2g_jax.data.manifest.MEMORY", 0)  # the benchmark sets it; back to what it was afterwards
    pipeline.write(tmp_path, 2)
    for kind in ("loose", "packed"):
        batches, source = pipeline.ours(tmp_path / kind, 2**20)
        batches.close()
        expected = pipeline.plain(str(tmp_path / "loose/images/000001.png"))
        np.testing.assert_allclose(source.read(1, "ct", np.random.default_rng(0)), expected, atol=3e-5)


def test_a_moment_belongs_to_the_innermost_clock():
    clocks = demo.Clocks()
    clocks.stage = "ldm"
    main = [("rest", 0, 10), ("data", 1, 3), ("tracing", 2, 3), ("steps", 5, 9)]
    clocks.rows = [("ldm", kind, "", a, b) for kind, a, b in main]
    found = clocks.split()["ldm"]
    assert found == {"rest": 4, "data": 1, "tracing": 1, "steps": 4}
    line = demo.table({"stages": {"ldm": found}, "cpu": {"ldm": 15.0}}).splitlines()[-2]
    assert line.startswith("| ldm |") and line.endswith("| 4.0 | 10.0 | 15 |")
    clocks.compiler("/jax/core/compile/backend_compile_duration", 2.0, fun_name="step")
    stage, kind, what, begin, end = clocks.rows[-1]
    assert (stage, kind, what) == ("ldm", "compiling", "step") and end - begin == pytest.approx(2)


def test_torch_has_the_flops_of_ours_and_both_a_share_of_the_ceiling():
    step = {"first": 1.0, "rows": 8, "GB": 2.0}
    rows = {
        "ceiling": step | {"seconds": 1.0, "flops": 800e12},
        "unet step, batch 8, ours": step | {"seconds": 0.5, "flops": 200e12},
        "unet step, batch 8, torch.compile": step | {"seconds": 1.0, "flops": None},
        "decode, ours": step | {"seconds": 0.1, "flops": None},
        "ldm:ct step, batch 64": {"error": "RESOURCE_EXHAUSTED: a|b"},
    }
    found = {"device": "gpu", "dtype": "bfloat16", "date": "2026-11-30", "dry": False, "rows": rows}
    lines = gpu.table(found).splitlines()
    assert "| unet step, batch 8, ours | 0.5 | 16 | 400 | 50% | 1 | 2 |" in lines
    assert "| unet step, batch 8, torch.compile | 1 | 8 | 200 | 25% | 1 | 2 |" in lines
    assert "| decode, ours | 0.1 | 80 |  |  | 1 | 2 |" in lines and "RESOURCE_EXHAUSTED: a/b" in lines[-1]
    assert {words[0] for _, words, _ in gpu.ROWS} == {"ceiling", "step", "stage", "ddim", "decode"}
