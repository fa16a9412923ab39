import collections
import itertools
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from medm2g_jax.data import pipeline
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.pipeline import Rows, batches, fixed, matching, share_a_grid, texts
from medm2g_jax.data.source import Record
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

LENGTHS = {"clip": 12, "bert": 16, "gpt2": 16}
MRI = ("mri", "mri:t1", "mri:t2")
MRI_STREAMS = MODALITIES["mri"].streams


class Fake:
    """Pixels and words name the record and the stream that they come from, and the rng that was handed in."""

    name, open = "fake", True

    def __init__(self, *streams: tuple[str, ...], splits: tuple[str, ...] = ("train",), grids: dict | None = None):
        grid = lambda i: grids[i] if grids and i in grids else ()  # noqa: E731
        self.records = [Record(str(i), str(i), splits[i % len(splits)], s, grid=grid(i)) for i, s in enumerate(streams)]
        self.streams = sorted({stream for s in streams for stream in s})

    def read(self, index, stream, rng):
        assert stream in self.records[index].streams
        if stream == "text":
            return f"report {index} words {rng.integers(10)}"
        return np.full((4, 4, 1), index / 100 + self.streams.index(stream) / 10_000, np.float32)

    def source_of(self, pixels):
        """(record, stream) of each row."""
        number = np.round(pixels[:, 0, 0, 0] * 10_000).astype(int)
        return [(n // 100, self.streams[n % 100]) for n in number]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return Tokenizers.train([f"report {i} words" for i in range(50)], tmp_path_factory.mktemp("tok"), 700)


def take(iterator, count):
    got = list(itertools.islice(iterator, count))
    iterator.close()
    return got


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_record_once_an_epoch_in_a_new_order():
    source = Fake(*[("ct",)] * 12)
    got = take(batches(source, Rows(require=("ct",)), "train", 4, 3, size=4), 9)
    order = [i for batch in got for i, _ in source.source_of(batch["ct"])]
    epochs = [order[:12], order[12:24], order[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert got[0]["ct"].dtype == np.float32 and got[0]["ct"].shape == (4, 4, 4, 1)
    other = take(batches(source, Rows(require=("ct",)), "train", 12, 4, size=4), 1)[0]
    assert [i for i, _ in source.source_of(other["ct"])] != epochs[0]


def test_the_same_from_any_start_and_on_any_number_of_hosts(tokenizers):
    source = Fake(*[("text", "ct", *MRI)] * 7, *[("text", "xray")] * 3)
    rows = Rows(require=("text",), prompts=("mri", "xray"))
    options = {"size": 4, "tokenizers": tokenizers, "lengths": LENGTHS}
    whole = take(batches(source, rows, "train", 8, 5, **options), 9)
    same(whole[6:], take(batches(source, rows, "train", 8, 5, start=6, **options), 3))
    for hosts in (2, 4):
        parts = [
            take(batches(source, rows, "train", 8, 5, start=2, process=(k, hosts), **options), 3) for k in range(hosts)
        ]
        same(whole[2:5], [jax.tree.map(lambda *x: np.concatenate(x), *blocks) for blocks in zip(*parts, strict=True)])
    words = [tokenizers.decode(ids) for batch in whole for ids in batch["text"]["gpt2"]]
    assert len(set(words)) > 20  # the paraphrase is drawn anew in each epoch, from (seed, row)


def test_a_far_start_costs_nothing():
    source = Fake(*[("ct",)] * 1000)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        batch = take(batches(source, Rows(require=("ct",)), "train", 32, 0, size=4, start=1_000_000), 1)[0]
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5
    assert len({i for i, _ in source.source_of(batch["ct"])}) == 32


def test_streams_are_stated_and_the_bare_one_is_drawn_for_one_row_in_five():
    source = Fake(MRI, ("mri",), ("mri:t1", "mri:pd"))
    count = collections.Counter()
    for batch in take(batches(source, Rows(require=("mri",)), "train", 300, 1, size=4), 10):
        drawn = source.source_of(batch["mri"])
        streams = ("mri", "mri:t1", "mri:t2", "mri:pd", "mri:flair", "mri:t1ce")
        assert [streams[i] for i in batch["about"]["stream"]["mri"]] == [stream for _, stream in drawn]
        count.update(drawn)
    assert batch["about"]["stream"]["mri"].dtype == np.int32
    assert count[0, "mri"] / 1000 == pytest.approx(0.2, abs=0.04)
    assert count[0, "mri:t1"] / 1000 == pytest.approx(0.4, abs=0.05)
    assert count[1, "mri"] == 1000
    assert count[2, "mri:pd"] / 1000 == pytest.approx(0.5, abs=0.05)


def test_prompts_absent_ones_are_zero_and_marked(tokenizers):
    source = Fake(("text", "ct"), ("text", "xray", "ct"), ("text",), ("ct",))
    options = {"size": 4, "tokenizers": tokenizers, "lengths": LENGTHS}
    rows = Rows(require=("text",), prompts=("xray", "ct"))
    assert list(matching(source, rows, "train")) == [0, 1]
    batch = fixed(source, rows, "train", 9, 0, **options)
    about = batch["about"]
    assert len(about["present"]["ct"]) == 2 and about["present"]["ct"].all() and "stream" not in about
    has = about["present"]["xray"]
    assert has.dtype == bool and sorted(has) == [False, True]
    assert (about["prompt"]["xray"][~has] == 0).all() and (about["prompt"]["xray"][has] > 0).all()

    batch = fixed(source, Rows(require=("ct",), prompts=("text", "xray")), "train", 9, 0, **options)
    assert batch["about"]["present"]["text"].all()
    batch = fixed(Fake(("xray",), ("xray", "ct")), Rows(("xray",), prompts=("text", "ct")), "train", 9, 0, **options)
    same({name: ids[0] for name, ids in batch["about"]["prompt"]["text"].items()}, tokenizers.encode("", LENGTHS))


def test_a_prompt_of_the_target_is_another_stated_contrast():
    source = Fake(MRI, ("ct", *MRI), ("ct", "mri"), ("mri", "mri:t1"))
    rows = Rows(require=("mri",), prompts=("ct", "mri"))
    assert list(matching(source, rows, "train")) == [0, 1, 2]  # a lone stated contrast has nothing to be prompted with
    seen = collections.Counter()
    for batch in take(batches(source, rows, "train", 60, 2, size=4), 10):
        about = batch["about"]
        targets, prompts = source.source_of(batch["mri"]), source.source_of(about["prompt"]["mri"])
        for (record, target), (_, prompt), mri, ct in zip(
            targets, prompts, about["present"]["mri"], about["present"]["ct"], strict=True
        ):
            assert mri == (target != "mri") and ct == (record > 0)
            assert not mri or {target, prompt} == {"mri:t1", "mri:t2"}
            seen[record, target] += 1
    assert seen[0, "mri"] == 0 and seen[1, "mri"] > 0 and seen[2, "mri"] == 200


def test_rows_say_which_of_their_sources_lie_on_the_targets_grid():
    """Never the target's own stream, nothing of a record that does not say so, and only of what guides it."""
    held = ("ct", *MRI, "mri:pd")
    source = Fake(held, held, held, ("ct",), grids={1: ("mri:t1", "mri:t2"), 2: held})
    rows = Rows(require=("ct", "mri"), contrasts=("mri",), others=2, registered=("ct", "mri"))
    seen = collections.Counter()
    for batch in take(batches(source, rows, "train", 60, 2, size=4), 10):
        about = batch["about"]
        others = about["others"]["mri"]
        for i, (record, target) in enumerate(source.source_of(batch["mri"])):
            partner, near = about["grid"]["mri"]["partner"][i], about["grid"]["mri"]["others"][i]
            streams = [MRI_STREAMS[k] for k in others["stream"][i]]
            assert all(near <= others["has"][i]) and target not in np.asarray(streams)[near]
            assert partner == (record == 2 and about["partner"]["mri"][i])
            assert about["grid"]["ct"]["partner"][i] == (record == 2)  # whatever guides the MRI
            if record == 1:
                pair = [{s, target} == {"mri:t1", "mri:t2"} for s in streams]
                assert list(near) == list(others["has"][i] & pair)
            elif record == 2:
                assert list(near) == list(others["has"][i])
            else:
                assert not near.any()
            # Beside the MRI any of its other contrasts guide the CT; on its grid they are where the record says so.
            beside = about["beside"]["ct"][i]
            assert all(beside <= others["has"][i])
            assert list(about["grid"]["ct"]["beside"][i]) == list(beside & (record == 2))
            seen["beside", int(others["has"][i].sum()), int(beside.sum())] += 1
            seen[record, bool(partner), bool(near.any())] += 1
    assert all(seen["beside", n, k] for n in (1, 2) for k in range(n + 1))
    assert all(seen[2, a, b] for a, b in ((True, True), (True, False), (False, True))) and seen[1, False, True]
    assert share_a_grid(Fake(held, grids={0: held}), ("ct", "mri"), "train")
    assert not share_a_grid(source, ("ct", "mri:t1"), "train") and not share_a_grid(source, ("xray",), "train")
    assert share_a_grid(Fake(held, ("ct",), grids={0: ("mri:t1", "ct")}), ("ct", "mri:t1"), "train")


def test_any_of_draws_evenly_among_all_streams():
    source = Fake(("ct", "mri:t1", "mri:t2", "text"), ("xray",))
    rows = Rows(any_of=("ct", "xray", "mri"), merge="image")
    count = collections.Counter()
    for batch in take(batches(source, rows, "train", 200, 0, size=4), 9):
        assert set(batch) == {"image"}
        count.update(source.source_of(batch["image"]))
    assert count[1, "xray"] == 900
    for stream in ("ct", "mri:t1", "mri:t2"):
        assert count[0, stream] / 900 == pytest.approx(1 / 3, abs=0.05)


def test_fixed_never_repeats_and_a_small_count_begins_a_large_one():
    source = Fake(*[("ct",)] * 20, splits=("train", "val"))
    rows = Rows(require=("ct",))
    large = fixed(source, rows, "val", 100, 7, size=4)
    assert sorted(i for i, _ in source.source_of(large["ct"])) == list(range(1, 20, 2))
    same(jax.tree.map(lambda x: x[:4], large), fixed(source, rows, "val", 4, 7, size=4))


def test_splits_never_mix():
    source = Fake(*[("ct",)] * 30, splits=("train", "val", "test"))
    batch = take(batches(source, Rows(require=("ct",)), "test", 30, 0, size=4), 1)[0]
    assert {i % 3 for i, _ in source.source_of(batch["ct"])} == {2}


def test_errors_say_what_is_there_and_what_is_needed():
    source = Fake(("text", "ct"), ("text", "ct"), ("ct", "mri:t1"), splits=("train",))
    with pytest.raises(UserError, match=r"'fake'.*'train'.* text and any of xray; its 3 .*ct 3, mri:t1 1, text 2"):
        matching(source, Rows(require=("text",), prompts=("xray",)), "train")
    with pytest.raises(UserError, match="another mri"):
        matching(source, Rows(require=("mri",), prompts=("mri",)), "train")
    with pytest.raises(UserError, match="hold nothing"):
        batches(source, Rows(require=("ct",)), "val", 2, 0, size=4)
    with pytest.raises(UserError, match="batch size 7 does not divide by 3 hosts; 6 or 9 does"):
        batches(source, Rows(require=("ct",)), "train", 7, 0, size=4, process=(0, 3))
    with pytest.raises(ValueError, match="tokenizers"):
        batches(source, Rows(require=("text",)), "train", 2, 0, size=4)


def test_a_broken_image_reaches_the_caller_as_the_error_it_is(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    row = {"id": "one", "subject": "s", "split": "train", "images": {"ct": "a.png"}}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    stream = batches(Manifest(tmp_path, 8), Rows(require=("ct",)), "train", 2, 0, size=8)
    with pytest.raises(UserError, match="'one'.*a.png"):
        next(stream)


def test_texts_for_the_tokenizers_are_those_of_the_split():
    source = Fake(("text",), ("text", "ct"), ("ct",), ("text",), splits=("train", "val"))
    assert [text.split()[1] for text in texts(source, "train", 0)] == ["0"]
    assert [text.split()[1] for text in texts(source, "val", 0)] == ["1", "3"]
    source.open = False
    assert texts(source, "val", 0) == [".", "."]  # two subjects are too few for a word of theirs to be learned


def test_throughput(tokenizers):
    """The target is 2000 rows a second of 64 px with cached texts (measured figures are in the test's output)."""
    images = [np.random.default_rng(i).uniform(-1, 1, (64, 64, 1)).astype(np.float32) for i in range(64)]

    class InMemory(Fake):
        def read(self, index, stream, rng):
            return f"report {index} words" if stream == "text" else images[index]

    source = InMemory(*[("text", "ct")] * 64)
    options = {"size": 64, "tokenizers": tokenizers, "lengths": {"clip": 77, "bert": 128, "gpt2": 128}}
    stream = batches(source, Rows(require=("text", "ct")), "train", 32, 0, **options)
    next(stream)
    rate = 0.0
    for _ in range(6):  # the best of several: machines are shared
        begin = time.perf_counter()
        for _ in range(10):
            next(stream)
        rate = max(rate, 320 / (time.perf_counter() - begin))
    stream.close()
    print(f"\n{rate:.0f} rows a second")
    assert rate > 400  # five times below what an idle core does


def test_importing_the_pipeline_is_light():
    code = "import sys, medm2g_jax.data.pipeline, medm2g_jax.data.manifest; print([m for m in ('torch', 'tensorflow', "
    code += "'transformers', 'tensorflow_datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_share_of_bare_rows_is_what_the_design_says():
    assert pipeline.BARE == 0.2
