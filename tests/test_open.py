"""The promises about the tree: a modality is a value (PET in one small file), and only four places name one."""

import ast
from pathlib import Path

import pytest
from etils import epath
from micro import train

from medm2g_jax import modality
from medm2g_jax.train import checkpoint

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


@pytest.mark.parametrize("upstream", ["init", pytest.param("train", marks=pytest.mark.full)])
def test_a_fifth_modality_trains_a_round(tmp_path, upstream):
    """PET in one small file: pet_round.py. On a base that nobody has trained, or (slow) with all it stands on."""
    out = train("pet_round.py", str(tmp_path / "run"), upstream)
    meta = checkpoint.read_meta(epath.Path(tmp_path) / "run" / "text_pet")
    assert set(meta["trains"]) == {"text/guide", "pet/guide"} and ["pet", "text"] in meta["pairs"]["guide"]
    measured = {(f["task"], f["metric"]) for f in meta["figures"]}
    assert "text_pet: all done" in out and ("report -> PET", "PSNR dB") in measured
