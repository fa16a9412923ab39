import jax
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from medm2g_jax.errors import UserError
from medm2g_jax.train import optim

BASE = dict(
    steps=100,
    lr=1e-2,
    lr_adapt=0.0,
    optimizer="adamw",
    b1=0.9,
    b2=0.99,
    weight_decay=0.1,
    warmup=0.1,
    final_lr=0.02,
    clip=1e9,
    accumulate=1,
)
ROWS = "ct/adapt/rows"
SHAPES = {
    "ct/unet/mid/attn_0/guide/q/kernel": (4, 3),
    "ct/unet/mid/attn_0/guide/out/bias": (3,),
    "ct/context/conv_in/kernel": (3, 3, 2, 2),
    "ct/adapt/embed/kernel": (3, 3),
    ROWS: (2, 3),
    "pair/text_ct/log_scale": (),
}


def config(**kwargs):
    return ConfigDict(BASE | kwargs)


def tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.normal(size=s), np.float32) for k, s in shapes.items()}


def train(c, params, grads):
    """Parameters after each of these gradients."""
    return follow(optim.make(c, params), params, grads)


def follow(tx, params, grads):
    @jax.jit
    def step(g, state, params):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, out = tx.init(params), []
    for g in grads:
        params, state = step(g, state, params)
        out.append(params)
    return out


def torch_train(cls, c, params, grads, **kwargs):
    leaves = {k: torch.nn.Parameter(torch.from_numpy(np.array(v))) for k, v in params.items()}
    tx = cls(leaves.values(), lr=1.0, betas=(c.b1, c.b2), weight_decay=c.weight_decay, **kwargs)
    lr = optim.schedule(c)
    for i, g in enumerate(grads):
        for k, p in leaves.items():
            p.grad = torch.from_numpy(np.array(g[k]))
        torch.nn.utils.clip_grad_norm_(leaves.values(), c.clip)
        tx.param_groups[0]["lr"] = float(lr(i))
        tx.step()
    return {k: p.detach().numpy() for k, p in leaves.items()}


def close(ours, theirs, rtol=2e-5, atol=1e-6):
    assert set(ours) == set(theirs)
    for k in ours:
        np.testing.assert_allclose(ours[k], theirs[k], rtol=rtol, atol=atol, err_msg=k)


def test_schedule_is_a_cosine_times_a_warm_up_that_does_not_start_at_zero():
    c = config()
    lr = optim.schedule(c)
    cosine = optax.cosine_decay_schedule(c.lr, c.steps, alpha=c.final_lr)
    warm = optax.linear_schedule(0.0, 1.0, 10)
    for step in (0, 1, 5, 9, 10, 50, 99, 100, 150):
        assert float(lr(step)) == pytest.approx(float(cosine(step) * warm(step + 1)), rel=1e-6)
    assert float(lr(0)) == pytest.approx(1e-3)  # a tenth of lr: the first step counts
    assert float(lr(50)) == pytest.approx(1e-2 * 0.51, rel=1e-6)  # half-way between lr and 0.02 lr
    assert float(lr(100)) == float(lr(10_000)) == pytest.approx(2e-4)
    peak = max(float(lr(s)) for s in range(100))
    assert 0.97 * c.lr < peak <= c.lr


@pytest.mark.parametrize("kwargs", (dict(warmup=0.0), dict(steps=1), dict(steps=3, warmup=0.05)))
def test_short_schedules_start_at_lr(kwargs):
    assert float(optim.schedule(config(**kwargs))(0)) == pytest.approx(1e-2)


@pytest.mark.parametrize("clip", (1e9, 0.5))
@pytest.mark.parametrize(("name", "cls"), (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)))
def test_it_is_torch_s(name, cls, clip):
    """torch decays every parameter, so only matrices are compared."""
    shapes = {k: s for k, s in SHAPES.items() if len(s) > 1 and k != ROWS}
    c = config(optimizer=name, clip=clip)
    params, grads = tree(0, shapes), [tree(i + 1, shapes) for i in range(12)]
    close(train(c, params, grads)[-1], torch_train(cls, c, params, grads))


def test_adam_and_adamw_differ():
    params, grads = tree(0), [tree(1)] * 3
    a, b = (train(config(optimizer=o), params, grads)[-1] for o in ("adam", "adamw"))
    assert all(np.abs(a[k] - b[k]).max() > 1e-5 for k in a if a[k].ndim > 1 and k != ROWS)


def test_only_matrices_decay_and_f_s_rows_do_not():
    params, zero = tree(0), jax.tree.map(np.zeros_like, tree(0))
    for optimizer in ("adam", "adamw"):
        (after,) = train(config(optimizer=optimizer), params, [zero])
        decayed = {k for k in params if not np.array_equal(params[k], after[k])}
        assert decayed == {k for k, s in SHAPES.items() if len(s) > 1} - {ROWS}
    kernel, lr = "ct/adapt/embed/kernel", float(optim.schedule(config())(0))
    np.testing.assert_allclose(after[kernel], params[kernel] * (1 - lr * 0.1), rtol=1e-6)


@pytest.mark.parametrize("optimizer", ("adam", "adamw"))
def test_lr_adapt_is_the_rate_of_the_rows_alone(optimizer):
    c = config(lr_adapt=5e-2, optimizer=optimizer, weight_decay=0.0)
    params, grads = tree(0), [tree(i + 1) for i in range(5)]
    ours = train(c, params, grads)[-1]
    for rate, names in ((5.0, {ROWS}), (1.0, set(SHAPES) - {ROWS})):
        tx = optax.adam(lambda step, rate=rate: rate * optim.schedule(c)(step), b1=c.b1, b2=c.b2)
        some = [{k: x[k] for k in names} for x in (ours, params, *grads)]
        close(some[0], follow(tx, some[1], some[2:])[-1])
    # Left at 0 they learn as everything else does.
    same = train(config(weight_decay=0.0, optimizer=optimizer), params, grads)[-1]
    np.testing.assert_allclose(same[ROWS] - params[ROWS], (ours[ROWS] - params[ROWS]) / 5, rtol=1e-3, atol=1e-6)


def test_the_whole_gradient_is_clipped_by_its_norm():
    params, grads = tree(0), [tree(1), jax.tree.map(lambda x: 1000 * x, tree(2))]
    norms = [np.sqrt(sum((x**2).sum() for x in g.values())) for g in grads]
    unit = [jax.tree.map(lambda x, n=n: x / n, g) for g, n in zip(grads, norms, strict=True)]
    close(train(config(clip=1.0), params, grads)[-1], train(config(), params, unit)[-1])


@pytest.mark.parametrize("clip", (1e9, 0.5))
def test_four_micro_batches_are_one_big_one(clip):
    params, micro = tree(0), [tree(i + 1) for i in range(12)]
    whole = [jax.tree.map(lambda *x: sum(x) / 4, *micro[i : i + 4]) for i in range(0, 12, 4)]
    ours = train(config(accumulate=4, clip=clip), params, micro)
    theirs = train(config(clip=clip), params, whole)
    close(ours[-1], theirs[-1])
    # Nothing moves between, and the schedule counts steps, not micro-batches.
    assert all(np.array_equal(ours[4][k], ours[3][k]) and np.array_equal(ours[2][k], params[k]) for k in params)
    close(ours[7], theirs[1])


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="config.optimizer='lars': expected 'adamw' or 'adam'"):
        optim.make(config(optimizer="lars"), SHAPES)
