"""What `medm2g prepare` does for all sets alike: shards, Ctrl-C. What is common to a set's rows is tested with the
adapters."""

import look_alikes
import numpy as np
import pytest

from medm2g_jax import cli, prepare
from medm2g_jax.data.adapters import adapter_of
from medm2g_jax.data.manifest import Manifest


def made(root, out, **asked) -> list[str]:
    lines: list[str] = []
    prepare.prepare(adapter_of("chestxray14"), root, out, prepare.Order(workers=1, **asked), say=lines.append)
    return lines


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return look_alikes.chestxray14(tmp_path_factory.mktemp("downloaded"))


def test_shards_hold_the_pixels_that_files_would(root, tmp_path):
    made(root, tmp_path / "loose", keep_ids=True)
    made(root, tmp_path / "packed", keep_ids=True, pack=1)
    loose, packed = (Manifest(tmp_path / name, 32, template_text=True) for name in ("loose", "packed"))
    assert len(list((tmp_path / "packed" / "shards").iterdir())) > 3  # one an image
    assert not (tmp_path / "packed" / "images").exists()
    assert [r.id for r in loose.records] == [r.id for r in packed.records]
    for i in range(len(loose.records)):
        a, b = (np.asarray(source.picture(i, "xray").pixels) for source in (loose, packed))
        np.testing.assert_array_equal(a, b)


def test_shards_of_a_finished_run_are_left_as_they_are(root, tmp_path):
    made(root, tmp_path, pack=1)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "shards").iterdir()}
    assert "nothing is left to do" in made(root, tmp_path, pack=1)[-1]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "shards").iterdir()} == before


def test_a_shard_that_is_gone_is_made_again_with_the_same_bytes(root, tmp_path):
    made(root, tmp_path, pack=1)
    before = {p: p.read_bytes() for p in (tmp_path / "shards").iterdir()}
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    (tmp_path / ".prepare" / "packed").unlink()  # as a run that was stopped leaves it
    made(root, tmp_path, pack=1)
    assert {p: p.read_bytes() for p in (tmp_path / "shards").iterdir()} == before
    assert (tmp_path / "manifest.jsonl").read_bytes() == manifest


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(root, tmp_path, monkeypatch, capsys):
    def stop(*rest):
        raise KeyboardInterrupt

    line = ["prepare", "chestxray14", "--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(prepare, "_finish", stop)
        cli.main(line)
    assert ended.value.code == 130 and capsys.readouterr().err == "stopped\n"
    cli.main(line)
    assert "were cut by an earlier run; 0 are left" in capsys.readouterr().out
