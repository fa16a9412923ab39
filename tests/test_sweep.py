"""`medm2g plan --sweep`: meshes and batches, bounds in closed form, and rows that are asked once."""

import json

import pytest
from micro import micro_stage

from medm2g_jax import cli, plan, sweep
from medm2g_jax.errors import UserError


def test_meshes_are_products_of_the_chips():
    assert sweep.meshes(8) == [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 4, 2)]
    assert sweep.meshes(1) == [(1, 1, 1)]
    assert sweep.parse_meshes("8x1x1,1x4x2", 8) == [(8, 1, 1), (1, 4, 2)]
    for text in ("8x1", "4x1x1", "axbxc", "8x1x1,", "8x1x1x1"):
        with pytest.raises(UserError, match="--meshes: expected DATAxFSDPxTENSOR whose product is 8"):
            sweep.parse_meshes(text, 8)


def answer(flops, sent, total, fits=True):
    moved = {"all-reduce": {"count": 3, "bytes": sent}}
    return {"fits": fits, "flops": flops, "accessed": 819e9, "collectives": moved, "total": total * plan.GIB}


def test_bounds_are_those_of_the_vendors_figures():
    row = answer(flops=197e12 * 0.5, sent=200e9 * 0.25, total=10) | {"mesh": [8, 1, 1], "batch": 4}
    found = sweep.bounds(row, "v5e:2x4", price=0.9)
    assert found == pytest.approx(
        # 32 rows in half a second; 8 chips at 90 cents an hour for a million of them
        dict(compute=0.5, exchange=0.25, memory=1.0, seconds=0.5, rate=64.0, dollars=7.2 / 3600 / 64 * 1e6)
    )
    slow = row | answer(flops=1e12, sent=200e9, total=10)
    assert sweep.bounds(slow, "v5e:2x4", 0.9)["seconds"] == pytest.approx(1.0)
    said = sweep.table([row, slow | {"mesh": [1, 8, 1]}], "v5e:2x4", 0.9)
    assert "Best on v5e:2x4, at $0.9 an hour and chip: data=8, fsdp=1, tensor=1, 4 rows a chip" in said
    assert "all-reduce 3: 47684" in said


def test_rows_are_asked_once_and_end_where_nothing_fits(tmp_path):
    config, asked = micro_stage("image_vae"), []

    def ask(own):
        asked.append((own.mesh.data, own.mesh.fsdp, own.mesh.tensor, own.batch))
        return answer(1e12, 1e6, total=own.batch, fits=own.batch <= 16)

    path, words = tmp_path / "plan" / "x.json", dict(grids=[(8, 1, 1), (1, 4, 2)], say=lambda line: None)
    rows = sweep.run(config, "v5e:2x4", path, ask, batches=(1, 2, 4, 8), **words)
    assert asked == [(8, 1, 1, 8), (8, 1, 1, 16), (8, 1, 1, 32), (1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 32)]
    assert json.loads(path.read_text())["rows"] == rows and "32.00: too much" in sweep.table(rows, "v5e:2x4")
    again = sweep.run(config, "v5e:2x4", path, ask, batches=(1, 2, 4, 8), **words)
    assert again == rows and len(asked) == 6
    with pytest.raises(UserError, match="holds .*this command asks for .*--out"):
        sweep.run(micro_stage("text_vae"), "v5e:2x4", path, ask, **words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sweep: say on which slice"),
        (["--topology=v5e:2x4", "--batches=0,1"], "--batches: expected rows a chip"),
        (["--topology=v5e:2x4", "--meshes=3x1x1"], "whose product is 8, found '3x1x1'"),
        (["--topology=v5e:2x4", "--libtpu-python=nowhere/python"], "`make plan-env` installs libtpu"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", "--config=image_vae:tiny", f"--workdir={tmp_path}", "--sweep", *arguments])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_costs_of_a_stage_are_those_of_its_step():
    """Of a plan at test size; twice the rows, twice the products; and the dollars in closed form."""
    config = micro_stage("image_vae", batch=8, steps=100)
    one = sweep.cost(config, dict(clip=700, bert=300, gpt2=450))
    config.batch = 16
    two = sweep.cost(config, dict(clip=700, bert=300, gpt2=450))
    assert two["flops"] == pytest.approx(one["flops"], rel=1e-3) and one["flops"] > 1e6 and one["frozen"] == 0
    assert (one["trained"], one["steps"]) == (two["trained"], 100)
    row = dict(stage="x", batch=3600, steps=10, flops=197e12, trained=25e9, frozen=0)
    said = sweep.costs_table([row], ("v5e",))
    assert "| 1; 1; 12 |" in said and "$12 on v5e at $1.2 an hour and chip" in said
