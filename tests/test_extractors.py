"""Networks that others have published: converted from a file of random weights in their layout, they say what torch's
say; and what is said where a file is absent or another one's.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import oracles_extractors as theirs
import pytest
import torch
import torch.nn.functional as F
from flax.traverse_util import unflatten_dict

from medm2g_jax import cli
from medm2g_jax.convert import converted
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import extractors, sets
from medm2g_jax.evaluate.extractors import densenet, dino, inception, resnet
from medm2g_jax.evaluate.metrics import METRICS
from medm2g_jax.modality import MODALITIES


def images(n, side, channels):
    return np.random.default_rng(0).normal(size=(n, side, side, channels)).astype(np.float32)


def params(weights, name):
    tensors = converted.read(weights, name).tensors
    return {"params": unflatten_dict({k.partition("/")[2]: jnp.asarray(t.read()) for k, t in tensors.items()}, sep="/")}


def near(ours, expected, limit=2e-5):
    expected = expected.detach().numpy()
    assert np.linalg.norm(ours - expected) < limit * np.linalg.norm(expected) and np.std(expected) > 1e-3


@pytest.mark.parametrize(
    ("name", "oracle", "network", "small", "side"),
    [  # inception's sizes are fixed; of the others fewer layers say the same
        ("inception", theirs.Inception, inception.Inception, {}, 75),
        ("xrv", theirs.DenseNet, densenet.DenseNet, {"blocks": (2, 3, 1, 1)}, 64),
        ("radimagenet", theirs.ResNet, resnet.ResNet, {"blocks": (2, 1, 1, 1)}, 64),
    ],
)
def test_a_converted_file_says_what_torch_s_says(tmp_path, monkeypatch, name, oracle, network, small, side):
    expected = theirs.randomised(oracle(**small))
    torch.save(expected.state_dict(), tmp_path / "published.pth")
    own = extractors.EXTRACTORS[name]
    monkeypatch.setitem(extractors.EXTRACTORS, name, dataclasses.replace(own, network=lambda: network(**small)))
    cli.main(["convert", name, "--from", str(tmp_path / "published.pth"), "--to", str(tmp_path / "W")])
    channels = own.size[1]
    x = images(2, side, channels)
    maps, features = network(**small).apply(params(tmp_path / "W", name), jnp.asarray(x))
    near(features, expected(torch.from_numpy(x.transpose(0, 3, 1, 2))))
    sides = [m.shape[1] for m in maps]
    assert len(maps) >= 4 and sides == sorted(sides, reverse=True)


def test_a_converted_rad_dino_says_what_transformers_says(tmp_path, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14,
                          layerscale_value=0.7, mlp_ratio=2)  # fmt: skip
    torch.manual_seed(0)
    expected = Dinov2Model(config).eval()
    expected.embeddings.cls_token.data.normal_()
    folder = tmp_path / "rad-dino"
    expected.save_pretrained(folder)
    line = ["convert", "rad_dino", "--from", str(folder), "--to", str(tmp_path / "W")]
    with pytest.raises(SystemExit):  # how are its images normalised?
        cli.main(line)
    said = dict(image_mean=[0.53] * 3, image_std=[0.26] * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    cli.main(line)
    monkeypatch.setenv("MEDM2G_SD_WEIGHTS", str(tmp_path / "W"))
    x = np.clip(images(3, 42, 1), -1, 1)
    loaded = extractors.load("rad_dino", str(tmp_path / "W"))
    pixels = torch.from_numpy(((x + 1) / 2 - 0.53) / 0.26).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    out = expected(pixels.float())
    near(loaded.features(x), out.pooler_output)
    near(loaded.maps(x)[0].reshape(3, 9, 128), out.last_hidden_state[:, 1:])
    # The distance in its maps is torch's by the definition of LPIPS, all learnt weights one.
    a, b = (F.normalize(out.last_hidden_state[k, 1:], dim=-1) for k in (0, 1))
    distance = METRICS["perceptual distance"].scores(x[:1], x[1:2], loaded.maps)
    assert distance[0] == pytest.approx(float(((a - b) ** 2).sum(-1).mean()), rel=1e-4)
    assert METRICS["perceptual distance"](x, x, loaded.maps) == 0
    # The row that is alone in its batch, and 17 of which one is.
    last = loaded.features(np.repeat(x, 6, 0)[:17])[-1]
    np.testing.assert_allclose(last, loaded.features(x[2:])[0], rtol=1e-4, atol=1e-5)
    assert dino.SIZES == ("width", "layers", "ff", "patch")


def test_pixels_are_those_that_the_networks_were_trained_with():
    x = np.clip(images(2, 20, 1), -1, 1)
    ours = np.asarray(inception.pixels(jnp.asarray(x)))
    levels = np.round((x[..., 0] + 1) * 127.5).clip(0, 255)
    at = np.arange(299) * np.float32(20 / 299)  # TensorFlow 1: the first pixel on the first one
    low, part = at.astype(int), at - at.astype(int)
    high = np.minimum(low + 1, 19)
    rows = levels[:, low] + (levels[:, high] - levels[:, low]) * part[None, :, None]
    both = rows[:, :, low] + (rows[:, :, high] - rows[:, :, low]) * part
    np.testing.assert_allclose(ours[..., 1], (both - 128) / 128, atol=1e-4)
    grey = jnp.full((1, 64, 64, 1), 0.5)
    assert np.allclose(densenet.pixels(grey), 512) and densenet.pixels(grey).shape == (1, 224, 224, 1)
    np.testing.assert_allclose(resnet.pixels(grey)[0, 5, 5], 0.75 - np.array([0.406, 0.456, 0.485]), atol=1e-6)


def test_what_is_absent_or_another_network_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MEDM2G_SD_WEIGHTS", raising=False)
    said = r"(?s)torch-fidelity.*Apache-2.0.*weights-inception-2015-12-05.*convert inception"
    with pytest.raises(UserError, match=said):
        extractors.load("inception")
    torch.save(theirs.ResNet((1, 1, 1, 1)).state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        cli.main(["convert", "xrv", "--from", str(tmp_path / "other.pth"), "--to", str(tmp_path)])
    assert "missing: features.conv0.weight" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["convert", "xrv", "--to", str(tmp_path)])
    assert "expected torchxrayvision" in capsys.readouterr().err
    # The rest of the table still prints; who was trained on projections alone reads no slices.
    assert [name for name, *_ in sets._extractors(sets.Model.__new__(sets.Model), "ct", ())] == ["ours"]
    said = capsys.readouterr().out
    assert "FID @inception and its kin are left out" in said and "@radimagenet" in said and "@xrv" not in said
    film = [name for name, own in extractors.EXTRACTORS.items() if own.reads(MODALITIES["xray"])]
    assert film == ["inception", "xrv", "rad_dino"]
