"""The model in the box: a file of today's format, which every later version has to read and to make the same of."""

import json
from pathlib import Path

import numpy as np
import pytest

from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.evaluate.metrics.image import psnr
from medm2g_jax.loading import BOX, load

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
