"""The promises about the tree: a modality is a value (PET in one small file), and only four places name one."""

import ast
from pathlib import Path

import pytest
from etils import epath
from micro import micro

from medm2g_jax import modality
from medm2g_jax.data.phantom import Phantom
from medm2g_jax.data.pipeline import Record
from medm2g_jax.train import checkpoint, loop, run

PACKAGE = Path(modality.__file__).parent


def test_imaging_modalities_are_named_in_four_places_only():
    found = []
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        if str(inside) in ("modality.py", "rounds.py") or inside.parts[0] in ("data", "configs"):
            continue
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                words = node.value.replace(":", " ").replace("/", " ").replace("_", " ").split()
                if len(words) <= 2 and {"ct", "mri", "xray"} & set(words):
                    found.append(f"{inside}:{node.lineno}: {node.value!r}")
    assert not found, found


@pytest.fixture
def pet():
    """All it takes: one value, and a source that has the images."""
    yield modality.register(modality.Modality("pet", "image", "PET", window=(0.0, 10.0), unit="SUV", dicom="PT"))
    del modality.MODALITIES["pet"]


class PetSource:
    """Text and PET of the phantom's subjects: the CT slice stands in for an uptake image."""

    name, open = "pet", True

    def __init__(self, config):
        self.phantom = Phantom(size=config.image_size, seed=0, train=48, val=12, test=4, pairs=(("text", "ct"),))
        self.records = [Record(r.id, r.subject, r.split, ("text", "pet"), r.licence) for r in self.phantom.records]

    def read(self, index, stream, rng):
        return self.phantom.read(index, {"pet": "ct"}.get(stream, stream), rng)


@pytest.mark.full
def test_a_fifth_modality_trains_a_round(pet, tmp_path, monkeypatch):
    listing = ("text_pet",)
    config = micro("text_pet", listing=listing)
    monkeypatch.setattr(run, "open_source", lambda *args, **kwargs: PetSource(config))
    root = run.run(config, str(tmp_path / "run"))
    meta = checkpoint.read_meta(epath.Path(root) / "text_pet")
    assert set(meta["trains"]) == {"text/guide", "pet/guide"} and ["pet", "text"] in meta["pairs"]["guide"]
    assert all(what == "done" for _, what in loop.plan_stages(config, root))
