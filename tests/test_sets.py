"""Images from reports as a set, of a model whose samples are known."""

import numpy as np
import pytest
from etils import epath
from scipy.ndimage import gaussian_filter

from medm2g_jax.data.source import Record
from medm2g_jax.evaluate import extractors, sets
from medm2g_jax.inference import Model

SIDE, ROWS = 192, 10


class Drawn:
    """Ten subjects to train on, ten to test: blurred noise, and a text each."""

    name, open = "drawn", True

    def __init__(self):
        splits = ROWS * ["train"] + ROWS * ["test"]
        self.records = [Record(f"r{i}", f"p{i}", split, ("text", "ct")) for i, split in enumerate(splits)]

    def read(self, index, stream, rng):
        return f"subject {index} ." if stream == "text" else noise(index, 2.0)


class Greys(Model):
    """The vector of an image is sixteen of its pixels, of a text those of its subject's image."""

    givable = ("text", "ct")

    def __init__(self):
        pass

    def ids(self, texts):
        return np.stack([noise(int(text.split()[1]), 2.0) for text in texts])

    def embedded(self, stream, x):
        v = np.asarray(x)[:, :: SIDE // 16, SIDE // 2, 0]
        return v / np.linalg.norm(v, axis=1, keepdims=True)


def noise(seed: int, blur: float) -> np.ndarray:
    x = gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE, SIDE)), blur)
    return np.float32(np.clip(x / np.abs(x).max(), -1, 1))[..., None]


def test_what_fits_its_report_and_what_is_sharp(monkeypatch, tmp_path, capsys):
    """Made of a text: its image, rougher; of nothing: anybody's."""
    monkeypatch.delenv("MEDM2G_SD_WEIGHTS", raising=False)
    monkeypatch.setattr(sets, "DRAWS", 2)

    def samples(model, given, make, count, seed):
        whose = [int(text.split()[1]) for text in given["text"]] if given else range(100, 100 + count)
        return {"ct": np.stack([noise(i, 1.0 if given else 2.0) + 0.01 * seed for i in whose])}

    monkeypatch.setattr(sets, "samples", samples)
    row = lambda name, measure: list(measure())  # noqa: E731
    sheet = epath.Path(tmp_path / "a.png")
    found = sets.as_sets(
        Greys(), Drawn(), ("text",), "ct", ROWS, 0, row=row, sheet=sheet, protocols=("chexgenbench",)
    )
    assert sheet.exists()
    figures = {(f.task, f.metric): f for f in found}
    near = {task: f.value for (task, metric), f in figures.items() if metric == "cosine with its source @ours"}
    assert near["real CT"] == pytest.approx(1) and near["real CT"] > near["report -> CT"] > near["nothing -> CT"]
    sharp = {task: f.value for (task, metric), f in figures.items() if metric == "NIQE @training images"}
    assert sharp["real CT"] < sharp["report -> CT"] and sharp["nothing -> CT"] < sharp["report -> CT"]
    assert ("real training CT", "KID @ours") in figures and ("report -> CT", "FID @ours") not in figures
    assert ("report -> CT", "MS-SSIM among draws, 5 scales") in figures
    said = capsys.readouterr().out
    for left in ("FID @ours is left out", "FID @inception and its kin are left out", "niqe_pris_params.npz"):
        assert left in said


def test_chexgenbench_s_images(monkeypatch):
    """Its features are of 299 px in 256 levels; of other extractors, of the images as they are."""
    seen: dict[str, np.ndarray] = {}
    loaded = lambda name: extractors.Loaded(None, lambda x: seen.setdefault(name, x))  # noqa: E731
    monkeypatch.setattr(extractors, "load", loaded)
    x = noise(0, 2.0)[None]
    of = {name: (features, protocol) for name, features, protocol in sets._extractors(Greys(), "xray", (sets.BENCH,))}
    for features, _ in list(of.values())[1:]:
        features(x)
    assert {n: p for n, (_, p) in of.items()} == dict(
        ours="features", inception="chexgenbench", rad_dino="chexgenbench", xrv="features"
    )
    np.testing.assert_array_equal(seen["xrv"], x)
    assert seen["rad_dino"].shape == (1, 299, 299, 1)
    levels = (seen["rad_dino"] + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert abs(levels.mean() - 127.5 * (x.mean() + 1)) < 0.1
