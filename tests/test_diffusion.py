import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from medm2g_jax.diffusion import (
    ABAR,
    BETAS,
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    TIMES,
    Process,
    Row,
    State,
    denoising_loss,
    guided,
    sample,
    sampler_table,
    times,
)
from medm2g_jax.errors import UserError
from medm2g_jax.keys import row_keys, row_normal

SHAPE = (2, 4, 4, 3)
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def scheduler(cls, steps, spacing="leading", **kwargs):
    """diffusers' scheduler; all 1000 steps leave no room for latent diffusion's offset."""
    offset = 1 if steps < 1000 else 0
    out = cls(**SCHEDULE, timestep_spacing=spacing, steps_offset=offset, **kwargs)
    out.set_timesteps(steps)
    return out


def network():
    """A fixed random eps_theta: a function of z and of t."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(SHAPE[-1],) * 2), rng.normal(size=SHAPE[1:])
    return lambda z, t: np.float32(np.tanh(np.asarray(z) @ w) + np.sin(t / 50 + v))


def denoiser():
    eps, process = network(), Process("eps")

    def denoise(z, t):
        at = jnp.full((SHAPE[0],), int(t))
        return {s: process.split(jnp.asarray(eps(x, float(t))), x, at) for s, x in z.items()}

    return denoise


def run(sampler, steps, z, noises, eta, spacing="leading"):
    """Our sampler over the rows of its table that `noises` has; returns the times and every z on the way."""
    table, denoise, out = sampler_table(steps, spacing), denoiser(), []
    step, memory = SAMPLERS[sampler]
    state = State({"a": z}, memory({"a": z}))
    for i, noise in enumerate(noises):
        state = step(denoise, state, Row(*(x[i] for x in table)), {"a": jnp.asarray(noise)}, jnp.float32(eta))
        out.append(np.asarray(state.z["a"]))
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
    add_noise = Process().add_noise
    ours = add_noise(jnp.asarray(z), jnp.asarray(t), jnp.asarray(eps))
    theirs = diffusers.DDPMScheduler(**SCHEDULE).add_noise(*map(torch.from_numpy, (z, eps, t)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
    text = add_noise(jnp.asarray(z[:, 0, 0]), jnp.asarray(t), jnp.asarray(eps[:, 0, 0]))
    np.testing.assert_array_equal(text, ours[:, 0, 0])


@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("steps", (50, 20, 10))
def test_ddim_matches_diffusers(steps, eta):
    oracle = scheduler(diffusers.DDIMScheduler, steps, set_alpha_to_one=False, clip_sample=False)
    rng = np.random.default_rng(steps)
    start, *noises = rng.normal(size=(steps + 1, *SHAPE)).astype(np.float32)
    at, ours = run("ddim", steps, jnp.asarray(start), noises, eta)
    z, theirs, eps = torch.from_numpy(start), [], network()
    for t, noise in zip(oracle.timesteps, noises, strict=True):
        model_output = torch.from_numpy(eps(z, float(t)))
        z = oracle.step(model_output, t, z, eta=eta, variance_noise=torch.from_numpy(noise)).prev_sample
        theirs.append(z.numpy())
    np.testing.assert_array_equal(at, oracle.timesteps)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize(("steps", "first"), ((1000, 30), (50, 50), (20, 20)))
def test_ddpm_matches_diffusers(steps, first):
    oracle = scheduler(diffusers.DDPMScheduler, steps, variance_type="fixed_large", clip_sample=False)
    rng = np.random.default_rng(steps)
    start, eps, seed = rng.normal(size=SHAPE).astype(np.float32), network(), torch.Generator().manual_seed(0)
    z, theirs, noises = torch.from_numpy(start), [], []
    for t in oracle.timesteps[:first]:
        noises.append(torch.randn(SHAPE, generator=torch.Generator().set_state(seed.get_state())))
        z = oracle.step(torch.from_numpy(eps(z, float(t))), t, z, generator=seed).prev_sample
        theirs.append(z.numpy())
    at, ours = run("ddpm", steps, jnp.asarray(start), [n.numpy() for n in noises], 0.0)
    np.testing.assert_array_equal(at, oracle.timesteps[:first])
    if first == steps:  # the last step, at t = 1: diffusers leaves out the noise only at t = 0
        theirs[-1] = theirs[-1] - (1 - ABAR[1]) ** 0.5 * noises[-1].numpy()
    assert relative(ours, theirs) <= 1e-5


def test_the_last_of_1000_ddpm_steps_is_the_estimate_of_z0():
    oracle = scheduler(diffusers.DDPMScheduler, 1000, variance_type="fixed_large", clip_sample=False)
    table = sampler_table(1000)
    np.testing.assert_array_equal(np.asarray(table.t, int), oracle.timesteps)
    rng = np.random.default_rng(3)
    z, eps, noise = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    z, eps, noise = map(jnp.asarray, (z, eps, noise))
    row, made = Row(*(x[-1] for x in table)), {"a": Process().split(eps, z, jnp.zeros(2, int))}
    state = SAMPLERS["ddpm"].step(lambda z, t: made, State({"a": z}), row, {"a": noise}, jnp.float32(1))
    ours = state.z["a"]
    theirs = oracle.step(*map(torch.from_numpy, map(np.array, (eps,))), 0, torch.from_numpy(np.array(z))).prev_sample
    assert relative([ours], [theirs.numpy()]) <= 1e-5


def sigma_space(cls, steps, spacing, **kwargs):
    """Trajectory of one of diffusers' samplers that work on x = z / alpha or, like DPM-Solver, on z."""
    oracle = scheduler(cls, steps, spacing, **kwargs)
    start, eps = np.random.default_rng(steps).normal(size=SHAPE).astype(np.float32), network()
    scaled = hasattr(oracle, "init_noise_sigma") and oracle.init_noise_sigma != 1
    alpha = lambda i: float(1 / (oracle.sigmas[i] ** 2 + 1) ** 0.5) if scaled else 1.0  # noqa: E731
    x, out = torch.from_numpy(start) / alpha(0), []
    for i, t in enumerate(oracle.timesteps):
        model_output = torch.from_numpy(eps(oracle.scale_model_input(x, t), float(t)))
        x = oracle.step(model_output, t, x).prev_sample
        out.append((x * alpha(i + 1)).numpy())
    return start, np.asarray(oracle.timesteps, int), out


@pytest.mark.parametrize("steps", (50, 20, 10))
@pytest.mark.parametrize("spacing", ("leading", "trailing"))
def test_euler_matches_diffusers(steps, spacing):
    start, expected, theirs = sigma_space(diffusers.EulerDiscreteScheduler, steps, spacing)
    at, ours = run("euler", steps, jnp.asarray(start), np.zeros((steps, *SHAPE), np.float32), 0.0, spacing)
    np.testing.assert_array_equal(at, expected)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("steps", (50, 20, 10))
@pytest.mark.parametrize("spacing", ("leading", "trailing"))
def test_heun_matches_diffusers(steps, spacing):
    """diffusers asks once a step() and so takes two of them for one of ours, but for the last."""
    start, expected, theirs = sigma_space(diffusers.HeunDiscreteScheduler, steps, spacing)
    at, ours = run("heun", steps, jnp.asarray(start), np.zeros((steps, *SHAPE), np.float32), 0.0, spacing)
    np.testing.assert_array_equal(at, [expected[0], *expected[1::2]])
    assert relative(ours, [*theirs[1::2], theirs[-1]]) <= 1e-5


@pytest.mark.parametrize("steps", (50, 20, 10, 2))
def test_dpmpp_2m_matches_diffusers(steps):
    """diffusers' multistep scheduler has leading times of its own; trailing ones agree."""
    start, expected, theirs = sigma_space(diffusers.DPMSolverMultistepScheduler, steps, "trailing")
    at, ours = run("dpmpp_2m", steps, jnp.asarray(start), np.zeros((steps, *SHAPE), np.float32), 0.0, "trailing")
    np.testing.assert_array_equal(at, expected)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_in_one_scan_is_the_steps_one_by_one(sampler):
    """Two streams at once, each with the noise that its name and its row have."""
    process, keys = Process(), row_keys(jax.random.key(3), SHAPE[0])
    w = jnp.asarray(np.random.default_rng(0).normal(size=(SHAPE[-1],) * 2), jnp.float32)

    def denoise(z, t):
        at = jnp.broadcast_to(t, SHAPE[:1])
        return {s: process.split(jnp.tanh(x @ w), x, at) for s, x in z.items()}

    start = {s: row_normal(keys, SHAPE[1:], i) for i, s in enumerate(("a", "b"))}
    both = jax.jit(lambda z: sample(denoise, z, keys, sampler, 8, eta=1.0))(start)
    one = sample(denoise, {"b": start["b"]}, keys, sampler, 8, eta=1.0)
    np.testing.assert_allclose(both["b"], one["b"], atol=1e-4)
    assert not np.allclose(both["a"], both["b"], atol=0.1)


@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("steps", (1, 7, 20, 30, 50, 400, 501, 999, 1000))
def test_times_are_those_of_diffusers(steps, spacing):
    oracle = scheduler(diffusers.DDIMScheduler, steps, spacing, set_alpha_to_one=False, clip_sample=False)
    expected = np.asarray(oracle.timesteps)
    if spacing == "leading" and steps == 999:  # its offset is 1 all the same; 999 .. 1
        assert expected[0] == 999
    np.testing.assert_array_equal(times(steps, spacing), expected)


@pytest.mark.parametrize("steps", (1, 2, 3, 7, 19, 20, 30, 50, 400, 500, 501, 600, 999, 1000))
def test_tables_descend_from_the_top_of_the_schedule(steps):
    t = np.asarray(sampler_table(steps).t, int)
    assert len(t) == steps and len(set(t)) == steps and 0 <= t[-1] <= t[0] < 1000
    assert (np.diff(t) < 0).all() and t[0] >= 950


@pytest.mark.parametrize("steps", (0, -1, 1001))
def test_impossible_tables_are_refused(steps):
    with pytest.raises(UserError, match=rf"steps={steps}: .* 1 \.\. 1000"):
        sampler_table(steps)
    with pytest.raises(UserError, match="spacing='even': expected one of auto, leading"):
        sampler_table(10, "even")


def test_an_unknown_sampler_or_prediction_is_refused():
    with pytest.raises(UserError, match="sampler='lms': expected one of ddim, ddpm"):
        sample(denoiser(), {"a": jnp.zeros(SHAPE)}, row_keys(jax.random.key(0), 2), "lms")
    with pytest.raises(UserError, match=r"config\.predict='x0': expected one of eps"):
        Process("x0")


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_a_prediction_of_the_target_gives_z0_and_eps_back(predict):
    """And the target is what diffusers' scheduler of that prediction type turns into the same z0."""
    rng = np.random.default_rng(2)
    z0, eps = rng.normal(size=(2, 4, 8, 8, 4)).astype(np.float32)
    process, t = Process(predict), np.array([1, 300, 700, 999])
    z_t = process.add_noise(*map(jnp.asarray, (z0, t, eps)))
    target = process.target(*map(jnp.asarray, (z0, t, eps)))
    got = process.split(target, z_t, jnp.asarray(t))
    np.testing.assert_allclose(got[0], z0, atol=3e-4)
    np.testing.assert_allclose(got[1], eps, atol=3e-4)
    kind = {"eps": "epsilon", "v": "v_prediction"}.get(predict, predict)
    oracle = diffusers.DDIMScheduler(**SCHEDULE, prediction_type=kind, clip_sample=False)
    oracle.set_timesteps(1000)
    for i, at in enumerate(t):
        sample = torch.from_numpy(np.array(z_t[i]))
        theirs = oracle.step(torch.from_numpy(np.array(target[i])), int(at), sample).pred_original_sample
        np.testing.assert_allclose(got[0][i], theirs, atol=3e-4)
    if predict == "v":
        theirs = oracle.get_velocity(*map(torch.from_numpy, (z0, eps, t)))
        np.testing.assert_allclose(target, theirs, atol=1e-5)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_min_snr_weights_are_those_of_z0_s_error(predict):
    """Hang et al. 2023: whatever is predicted, its weighted error is min(SNR, 5) times that of z0."""
    rng = np.random.default_rng(4)
    z0, eps, wrong = map(jnp.asarray, rng.normal(size=(3, 4, 8, 8, 4)).astype(np.float32))
    process, t = Process(predict), jnp.array([5, 300, 700, 990])
    z_t = process.add_noise(z0, t, eps)
    loss = denoising_loss(process.target(z0, t, eps), wrong, process.weight(t, 5.0))
    error = jnp.mean(jnp.square(process.split(wrong, z_t, t)[0] - z0), axis=(1, 2, 3))
    snr = ABAR[np.asarray(t)] / (1 - ABAR[np.asarray(t)])
    assert float(loss) == pytest.approx(float(np.mean(np.minimum(snr, 5.0) * np.asarray(error))), rel=1e-3)
    assert np.array_equal(process.weight(t, 0.0), np.ones(4))


def test_the_schedule_that_ends_without_signal_is_diffusers():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = rescale_zero_terminal_snr(torch.from_numpy(BETAS))
    theirs = np.cumprod(1 - betas.numpy())
    np.testing.assert_allclose(SCHEDULES["zero_snr"][:-1], theirs[:-1], rtol=1e-9)
    assert theirs[-1] == 0 and SCHEDULES["zero_snr"][-1] == 2.0**-24
    for steps in (2, 20, 50):  # its samplers begin at the very end
        assert times(steps, schedule="zero_snr")[0] == 999


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("predict", ("v", "sample"))
def test_from_a_schedule_that_ends_without_signal_the_truth_is_reached(sampler, predict):
    """A denoiser that knows z0 leads there from pure noise, finite at every step."""
    z0, noise = map(jnp.asarray, np.random.default_rng(8).normal(size=(2, *SHAPE)).astype(np.float32))
    process = Process(predict, "zero_snr")

    def knows(z, t):
        at = jnp.broadcast_to(t, SHAPE[:1])
        alpha, sigma = process.at(at, z0)
        eps = (z["a"] - alpha * z0) / sigma
        return {"a": process.split(process.target(z0, at, eps), z["a"], at)}

    keys = row_keys(jax.random.key(0), SHAPE[0])
    z = sample(knows, {"a": noise}, keys, sampler, 10, schedule="zero_snr")["a"]
    np.testing.assert_allclose(z, z0, atol=0.1)  # DDIM ends at abar_0


def test_ddim_with_the_true_noise_recovers_z0():
    # Going from z_t to the last time with the eps that made z_t gives z_0's own noising at abar_0.
    rng = np.random.default_rng(5)
    z0, eps = map(jnp.asarray, rng.normal(size=(2, *SHAPE)).astype(np.float32))
    process = Process()
    z = process.add_noise(z0, jnp.full((2,), int(times(25)[0])), eps)
    true = lambda z, t: {"a": process.split(eps, z["a"], jnp.broadcast_to(t, 2))}  # noqa: E731
    z = sample(true, {"a": z}, row_keys(jax.random.key(0), 2), "ddim", 25)["a"]
    np.testing.assert_allclose(z, process.add_noise(z0, jnp.zeros((2,), int), eps), atol=1e-4)


def test_guidance():
    u, c = np.float32([[1.0, 2.0]]), np.float32([[3.0, -1.0]])
    halves = lambda z, t: {"a": (jnp.concatenate([u, c]), jnp.concatenate([2 * u, 2 * c]))}  # noqa: E731
    for scale, expected in ((1.0, c), (0.0, u), (jnp.float32(2.0), [[5.0, -4.0]])):
        z0, eps = guided(halves, scale)({}, 0)["a"]
        np.testing.assert_allclose(z0, expected, rtol=1e-7)
        np.testing.assert_allclose(eps, 2 * np.float32(expected), rtol=1e-7)


def test_guidance_by_two_conditions_adds_what_each_changes_beside_those_before_it():
    u, p, b = np.float32([[1.0]]), np.float32([[3.0]]), np.float32([[4.0]])
    parts = lambda z, t: {"a": (jnp.concatenate([u, p, b]),) * 2}  # noqa: E731
    for scales, expected in (((1.0, 1.0), 4.0), ((2.0, 0.0), 5.0), ((2.0, 3.0), 8.0), ((0.0, 0.0), 1.0)):
        np.testing.assert_allclose(guided(parts, jnp.float32(scales))({}, 0)["a"][0], [[expected]], rtol=1e-6)


def test_the_loss_is_torch_mse_in_float32():
    a, b = np.random.default_rng(6).normal(size=(2, *SHAPE)).astype(np.float32)
    assert float(denoising_loss(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(
        float(torch.nn.functional.mse_loss(torch.from_numpy(a), torch.from_numpy(b))), rel=1e-6
    )
    assert denoising_loss(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)).dtype == jnp.float32
    some = denoising_loss(jnp.asarray(a), jnp.asarray(b), rows=jnp.array([False, True]))
    assert float(some) == pytest.approx(float(np.mean((a[1] - b[1]) ** 2)), rel=1e-6)
    assert float(denoising_loss(jnp.asarray(a), jnp.asarray(b), rows=jnp.zeros(2, bool))) == 0


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


def test_times_are_spread_as_their_names_say():
    """By scipy's distribution of log-odds, and inside the table of noise levels at both ends."""
    u = (np.arange(20_000) + 0.5) / 20_000
    shares = np.asarray(TIMES["logit_normal"](jnp.asarray(u, jnp.float32)))
    for share in (0.05, 0.25, 0.5, 0.9):
        assert np.mean(shares < share) == pytest.approx(stats.norm.cdf(np.log(share / (1 - share))), abs=1e-3)
    ends = jnp.asarray([0.0, 1 - 2.0**-24], jnp.float32)
    for name, spread in TIMES.items():
        low, high = np.minimum(np.asarray(spread(ends)) * 1000, 999).astype(int)
        assert low >= 0 and high <= 999 and low < 10 and high > 990, name
