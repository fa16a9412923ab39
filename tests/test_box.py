"""The model in the box: a file of today's format, which every later version has to read and to make the same of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from medm2g_jax import cli, export, unpack
from medm2g_jax.config import get_config
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics.image import psnr
from medm2g_jax.loading import BOX, load
from medm2g_jax.train import loop

FOLDER = BOX / "phantom"
REPORT = "large mass in the left upper lung ."


@pytest.fixture(scope="module")
def model():
    return load("phantom")


@pytest.fixture(scope="module")
def subjects():
    source = Phantom(size=64, seed=0, train=3, val=0, test=12)
    return source, [i for i, r in enumerate(source.records) if r.split == "test"]


def test_it_is_small_and_its_card_names_it(model):
    assert sum(p.stat().st_size for p in Path(FOLDER).rglob("*") if p.is_file()) < 20e6
    card = (FOLDER / "README.md").read_text()
    assert model.fingerprint in card and "Not for clinical use" in card and "synthetic, Apache-2.0" in card
    assert set(model.modalities) == {"text", "ct", "mri", "xray"}
    assert json.loads((FOLDER / "model.json").read_text())["shared"]["variant"] == "long"


@pytest.mark.parametrize(("stream", "least"), [("ct", 28), ("xray", 32), ("mri:t2", 24)])
def test_its_autoencoder_reads_as_it_did(model, subjects, stream, least):
    source, test = subjects
    x = source.images(test, stream)
    z = model.encode(stream, list(model.in_units(stream, x)))
    assert psnr(x, model.decode(stream, z)) > least


def test_reports_lie_next_to_their_images(model, subjects):
    source, test = subjects
    reports = [source.read(i, "text", np.random.default_rng(i)) for i in test]
    texts = model.embed("text", reports)
    for stream in ("ct", "xray"):
        images = model.embed(stream, list(model.in_units(stream, source.images(test, stream))))
        cosines = texts @ images.T
        assert np.diag(cosines).mean() > cosines.mean() + 0.2


def test_it_puts_the_mass_on_the_side_of_the_report(model):
    """The patient's left is on the image's right."""
    asked = dict(make=["ct"], steps=4, eta=0.0, seed=0)
    reports = [REPORT, REPORT.replace("left", "right")]
    left, right = (model.generate({"text": report}, **asked).samples["ct"][0] for report in reports)
    difference = left - right
    assert difference[:, 32:].mean() > 10 and difference[:, :32].mean() < -10  # HU


def test_a_hub_s_folder_is_read_back_and_its_card_by_the_hub_s_own_library(model, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    out = tmp_path / "hub"
    export.export("phantom", out, "hub", dtype="float16")
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "medm2g_jax"
    assert {"medical", "ct", "mri", "xray", "text"} <= set(card.data.tags)
    assert card.text.lstrip().startswith("# The model in the box") and "Not for clinical use" in card.text
    again = load(str(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.json", "model.safetensors", "tokenizers",
    ]  # fmt: skip
    asked = dict(given={"text": REPORT}, make=["ct"], steps=2, eta=0.0)
    ours, theirs = (m.generate(**asked).samples["ct"] for m in (model, again))
    np.testing.assert_allclose(ours, theirs, atol=5)  # HU; its weights in float16
    export.export(out, tmp_path / "second", "safetensors")  # which has no front matter
    assert (tmp_path / "second" / "README.md").read_text().startswith("# The model in the box")


def test_the_card_of_several_licences_says_other():
    assert "license: other\nlicense_name: several" in export._front_matter(["ct"], ["CC BY 4.0", "Apache-2.0"])
    assert "license: creativeml-openrail-m" in export._front_matter(["ct"], ["CreativeML OpenRAIL-M", "CC0"])
    assert "license: other" in export._front_matter(["ct"], [])


def test_a_run_goes_on_from_it(model, tmp_path, capsys):
    """Every stage of its plan is done for a fine-tune of it, and what they hold is the model."""
    root = epath.Path(tmp_path)
    folder = epath.Path(unpack.run_root("phantom", root))
    config = get_config("finetune", "mri_to_ct,full,tiny,long")
    config.upstream_dirs = (str(folder),)
    assert {what for name, what in loop.plan_stages(config, root) if name != config.stage} == {"done"}
    line = ["plan", "--config=finetune:mri_to_ct,full,tiny,long", f"--workdir={root}", "--commands"]
    cli.main([*line, "--config.upstream_dirs=('phantom',)"])  # which says so too
    assert capsys.readouterr().out.count(": done") == len(config.stages)
    again = load(str(folder / model.meta["stage"]))
    assert again.tokenizers.sizes == model.tokenizers.sizes and again.meta["pairs"] == model.meta["pairs"]
    assert again.params.keys() == model.params.keys()
    assert all(np.array_equal(again.params[name], value) for name, value in model.params.items())
    stage = Path(folder / model.meta["stage"])
    meta = json.loads((stage / "model.json").read_text())
    for origin in meta["from"].values():  # as where it stands on another run root
        origin["run"] = str(folder)
    (stage / "model.json").write_text(json.dumps(meta))
    export.export(stage, tmp_path / "exported", "safetensors", dtype="int8")
    told = ("model.json", "config.json", "tokenizers/done")
    about = "".join((tmp_path / "exported" / name).read_text() for name in told)
    assert str(tmp_path) not in about  # whose folders these were is nobody's business
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert unpack.run_root("phantom", root) == str(folder)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = shutil.copytree(FOLDER, tmp_path / "other" / "phantom")  # another model of this name is not taken for it
    about = json.loads((other / "model.json").read_text())
    about["crc32"] = dict.fromkeys(about["crc32"], 0)
    (other / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="damaged"):
        unpack.run_root(str(other), root)


def test_what_holds_no_finished_stage_is_no_upstream(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("phantm", str(tmp_path / "empty")):
        with pytest.raises(UserError, match=r"no finished stage in .*phant.*"):
            unpack.run_root(name, epath.Path(tmp_path))
