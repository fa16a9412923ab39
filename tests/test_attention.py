"""Contexts in closed form, attention against torch."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch

from medm2g_jax.nn import attention
from medm2g_jax.nn.attention import MASKED, Context, attend, concat, context, fold_bias, mask, present


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attend_and_its_gradients_equal_torch(biased, causal, long, backend, monkeypatch):
    """All at once, and as many tokens are taken: one head and some queries at a time on CPU, some queries on TPU."""
    monkeypatch.setattr(attention, "SCORES", 0 if long else 2**40)
    monkeypatch.setattr(attention, "MANY", 0 if long else 2**40)
    monkeypatch.setattr(attention, "BLOCK", 35)
    token = attention.TRACED_FOR.set(backend)
    n, m = 140, 140 if causal else 200
    q, k, v = draw(2, n, 3, 8, seed=1), draw(2, m, 3, 8, seed=2), draw(2, m, 3, 8, seed=3)
    bias = 3 * draw(2, m, seed=4) if biased else None
    logit_bias = torch.zeros(2, 1, n, m)
    if biased:
        logit_bias += torch.tensor(np.asarray(bias))[:, None, None]
    if causal:
        logit_bias += torch.full((n, m), -torch.inf).triu(1)
    theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in theirs), attn_mask=logit_bias
    ).transpose(1, 2)
    program = jax.make_jaxpr(lambda *x: attend(*x, bias, causal))(q, k, v)
    assert ("scan" in str(program)) == long
    np.testing.assert_allclose(attend(q, k, v, bias, causal), expected.detach(), atol=2e-6)
    (expected**2).sum().backward()
    grads = jax.grad(lambda *x: jnp.sum(attend(*x, bias, causal) ** 2), argnums=(0, 1, 2))(q, k, v)
    for ours, x in zip(grads, theirs, strict=True):
        assert oracles.relative_error(ours, x.grad) < 1e-5
    attention.TRACED_FOR.reset(token)


@pytest.mark.parametrize("long", [False, True])
def test_large_scores_do_not_overflow(long, monkeypatch):
    """Each query's greatest score, wherever it stands, is taken off before the exponential: exp(89) is infinite."""
    monkeypatch.setattr(attention, "SCORES", 0 if long else 2**40)
    q, k, v = 60 * draw(1, 256, 1, 8, seed=1), draw(1, 256, 1, 8, seed=2), draw(1, 256, 1, 8, seed=3)
    theirs = (torch.tensor(np.asarray(x)).double().transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs).transpose(1, 2)
    np.testing.assert_allclose(attend(q, k, v), expected, atol=1e-4)


def test_sources_of_different_length_weigh_the_same():
    """With equal keys, 4 text tokens get the attention mass of 16 image tokens: half each."""
    both = concat([context(jnp.zeros((1, 4, 8))), context(jnp.zeros((1, 16, 8)))])
    assert both.tokens.shape == (1, 20, 8)
    # The values tell which source a token is of: what comes out is the mass on the second.
    value = jnp.repeat(jnp.array([0.0, 1.0]), jnp.array([4, 16]))[None, :, None, None]
    q, k = draw(1, 3, 2, 8), jnp.broadcast_to(draw(1, 1, 2, 8), (1, 20, 2, 8))
    out = attend(q, k, jnp.broadcast_to(value, k.shape), both.bias)
    np.testing.assert_allclose(out, 0.5, atol=1e-6)
    # With a third source of one token, each has a third.
    three = concat([both, context(jnp.zeros((1, 1, 8)))])
    k, value = (jnp.concatenate([x, x[:, :1]], axis=1) for x in (k, jnp.broadcast_to(value, k.shape)))
    np.testing.assert_allclose(attend(q, k, value, three.bias), 1 / 3, atol=1e-6)


def test_one_source_alone_is_plain_attention():
    q, k, v = draw(2, 3, 2, 8, seed=1), draw(2, 6, 2, 8, seed=2), draw(2, 6, 2, 8, seed=3)
    np.testing.assert_allclose(attend(q, k, v, context(jnp.zeros((2, 6, 8))).bias), attend(q, k, v), atol=1e-6)


def test_a_masked_source_has_no_weight():
    first, second = context(draw(2, 4, 8, seed=1)), context(draw(2, 3, 8, seed=2))
    both = concat([first, mask(second, jnp.array([True, False]))])
    np.testing.assert_array_equal(present(both), [True, True])
    q, tokens = draw(2, 5, 1, 8, seed=3), both.tokens[:, :, None]
    out, alone = attend(q, tokens, tokens, both.bias), attend(q, *[first.tokens[:, :, None]] * 2, first.bias)
    np.testing.assert_allclose(out[1], alone[1], atol=1e-6)
    assert np.abs(out[0] - alone[0]).max() > 1e-2


def test_a_row_without_any_token_is_absent_and_finite():
    nothing = mask(context(draw(2, 4, 8)), jnp.array([False, True]))
    np.testing.assert_array_equal(present(nothing), [False, True])
    np.testing.assert_array_equal(nothing.bias[0], MASKED)
    tokens = nothing.tokens[:, :, None]
    grad = jax.grad(lambda q: jnp.sum(attend(q, tokens, tokens, nothing.bias)))(draw(2, 3, 1, 8))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_folding_the_bias_keeps_it_exact_in_half_precision(dtype):
    """Logits of the folded heads against logits plus bias; -log(272) rounds to a hundredth in bfloat16."""
    ctx = concat([context(jnp.zeros((1, 4, 8))), context(jnp.zeros((1, 272, 8)))])
    q, k, v = (draw(1, n, 2, 24, seed=n, dtype=dtype) for n in (4, 276, 276))
    fq, fk, fv = fold_bias(q, k, v, ctx.bias)
    assert {x.shape[-1] for x in (fq, fk, fv)} == {32} and fq.dtype == dtype
    exact = jnp.float32

    def logits(a, b):
        return jnp.einsum("bnke,bmke->bknm", a.astype(exact), b.astype(exact)) * 24**-0.5

    np.testing.assert_allclose(logits(fq, fk) - logits(q, k), jnp.broadcast_to(ctx.bias, (1, 2, 4, 276)), atol=2e-4)
    assert (fv[..., 24:] == 0).all()
    assert fold_bias(q, k, v, None)[0].shape[-1] == 24
    # A masked token keeps no weight, in float16 too.
    masked = fold_bias(q, k, v, jnp.full((1, 276), MASKED).at[:, 0].set(0.0))
    np.testing.assert_array_equal(jax.nn.softmax(logits(*masked[:2]), axis=-1)[..., 1:], 0.0)


def test_gpus_get_cudnn_where_it_can_and_the_same_numbers(monkeypatch):
    calls = []
    plain = jax.nn.dot_product_attention

    def kernel(q, k, v, implementation, **kwargs):
        """What jax asks of the arguments in training; tests/test_gpu.py has the kernel itself."""
        assert implementation == "cudnn" and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
        assert q.shape[1] % 2 == k.shape[1] % 2 == v.shape[1] % 2 == 0
        calls.append((q.shape[1], k.shape[1], q.shape[-1]))
        return plain(q, k, v, implementation="xla", **kwargs)

    def case(n, sources, e, dtype, biased=True, causal=False):
        m = sum(sources)
        q, k, v = (draw(2, length, 2, e, seed=length, dtype=dtype) for length in (n, m, m))
        bias = concat([context(jnp.zeros((2, some, 8))) for some in sources]).bias if biased else None
        return attend(q, k, v, bias, causal)

    half = jnp.bfloat16
    cases = {
        (3, (2, 5), 40, half): (4, 8, 48),
        (4, (2, 6), 80, half): (4, 8, 88),
        (4, (7,), 64, half, False): (4, 8, 72),  # the eighth is masked
        (7, (7,), 64, half, False, True): (8, 8, 64),  # causal: nobody sees it
        (7, (7,), 64, half, True, True): (8, 8, 72),
        (3, (2, 5), 160, half): None,  # SD's 160 and float32 go to XLA
        (3, (2, 5), 40, jnp.float32): None,
    }
    expected = [case(*some) for some in cases]
    gpu = SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention.jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", kernel)
    for some, want in zip(cases, expected, strict=True):
        got = case(*some)
        assert got.dtype == some[3] and got.shape == want.shape
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)
    for gpu.compute_capability in ("7.5", "gfx942"):  # T4, AMD: no such kernel
        case(*next(iter(cases)))
    assert calls == [sizes for sizes in cases.values() if sizes]


def test_programs_for_a_tpu_that_is_not_here_are_its_own():
    """What `medm2g plan` compiles on a CPU for a TPU has none of the CPU's loops."""
    x = jnp.zeros((1, 256, 2, 8))
    program = lambda: str(jax.make_jaxpr(lambda x: attend(x, x, x))(x))  # noqa: E731
    assert "scan" in program()
    with attention.traced_for("tpu"):
        assert "scan" not in program()
    assert "scan" in program()


def test_a_context_is_a_pytree():
    ctx = jax.jit(lambda c: concat([c, c]))(context(draw(1, 2, 3)))
    assert isinstance(ctx, Context) and ctx.bias.shape == (1, 4)
