"""A model over a whole data set: what is missing is made, marked, and taken as data; a stopped run goes on."""

import io
import json

import numpy as np
import pytest
from micro import model_of
from PIL import Image

from medm2g_jax import cli, fill
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.picture import normalised
from medm2g_jax.data.shards import Writer
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES


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


MISSING = fill.Order((fill.MISSING,), (), "train")


def filled(model, data, out, order=MISSING, **options):
    source = fill.data_of(model, f"manifest:{data}")
    return fill.fill(model, source, order, out, seed=3, say=lambda line: None, **options)


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


def test_records_in_shards_keep_their_names_and_units(model, data, tmp_path):
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    with Writer(data, "train") as writer:
        for row in rows:
            values = np.asarray(Image.open(data / row["images"]["ct"]), np.uint16) * 5  # HU + 1024
            content = io.BytesIO()
            Image.fromarray(values).save(content, format="PNG")
            row["images"]["ct"] = writer.add(content.getvalue())
            row["scale"] = {"ct": [1, -1024]}
    (data / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = filled(model, data, tmp_path / "out")
    ours, theirs = Manifest(written.parent, 32), Manifest(data, 32)
    for i in range(6):
        a, b = (source.picture(i, "ct") for source in (ours, theirs))
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert a.span is None and a.pixels.max() < 255 * 5 - 1023
    sheet = np.asarray(Image.open(written.parent / "sheet.png"))
    given = normalised(theirs.picture(1, "ct"), MODALITIES["ct"])  # in the first tile
    assert abs(float(sheet[40:150, 125:245].mean()) - float((given.mean() + 1) * 127.5)) < 5


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
    written = filled(model, data, tmp_path / "out", fill.Order(("ct",), ("mri:t2",), "test"))
    (row,) = map(json.loads, written.read_text().splitlines())
    assert row["id"] == "r5" and row["synthetic"] == ["ct"] and set(row["images"]) == {"ct", "mri_t2"}
    assert "images/ct/" in row["images"]["ct"]  # the made one, not the record's own
    about = json.loads((written.parent / "provenance.json").read_text())
    assert (about["given"], about["make"], about["split"]) == (["mri:t2"], ["ct"], "test")
    assert about["pairs"] == {"mri:t2 -> ct": "prompt tokens, guide tokens, registered"}


@pytest.mark.parametrize(
    ("order", "options", "message"),
    [
        ((("ct",), ("mri:t2",), "val"), {}, "no record of split 'val' holds mri:t2; these hold nothing"),
        (((fill.MISSING,), (), "test"), {}, "no record of split 'test' lacks what the model makes"),
        ((("text",), (), "train"), {}, "'text' cannot be made: this model makes ct, mri"),
        ((("ct",), (), "train"), {"sampler": "foo"}, "foo"),
        ((("ct",), ("ct",), "train"), {}, "both given and wanted"),
    ],
)
def test_what_cannot_be_made_leaves_no_folder(order, options, message, model, data, tmp_path):
    with pytest.raises(UserError, match=message):
        filled(model, data, tmp_path / "out", fill.Order(*order), **options)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_orders_that_mean_nothing():
    for order, message in (
        ((("missing", "ct"), (), "train"), "stands alone"),
        (((), (), "train"), "name at least one stream"),
        ((("ct",), (), "foo"), "expected one of train, val, test"),
        ((("ct",), ("foo",), "test"), "unknown stream 'foo'"),
    ):
        with pytest.raises(UserError, match=message):
            fill.Order(*order)


def test_another_order_in_a_begun_folder_is_refused_and_a_broken_image_is_found_first(model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    about = dict(given=[], make=["missing"], split="test")
    (out / fill.PROVENANCE).write_text(json.dumps(about))
    with pytest.raises(UserError, match="was begun with"):
        filled(model, data, out)
    (out / fill.PROVENANCE).write_text('{"a')
    with pytest.raises(UserError, match="JSONDecodeError in reading it"):
        filled(model, data, out)
    (data / "images" / "ct1.png").write_bytes(b"x")
    with pytest.raises(UserError, match="r1"):
        filled(model, data, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_what_was_made_stays_marked_when_a_set_is_filled_again(model, data, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    once = filled(model, data, tmp_path / "link" / "out")  # through a link: names of files hold all the same
    twice = filled(model, once.parent, tmp_path / "twice", fill.Order(("ct",), ("mri:t2",), "train"))
    rows = {r["id"]: r for r in map(json.loads, twice.read_text().splitlines())}
    assert rows["r1"]["synthetic"] == ["mri_t2", "ct"] and rows["r0"]["synthetic"] == ["ct"]
    source = Manifest(once.parent, 32)
    assert source.records[1].synthetic == ("mri:t2",) and not source.records[0].synthetic


def test_a_16_bit_set_counts_over_its_own_range(model, data, tmp_path):
    """The same pictures at 8 and at 12 of 16 bits are given alike."""
    for file in (data / "images").iterdir():
        pixels = np.asarray(Image.open(file))
        Image.fromarray((pixels.astype(int) * 4095 // 255).astype(np.uint16)).save(file)
    source = fill.data_of(model, f"manifest:{data}")
    given = fill._value(model, source, 0, "ct")
    low, high = given.span
    np.testing.assert_allclose((low, high), (0, 4095), rtol=0.01)


def test_a_data_set_may_be_filled_with_the_best_of_several_draws(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("medm2g_jax.loading.load", lambda *_, **__: model)
    line = ["generate", "--model", "RUN", "--data", f"manifest:{data}", "--given", "mri:t2", "--make", "ct"]
    cli.main([*line, "--steps", "2", "--best-of", "2", "--seed", "3", "--out", str(tmp_path / "out")])
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["best_of"] == 2 and any("each the best of 2 draws" in note for note in about["notes"])
    source = fill.data_of(model, f"manifest:{data}")
    given = fill._value(model, source, 5, "mri:t2")  # the record of the test split
    best = model.generate({"mri:t2": given}, ["ct"], steps=2, best_of=2, seed=3, numbers=[5])
    made = Manifest(tmp_path / "out", 32).read(0, "ct", np.random.default_rng(0))
    expected = model.model_input("ct", model.opened("ct", [best.samples["ct"][0]]))[0]
    np.testing.assert_allclose(made, expected, atol=2 / 255)


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
