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


def as_image(z: np.ndarray) -> np.ndarray:
    """Latents as the first pixels of an image."""
    flat = z.reshape(len(z), -1)
    return np.pad(flat, ((0, 0), (0, 1024 - flat.shape[1]))).reshape(len(z), 32, 32, 1)


def as_it_should() -> tuple[float, float]:
    """(c, v): of latents x = y, standard normal, with y held, 50 ancestral steps of DDIM end at x = c y + N(0, v): each
    is linear in x_t, y and the noise of y_t, where z0 = a (x_t + y_t) / (2 a^2 + s^2). Not y itself: x_t goes on
    counting, which is what replacement is known for."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2)
    t = np.arange(50)[::-1] * 20 + 1
    c, v = 0.0, 1.0
    for now, after in zip(t, np.append(t[1:], 0), strict=True):
        a, s, a1, s1 = (f(abar[i]) ** 0.5 for i in (now, after) for f in (lambda x: x, lambda x: 1 - x))
        spread = s1 / s * (1 - abar[now] / abar[after]) ** 0.5
        along, k = (s1**2 - spread**2) ** 0.5, a / (2 * a**2 + s**2)
        of_x, of_y, of_noise = (a1 * z + along * (own - a * z) / s for z, own in ((k, 1), (k * a, 0), (k * s, 0)))
        c, v = of_x * c + of_y, of_x**2 * v + of_noise**2 + spread**2
    return c, v


def test_of_two_streams_that_are_always_equal_the_missing_one_is_as_near_as_replacement_brings_it(model, monkeypatch):
    process = Process()
    seen = []

    def joint(model, request, params, given, rows, guidance):
        seen.append((request.make, dict(given)))

        def denoise(z, t):
            x = z["ct"]
            alpha, sigma = process.at(jnp.broadcast_to(t, x.shape[:1]), x)
            z0 = alpha * (x + z["mri:t2"]) / (2 * alpha**2 + sigma**2)
            return {s: (z0, (z[s] - alpha * z0) / sigma) for s in z}

        return denoise

    monkeypatch.setattr(inpainting, "build_denoiser", joint)
    monkeypatch.setattr(type(model), "decode", lambda self, stream, z, rows: as_image(z))
    model.defaults |= dict(steps=50, eta=1.0)
    images = np.random.default_rng(0).uniform(-1, 1, (32, 32, 32, 1)).astype(np.float32)
    clean = np.asarray(model.model.encode(model.params, "mri", images))
    clean = clean / clean.std()
    monkeypatch.setattr(type(model.model), "encode", lambda self, params, name, x: jnp.asarray(clean))
    made = inpainted(model, {"mri:t2": images}, "ct", 32, 0)
    assert seen == [(("mri:t2", "ct"), {})], "nothing is given: the model is not told what is known"
    y, (c, v) = clean.ravel(), as_it_should()
    x = made.reshape(32, -1)[:, : y.size // 32].ravel()
    slope = x @ y / (y @ y)
    assert slope == pytest.approx(c, abs=0.02) and np.var(x - slope * y) == pytest.approx(v, rel=0.15)
    np.testing.assert_array_equal(made, inpainted(model, {"mri:t2": images}, "ct", 32, 0))
    assert not np.array_equal(made, inpainted(model, {"mri:t2": images}, "ct", 32, 1))
