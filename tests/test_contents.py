"""What data hold: the same wherever they stand, another one whatever changes in them; no image is decoded."""

import json
import shutil
from types import SimpleNamespace

import pytest
from micro import micro
from test_manifest import picture, row, write

from medm2g_jax.data import formats
from medm2g_jax.data.contents import changes, contents, contents_of
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.source import Record


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "read", lambda *_: pytest.fail("an image was decoded"))
    path = tmp_path / "data"
    return write(
        path,
        [
            row(i, split="train" if i < 3 else "val", images={"ct": picture(path, f"ct/{i}.png", i)}, text=f"text {i}")
            for i in range(4)
        ],
    )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_counts(folder):
    found = contents(Manifest(folder, 16))
    assert found.records == {"train": 3, "val": 1, "test": 0} and found.subjects == 4
    assert found.streams == {"ct": 4, "text": 4}
    assert (
        found == contents(Manifest(folder, 16)) and found.fingerprint != contents(Phantom(16, 0, 4, 0, 0)).fingerprint
    )


def test_a_place_is_not_contents(folder, tmp_path):
    before = contents(Manifest(folder, 16))
    shutil.copytree(folder, tmp_path / "elsewhere" / "other name")
    assert contents(Manifest(tmp_path / "elsewhere" / "other name", 16)) == before
    # One folder of several, whose parent moves.
    assert contents(Manifest(tmp_path / "elsewhere", 16)).parts["texts and files"] == before.parts["texts and files"]


@pytest.mark.parametrize(
    ("change", "kinds", "counts"),
    [
        (lambda rows, _: rows.pop(0), "other ids, subjects, splits, streams, texts and files", "train 3 -> 2 records"),
        (lambda rows, _: rows[0].update(text="another"), "other texts and files", "train 3 -> 3 records"),
        (lambda rows, _: rows[0].update(id="x"), "other ids", "4 -> 4 subjects"),
        (lambda rows, _: rows[1].update(subject="s0"), "other subjects", "4 -> 3 subjects"),
        (
            lambda rows, _: rows[0].update(split="test"),
            "other splits",
            "train 3 -> 2 records, val 1 -> 1 records, test 0",
        ),
        (lambda rows, _: rows[0].update(images={}), "other streams, texts and files", "4 -> 4 subjects"),
        (lambda _, folder: (folder / "ct/1.png").write_bytes(b"longer than it was " * 9), "other texts and files", ""),
        (lambda rows, _: rows.reverse(), "other ids, subjects, splits, texts and files", ""),
    ],
)
def test_what_changes_is_named(change, kinds, counts, folder):
    before = contents(Manifest(folder, 16))
    rows = rows_of(folder)
    change(rows, folder)
    write(folder, rows)
    now = contents(Manifest(folder, 16))
    assert now.fingerprint != before.fingerprint
    said = changes(before.plain(), now)
    assert said.endswith("; " + kinds) and counts in said
    assert "text 0" not in said and "s0" not in said  # nobody's words, nobody's name


def test_a_source_that_says_nothing_of_itself_has_its_texts_read():
    def source(*texts):
        records = [Record(f"r{i}", f"s{i}", "train", ("text", "ct")) for i in range(len(texts))]
        return SimpleNamespace(name="x", open=True, records=records, read=lambda i, stream, rng: texts[i])

    one, same, other = (contents(source(*t)) for t in (("a", "bc"), ("a", "bc"), ("ab", "c")))
    assert one == same and one.parts["texts and files"] != other.parts["texts and files"]
    contents(source("a lone surrogate \ud800"))  # no concern of this file


def test_the_phantom_is_what_its_config_says():
    config = micro("text_ct")
    one = contents_of(config)
    assert one == contents_of(micro("align", "text_ct,tiny")) and one.records == {"train": 96, "val": 32, "test": 16}
    config.data.train = 97
    assert contents_of(config).fingerprint != one.fingerprint
    config = micro("text_ct")
    config.seed = 1
    assert contents_of(config).fingerprint != one.fingerprint
