"""Several data sets as one: whose records are whose, and how often each is drawn."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from test_manifest import RNG, deep, picture, row, write

from medm2g_jax.data import draw
from medm2g_jax.data.contents import contents
from medm2g_jax.data.draw import BLOCK, at_random, in_turn
from medm2g_jax.data.mixture import split
from medm2g_jax.data.open import open_source
from medm2g_jax.data.pipeline import Rows, batches, fixed
from medm2g_jax.data.source import Source, labeller, picture_of, steady
from medm2g_jax.errors import UserError

OPTIONS = dict(size=8, seed=0, pairs=(("text", "ct"),), template_text=False, phantom=dict(train=3, val=1, test=1))


@pytest.fixture
def spec(tmp_path):
    """a: an X-ray of 12 bits and a CT; b: three X-rays of 10 bits."""
    images = {"xray": deep(tmp_path, "12.png", np.full((8, 8), 4095)), "ct": picture(tmp_path, "ct.png", 51)}
    write(tmp_path / "a", [row(0, images={k: f"../{v}" for k, v in images.items()}, text="of a")])
    name = deep(tmp_path, "10.png", np.full((8, 8), 1023))
    write(tmp_path / "b", [row(i, images={"xray": f"../{name}"}, license="unclear") for i in range(3)])
    return f"manifest:{tmp_path / 'a'}+manifest:{tmp_path / 'b'}"


def test_specs():
    assert split("phantom+manifest:a+tfds:b") == ["phantom", "manifest:a", "tfds:b"]
    assert split("manifest:/data/a+b") == ["manifest:/data/a+b"] and split("manifest:a+phantoms") == [
        "manifest:a+phantoms"
    ]
    assert split("manifest:a+phantom") == ["manifest:a", "phantom"]


def test_records_are_those_of_all_parts(spec, tmp_path):
    source = open_source(f"{spec}+phantom", **OPTIONS)
    assert isinstance(source, Source) and source.name == "a+b+phantom" and not source.open
    assert [r.id for r in source.records][:4] == ["a/r0", "b/r0", "b/r1", "b/r2"]
    assert source.records[1].subject == "b/s0" != source.records[0].subject  # s0 of a is another person
    assert source.read(0, "text", RNG) == "of a" and len(source.records) == 9
    source.check(tmp_path / "cache.json", print)
    assert {f.name for f in tmp_path.glob("cache*")} == {"cache.0.json", "cache.1.json"}
    for index in (0, 3):  # each over its own set's range
        np.testing.assert_allclose(source.read(index, "xray", RNG), 1, atol=1e-6)
    assert source.ranges == {} and picture_of(source, 3, "xray").span == (0, 1023)
    assert source.entry(3, "xray")["images"].endswith("10.png") and source.entry(8, "ct") is None
    alike = [(source, 4), (open_source("phantom", **OPTIONS), 0)]
    assert len({s.read(i, "text", np.random.default_rng(0)) for s, i in alike}) == 1
    assert source.licences["unclear"] == 3 and labeller(source) is None
    assert steady(source, "xray") and steady(source, "ct") == steady(open_source("phantom", **OPTIONS), "ct")
    prints = {contents(open_source(s, **OPTIONS)).fingerprint for s in (spec, f"{spec}+phantom", spec.split("+")[0])}
    assert len(prints) == 3
    assert contents(source) == contents(open_source(f"{spec}+phantom", **OPTIONS))


def test_ranges_hold_for_the_parts_that_have_the_stream(spec):
    source = open_source(spec, **OPTIONS, range="ct=0:10,xray=0:8190")
    source.check(None, print)
    np.testing.assert_allclose(source.read(0, "xray", RNG), 0, atol=1e-3)
    assert source.ranges == {"xray": (0, 8190)}
    with pytest.raises(UserError, match=r"data range of 'mri': a\+b has images of ct, xray"):
        open_source(spec, **OPTIONS, range="mri=0:1")


def test_images_are_as_wide_as_in_any_part(spec, tmp_path):
    for part, mm in (("a", 1), ("b", 3)):
        (one, *rest) = (tmp_path / part / "manifest.jsonl").read_text().splitlines()
        said = json.dumps(json.loads(one) | {"spacing": {"xray": [mm, 0.5]}})
        (tmp_path / part / "manifest.jsonl").write_text("\n".join([said, *rest]))
    assert open_source(spec, **OPTIONS).extents == {"xray": (8, 24)}


def test_wrong_parts_and_weights(spec, tmp_path):
    with pytest.raises(UserError, match=r"weights: expected a number above 0 for each of data.source's 2 .*\(1.0,\)"):
        open_source(spec, **OPTIONS, weights=(1.0,))
    with pytest.raises(UserError, match="data.source's 1 "):
        open_source("phantom", **OPTIONS, weights=(0.5, 0.5))
    with pytest.raises(UserError, match="found .0, 1"):
        open_source(spec, **OPTIONS, weights=(0, 1))
    with pytest.raises(UserError, match="nowhere: no manifest.jsonl"):
        open_source(f"{spec}+manifest:{tmp_path / 'nowhere'}", **OPTIONS)
    for name in ("12.png", "10.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a: 1 of 2 images .*12.png.*; data b: 3 of 3 images .*10.png"):
        open_source(spec, **OPTIONS).check(None, print)


def mixed(*sizes, weights=None):
    ends = np.cumsum(sizes)
    shares = weights and list(zip(ends.tolist(), weights, strict=True))
    return SimpleNamespace(name="mixed", open=True, records=[], read=str, shares=shares), np.arange(ends[-1])


def test_weights_hold_to_the_row_and_each_part_goes_round(monkeypatch):
    monkeypatch.setattr(draw, "BLOCK", 100)
    source, index = mixed(50, 7, 300, weights=(0.6, 0.3, 0.1))
    record = in_turn(source, index, 3)
    rows = [record(row) for row in range(1000)]
    assert [record(row) for row in reversed(range(1000))] == rows[::-1]  # whatever was asked before
    for begin in range(0, 1000, 100):
        assert [Counter(np.searchsorted([50, 57], rows[begin : begin + 100], "right"))[p] for p in range(3)] == [
            60,
            30,
            10,
        ]
    small = [r for r in rows if 50 <= r < 57]
    assert all(len(set(small[i : i + 7])) == 7 for i in range(0, 294, 7)) and small[:7] != small[7:14]
    assert (
        len({r for r in rows if r < 50}) == 50 and len({r for r in rows if r >= 57}) == 100
    )  # none twice: 300 are there
    assert [*map(in_turn(source, index, 4), range(100))] != rows[:100]


def test_shares_are_of_the_parts_that_have_something():
    source, index = mixed(5, 5, 5, weights=(1.0, 8.0, 1.0))
    record = in_turn(source, index[[0, 1, 12]], 0)
    assert Counter(map(record, range(BLOCK))) == {0: 2500, 1: 2500, 12: 5000}
    rng = np.random.default_rng(0)
    draw_one = at_random(source, index)
    drawn = Counter(draw_one(rng) // 5 for _ in range(500))
    assert drawn[1] > 350 and len(drawn) == 3
    tiny, all_of = mixed(2, 2, weights=(1e-9, 1.0))
    assert sum(r < 2 for r in map(in_turn(tiny, all_of, 0), range(BLOCK))) == 1  # never none


def test_batches_and_held_out_rows(spec):
    rows = Rows(require=("xray",), identify=True)
    source = open_source(spec, **OPTIONS, weights=(0.9, 0.1))
    stream = batches(source, rows, "train", 100, 0, size=8)
    shares = np.mean([next(stream)["about"]["record"] == 0 for _ in range(3)])
    stream.close()
    assert 0.8 < shares < 0.97
    later = batches(source, rows, "train", 100, 0, size=8, start=2)
    again = batches(source, rows, "train", 100, 0, size=8)
    for _ in range(2):
        next(again)
    np.testing.assert_array_equal(next(later)["about"]["record"], next(again)["about"]["record"])
    later.close(), again.close()
    assert sorted(fixed(source, rows, "train", 4, 0, size=8)["about"]["record"]) == [0, 1, 2, 3]
