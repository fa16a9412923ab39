"""Files: strict safetensors, safe pickles, shards, folders written whole or not at all, memory near one tensor."""

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from medm2g_jax.convert import converted, files, rules
from medm2g_jax.convert.files import Output, Tensor, open_tensors, weights_in, write_safetensors
from medm2g_jax.errors import UserError

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float16),
    "c": np.array(7, np.int64),
}


@pytest.fixture
def good(tmp_path):
    save_file(ARRAYS, tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def test_reads_what_safetensors_wrote_and_writes_what_it_reads(good, tmp_path):
    found = open_tensors(good)
    assert {k: t.shape for k, t in found.items()} == {k: v.shape for k, v in ARRAYS.items()}
    for key, value in ARRAYS.items():
        np.testing.assert_array_equal(found[key].read(), value)
    outputs = {k: Output(t.shape, t.dtype, t.read) for k, t in found.items()}
    prints = write_safetensors(tmp_path / "again.safetensors", outputs, {"format": "pt"})
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == ARRAYS.keys() == prints.keys()
    assert all(np.array_equal(again[k], v) and again[k].dtype == v.dtype for k, v in ARRAYS.items())


def test_bfloat16_needs_no_torch_tensor(tmp_path):
    from safetensors.torch import save_file as save_torch

    save_torch({"x": torch.tensor([1.5, -2.0]).bfloat16()}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(open_tensors(tmp_path / "x.safetensors")["x"].read().astype(np.float32), [1.5, -2])
    torch.save({"x": torch.tensor([1.5, -2.0]).bfloat16()}, tmp_path / "x.bin")
    np.testing.assert_array_equal(open_tensors(tmp_path / "x.bin")["x"].read().astype(np.float32), [1.5, -2])


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def with_header(path: Path, header: dict, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_damaged_safetensors_are_refused(good, tmp_path):
    raw = good.read_bytes()
    bad = tmp_path / "bad.safetensors"

    def refused(content: bytes, message: str):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_tensors(bad)

    refused(raw[:-5], "truncated: its header promises")
    refused(raw[:20], "its first 8 bytes give a header")
    refused(b"", "its first 8 bytes give a header")
    refused(raw + b"more", "do not fill")
    flipped = bytearray(raw)
    flipped[7] ^= 0x40  # the header's length
    refused(bytes(flipped), "its first 8 bytes give a header")
    for at in range(8, 8 + struct.unpack("<Q", raw[:8])[0]):
        flipped = bytearray(raw)
        flipped[at] ^= 1
        bad.write_bytes(bytes(flipped))
        try:  # a flipped letter of a name is a name, and no table knows it; anything else is noticed here
            found = open_tensors(bad)
        except UserError:
            continue
        assert set(found) != set(ARRAYS)
    header, data = header_of(good)
    first = next(k for k in header if k != "__metadata__")
    for change in (
        {"shape": [3, 5]},
        {"dtype": "F99"},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [-4, 44]},
        {"shape": "34"},
        {"data_offsets": None},
    ):
        with_header(bad, {**header, first: header[first] | change}, data)
        with pytest.raises(UserError, match="damaged|truncated|dtype F99"):
            open_tensors(bad)
    # Two tensors over the same bytes.
    twice = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    with_header(bad, twice | {"b": twice["a"]}, bytes(8))
    with pytest.raises(UserError, match="do not fill"):
        open_tensors(bad)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo gotcha > {self.path}",)


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.pth"])
def test_malicious_pickles_run_nothing(tmp_path, name):
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Evil(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(UserError, match=r"refused: it asks for (posix|os)\.system\. A pickle can run any program"):
        open_tensors(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError):
        open_tensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    (tmp_path / name).write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError):
        open_tensors(tmp_path / name)


def test_lightning_callbacks_are_inert(tmp_path, monkeypatch):
    """Checkpoints of Stable Diffusion's own training name callback classes, as keys of a dict."""
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    packages = ("pytorch_lightning", "pytorch_lightning.callbacks")
    with monkeypatch.context() as patch:
        for package in packages:
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, module.__name__, module)
        state = {"callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.1)}}}
        torch.save(state | {"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "sd.ckpt")
    assert module.__name__ not in sys.modules
    found = open_tensors(tmp_path / "sd.ckpt")
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"].read(), [1, 1])


def test_old_torch_files_and_other_contents(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_tensors(tmp_path / "old.pth")["a"].read(), [1, 1])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a dict of tensors, found list"):
        open_tensors(tmp_path / "list.pth")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(UserError, match="expected .safetensors"):
        open_tensors(tmp_path / "x.npz")
    with pytest.raises(UserError, match="no such file"):
        open_tensors(tmp_path / "nothing.bin")


def shards(folder: Path, names=("m-1.safetensors", "m-2.safetensors")) -> Path:
    weight_map = {}
    for name, key in zip(names, ("a", "b"), strict=True):
        weight_map[key] = name
        if "/" not in name and ".." not in name:
            save_file({key: ARRAYS[key]}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path):
    assert set(open_tensors(shards(tmp_path))) == {"a", "b"} and weights_in(tmp_path, "model").name.endswith("json")
    half = tmp_path / "half"
    half.mkdir()
    shards(half).rename(half / "model.safetensors.index.fp16.json")
    assert set(open_tensors(weights_in(half, "model"))) == {"a", "b"}
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(UserError, match="shard m-2.safetensors of 2 is not there"):
        open_tensors(tmp_path / "model.safetensors.index.json")
    save_file({"c": ARRAYS["a"]}, tmp_path / "m-2.safetensors")
    with pytest.raises(UserError, match="names other keys: b, c"):
        open_tensors(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/m.safetensors", "a/../../m.safetensors", "..\\m", "C:\\m"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="leaves the folder; not a file to trust"):
        open_tensors(shards(tmp_path, ("m-1.safetensors", name)))


def step(name: str, make, shape=(2,)) -> rules.Step:
    tensor = Tensor(shape, np.dtype(np.float32), make, Path("source/x.safetensors"))
    return rules.Step(name, tensor, lambda x: x, shape)


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def fails():
        raise KeyboardInterrupt

    steps = [step("a", lambda: np.zeros(2, np.float32)), step("b", fails)]
    meta = dict(source="x", licence="MIT", net={})
    with pytest.raises(KeyboardInterrupt):
        converted.write(tmp_path / "w", "sd15", steps, meta)
    assert list((tmp_path / "w").iterdir()) == [] and not converted.exists(tmp_path / "w", "sd15")
    # Killed: the unfinished folder stays under a name that nothing loads, and the next conversion removes it.
    (tmp_path / "w" / ".sd15.partial").mkdir()
    (tmp_path / "w" / ".sd15.partial" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="no converted weights there"):
        converted.read(tmp_path / "w", "sd15")
    converted.write(tmp_path / "w", "sd15", steps[:1], meta)
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["sd15"]
    with pytest.raises(UserError, match="exists; delete it"):
        converted.write(tmp_path / "w", "sd15", steps[:1], meta)
    np.testing.assert_array_equal(converted.read(tmp_path / "w", "sd15").tensors["a"].read(), [0, 0])


def test_a_full_disk_is_said_in_one_line(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="writing failed:.*No space left on device; make room"):
        converted.write(tmp_path / "w", "sd15", [step("a", full)], dict(source="x", licence="MIT", net={}))
    assert list((tmp_path / "w").iterdir()) == []


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """64 tensors of 2 MB, transposed on the way: the peak is a few of them, not 128 MB."""
    big = {f"k{i}": np.full((1024, 512), i, np.float32) for i in range(64)}
    save_file(big, tmp_path / "big.safetensors")
    del big
    tracemalloc.start()
    found = open_tensors(tmp_path / "big.safetensors")
    table = [rules.Rule(f"k{i}", f"n{i}", rules.LINEAR) for i in range(64)]
    steps = rules.match(table, found, {f"n{i}": (512, 1024) for i in range(64)}, "big")
    converted.write(tmp_path, "sd15", steps, dict(source="x", licence="MIT", net={}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
    out = converted.read(tmp_path, "sd15").tensors
    assert out["n9"].shape == (512, 1024) and out["n9"].read()[3, 5] == 9


def test_the_engine_reads_both_ways_and_takes_every_key_once():
    def told(shape):
        return Tensor(shape, np.dtype(np.float32), lambda: np.arange(np.prod(shape)).reshape(shape), Path("x"))

    table = rules.layer("conv", "c", "conv") + rules.layer("p", "p", "point") + rules.layer("n", "n", "norm")
    found = {"conv.weight": told((5, 3, 2, 4)), "conv.bias": told((5,)), "p.weight": told((6, 7, 1, 1))}
    found |= {"p.bias": told((6,)), "n.weight": told((3,)), "n.bias": told((3,))}
    expected = {"c/kernel": (2, 4, 3, 5), "c/bias": (5,), "p/kernel": (7, 6), "p/bias": (6,), "n/scale": (3,)}
    expected["n/bias"] = (3,)
    steps = rules.match(table, found, expected, "x")
    for s in steps:
        assert s.apply(s.tensor.read()).shape == s.shape == expected[s.name]
    ours = {s.name: Tensor(s.shape, s.tensor.dtype, lambda s=s: s.apply(s.tensor.read()), Path("y")) for s in steps}
    for s in rules.back(table, ours, "x"):
        np.testing.assert_array_equal(s.apply(s.tensor.read()), found[s.name].read())
    with pytest.raises(UserError, match="x: n/more has no place in this format"):
        rules.back(table, ours | {"n/more": ours["n/bias"]}, "x")
    with pytest.raises(ValueError, match="no rule for q/kernel"):
        rules.match(table, found, expected | {"q/kernel": (1,)}, "x")
    assert files.some(list("abcdefghi"), 2) == "a, b and 7 more"


def test_nests_and_wrappers_are_taken_off(tmp_path):
    """What Lightning, DeepSpeed, torch.compile, DataParallel and training programs put around a network's own keys."""
    state = {"encoder.a.weight": torch.ones(2), "decoder.b.weight": torch.zeros(3)}

    def keys(name="x.pth"):
        return set(files.open_published(tmp_path / name, "encoder.a.weight"))

    for nest in ("state_dict", "module", "model", "model_state_dict"):
        torch.save({nest: state, "epoch": 3, "step": torch.tensor(4)}, tmp_path / "x.pth")
        assert keys() == set(state)
    torch.save(
        {"model": {"state_dict": state}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "x.pth"
    )
    assert keys() == set(state)
    for front in ("_orig_mod.", "module.", "model.", "module._orig_mod.", "model._orig_mod.", "net.student."):
        torch.save({f"{front}{k}": v for k, v in state.items()}, tmp_path / "x.pth")
        assert keys() == set(state)
        save_file({f"{front}{k}": v.numpy() for k, v in state.items()}, tmp_path / "x.safetensors")
        assert keys("x.safetensors") == set(state)
    torch.save(
        {k.replace(".", "._orig_mod.", 1): v for k, v in state.items()} | {"model.c": torch.ones(1)}, tmp_path / "x.pth"
    )
    assert keys() == {*state, "model.c"}  # and no more than that
    for twice, words in (
        (state | {"module.encoder.a.weight": torch.ones(2)}, "encoder.a.weight stands there twice"),
        ({f"{w}.{k}": v for w in ("ema", "model") for k, v in state.items()}, "2 networks, behind 'ema.', 'model.'"),
    ):
        torch.save(twice, tmp_path / "x.pth")
        with pytest.raises(UserError, match=words):
            keys()
    torch.save({"weights_of_mine": state, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"found dict with 'weights_of_mine', 'epoch'.*torch.save\(model.state_dict"):
        keys()
    torch.save({"module": state, "args": Evil(tmp_path / "ran")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="refused: it asks for"):
        keys()
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="a is of dtype complex64; known are"):
        keys()


def test_a_conversion_loads_its_own_result_or_leaves_nothing(tmp_path, monkeypatch):
    """Bytes that change on their way to the disk, and a tokenizer that loses a file on its own."""
    from medm2g_jax.data.text import Tokenizers

    Tokenizers.train(["no mass ."], tmp_path / "tok", 600)
    size = Tokenizers.load(tmp_path / "tok").sizes["gpt2"]
    meta = dict(source="x", licence="MIT", net={}, vocab=dict(gpt2=size))
    steps, given = [step("a", lambda: np.zeros(2, np.float32))], {"gpt2": tmp_path / "tok" / "gpt2"}
    made = converted.write(tmp_path / "good", "optimus", steps, meta, given)
    assert "read back: 1 tensors, gpt2 tokenizer" in str(made)

    def flipped(path, outputs, metadata):
        prints = write_safetensors(path, outputs, metadata)
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        return prints

    with monkeypatch.context() as patch:
        patch.setattr(converted, "write_safetensors", flipped)
        with pytest.raises(UserError, match="a does not read back as it was written"):
            converted.write(tmp_path / "w", "optimus", steps, meta, given)
    with monkeypatch.context() as patch:
        patch.setattr(converted, "TOKENIZER_FILES", ("tokenizer_config.json", "vocab.json"))
        (tmp_path / "tok" / "gpt2" / "vocab.json").write_text("{}")
        with pytest.raises(UserError, match="no tokenizer there"):
            converted.write(tmp_path / "w", "optimus", steps, meta, given)
    for vocab in (size - 1, size + 1):
        with pytest.raises(
            UserError, match=f"tok/gpt2: its gpt2 tokenizer has {size} ids, its network rows for {vocab}"
        ):
            converted.write(tmp_path / "w", "optimus", steps, meta | dict(vocab=dict(gpt2=vocab)), given)
    (tmp_path / "tok" / "gpt2" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tok/gpt2/tokenizer.json: not a tokenizer file"):
        converted.write(tmp_path / "w", "optimus", steps, meta, given)
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())
