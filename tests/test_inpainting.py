"""The joint flow that inpaints: known streams are held, and what is sampled beside them is what goes with them."""

import jax.numpy as jnp
import numpy as np
import pytest
from micro import model_of

from medm2g_jax.diffusion import Process
from medm2g_jax.evaluate import inpainting
from medm2g_jax.evaluate.inpainting import can_inpaint, inpainted


@pytest.fixture(scope="module")
def model():
    return model_of("ct_mri", "tiny,alone")


def test_which_streams_a_model_can_inpaint(model):
    assert can_inpaint(model, ("mri:t2",), "ct") and can_inpaint(model, ("ct", "mri:t1"), "mri:t2")
    assert not can_inpaint(model, ("xray",), "ct")
    assert not can_inpaint(model, ("mri",), "mri:t2"), "an unstated contrast may be the very one that is wanted"


def test_of_two_streams_that_are_always_equal_the_missing_one_is_the_known_one(model, monkeypatch):
    """The exact denoiser of latents x = y, standard normal: z0 = a (x_t + y_t) / (2 a^2 + s^2), for both."""
    process = Process()
    seen = []

    def joint(model, request, params, told, rows, guidance):
        seen.append((request.make, told.encoded, told.clean))

        def denoise(z, t):
            x = z["ct"]
            alpha, sigma = process.at(jnp.broadcast_to(t, x.shape[:1]), x)
            z0 = alpha * (x + z["mri:t2"]) / (2 * alpha**2 + sigma**2)
            return {s: (z0, (z[s] - alpha * z0) / sigma) for s in z}

        return denoise

    monkeypatch.setattr(inpainting, "build_denoiser", joint)
    shown = lambda z: np.asarray(z).reshape(len(z), 8, 8, 1).repeat(4, 1).repeat(4, 2)  # noqa: E731
    monkeypatch.setattr(type(model), "decode", lambda self, stream, z, rows: shown(z))
    model.defaults |= dict(steps=50, eta=1.0)
    images = np.random.default_rng(0).uniform(-1, 1, (6, 32, 32, 1)).astype(np.float32)
    clean = np.asarray(model.model.encode(model.params, "mri", images))
    scale = clean.std()
    monkeypatch.setattr(type(model.model), "encode", lambda self, params, name, x: jnp.asarray(clean[: len(x)] / scale))
    made = inpainted(model, {"mri:t2": images}, "ct", 6, 0)
    assert seen == [(("mri:t2", "ct"), {}, {})], "nothing is given: the model is not told what is known"
    assert made.shape == images.shape
    assert np.corrcoef(made.ravel(), shown(clean).ravel())[0, 1] > 0.98
    np.testing.assert_array_equal(made, inpainted(model, {"mri:t2": images}, "ct", 6, 0))
    assert not np.array_equal(made, inpainted(model, {"mri:t2": images}, "ct", 6, 1))
