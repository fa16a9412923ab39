"""What each verb of the stage graph trains: the recipes that the one train step runs.

A recipe is three functions and the names that train:

    prepare(frozen, batch, key, t)   no gradient: latents, noise, times, prompts
    features(params, prepared)       one forward pass of what trains
    losses[term](features)           scalars, weighted by config.loss[term up to the first "/"]

Terms share the forward pass; a term of weight 0 is never traced. Two optional functions run once: `start` (f_B's rows
and the null prompt, after which C_T is needed no more) and `finish` (the latent scale).

Everything random comes from one key a step, folded with the global row and, for each modality, with its place in the
stage (not its name: stages that differ in the name alone are then one program to the compiler).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.align import HIGHEST, LOG_SCALE_INIT, info_nce
from medm2g_jax.arrays import Params
from medm2g_jax.autoencode import kl_per_dimension, token_cross_entropy
from medm2g_jax.config import stage_graph
from medm2g_jax.data.pipeline import Rows
from medm2g_jax.diffusion import T, add_noise, eps_loss
from medm2g_jax.extract import invariant_loss, view
from medm2g_jax.keys import row_keys, row_normal, row_uniform
from medm2g_jax.modality import MODALITIES, centre, of_kind
from medm2g_jax.model import MedM2G, apply, init, init_group, prompt_context

EVAL_TIMES = tuple(range(T // 20, T, T // 10))  # 50, 150, ..., 950: held-out eps loss is their mean


@dataclass(frozen=True)
class Recipe:
    """See the module's docstring. `init(key)` makes the parameters that train, `rows` says what a batch holds,
    `times` the noise levels of held-out evaluation (None: the loss has none)."""

    rows: Rows
    init: Callable[[Array], Params]
    prepare: Callable[..., Any]
    features: Callable[[Params, Any], Any]
    losses: Mapping[str, Callable[[Any], Array]]
    times: tuple[int, ...] | None = None
    start: Callable[[Params, Iterable, Array, Mapping], tuple[Params, Params]] | None = None
    finish: Callable[[Params, Iterable], dict] | None = None
    temporary: tuple[str, ...] = field(default=())  # prefixes of parameters that train and are then dropped


def recipe(config: ConfigDict, model: MedM2G, gpt2_pad: int, stage: rounds.Stage | None = None) -> Recipe:
    """The recipe of config.stage; `stage`: as the run's own graph has it, where rounds are absent."""
    stage = stage or stage_graph(config).stage(config.stage)
    build = {"vae": _autoencoder, "align": _alignment, "ldm": _single_flow, "round": _round}[stage.verb]
    return build(config, model, stage, gpt2_pad)


def weighted(recipe: Recipe, weights: Mapping[str, float], features: Any) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the terms and each term; terms of weight 0 are left out altogether."""
    terms = {t: loss(features) for t, loss in recipe.losses.items() if weights[t.split("/")[0]]}
    return sum(weights[t.split("/")[0]] * value for t, value in terms.items()), terms


# --- autoencoders (3.1) ---------------------------------------------------------------------------------------------


def _autoencoder(config: ConfigDict, model: MedM2G, stage: rounds.Stage, gpt2_pad: int) -> Recipe:
    kind = stage.subjects[0]
    text = kind == "text"

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None):
        x = batch[centre().name] if text else batch[kind]
        keys = row_keys(key, jax.tree.leaves(x)[0].shape[0])
        return x, keys

    def features(params: Params, prepared):
        x, keys = prepared
        mean, logvar = model.posterior(params, kind, x)
        z = mean + jnp.exp(0.5 * logvar) * row_normal(keys, mean.shape[1:], 0)
        if text:
            return (
                mean,
                logvar,
                apply(model.vaes[kind], params, f"{kind}/vae", z, x["gpt2"], method="logits"),
                x["gpt2"],
            )
        y = apply(model.vaes[kind], params, f"{kind}/vae", z, method="decode")
        return mean, logvar, y.astype(jnp.float32), x

    losses: dict[str, Callable] = {"kl": lambda f: kl_per_dimension(f[0], f[1])}
    if text:
        losses["ce"] = lambda f: token_cross_entropy(f[2], f[3], gpt2_pad)
    else:
        losses["l1"] = lambda f: jnp.mean(jnp.abs(f[2] - f[3]))
        losses["mse"] = lambda f: jnp.mean(jnp.square(f[2] - f[3]))

    def finish(params: Params, batches: Iterable) -> dict:
        encode = jax.jit(lambda p, x: model.posterior(p, kind, x)[0])
        means = [encode(params, batch[centre().name] if text else batch[kind]) for batch in batches]
        return {"scales": {kind: float(1.0 / jnp.std(jnp.concatenate(means)))}}

    rows = Rows(require=(centre().name,)) if text else Rows(any_of=of_kind(kind), merge=kind)
    return Recipe(rows, lambda key: init_group(model, key, stage.trains), prepare, features, losses, finish=finish)


# --- align and extract (3.2, 3.3) -----------------------------------------------------------------------------------


def _alignment(config: ConfigDict, model: MedM2G, stage: rounds.Stage, gpt2_pad: int) -> Recipe:
    a, b = stage.subjects
    pair = "_".join(stage.subjects)
    width = config.net.projector
    # The visual invariant is kept for the imaging modalities whose encoder trains here.
    invariant = [m for m in stage.new if MODALITIES[m].kind == "image" and config.loss.invariant]
    projector = Projector(width)

    def make(key: Array) -> Params:
        out = init_group(model, key, stage.trains)
        out[f"pair/{pair}/log_scale"] = jnp.float32(LOG_SCALE_INIT)
        for m in invariant:
            out |= init(projector, f"{m}/projector", key, jnp.zeros((2, model.width)))
        return out

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None):
        first, second = dict(batch), {}
        for i, m in enumerate(stage.subjects):
            if MODALITIES[m].kind == "image":
                first[m] = view(jax.random.fold_in(key, 2 * i), batch[m], config.crop)
            if m in invariant:
                second[m] = view(jax.random.fold_in(key, 2 * i + 1), batch[m], config.crop)
        return first, second

    def features(params: Params, prepared):
        first, second = prepared
        # Both views go through the tower in one pass.
        pooled, views = {}, {}
        for m in stage.subjects:
            if m in second:
                both = model.flows[m].prompt(params, jnp.concatenate([first[m], second[m]])).pooled
                pooled[m], other = jnp.split(both, 2)
                views[m] = [apply(projector, params, f"{m}/projector", z) for z in (pooled[m], other)]
            else:
                pooled[m] = model.flows[m].prompt(params, first[m]).pooled
        return pooled, views, params[f"pair/{pair}/log_scale"]

    losses: dict[str, Callable] = {f"contrast/{pair}": lambda f: info_nce(f[0][a], f[0][b], f[2])}
    for m in invariant:
        losses[f"invariant/{m}"] = lambda f, m=m: invariant_loss(*f[1][m], config.barlow_lambda)
    temporary = ("pair/", *(f"{m}/projector/" for m in invariant))
    return Recipe(Rows(require=stage.subjects), make, prepare, features, losses, temporary=temporary)


class Projector(nn.Module):
    """Barlow twins' three-layer projector (b d) -> (b width), batch statistics only; dropped after training."""

    width: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for i in range(2):
            z = nn.Dense(self.width, use_bias=False, precision=HIGHEST, name=f"linear_{i}")(z)
            scale = self.param(f"scale_{i}", nn.initializers.ones, (self.width,))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.width,))
            z = (z - z.mean(0)) * jax.lax.rsqrt(z.var(0) + 1e-5) * scale + bias
            z = nn.relu(z)
        return nn.Dense(self.width, use_bias=False, precision=HIGHEST, name="linear_2")(z)


# --- single flows (3.1, Eq. 2) --------------------------------------------------------------------------------------


def null_prompt(model: MedM2G, params: Params, empty: Mapping) -> Array:
    """Tokens (1 n d) of the null prompt C_T("") from the ids of the empty text."""
    return jax.jit(lambda p, x: model.flows[centre().name].prompt(p, x).tokens)(params, empty)


def _noised(keys: Array, z0: Mapping[str, Array], t: Array) -> tuple[dict, dict]:
    """(eps, z_t) of each modality, one time a row for all of them."""
    eps = {m: row_normal(keys, z.shape[1:], i) for i, (m, z) in enumerate(z0.items())}
    return eps, {m: add_noise(z, t, eps[m]) for m, z in z0.items()}


def _times(keys: Array, t: Array | None) -> Array:
    drawn = jnp.minimum((row_uniform(keys, "t") * T).astype(jnp.int32), T - 1)
    return drawn if t is None else jnp.full_like(drawn, t)


def _single_flow(config: ConfigDict, model: MedM2G, stage: rounds.Stage, gpt2_pad: int) -> Recipe:
    (target,) = stage.subjects
    flow = model.flows[target]
    prompts = rounds.graph(config.listing).prompts(target)

    def start(frozen: Params, batches: Iterable, key: Array, empty: Mapping) -> tuple[Params, Params]:
        return {}, {"null/tokens": null_prompt(model, frozen, empty)}

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None):
        z0 = {target: model.encode(frozen, target, batch[target])}
        keys = row_keys(key, z0[target].shape[0])
        times = _times(keys, t)
        eps, z_t = _noised(keys, z0, times)
        keep = row_uniform(keys, "drop_prompt") >= config.drop_prompt
        about = batch["about"]
        given = {
            m: (model.flows[m].prompt(frozen, about["prompt"][m]).tokens, keep & about["present"][m]) for m in prompts
        }
        return z_t[target], times, eps[target], prompt_context(frozen["null/tokens"], given), _stream(batch, target)

    def features(params: Params, prepared):
        z_t, times, eps, prompt, stream = prepared
        return eps, flow.eps(params, z_t, times, prompt, None, stream)

    return Recipe(
        Rows(require=(target,), prompts=prompts),
        lambda key: init_group(model, key, stage.trains),
        prepare,
        features,
        {f"eps/{target}": lambda f: eps_loss(*f)},
        times=EVAL_TIMES,
        start=start,
    )


def _stream(batch: Mapping, m: str) -> Array | None:
    return batch.get("about", {}).get("stream", {}).get(m)


# --- rounds (3.4, 3.5, Eq. 5-6) -------------------------------------------------------------------------------------


def _round(config: ConfigDict, model: MedM2G, stage: rounds.Stage, gpt2_pad: int) -> Recipe:
    a, b = stage.subjects
    partner = {a: b, b: a}
    pair = "_".join(stage.subjects)

    def start(frozen: Params, batches: Iterable, key: Array, empty: Mapping) -> tuple[Params, Params]:
        """phi_s of Eq. 5: f_B's free rows start as rows drawn from C_B's tokens of training data."""
        batch = next(iter(batches))
        rows = {}
        for i, m in enumerate(stage.new):
            tokens = jax.jit(lambda p, x, m=m: model.flows[m].prompt(p, x).tokens)(frozen, batch[m])
            flat = tokens.reshape(-1, tokens.shape[-1]).astype(jnp.float32)
            chosen = jax.random.choice(
                jax.random.fold_in(key, i), flat.shape[0], (model.flows[m].adapt.count,), replace=False
            )
            rows[f"{m}/adapt/rows"] = flat[chosen]
        return rows, {"null/tokens": null_prompt(model, frozen, empty)}

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None):
        z0 = {m: model.encode(frozen, m, batch[m]) for m in stage.subjects}
        keys = row_keys(key, z0[a].shape[0])
        times = _times(keys, t)
        eps, z_t = _noised(keys, z0, times)
        # One draw a row serves both flows: translation (clean source) or joint generation (source at the same t).
        clean = row_uniform(keys, "clean") < config.clean
        if t is not None:  # held out: always translation
            clean = jnp.ones_like(clean)
        source_t = jnp.where(clean, 0, times)
        source_z = {m: jnp.where(clean.reshape(-1, *(1,) * (z.ndim - 1)), z, z_t[m]) for m, z in z0.items()}
        prompts = {}
        for i, m in enumerate(stage.subjects):
            keep = row_uniform(keys, f"drop_prompt/{i}") >= config.drop_prompt
            other = partner[m]
            if config.drop_prompt >= 1:
                null = frozen["null/tokens"]
                given = {other: (jnp.zeros((keep.shape[0], 1, null.shape[-1])), jnp.zeros_like(keep))}
            else:
                given = {other: (model.flows[other].prompt(frozen, batch[other]).tokens, keep)}
            prompts[m] = prompt_context(frozen["null/tokens"], given)
        streams = {m: _stream(batch, m) for m in stage.subjects}
        return dict(
            z_t=z_t, t=times, eps=eps, prompts=prompts, streams=streams, clean=clean, z=source_z, source_t=source_t
        )

    def features(params: Params, p):
        sources = {m: model.flows[m].source(params, p["z"][m], p["source_t"], p["streams"][m]) for m in stage.subjects}
        eps = {
            m: model.flows[m].eps(params, p["z_t"][m], p["t"], p["prompts"][m], sources[partner[m]][0], p["streams"][m])
            for m in stage.subjects
        }
        return p["eps"], eps, {m: pooled for m, (_, pooled) in sources.items()}, p["clean"]

    losses: dict[str, Callable] = {f"eps/{m}": lambda f, m=m: eps_loss(f[0][m], f[1][m]) for m in stage.subjects}
    # Central alignment in the output space as well: V's pooled outputs, among rows with a clean source (rows of
    # different t would give the pair away by t).
    losses[f"contrast/{pair}"] = lambda f: info_nce(f[2][a], f[2][b], -jnp.log(config.contrast_tau), f[3])
    return Recipe(
        Rows(require=stage.subjects),
        lambda key: init_group(model, key, stage.trains),
        prepare,
        features,
        losses,
        times=EVAL_TIMES,
        start=start,
    )
