"""V_B and f_B: what they depend on, what they start as."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from medm2g_jax.nn import context as ctx

IMAGE = ctx.ImageContext(width=16, heads=2, channels=(8, 16), stride=2)
TEXT = ctx.TextContext(width=16, heads=2, tokens=4, latent=10)
SHAPES = {"image": (IMAGE, (2, 8, 8, 4), 16), "text": (TEXT, (2, 10), 4)}
T = jnp.array([0, 700])


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module", params=SHAPES)
def case(request):
    """V_B with random parameters, jitted, one input (z, t, f) and the number of z's tokens."""
    net, shape, n = SHAPES[request.param]
    inputs = draw(*shape), T, draw(3, 16, seed=1)
    return net, oracles.random_variables(net, *inputs), oracles.fast_jit(net.apply), inputs, n


def test_tokens_of_z_then_of_f_and_their_pooled_mean(case):
    _, params, apply, inputs, n = case
    tokens, pooled = apply(params, *inputs)
    assert tokens.shape == (2, n + 3, 16) and pooled.shape == (2, 16)
    mean = np.mean(tokens[:, :n], axis=1)
    np.testing.assert_allclose(pooled, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


def test_outputs_follow_z_t_and_f(case):
    _, params, apply, (z, t, f), n = case
    tokens, pooled = apply(params, z, t, f)
    for other in [(z.at[0].add(0.5), t, f), (z, t.at[0].set(400), f)]:  # of the first row only
        moved, moved_pooled = apply(params, *other)
        assert np.abs(moved - tokens)[0, :n].max() > 1e-3 and np.abs(moved_pooled - pooled)[0].max() > 1e-4
        np.testing.assert_allclose(moved[1], tokens[1], atol=1e-6)
    moved, moved_pooled = apply(params, z, t, f + draw(3, 16, seed=2))
    assert np.abs(moved - tokens)[:, n:].max() > 1e-3  # f's own tokens
    assert np.abs(moved - tokens)[:, :n].max() > 1e-4 and np.abs(moved_pooled - pooled).max() > 1e-5  # and z's, by it


def test_stream_embedding_is_zero_at_first_and_then_tells_streams_apart(case):
    net, _, _, inputs, _ = case
    net = net.clone(streams=3)
    fresh = oracles.fast_jit(net.init)(jax.random.key(0), *inputs)["params"]
    table = fresh["stream"]["embedding"]
    np.testing.assert_array_equal(table, np.zeros_like(table))
    apply = oracles.fast_jit(lambda p, stream: net.apply({"params": p}, *inputs, stream)[0])
    taught = fresh | {"stream": {"embedding": table.at[2].set(draw(table.shape[1]))}}
    change = np.abs(apply(taught, jnp.array([1, 2])) - apply(fresh, jnp.array([1, 2]))).max(axis=(1, 2))
    assert change[0] == 0 and change[1] > 1e-3


def test_image_tokens_know_where_they_are():
    """A constant latent gives the same token everywhere but for the padding, and for the positions."""
    grid = ctx.positions(3, 5, 16)
    assert len({tuple(row) for row in grid.reshape(15, 16).round(6)}) == 15
    np.testing.assert_array_equal(grid[:, 0, :8], grid[:, 4, :8])  # the first half tells the row alone
    np.testing.assert_array_equal(grid[0, :, 8:], grid[2, :, 8:])
    np.testing.assert_allclose(grid[2, 1, [0, 4]], [np.sin(2), np.cos(2)], atol=1e-12)


def test_full_size_has_256_image_and_4_text_tokens():
    f = jax.eval_shape(ctx.Adaptation().init_with_output, jax.random.key(0))[0]
    assert f.shape == (16, 768)

    def tokens(net, *shape):
        (guide, pooled), _ = jax.eval_shape(
            lambda: net.init_with_output(jax.random.key(0), jnp.zeros(shape), jnp.zeros(2), jnp.zeros(f.shape))
        )
        return guide.shape, pooled.shape

    assert tokens(ctx.ImageContext(), 2, 64, 64, 4) == ((2, 256 + 16, 768), (2, 768))
    assert tokens(ctx.TextContext(), 2, 768) == ((2, 4 + 16, 768), (2, 768))


def test_adaptation_starts_as_its_rows():
    """F_emb (Eq. 5) is the identity at first: f_B is the rows sampled from C_B, and both can be trained."""
    net = ctx.Adaptation(count=5, width=16)
    params = net.init(jax.random.key(0))["params"]
    assert oracles.shapes({"params": params}) == {"rows": (5, 16), "emb/kernel": (16, 16), "emb/bias": (16,)}
    assert 0.01 < float(jnp.std(params["rows"])) < 0.03
    rows = draw(5, 16)
    np.testing.assert_allclose(net.apply({"params": params | {"rows": rows}}), rows, atol=1e-6)
    grads = jax.grad(lambda p: jnp.sum(net.apply({"params": p}) ** 2))(params)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(grads))


def test_wrong_sizes_are_refused():
    f = jnp.zeros((3, 16))
    with pytest.raises(ValueError, match="stride 4"):
        IMAGE.clone(stride=4).init(jax.random.key(0), jnp.zeros((2, 8, 8, 4)), T, f)
    with pytest.raises(ValueError, match="latents of 10 features, found 9"):
        TEXT.init(jax.random.key(0), jnp.zeros((2, 9)), T, f)
