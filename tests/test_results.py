"""What a run root's results stand on: data and weights by their contents, stages by what they read of others."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from micro import micro
from test_manifest import picture, row, write

from medm2g_jax import plan, run
from medm2g_jax.convert import converted
from medm2g_jax.convert.files import FORMAT, Output, write_safetensors
from medm2g_jax.data.contents import contents
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.errors import UserError
from medm2g_jax.train import checkpoint, data_record, loop, results

GROUPS = {
    "image_vae": ["image/vae/a"],
    "align_text_xray": ["text/clip/a", "xray/clip/a"],
    "ldm_xray": ["xray/unet/a"],
}


def finish(root, config, stage, value=0.0):
    """A result of this stage that stands on what is there, as small as it can be."""
    origins = {"image_vae": [], "align_text_xray": [], "ldm_xray": [("image/vae", "image_vae")]}[stage]
    origins += [("text/clip", "align_text_xray")] if stage == "ldm_xray" else []
    lineage = {}
    for group, owner in origins:
        prints = checkpoint.read_meta(root / owner)["fingerprints"]
        lineage[group] = {"stage": owner, "fingerprint": results.group_fingerprint(prints, group)}
    lineage["xray/clip"] = {"stage": "align_text_xray"}  # as a stage that reads a part of what another trained hands on
    meta = dict(stage=stage, shared=results.shared(config), weights={}, rounds=[])
    params = {name: jnp.full(3, value) for name in GROUPS[stage]}
    checkpoint.save_model(root / stage, params, meta | {"from": lineage})


@pytest.fixture
def root(tmp_path):
    root, config = epath.Path(tmp_path / "run"), micro("ldm", "xray,tiny")
    for stage in GROUPS:
        finish(root, config, stage)
    return root


def begin(folder, lineage):
    """A stage with a checkpoint and no result yet."""
    (folder / "model.json").unlink()
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / results.LINEAGE).write_text(json.dumps(lineage))


# Lineage.


def test_a_plan_is_done_where_all_stand_on_what_is_there(root):
    config = micro("ldm", "xray,tiny")
    todo = loop.plan_stages(config, root)
    assert todo == [(stage, "done") for stage in GROUPS]
    results.refuse_stale(config, root, todo)


@pytest.mark.parametrize("begun", [False, True])
def test_a_stage_trained_again_takes_those_that_stand_on_it_along(begun, root, capsys):
    config = micro("ldm", "xray,tiny")
    if begun:  # not finished: it would be resumed
        begin(root / "ldm_xray", results.read_lineage(root / "ldm_xray"))
        assert dict(loop.plan_stages(config, root))["ldm_xray"] == "resume"
    finish(root, config, "image_vae", value=1.0)
    todo = loop.plan_stages(config, root)
    assert todo[:2] == [("image_vae", "done"), ("align_text_xray", "done")]
    assert todo[2] == ("ldm_xray", "train again: image_vae has been trained again since")
    message = rf"^ldm_xray: to be trained again \(image_vae .*\).*the same command: rm -r {root / 'ldm_xray'}$"
    with pytest.raises(UserError, match=message):
        run.run(config, str(root))
    assert "ldm_xray         train again: image_vae" in capsys.readouterr().out
    what = {name: what for name, what, _ in plan.commands(config, "configs/ldm.py:xray,tiny", [], str(root))}
    assert what["ldm_xray"].startswith("train again")
    finish(root, config, "image_vae", value=0.0)  # brought back
    assert dict(loop.plan_stages(config, root))["ldm_xray"] == ("resume" if begun else "done")


def test_so_does_one_that_is_gone_and_those_that_stand_on_these(root):
    config = micro("text_xray")
    (root / "align_text_xray").rmtree()
    todo = dict(loop.plan_stages(config, root))
    assert todo["align_text_xray"] == "train" and todo["ldm_xray"].endswith(
        "align_text_xray, which it stands on, is gone"
    )
    finish(root, micro("ldm", "xray,tiny"), "align_text_xray", value=2.0)
    begin_on = {"from": {"xray/flow": {"stage": "ldm_xray", "fingerprint": 0}}, "weights": {}}
    (root / "text_xray").mkdir()
    (root / "text_xray" / "model.json").write_text("{}")
    begin(root / "text_xray", begin_on)
    todo = dict(loop.plan_stages(config, root))
    assert todo["ldm_xray"] == "train again: align_text_xray has been trained again since"
    assert todo["text_xray"] == "train again: ldm_xray has to be trained again"
    with pytest.raises(UserError, match=rf"rm -r {root / 'ldm_xray'} {root / 'text_xray'}$"):
        results.refuse_stale(config, root, list(todo.items()))


def test_a_stage_that_has_learnt_nothing_yet_stands_on_what_is_there(root):
    begin(root / "ldm_xray", {"from": {"image/vae": {"stage": "image_vae", "fingerprint": 0}}, "weights": {}})
    (root / "ldm_xray" / "checkpoints" / "2").rmtree()
    assert dict(loop.plan_stages(micro("ldm", "xray,tiny"), root))["ldm_xray"] == "resume"


# Places.


@pytest.fixture
def weights(tmp_path):
    """Makes folders of converted weights of one tensor."""

    def make(name, value):
        for part in ("sd15", "clip"):
            folder = tmp_path / name / part
            folder.mkdir(parents=True)
            one = Output((2,), np.dtype(np.float32), lambda: np.full(2, value, np.float32))
            prints = write_safetensors(folder / converted.WEIGHTS, {"a": one}, {})
            (folder / converted.META).write_text(json.dumps({"format": FORMAT, "crc32": prints, "net": {}}))
        return str(tmp_path / name)

    return make


def test_weights_that_moved_are_the_same_and_others_are_not(weights, root):
    first, copy, other = weights("first", 1), weights("copy", 1), weights("other", 2)
    config = micro("ldm", "xray,tiny")
    config.weights = first
    meta = json.loads((root / "ldm_xray" / "model.json").read_text())
    meta["shared"]["weights"], meta["weights"] = first, results.weights_prints(first, ("sd15", "clip"))
    (root / "ldm_xray" / "model.json").write_text(json.dumps(meta))
    assert results.find(root, config, "ldm_xray") == root / "ldm_xray"
    config.weights = copy
    shutil.rmtree(first)
    assert results.find(root, config, "ldm_xray") == root / "ldm_xray"
    for path in (other, first, ""):  # other contents, nothing to compare, none
        config.weights = path
        with pytest.raises(UserError, match=r"config\.weights='.*first'"):
            if path == first:
                config.weights = first + "-gone"
            results.find(root, config, "ldm_xray")
    # At the same place, converted again from other files.
    shutil.copytree(other, first)
    config.weights = first
    for stage in ("image_vae", "align_text_xray"):
        text = json.loads((root / stage / "model.json").read_text())
        text["shared"]["weights"] = first
        (root / stage / "model.json").write_text(json.dumps(text))
    assert "sd15 was converted again" in dict(loop.plan_stages(config, root))["ldm_xray"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data"
    return write(path, [row(i, images={"ct": picture(path, f"{i}.png", i)}, text=f"text {i}") for i in range(6)])


def of_data(folder):
    config = micro("image_vae")
    config.data.source = f"manifest:{folder}"
    return config


def test_data_that_moved_are_the_same_and_others_are_said(data, tmp_path):
    root, config = epath.Path(tmp_path / "run"), of_data(data)
    data_record.hold(root, config.data.source, contents(Manifest(data, 32)), "")
    finish(root, config, "image_vae")
    moved = data.rename(tmp_path / "moved")
    assert results.find(root, of_data(moved), "image_vae") == root / "image_vae"
    write(moved, (moved / "manifest.jsonl").read_text().splitlines()[:3])
    other = of_data(tmp_path / "half")
    moved.rename(tmp_path / "half")
    message = r"train 6 -> 3 records.*6 -> 3 subjects; other ids.*--config\.data\.accept=([0-9a-f]{16})"
    with pytest.raises(UserError, match=message) as error:
        results.find(root, other, "image_vae")
    other.data.accept = str(error.value).rpartition("=")[2]
    assert results.find(root, other, "image_vae") == root / "image_vae"
    with pytest.raises(UserError, match="no manifest.jsonl"):
        results.find(root, of_data(tmp_path / "nowhere"), "image_vae")


def test_a_run_root_holds_to_its_data_once_something_was_learnt(data, tmp_path, capsys):
    root, whole = epath.Path(tmp_path / "run"), contents(Manifest(data, 32))
    assert data_record.read(root) is None
    data_record.hold(root, "manifest:a", whole, "")
    data_record.hold(root, "manifest:b", whole, "")
    assert data_record.read(root)["source"] == "manifest:b" and data_record.read(root)["records"]["train"] == 6
    write(data, (data / "manifest.jsonl").read_text().splitlines()[:3])
    half = contents(Manifest(data, 32))
    (root / "tokenizers").mkdir()
    (root / "tokenizers" / "done").write_text("trained on 6 texts")
    data_record.hold(root, "manifest:a", half, "")  # nothing was trained: mended data are taken, and their words
    assert data_record.read(root)["fingerprint"] == half.fingerprint and not (root / "tokenizers").exists()
    (root / "image_vae" / "checkpoints" / "2").mkdir(parents=True)
    data_record.hold(root, "manifest:a", half, "")
    for accept in ("", half.fingerprint):
        with pytest.raises(UserError, match=rf"train 3 -> 6 records.*accept={whole.fingerprint}"):
            data_record.hold(root, "manifest:a", whole, accept)
    assert not capsys.readouterr().out
    data_record.hold(root, "manifest:a", whole, whole.fingerprint)
    assert "accepted: train 3 -> 6" in capsys.readouterr().out
    data_record.hold(root, "manifest:a", whole, "")  # once is enough
    (root / "data.json").write_text("{")
    with pytest.raises(UserError, match="data.json is damaged"):
        data_record.hold(root, "manifest:a", whole, "")


def test_what_may_differ_is_not_compared():
    config = micro("image_vae")
    before = results.shared(config)
    config.data.accept = "0123456789abcdef"
    assert results.shared(config) == before
