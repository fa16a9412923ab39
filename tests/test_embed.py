"""Vectors of texts and images, in files and back, and what lies nearest: with an untrained model, whose space is as
good as any to tell whose vector is whose."""

import json

import numpy as np
import pytest
from dicom_files import series
from micro import model_of
from PIL import Image

from medm2g_jax import cli, embed, retrieve, vectors
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.errors import UserError

REPORT = "large mass in the left lung ."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    Tokenizers.train([REPORT, "no mass . heart size is normal ."] * 9, folder, 600)
    return model_of("text_ct", "tiny,alone", tokenizers=Tokenizers.load(folder), parts="clip")


def slices_of(rng, count=3):
    """(k rows columns): each with a look of its own."""
    coarse = rng.integers(-900, 300, (count, 4, 4))
    return np.kron(coarse, np.ones((1, 8, 8))).astype(np.int16)


@pytest.fixture
def folder(tmp_path, rng):
    """Three pictures, a volume whose last slice is empty, a series of DICOM slices, and two files that are neither."""
    at = tmp_path / "images"
    (at / "deep").mkdir(parents=True)
    for i in range(3):
        coarse = rng.integers(0, 256, (4, 4)).astype(np.uint8)
        Image.fromarray(np.kron(coarse, np.ones((8, 8), np.uint8))).save(at / f"{i}.png")
    stack = slices_of(rng)
    stack[2] = -1000
    np.save(at / "deep" / "head.npy", stack.transpose(2, 1, 0).astype(np.float32))
    series(at / "scan", slices_of(rng).transpose(2, 1, 0), np.diag([2.0, 2.0, 5.0, 1.0]))
    (at / "broken.png").write_bytes(b"x")
    (at / "notes.md").write_text("no image")
    return at


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def embedded(model, paths, stream="ct", **options):
    return embed.embed(model, embed.of_files(model, map(str, paths), stream), say=lambda line: None, **options)


def test_a_row_for_each_file_and_what_is_broken_is_left_out(model, folder):
    found, left = embedded(model, [folder])
    names = [name.removeprefix(f"{folder}/") for name in found.names]
    assert names == ["0.png", "1.png", "2.png", "deep/head.npy", "scan"]  # a folder of DICOM is one volume
    assert found.streams == ("ct",) * 5 and found.fingerprint == model.fingerprint
    np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), 1, rtol=1e-5)
    paths = [str(folder / f"{i}.png") for i in range(3)]
    np.testing.assert_allclose(found.values[:3], model.embed("ct", paths), atol=1e-5)
    ((name, why),) = left
    assert name == str(folder / "broken.png") and "broken.png: begins as none of" in why


def test_a_volume_is_the_mean_of_its_slices_or_a_row_each(model, folder):
    files = [folder / "deep" / "head.npy", folder / "scan"]
    rows, _ = embedded(model, files, slices=True)
    assert [n.rpartition("/")[2] for n in rows.names] == ["head.npy#0", "head.npy#1", "scan#0", "scan#1", "scan#2"]
    mean, _ = embedded(model, files)
    for one, own in zip(mean.values, (rows.values[:2], rows.values[2:]), strict=True):  # head's empty slice is none
        expected = own.mean(0) / np.linalg.norm(own.mean(0))
        np.testing.assert_allclose(one, expected, atol=1e-6)
    assert np.abs(rows.values[2] - rows.values[3]).max() > 1e-3


def test_what_a_file_says_it_is_decides_where_nothing_else_does(model, folder):
    found, left = embedded(model, [folder / "scan", folder / "0.png"], None)
    assert found.streams == ("ct", "ct") and not left  # the one kind of image that this model takes
    with pytest.raises(UserError, match=r"says it is CT \(CT\), taken for MRI|no prompt encoder"):
        embedded(model, [folder / "scan"], "mri")
    with pytest.raises(UserError, match="'xray': this model has no prompt encoder of it.*it takes text, ct"):
        embedded(model, [folder / "0.png"], "xray")
    with pytest.raises(UserError, match="no image in it; expected files that end in .png"):
        (folder / "empty").mkdir()
        embedded(model, [folder / "empty"])


def test_texts_are_lines_of_a_file_or_themselves(model, tmp_path):
    (tmp_path / "reports.txt").write_text(f"{REPORT}\n\nno mass .\n")
    items = embed.of_texts(model, [str(tmp_path / "reports.txt"), REPORT])
    found, _ = embed.embed(model, items)
    assert found.names == (f"{tmp_path}/reports.txt#0", f"{tmp_path}/reports.txt#2", REPORT)
    np.testing.assert_allclose(found.values[[0, 2]], model.embed("text", [REPORT, REPORT]), atol=1e-5)
    with pytest.raises(UserError, match="gone.txt: cannot be read"):
        embed.of_texts(model, ["gone.txt"])


def manifest(tmp_path, rng, licence):
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for i, split in enumerate(("train", "test", "test")):
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(data / f"{i}.png")
        rows.append(dict(id=f"secret{i}", subject=f"s{i}", split=split, images={"ct": f"{i}.png"}, text=REPORT))
        rows[-1]["license"] = licence
    (data / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"manifest:{data}"


@pytest.mark.parametrize("licence", ["CC BY 4.0", "credentialed"])
def test_records_are_named_by_number_and_shown_where_they_are_open(model, tmp_path, rng, licence):
    spec = manifest(tmp_path, rng, licence)
    found, _ = embed.embed(model, embed.of_data(model, spec, "test"))
    assert sorted(found.names) == sorted([f"{spec}#1", f"{spec}#2"] * 2) and "secret" not in str(found.names)
    only = embed.of_data(model, spec, "test", "ct")
    assert [item.name for item in only] == [f"{spec}#1", f"{spec}#2"]
    near = retrieve.nearest(model, embed.of_text(model, REPORT), found.of("ct"), 2)
    blank = retrieve.sheet(str(tmp_path / "sheet.png"), model, embed.of_text(model, REPORT), near)
    assert blank == ([] if licence.startswith("CC") else [one.name for one in near])
    with pytest.raises(UserError, match="split 'val' holds nothing, the model takes text, ct"):
        embed.of_data(model, spec, "val")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_vectors_come_back_and_damaged_ones_are_an_error(suffix, tmp_path, rng):
    out = str(tmp_path / "new" / f"v{suffix}")
    kept = vectors.Vectors(("a", "Œ #1"), ("ct", "mri:t2"), rng.normal(size=(2, 4)).astype(np.float32), "12ab34cd")
    vectors.check_out(out)
    vectors.write(out, kept)
    found = vectors.read(out)
    assert (found.names, found.streams, found.fingerprint) == (kept.names, kept.streams, kept.fingerprint)
    np.testing.assert_array_equal(found.values, kept.values)
    assert found.of("mri").names == ("Œ #1",) and found.of(None).names == kept.names
    with pytest.raises(UserError, match="--stream xray: no vector of it; expected one of ct, mri:t2"):
        found.of("xray")
    with pytest.raises(UserError, match="is there already"):
        vectors.check_out(out)
    whole = (tmp_path / "new" / f"v{suffix}").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"x" * 100):
        (tmp_path / f"cut{suffix}").write_bytes(content)
        with pytest.raises(UserError, match="no vectors can be read of it"):
            vectors.read(str(tmp_path / f"cut{suffix}"))


def test_other_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected a name that ends in .npz or .parquet"):
        vectors.check_out(str(tmp_path / "v.csv"))
    with pytest.raises(UserError, match="no vectors can be read of it"):
        vectors.read(str(tmp_path / "gone.npz"))


def test_the_nearest_of_an_image_is_itself_and_equal_ones_keep_their_order(model, folder):
    found, _ = embedded(model, [folder])
    query = retrieve.query_of(model, f"ct={folder / '1.png'}")
    near = retrieve.nearest(model, query, found, 3)
    assert near[0].name == str(folder / "1.png") and near[0].cosine == pytest.approx(1, abs=1e-5)
    assert [one.rank for one in near] == [1, 2, 3] and near[1].cosine >= near[2].cosine
    twice = vectors.Vectors(("a", "b", "c"), ("ct",) * 3, found.values[[0, 1, 1]], found.fingerprint)
    assert [one.name for one in retrieve.nearest(model, query, twice)] == ["b", "c", "a"]


def test_vectors_of_another_model_name_both(model, tmp_path):
    vectors.write(str(tmp_path / "v.npz"), vectors.Vectors(("a",), ("ct",), np.ones((1, 32), np.float32), "0badf00d"))
    with pytest.raises(UserError, match=f"of the model 0badf00d, and this model is {model.fingerprint}"):
        retrieve.among(model, str(tmp_path / "v.npz"), None)


def test_the_verbs(model, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medm2g_jax.loading.load", lambda path, modalities: model)
    out = str(tmp_path / "v.npz")
    line = ["embed", "--model", "RUN", "--out", out, str(folder), "--stream", "ct", "--text", REPORT]
    with pytest.raises(SystemExit) as left:
        cli.main(line)
    said = capsys.readouterr().out
    assert left.value.code == 3 and "1 of 7 were left out; exit status 3" in said and "broken.png" in said
    sheet = tmp_path / "sheet.png"
    asked = ["retrieve", "--model", "RUN", "--among", out, "--given", f"text={REPORT}"]
    cli.main([*asked, "-k", "2", "--stream", "ct", "--sheet", str(sheet)])
    assert len(capsys.readouterr().out.splitlines()) == 2 and np.asarray(Image.open(sheet)).std() > 10
    cli.main([*asked, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == model.fingerprint and found["nearest"][0]["name"] == REPORT and len(found["nearest"]) == 5
    cli.main(["retrieve", "--model", "RUN", "--among", str(folder), "--given", f"ct={folder / '0.png'}", "-k", "1"])
    assert str(folder / "0.png") in capsys.readouterr().out
    for wrong, message in (
        (["retrieve", "--model", "RUN", "--among", out, "--given", "text"], "expected STREAM=VALUE"),
        ([*asked, "-k", "0"], "-k: expected a whole number from 1"),
        (["embed", "--model", "RUN", "--out", str(tmp_path / "w.npz")], "nothing to embed"),
        (["embed", "--model", "RUN", "--out", out, str(folder)], "is there already"),
    ):
        with pytest.raises(SystemExit):
            cli.main(wrong)
        assert message in capsys.readouterr().err
