"""The serious baselines of translation: the flow's own UNet without diffusion, on the same latents, from fresh weights.

No noise and one answer: the UNet reads the sources on its input channels and says the target's latents.

    fit               in the mean square: the mean of what may be, which is what PSNR rewards
    fit_adversarial   pix2pix (Isola et al. 2017): on the decoded images, in L1 and against a discriminator of patches

Ours differs from pix2pix in what keeps the comparison fair and small: the generator is the flow's UNet with its
autoencoder, trained as `fit` trains it, without dropout; the discriminator has group norm for batch norm.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from medm2g_jax.arrays import Params
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics.image import Images
from medm2g_jax.evaluate.samples import CHUNK
from medm2g_jax.inference import Model
from medm2g_jax.modality import split_stream
from medm2g_jax.model import OnGrid, init, null_context
from medm2g_jax.nn.attention import context

ALL = 2**30  # records: as many as there are
L1 = 100.0  # its weight beside the adversarial loss, pix2pix's
Latents = Mapping[str, jax.Array | np.ndarray]


class Fit(NamedTuple):
    """What makes the target of the sources, its last training loss, and the seconds its steps took."""

    answer: Callable[[Mapping[str, Images]], Images]
    loss: float
    seconds: float


class Translator:
    """The UNet of the target's flow as a function of the sources' latents.

    Attributes:
      params: fresh ones, which it is trained from.

    Raises:
      UserError: the flow of the target has no input channels for sources on its grid.
    """

    def __init__(self, held: Model, given: tuple[str, ...], target: str, seed: int):
        self._held, self._given = held, given
        self._name, self._number = split_stream(target)
        model, self._flow = held.model, held.model.flows[self._name]
        if not self._flow.slots:
            raise UserError(f"the flow of {self._name} reads nothing on its grid: a baseline by its UNet needs that")
        empty = held.ids([""]) if held.tokenizers else {}
        self._frozen = {**held.params, **model.null(held.params, empty)}
        self._encode = {m: jax.jit(lambda x, m=m: model.encode(held.params, m, x)) for m in model.flows}
        blank, at = jnp.zeros((1, *self._flow.family.latent_shape)), jnp.zeros((1,), jnp.int32)
        prompt, stream = context(jnp.zeros((1, 2, model.width))), at if self._flow.modality.contrasts else None
        near = self._near({s: blank for s in given})
        key = jax.random.key(seed)
        self.params = init(self._flow.unet, f"{self._name}/unet", key, blank, at, prompt, None, stream, near)

    def latents(self, some: Mapping[str, Images]) -> dict[str, np.ndarray]:
        out = {}
        for stream, x in some.items():
            one = self._encode[split_stream(stream)[0]]
            out[stream] = np.concatenate([np.asarray(one(x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)])
        return out

    def _near(self, z: Latents) -> jax.Array:
        ones = jnp.ones((len(z[self._given[0]]),), bool)
        return self._flow.on_grid(
            OnGrid(m, z[s], ones[:, None, None, None].astype(jnp.float32), jnp.full(len(ones), index, jnp.int32), ones)
            for s in self._given
            for m, index in [split_stream(s)]
        )

    def said(self, params: Params, z: Latents) -> jax.Array:
        """The target's latents: the UNet sees its sources, the null prompt, and a blank in place of noise."""
        rows = len(z[self._given[0]])
        blank, at = jnp.zeros((rows, *self._flow.family.latent_shape)), jnp.full((rows,), self._number, jnp.int32)
        prompt = null_context(self._flow.null(self._frozen), rows)
        return self._flow.predict(
            {**self._frozen, **params}, blank, jnp.zeros_like(at), prompt, None, at, self._near(z)
        )

    def image(self, params: Params, z: Latents) -> jax.Array:
        return self._held.model.decode(self._held.params, self._name, self.said(params, z))

    def answer(self, params: Params) -> Callable[[Mapping[str, Images]], Images]:
        decode = jax.jit(functools.partial(self.image, params))

        def answer(some: Mapping[str, Images]) -> Images:
            z = self.latents({s: some[s] for s in self._given})
            n = len(z[self._given[0]])
            parts = [decode({s: x[i : i + CHUNK] for s, x in z.items()}) for i in range(0, n, CHUNK)]
            return np.concatenate([np.asarray(x) for x in parts])

        return answer


def _optimiser(steps: int, lr: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 20, steps, lr / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))


def _batches(x: Mapping[str, np.ndarray], steps: int, batch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    rng, n = np.random.default_rng(seed), len(next(iter(x.values())))
    for _ in range(steps):
        rows = rng.choice(n, batch, replace=n < batch)
        yield {name: values[rows] for name, values in x.items()}


def fit(
    held: Model,
    train: Mapping[str, Images],
    target: str,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 4e-3,
    seed: int = 0,
) -> Fit:
    """Train it on `train`: images (n h w 1) in [-1, 1] of the target and of each source.

    Raises:
      UserError: see `Translator`.
    """
    net = Translator(held, tuple(s for s in train if s != target), target, seed)
    tx, params = _optimiser(steps, lr), net.params
    opt, z = tx.init(params), net.latents(train)

    @jax.jit
    def step(params, opt, z):
        value, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(net.said(p, z) - z[target])))(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    began, value = time.time(), jnp.inf
    for some in _batches(z, steps, batch, seed):
        params, opt, value = step(params, opt, some)
    return Fit(net.answer(params), float(value), time.time() - began)


class Patches(nn.Module):
    """Sources and target (b h w c) -> a logit of each patch, of 34 x 34 pixels: is the target real?"""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/4 w/4 1"]:
        x = nn.leaky_relu(nn.Conv(32, (4, 4), strides=2)(x), 0.2)
        x = nn.leaky_relu(nn.GroupNorm(8)(nn.Conv(64, (4, 4), strides=2)(x)), 0.2)
        x = nn.leaky_relu(nn.GroupNorm(8)(nn.Conv(128, (4, 4))(x)), 0.2)
        return nn.Conv(1, (4, 4))(x)


def fit_adversarial(
    held: Model,
    train: Mapping[str, Images],
    target: str,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 4e-3,
    seed: int = 0,
) -> Fit:
    """`fit` as a conditional GAN: the generator's loss is that of `Patches`, which it deceives, and L1 of the images.

    Raises:
      UserError: see `Translator`.
    """
    given = tuple(s for s in train if s != target)
    net, judge = Translator(held, given, target, seed), Patches()
    z = net.latents({s: train[s] for s in given})
    first = np.concatenate([x[:1] for x in train.values()], axis=-1)
    params = net.params, jax.jit(judge.init)(jax.random.key(seed + 1), first)
    txs = _optimiser(steps, lr), optax.adam(2e-4, b1=0.5)
    opts = tuple(tx.init(p) for tx, p in zip(txs, params, strict=True))
    wrong = optax.sigmoid_binary_cross_entropy

    @jax.jit
    def step(params, opts, z, x):
        sources, real = jnp.concatenate([x[s] for s in given], axis=-1), x[target]
        beside = lambda p, y: judge.apply(p, jnp.concatenate([sources, y], axis=-1))  # noqa: E731

        def deceive(p):
            made = net.image(p, z)
            logits = beside(params[1], made)
            return jnp.mean(wrong(logits, jnp.ones_like(logits))) + L1 * jnp.mean(jnp.abs(made - real)), made

        def tell(p, made):
            yes, no = beside(p, real), beside(p, made)
            return 0.5 * (jnp.mean(wrong(yes, jnp.ones_like(yes))) + jnp.mean(wrong(no, jnp.zeros_like(no))))

        (value, made), grads = jax.value_and_grad(deceive, has_aux=True)(params[0])
        moved = []
        for tx, opt, p, g in zip(txs, opts, params, (grads, jax.grad(tell)(params[1], made)), strict=True):
            updates, opt = tx.update(g, opt, p)
            moved.append((optax.apply_updates(p, updates), opt))
        return (*zip(*moved, strict=True), value)

    began, value = time.time(), jnp.inf
    both = {f"z {s}": x for s, x in z.items()} | {f"x {s}": x for s, x in train.items()}
    for some in _batches(both, steps, batch, seed):
        parts = ({s[2:]: v for s, v in some.items() if s[0] == kind} for kind in "zx")
        params, opts, value = step(params, opts, *parts)
    return Fit(net.answer(params[0]), float(value), time.time() - began)
