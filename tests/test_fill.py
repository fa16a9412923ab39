"""A model over a whole data set: what is missing is made, marked, and taken as data; a stopped run goes on."""

import json

import numpy as np
import pytest
from micro import model_of
from PIL import Image

from medm2g_jax import cli, fill
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.errors import UserError


@pytest.fixture(scope="module")
def model():
    """CT and MRI, untrained: what is made is noise, where it goes is what counts."""
    return model_of("ct_mri", "tiny,alone")


@pytest.fixture
def data(tmp_path):
    """Six records, two of them without MRI; one is held out, one of another size."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(6):
        images, side = {}, 40 if i == 4 else 32
        for key in ("ct", "mri_t2") if i not in (1, 4) else ("ct",):
            images[key] = f"images/{key}{i}.png"
            Image.fromarray(rng.integers(0, 256, (side, 36), np.uint8)).save(folder / images[key])
        split = "test" if i == 5 else "train"
        row = dict(id=f"r{i}", subject=f"p{i}", split=split, images=images, license="CC BY 4.0", registered=True)
        rows.append(row)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def filled(model, data, out, **options):
    source = fill.data_of(model, f"manifest:{data}")
    todo = fill.tasks(model, source, (), (fill.MISSING,), "train")
    return fill.fill(model, source, todo, out, whole=True, seed=3, say=lambda line: None, **options)


def test_what_is_missing_is_made_on_the_given_grid_and_marked(model, data, tmp_path):
    written = filled(model, data, tmp_path / "out")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [r["id"] for r in rows] == [f"r{i}" for i in range(6)]
    assert [r.get("synthetic") for r in rows] == [None, ["mri_t2"], None, None, ["mri_t2"], None]
    assert all({"ct", "mri_t2"} == set(r["images"]) for r in rows)
    made = Image.open(written.parent / rows[4]["images"]["mri_t2"])
    assert made.size == (36, 40) and "Synthetic" in made.text["Description"]
    assert (written.parent / "sheet.png").exists() and not (written.parent / "manifest.jsonl.part").exists()
    about = json.loads((written.parent / "provenance.json").read_text())
    assert about["fingerprint"] == model.fingerprint and about["seed"] == 3 and "Synthetic" in about["note"]
    source = Manifest(written.parent, 32)  # the trainer's reader
    assert len(source.records) == 6 and source.records[1].licence == "CC BY 4.0"
    assert all(set(r.streams) == {"ct", "mri:t2"} for r in source.records)
    assert source.records[0].grid == ("ct", "mri:t2")
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(source.read(0, "ct", rng), Manifest(data, 32).read(0, "ct", rng))


def test_a_stopped_run_goes_on_and_ends_with_the_same(model, data, tmp_path, monkeypatch):
    whole = filled(model, data, tmp_path / "whole", rows=1)
    wrote, left = fill._row, iter((True, False))

    def killed(*args):
        if next(left):
            return wrote(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fill, "_row", killed)
    with pytest.raises(KeyboardInterrupt):
        filled(model, data, tmp_path / "out", rows=1)
    monkeypatch.setattr(fill, "_row", wrote)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()  # nobody takes half of it for data
    with (tmp_path / "out" / fill.PART).open("a") as file:
        file.write('{"index": 4, "ro')  # cut off in mid-line
    with pytest.raises(UserError, match="begun with eta 1.0, this command has 0.5; give it back"):
        filled(model, data, tmp_path / "out", rows=1, eta=0.5)
    again = filled(model, data, tmp_path / "out", rows=2)  # a sample does not depend on its batch
    assert again.read_text() == whole.read_text()
    for row in map(json.loads, whole.read_text().splitlines()):
        for key in row.get("synthetic", ()):
            ours, theirs = (np.asarray(Image.open(at.parent / row["images"][key]), int) for at in (again, whole))
            assert np.abs(ours - theirs).max() <= 1
    with pytest.raises(UserError, match="holds a manifest.jsonl already"):
        filled(model, data, tmp_path / "out")


def test_one_stream_of_others_on_the_test_split(model, data, tmp_path):
    source = fill.data_of(model, f"manifest:{data}")
    todo = fill.tasks(model, source, ("mri:t2",), ("ct",), "test")
    written = fill.fill(model, source, todo, tmp_path / "out", whole=False, say=lambda line: None)
    (row,) = map(json.loads, written.read_text().splitlines())
    assert row["id"] == "r5" and row["synthetic"] == ["ct"] and set(row["images"]) == {"ct", "mri_t2"}
    assert "images/ct/" in row["images"]["ct"]  # the made one, not the record's own
    with pytest.raises(UserError, match="no record of split 'val' holds mri:t2"):
        fill.tasks(model, source, ("mri:t2",), ("ct",), "val")
    with pytest.raises(UserError, match="no record of split 'test' lacks what the model makes"):
        fill.tasks(model, source, (), (fill.MISSING,), "test")


def test_what_an_unstated_contrast_may_be_is_not_missing():
    lacks = [fill._lacks(fill.Record("a", "a", "train", streams), "mri:t2") for streams in (("ct",), ("mri",), ())]
    assert lacks == [True, False, True]
    assert not fill._lacks(fill.Record("a", "a", "train", ("mri:t1",)), "mri")
    assert fill._lacks(fill.Record("a", "a", "train", ("mri:t1",)), "mri:t2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--given", "mri=a.png"], "--given 'mri=a.png': with --data name a stream alone"),
        (["--draws", "3"], "--draws and --data: records are made one sample each"),
    ],
)
def test_what_a_data_set_cannot_be_asked_is_one_line(options, message, tmp_path, capsys):
    line = ["generate", "--model", "x", "--data", "phantom", "--make", "ct", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main([*line, *options])
    assert message in capsys.readouterr().err
