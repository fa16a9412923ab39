"""A prepared folder as a TFDS set: read back, it is what the manifest is."""

import json
import stat

import numpy as np
import pytest
from test_manifest import RNG, deep, picture, row, write

from medm2g_jax import cli
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.picture import network_input
from medm2g_jax.data.shards import Writer
from medm2g_jax.data.tfds import Tfds
from medm2g_jax.data.tfds_builder import build
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES


def test_a_set_read_back_is_what_its_manifest_is(tmp_path):
    draw, folder = np.random.default_rng(0), tmp_path / "set"
    folder.mkdir()
    images = [
        {"ct": deep(folder, f"{i}.png", draw.integers(0, 3000, (9, 7))), "mri_t2": picture(folder, f"{i}.jpg", 30 * i)}
        for i in range(4)
    ]
    with Writer(folder, "train") as writer:
        images[2]["ct"] = writer.add((folder / "2.png").read_bytes())
    about = {"scale": {"ct": [1, -1024]}, "spacing": {"ct": [2, 3]}, "orientation": {"ct": "PL"}}
    rows = [row(i, images=some, text=f"report {i}", registered=True, **about) for i, some in enumerate(images)]
    rows[1] |= dict(split="val", registered=["ct"], license="unclear", span={"mri_t2": [10, 90]}, synthetic=["mri_t2"])
    rows[3] |= dict(split="test", images={"mri_t2": "3.jpg"}, text="", registered=False)
    for field in about:
        del rows[3][field]
    manifest = Manifest(write(folder, rows), 8)
    for _ in range(2):  # the second finds it there
        assert build(folder, "mine", tmp_path / "tfds") == "tfds:prepared/mine"
    assert stat.S_IMODE((tmp_path / "tfds/prepared/mine").stat().st_mode) == 0o700
    back = Tfds("prepared/mine", 8, data_dir=str(tmp_path / "tfds"))
    assert list(back.records) == sorted(manifest.records, key=lambda r: ("train", "val", "test").index(r.split))
    assert not back.open and back.licences == manifest.licences
    places = {record.id: i for i, record in enumerate(back.records)}
    for i, record in enumerate(manifest.records):
        for stream in record.streams:
            given = back.read(places[record.id], stream, RNG)
            if stream == "text":
                assert given == manifest.read(i, stream, RNG)
            else:
                own = network_input(manifest.picture(i, stream), MODALITIES[stream.partition(":")[0]], 8)
                np.testing.assert_array_equal(given, own)
    back.check()
    assert back.ranges == {} and back.extents == {"ct": (21, 21)}
    info = json.loads(next((tmp_path / "tfds/prepared/mine").glob("*/features.json")).read_text())
    assert "uint16" in json.dumps(info["featuresDict"]["features"]["ct"])


def test_what_tfds_does_not_keep_is_said(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(b"no picture")
    write(folder, [row(0, images={"ct": "a.dcm"})])
    with pytest.raises(UserError, match="row 'r0': .*a.dcm: no PNG, JPEG or TIFF"):
        build(folder, "mine", tmp_path / "tfds")


def test_a_name_that_is_taken_by_another_set_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    for number in range(2):
        (tmp_path / f"down{number}").mkdir()
        image = deep(tmp_path / f"down{number}", "a.png", np.arange(192).reshape(16, 12))
        table = f"file_name,modality,text\n{image},ct,Text {number}.\n"
        (tmp_path / f"down{number}/metadata.csv").write_text(table)
    line = ["prepare", "folder:images", "--workers", "1", "--tfds", "mine"]
    cli.main([*line, "--root", str(tmp_path / "down0"), "--out", str(tmp_path / "out0")])
    assert "--config.data.source=tfds:prepared/mine" in capsys.readouterr().out
    assert len(Tfds("prepared/mine", 8, data_dir=str(tmp_path / "tfds")).records) == 1
    with pytest.raises(SystemExit):
        cli.main([*line, "--root", str(tmp_path / "down1"), "--out", str(tmp_path / "out1")])
    assert "a TFDS set of other contents; delete it, or name another" in capsys.readouterr().err
