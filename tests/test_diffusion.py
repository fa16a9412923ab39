import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from medm2g_jax.diffusion import (
    ABAR,
    Steps,
    add_noise,
    eps_loss,
    guide_eps,
    sampler_step,
    sampler_table,
)
from medm2g_jax.errors import UserError
from medm2g_jax.keys import row_keys, row_normal

SHAPE = (2, 4, 4, 3)
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def scheduler(cls, steps, **kwargs):
    """diffusers' scheduler with latent diffusion's times; all 1000 steps leave no room for the offset."""
    offset = 1 if steps < 1000 else 0
    out = cls(**SCHEDULE, clip_sample=False, timestep_spacing="leading", steps_offset=offset, **kwargs)
    out.set_timesteps(steps)
    return out


def network():
    """A fixed random eps_theta: a function of z and of t."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(SHAPE[-1],) * 2), rng.normal(size=SHAPE[1:])
    return lambda z, t: np.float32(np.tanh(np.asarray(z) @ w) + np.sin(t / 50 + v))


def run(sampler, steps, z, noises, eta):
    """Our sampler over the rows of its table that `noises` has; returns the times and every z on the way."""
    table, eps, out = sampler_table(steps), network(), []
    step = jax.jit(sampler_step, static_argnums=0)
    for i, noise in enumerate(noises):
        row = Steps(*(x[i] for x in table))
        z = step(sampler, row, z, jnp.asarray(eps(z, float(row.t))), jnp.asarray(noise), jnp.float32(eta))
        out.append(np.asarray(z))
    return np.asarray(table.t[: len(noises)], int), out


def relative(ours, theirs):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


def test_abar_is_linear_in_the_root_of_beta():
    known = {0: 0.99915, 249: 0.675432, 499: 0.27767, 749: 0.056623, 999: 0.00466}
    for t, abar in known.items():
        assert ABAR[t] == pytest.approx(abar, abs=1e-6), t


def test_add_noise_matches_diffusers():
    rng = np.random.default_rng(1)
    t = np.array([0, 1, 499, 998, 999])
    z, eps = rng.normal(size=(2, 5, 8, 8, 4)).astype(np.float32)
    ours = add_noise(jnp.asarray(z), jnp.asarray(t), jnp.asarray(eps))
    theirs = diffusers.DDPMScheduler(**SCHEDULE).add_noise(*map(torch.from_numpy, (z, eps, t)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
    text = add_noise(jnp.asarray(z[:, 0, 0]), jnp.asarray(t), jnp.asarray(eps[:, 0, 0]))
    np.testing.assert_array_equal(text, ours[:, 0, 0])


@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("steps", (50, 20, 10))
def test_ddim_matches_diffusers(steps, eta):
    oracle = scheduler(diffusers.DDIMScheduler, steps, set_alpha_to_one=False)
    rng = np.random.default_rng(steps)
    start, *noises = rng.normal(size=(steps + 1, *SHAPE)).astype(np.float32)
    times, ours = run("ddim", steps, jnp.asarray(start), noises, eta)
    z, theirs, eps = torch.from_numpy(start), [], network()
    for t, noise in zip(oracle.timesteps, noises, strict=True):
        model_output = torch.from_numpy(eps(z, float(t)))
        z = oracle.step(model_output, t, z, eta=eta, variance_noise=torch.from_numpy(noise)).prev_sample
        theirs.append(z.numpy())
    np.testing.assert_array_equal(times, oracle.timesteps)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize(("steps", "first"), ((1000, 30), (50, 50), (20, 20)))
def test_ddpm_matches_diffusers(steps, first):
    oracle = scheduler(diffusers.DDPMScheduler, steps, variance_type="fixed_large")
    rng = np.random.default_rng(steps)
    start, eps, seed = rng.normal(size=SHAPE).astype(np.float32), network(), torch.Generator().manual_seed(0)
    z, theirs, noises = torch.from_numpy(start), [], []
    for t in oracle.timesteps[:first]:
        noises.append(torch.randn(SHAPE, generator=torch.Generator().set_state(seed.get_state())))
        z = oracle.step(torch.from_numpy(eps(z, float(t))), t, z, generator=seed).prev_sample
        theirs.append(z.numpy())
    times, ours = run("ddpm", steps, jnp.asarray(start), [n.numpy() for n in noises], 0.0)
    np.testing.assert_array_equal(times, oracle.timesteps[:first])
    if first == steps:  # the last step, at t = 1: diffusers leaves out the noise only at t = 0
        theirs[-1] = theirs[-1] - (1 - ABAR[1]) ** 0.5 * noises[-1].numpy()
    assert relative(ours, theirs) <= 1e-5


def test_the_last_of_1000_ddpm_steps_is_the_estimate_of_z0():
    oracle = scheduler(diffusers.DDPMScheduler, 1000, variance_type="fixed_large")
    table = sampler_table(1000)
    np.testing.assert_array_equal(np.asarray(table.t, int), oracle.timesteps)
    rng = np.random.default_rng(3)
    z, eps, noise = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    ours = sampler_step("ddpm", Steps(*(x[-1] for x in table)), *map(jnp.asarray, (z, eps, noise)), jnp.float32(1))
    theirs = oracle.step(torch.from_numpy(eps), 0, torch.from_numpy(z)).prev_sample
    assert relative([ours], [theirs.numpy()]) <= 1e-5


@pytest.mark.parametrize("steps", (1, 3, 30, 500, 501, 999, 1000))
def test_tables_descend_inside_the_schedule(steps):
    t = np.asarray(sampler_table(steps).t, int)
    assert len(t) == steps and len(set(t)) == steps and 0 <= t[-1] <= t[0] < 1000
    assert (np.diff(t) < 0).all()


@pytest.mark.parametrize("steps", (0, -1, 1001))
def test_impossible_tables_are_refused(steps):
    with pytest.raises(UserError, match=rf"steps={steps}: .* 1 \.\. 1000"):
        sampler_table(steps)


def test_an_unknown_sampler_is_refused():
    row = Steps(*(x[0] for x in sampler_table(10)))
    z = jnp.zeros(SHAPE)
    with pytest.raises(UserError, match="sampler='euler': expected 'ddim' or 'ddpm'"):
        sampler_step("euler", row, z, z, z, jnp.float32(0))


def test_ddim_with_the_true_noise_recovers_z0():
    # Going from z_t to the last time with the eps that made z_t gives z_0's own noising at abar_0.
    rng = np.random.default_rng(5)
    z0, eps = map(jnp.asarray, rng.normal(size=(2, *SHAPE)).astype(np.float32))
    table = sampler_table(25)
    z = add_noise(z0, jnp.full((2,), int(table.t[0])), eps)
    for i in range(25):
        z = sampler_step("ddim", Steps(*(x[i] for x in table)), z, eps, jnp.zeros_like(z), jnp.float32(0))
    np.testing.assert_allclose(z, add_noise(z0, jnp.zeros((2,), int), eps), atol=1e-4)


def test_guide_eps():
    u, c = jnp.float32([[1.0, 2.0]]), jnp.float32([[3.0, -1.0]])
    np.testing.assert_allclose(guide_eps(u, c, 1.0), c, rtol=1e-7)
    np.testing.assert_allclose(guide_eps(u, c, 0.0), u, rtol=1e-7)
    np.testing.assert_allclose(guide_eps(u, c, jnp.float32(2.0)), [[5.0, -4.0]], rtol=1e-7)


def test_eps_loss_is_torch_mse_in_float32():
    a, b = np.random.default_rng(6).normal(size=(2, *SHAPE)).astype(np.float32)
    assert float(eps_loss(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(
        float(torch.nn.functional.mse_loss(torch.from_numpy(a), torch.from_numpy(b))), rel=1e-6
    )
    assert eps_loss(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)).dtype == jnp.float32


def test_a_row_has_the_same_noise_in_any_batch():
    key, salt = jax.random.key(0), 7
    large = row_normal(row_keys(key, 64), (8, 8, 2), salt)
    small = row_normal(row_keys(key, 3), (8, 8, 2), salt)
    np.testing.assert_array_equal(large[:3], small)
    # Rows, streams and keys differ, and what is drawn is a standard normal.
    flat = np.asarray(large).reshape(64, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(64)).max() < 0.5
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05
    for other in (row_normal(row_keys(key, 3), (8, 8, 2), salt + 1),
                  row_normal(row_keys(jax.random.key(1), 3), (8, 8, 2), salt)):
        assert abs(np.corrcoef(np.asarray(other).ravel(), np.asarray(small).ravel())[0, 1]) < 0.2
