"""The judge of generated phantom images: a small CNN that reads the findings, trained on real phantoms of one modality.

Its accuracy on real held-out images is the ceiling of every figure it gives, and is printed beside them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Float

from medm2g_jax.data.phantom.report import KINDS, LEVELS, SIDES, SIZES, Findings
from medm2g_jax.device import compiler_options
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.metrics import METRICS

FIELDS = {"kind": KINDS, "side": SIDES, "size": SIZES, "level": LEVELS, "cardiomegaly": (False, True)}
STEPS, BATCH, LR = 500, 64, 3e-3


class Probe(nn.Module):
    """(b h w 1) -> {field: logits (b, number of values)}: strided convolutions with residual blocks between them."""

    @nn.compact
    def __call__(self, x: Float[jax.Array, "b h w 1"]) -> dict[str, jax.Array]:
        b, h, w, _ = x.shape
        # Space-to-depth to 16 x 16 keeps the convolutions cheap at every image size.
        p = max(1, h // 32)
        x = x.reshape(b, h // p, p, w // p, p).transpose(0, 1, 3, 2, 4).reshape(b, h // p, w // p, p * p)
        x = nn.Conv(32, (3, 3), strides=2)(x)
        for c in (48, 64):
            x = nn.Conv(c, (3, 3), strides=2)(nn.silu(nn.GroupNorm(8)(x)))
            y = nn.Conv(c, (3, 3))(nn.silu(nn.GroupNorm(8)(x)))
            x = x + nn.Conv(c, (3, 3))(nn.silu(nn.GroupNorm(8)(y)))
        x = nn.silu(nn.Dense(64)(nn.silu(nn.GroupNorm(8)(x)).reshape(b, -1)))
        return {name: nn.Dense(len(values), name=name)(x) for name, values in FIELDS.items()}


def as_indices(labels: list[Findings]) -> dict[str, np.ndarray]:
    """{field: index of its value (n,), -1 where the field does not apply}."""
    out = {}
    for name, values in FIELDS.items():
        stated = [getattr(label, name) for label in labels]
        out[name] = np.asarray([-1 if v is None else values.index(v) for v in stated], np.int32)
    return out


def finding_figures(
    task: str,
    target: Mapping[str, np.ndarray],
    read: Mapping[str, np.ndarray],
    ceilings: Mapping[str, Reference],
    seed: int,
) -> list[Figure]:
    """Of images with a lesion: whether each field is read as it is, and whether a lesion is seen at all; the floor is
    the commonest answer.

    Args:
      ceilings: {metric: what the judge reaches on real images}.
    """
    out, n = [], len(target["kind"])
    for name in FIELDS:
        commonest = float(np.bincount(target[name]).max() / n)
        ends = dict(floor=Reference(commonest, "the commonest answer"), ceiling=ceilings.get(f"{name} right"))
        pair = target[name], read[name]
        out.append(METRICS["right"].figure(task, f"{name} right", *pair, seed=seed, **ends))
    seen = (read["kind"] != FIELDS["kind"].index("none")).astype(int)
    ends = dict(ceiling=ceilings.get("lesion seen"))
    out.append(METRICS["right"].figure(task, "lesion seen", np.ones_like(seen), seen, seed=seed, **ends))
    return out


def train_probe(
    images: Callable[[np.ndarray], np.ndarray], labels: list[Findings], indices: np.ndarray, seed: int = 0
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Train on real images; returns read((n h w 1) in [-1, 1]) -> {field: index of the value read (n,)}.

    Args:
      images: indices -> (n h w 1).
      labels: of `indices`, in that order.
    """
    target = as_indices(labels)
    probe = Probe()
    params = jax.jit(probe.init)(jax.random.key(seed), images(indices[:2]))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_onecycle_schedule(STEPS, LR, 0.1), b2=0.99)
    )

    def loss(params: Any, x: jax.Array, y: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        # Noise and a blur-free jitter keep the probe from reading what an autoencoder does not reproduce.
        logits = probe.apply(params, x + 0.1 * jax.random.normal(key, x.shape))
        terms = []
        for name, out in logits.items():
            nll = optax.softmax_cross_entropy_with_integer_labels(out, jnp.maximum(y[name], 0))
            terms.append(jnp.sum(nll * (y[name] >= 0)) / jnp.maximum(jnp.sum(y[name] >= 0), 1))
        return sum(terms)

    @jax.jit
    def step(params, opt, x, y, key):
        grads = jax.grad(loss)(params, x, y, key)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    rng = np.random.default_rng(seed)
    for i in range(STEPS):
        chosen = rng.integers(0, len(indices), BATCH)
        y = {name: values[chosen] for name, values in target.items()}
        params, opt = step(params, opt, images(indices[chosen]), y, jax.random.fold_in(jax.random.key(seed), i))
    apply = jax.jit(lambda x: probe.apply(params, x), compiler_options=compiler_options())
    return lambda x: {name: np.asarray(jnp.argmax(out, -1)) for name, out in apply(x).items()}
