"""Generated samples on disk: nothing of an earlier call is lost, and what cannot be written is said at once."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from medm2g_jax import cli
from medm2g_jax.data.write import NOTE, check_writable, write_samples
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated

CT = np.linspace(-1000, 400, 64, dtype=np.float32).reshape(1, 8, 8)


def made(**samples) -> Generated:
    return Generated({stream.replace("_", ":"): values for stream, values in samples.items()}, {}, 0)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "generated.json"}


def test_a_second_call_numbers_on_and_adds_its_record(tmp_path):
    folder = tmp_path / "a" / "out"
    check_writable(folder)
    assert not (tmp_path / "a").exists()  # a question, not a deed
    first = write_samples(folder, made(ct=np.repeat(CT, 2, 0), text=["one", "two"]), dict(seed=1))
    assert [p.name for p in first] == ["ct_000.png", "ct_001.png", "text_000.txt", "text_001.txt"]
    before = contents(folder)
    check_writable(folder)
    # Another stream alone: its number is the next of the folder, so that files of one number belong together.
    second = write_samples(folder, made(mri_t2=np.zeros((1, 8, 8)), ct=CT), dict(seed=2))
    assert [p.name for p in second] == ["mri-t2_002.png", "ct_002.png"]
    after = contents(folder)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 4
    records = json.loads((folder / "generated.json").read_text())
    assert [r["seed"] for r in records] == [1, 2] and all(r["note"] == NOTE for r in records)
    assert [r["files"] for r in records] == [[p.name for p in call] for call in (first, second)]
    assert Image.open(folder / "ct_002.png").text["Description"] == NOTE
    np.testing.assert_array_equal(np.load(folder / "ct_002.npy"), CT[0])


def test_draws_come_with_their_mean_and_deviation_and_say_what_made_them(tmp_path):
    x = np.stack([np.full((8, 8), v, np.float32) for v in (-100, 100, 300, 300)])
    of = Generated({"ct": x}, {"mri -> ct": "guide tokens"}, 5, draws=2)
    names = [p.name for p in write_samples(tmp_path, of, dict(seed=5, fingerprint="0badcafe"))]
    maps = ["ct-mean_000.png", "ct-mean_002.png", "ct-std_000.png", "ct-std_002.png"]
    assert names == [f"ct_{i:03d}.png" for i in range(4)] + maps
    np.testing.assert_array_equal(np.load(tmp_path / "ct-mean_002.npy"), x[2])
    np.testing.assert_allclose(np.load(tmp_path / "ct-std_000.npy"), np.std([-100, 100], ddof=1))
    about = Image.open(tmp_path / "ct-std_000.png").text
    said = "model 0badcafe, seed 5, sample 0, std of 2 draws"
    assert about["Window"] == "0.0 350.0" and about["Provenance"] == said
    assert Image.open(tmp_path / "ct_003.png").text["Provenance"] == "model 0badcafe, seed 5, sample 1, draw 1"
    (record,) = json.loads((tmp_path / "generated.json").read_text())
    assert record["pairs"] == of.pairs and record["make"] == ["ct"]
    best = Generated({"ct": x[:1]}, {}, 5, agreement=np.array([0.5]), kept=np.array([3]))
    assert [p.name for p in write_samples(tmp_path, best, dict(seed=5))] == ["ct_004.png"]
    assert Image.open(tmp_path / "ct_004.png").text["Provenance"] == "seed 5, sample 0, draw 3"
    record = json.loads((tmp_path / "generated.json").read_text())[1]
    assert record["agreement"] == [0.5] and record["kept"] == [3]


def test_the_record_of_an_earlier_version_is_kept(tmp_path):
    (tmp_path / "generated.json").write_text(json.dumps({"note": NOTE, "seed": 7, "files": ["ct_000.png"]}))
    write_samples(tmp_path, made(text=["one"]), dict(seed=8))
    assert [r["seed"] for r in json.loads((tmp_path / "generated.json").read_text())] == [7, 8]


def test_calls_at_once_take_turns(tmp_path):
    calls = [
        threading.Thread(target=write_samples, args=(tmp_path, made(text=[f"call {i}"]), dict(seed=i)))
        for i in range(12)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    records = json.loads((tmp_path / "generated.json").read_text())
    assert sorted(r["seed"] for r in records) == list(range(12))
    for record in records:
        assert (tmp_path / record["files"][0]).read_text() == f"call {record['seed']}\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text("x"), "expected a folder, found the file"),
        (lambda p: (p.mkdir(), (p / "generated.json").write_text("{")), "generated.json.*move it away"),
        (lambda p: (p.mkdir(), (p / "generated.json").write_text("[1]")), "generated.json.*expected records"),
        (lambda p: (p.mkdir(), (p / "generated.json").mkdir()), "generated.json.*IsADirectory"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_model_is_loaded(make, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medm2g_jax.loading.load", lambda *_, **__: pytest.fail("loaded first"))
    make(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper") if (tmp_path / "out").is_file() else (tmp_path / "out",):
        with pytest.raises(UserError, match=message):
            check_writable(out)
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", "--model", "x", "--make", "ct", "--out", str(out)])
        assert end.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_a_read_only_file_system_is_named(tmp_path):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match="out: cannot be written: Read-only file system"):
            check_writable(tmp_path / "out")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--count", "-2", "from 1"),
        ("--count", "0", "from 1"),
        ("--seed", str(2**64 - 1), "to 4294967295"),
        ("--seed", "-1", "from 0"),
        ("--steps", "0", "from 1 to 1000"),
        ("--steps", "1001", "from 1 to 1000"),
        ("--guidance", "nan", "a finite number from -1000 to 1000"),
        ("--guidance", "1e+308", "a finite number from -1000 to 1000"),
        ("--eta", "1.5", "from 0 to 1"),
        ("--eta", "nan", "from 0 to 1"),
        ("--draws", "0", "from 1 to"),
        ("--beams", "1000000", "from 1 to 100"),
        ("--best-of", "0", "from 1 to"),
        ("--guide-guidance", "nan", "a finite number"),
    ],
)
def test_numbers_out_of_range_are_one_line(option, value, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medm2g_jax.loading.load", lambda *_, **__: pytest.fail("loaded first"))
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--model", "x", "--make", "ct", "--out", str(tmp_path), f"{option}={value}"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {option}: expected ") and error.count("\n") == 1
    assert expected in error and f"found {value}" in error


def test_python_users_are_told_the_same():
    from medm2g_jax.inference import Model

    for name, value in dict(count=0, steps=1001, eta=-0.1, guidance=float("nan"), seed=2**32).items():
        with pytest.raises(UserError, match=f"^{name}: expected .*, found {value}"):
            Model.generate(None, {}, ["ct"], **{name: value})


def test_importing_the_writer_needs_no_accelerator_library():
    code = "import sys, medm2g_jax.data.write; print('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
