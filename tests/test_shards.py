"""Images in shards: the same pixels, the same bytes for the same records, and errors that name row and shard."""

import threading

import numpy as np
import pytest
from test_manifest import RNG, deep, picture, row, write

from medm2g_jax.data import shards
from medm2g_jax.data.contents import contents
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.shards import Shards, Writer, split_name
from medm2g_jax.errors import UserError


def test_names():
    assert split_name("shards/train-00003.array_record#17") == ("shards/train-00003.array_record", 17)
    for name in ("a.png", "a#3.png", "a.png#3", "a.array_record", "a.array_record#", "a.array_record#-1", "#1"):
        assert split_name(name) is None


def pack(folder, split, files, **options):
    with Writer(folder, split, **options) as writer:
        return [writer.add((folder / file).read_bytes()) for file in files]


@pytest.fixture
def folder(tmp_path):
    """Six rows, loose in `loose`, and packed in `packed`."""
    values = np.random.default_rng(0).integers(0, 4096, (6, 24, 16))
    files = [deep(tmp_path, f"{i}.png", v) for i, v in enumerate(values)]
    files[5] = picture(tmp_path, "5.jpg", 77)
    names = pack(tmp_path, "train", files, per_shard=2000)
    assert names[0].endswith("train-00000.array_record#0") and names[-1].startswith("shards/train-0000")
    assert len({name.partition("#")[0] for name in names}) > 2
    for form, images in (("loose", files), ("packed", names)):
        rows = [row(i, images={"xray": f"../{image}"}, text="t") for i, image in enumerate(images)]
        rows[1]["scale"] = {"xray": [1 / 4095, 0]}
        write(tmp_path / form, rows)
    return tmp_path


def test_packing_changes_no_pixel(folder):
    loose, packed = (Manifest(folder / form, 24) for form in ("loose", "packed"))
    for source in (loose, packed):
        source.check(folder / f"{source.name}.json")
    assert loose.ranges == packed.ranges == {"xray": (0, 4095)}
    for i in range(6):
        np.testing.assert_array_equal(loose.read(i, "xray", RNG), packed.read(i, "xray", RNG))
        np.testing.assert_array_equal(loose.picture(i, "xray").pixels, packed.picture(i, "xray").pixels)
    assert ".array_record#" in packed.picture(2, "xray").path
    assert packed.entry(0, "xray")["images"].endswith("shards/train-00000.array_record#0")
    assert contents(packed) == contents(Manifest(folder / "packed", 8))


def test_the_same_records_make_the_same_bytes(tmp_path):
    for name in "ab":
        with Writer(tmp_path / name, "val", per_shard=1000) as writer:
            assert [writer.add(bytes([i]) * 400) for i in range(5)][2] == "shards/val-00001.array_record#0"
    files = sorted(f.name for f in (tmp_path / "a" / "shards").iterdir())
    assert files == [f"val-0000{i}.array_record" for i in range(3)]
    for file in files:
        assert (tmp_path / "a/shards" / file).read_bytes() == (tmp_path / "b/shards" / file).read_bytes()


def test_a_killed_writer_leaves_no_shard_by_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, "train") as writer:
        writer.add(b"x")
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("shards/*.array_record"))
    with Writer(tmp_path, "train") as writer:
        name = writer.add(b"y")
    assert Shards().read(tmp_path / split_name(name)[0], 0) == b"y" and len(list(tmp_path.glob("shards/*"))) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="train-00000.array_record: cannot be written"):
        Writer(tmp_path / "file", "train").add(b"x")


def test_threads_share_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 2)
    with Writer(tmp_path, "train", per_shard=1) as writer:
        names = [split_name(writer.add(bytes([i]) * 50)) for i in range(8)]
    source, wrong = Shards(), []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 8, 60):
            if source.read(tmp_path / names[i][0], 0) != bytes([i]) * 50:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(source._readers) == 2


def test_what_is_not_there_is_said_when_the_set_is_opened(folder):
    (folder / "shards/broken.array_record").write_bytes(b"no shard " * 99)
    names = ["train-00009.array_record#0", "train-00000.array_record#99", "broken.array_record#0"]
    write(folder / "packed", [row(i, images={"xray": f"../shards/{name}"}) for i, name in enumerate(names)])
    with pytest.raises(UserError) as error:
        Manifest(folder / "packed", 8)
    parts = str(error.value).split("; ")
    assert "manifest.jsonl:1: row 'r0': no file " in parts[0] and parts[0].endswith("train-00009.array_record")
    assert "manifest.jsonl:2: row 'r1': " in parts[1] and "train-00000.array_record: no record 99" in parts[1]
    assert "row 'r2': " in str(error.value) and "broken.array_record: not a whole ArrayRecord file" in str(error.value)


def test_damaged_records_name_row_and_record(folder):
    shard = folder / "shards/train-00000.array_record"
    content = bytearray(shard.read_bytes())
    at = content.index(b"IDAT") + 40
    content[at] ^= 255
    shard.write_bytes(content)
    source = Manifest(folder / "packed", 8)
    with pytest.raises(UserError, match="row 'r0': .*train-00000.array_record: record 0 is damaged .*hash mismatch"):
        source.check()
    with Writer(folder, "other") as writer:
        name = writer.add(b"no picture")
    write(folder / "packed", [row(0, images={"xray": f"../{name}"})])
    with pytest.raises(UserError, match="row 'r0': .*other-00000.array_record#0: begins as none of PNG, JPEG, TIFF"):
        Manifest(folder / "packed", 8).read(0, "xray", RNG)
