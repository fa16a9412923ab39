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

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.align import HIGHEST, LOG_SCALE_INIT, info_nce
from medm2g_jax.arrays import Latent, Params, Times
from medm2g_jax.autoencode import kl_per_dimension
from medm2g_jax.data.pipeline import Rows
from medm2g_jax.diffusion import TIMES, T, denoising_loss
from medm2g_jax.errors import UserError
from medm2g_jax.extract import invariant_loss, view
from medm2g_jax.keys import row_keys, row_normal, row_uniform
from medm2g_jax.modality import of_kind, split_stream
from medm2g_jax.model import Flow, MedM2G, OnGrid, apply, init, init_group, prompt_context, under
from medm2g_jax.nn.attention import Context, concat, mask

# What of a transformer's prompt attention theta_c may begin as: everything but its output layer.
PROMPT = re.compile(r"/prompt(_norm|)/(?!out/)")
GUIDE = {"": "/guide/", "_norm": "/guide/norm/"}
PRACTISED_PROMPT = 0.5  # share of a flow's rows with an earlier partner that have its prompt beside its guide
RIDGE = 1e-2  # of the mean second moment of prompts: what `_evened` makes of directions that hardly occur
EVAL_TIMES = tuple(range(T // 20, T, T // 10))  # 50, 150, ..., 950: held-out loss of a flow is their mean


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


def recipe(config: ConfigDict, model: MedM2G, graph: rounds.Graph, cached: Sequence[str] = ()) -> Recipe:
    """The recipe of config.stage, in the run's own graph. cached: see `rows_of`."""
    stage = graph.stage(config.stage)
    build = {"vae": _autoencoder, "align": _alignment, "ldm": _single_flow, "round": _round}[stage.verb]
    return build(config, model, stage, rows_of(config, graph, cached))


def rows_of(config: ConfigDict, graph: rounds.Graph, cached: Sequence[str] = ()) -> Rows:
    """What one training row of config.stage holds. cached: modalities whose latents, where the stage encodes them, it
    holds in place of pixels."""
    stage = graph.stage(config.stage)
    if stage.verb == "vae":
        (kind,) = stage.subjects
        return Rows(any_of=tuple(m for m in of_kind(kind) if m in graph.modalities), merge=kind)
    if stage.verb == "align":  # a single modality: two of its contrasts
        return Rows(require=stage.subjects, prompts=stage.subjects if len(stage.subjects) == 1 else (), identify=True)
    if stage.verb == "ldm":
        prompts, latents = graph.prompts(*stage.subjects), tuple(m for m in stage.subjects if m in cached)
        return Rows(require=stage.subjects, prompts=prompts, unprompted=config.unprompted, latents=latents)
    contrasts = stage.contrasts if config.others else ()
    rows = Rows(
        require=stage.subjects,
        contrasts=contrasts,
        others=config.others if contrasts else 0,
        registered=tuple(stage.registered),
        earlier=tuple(stage.earlier.items()),
        rehearse=config.rehearse if stage.earlier else 0.0,
        accelerate=accelerated(config),
        only=streams_of(config, "streams"),
        made="".join(streams_of(config, "make")),
        identify=True,
    )
    drawn = rows.accelerate[:1] if rows.accelerate else ()  # undersampled anew each time
    prompting = stage.subjects if len(stage.subjects) == 2 and config.drop_prompt < 1 else ()
    return replace(
        rows,
        latents=tuple(m for m in (*stage.subjects, *rows.partners) if m in cached and m not in drawn),
        pixels=(*prompting, *rows.partners),
    )


def accelerated(config: ConfigDict) -> tuple[str, int, str] | None:
    """`Rows.accelerate` of a stage; None where nothing is undersampled."""
    tune = rounds.tuned(config.stage)
    if tune is None or "accelerate" not in config or config.accelerate == 1:
        return None
    return rounds.TASKS[tune[0]].accelerated, config.accelerate, config.keep_lines


def streams_of(config: ConfigDict, field: str) -> tuple[str, ...]:
    """The streams that a field of a fine-tune names: `streams`, those that rows may be of (`Rows.only`), or `make`, the
    one that is made; () of any other stage.

    Raises:
      UserError: there is no such stream, or it is of no modality that this fine-tune trains on; `make` is of another
        than its target, or names several.
    """
    names = tuple(name.strip() for name in config.get(field, "").split(",") if name.strip())
    if names:
        task = rounds.TASKS[rounds.tuned(config.stage)[0]]
        able = (task.target,) if field == "make" else rounds.members(task.round)
        wrong = [name for name in names if split_stream(name)[0] not in able]
        if wrong or (field == "make" and len(names) > 1):
            raise UserError(
                f"config.{field}={config[field]!r}: expected {'one stream' if field == 'make' else 'streams'} of "
                f"{' or '.join(able)} for {config.stage}"
            )
    return names


def weighted(recipe: Recipe, weights: Mapping[str, float], features: Any) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the terms and each term; terms of weight 0 are left out altogether."""
    terms = {t: loss(features) for t, loss in recipe.losses.items() if weights[t.split("/")[0]]}
    return sum(weights[t.split("/")[0]] * value for t, value in terms.items()), terms


# --- autoencoders (3.1) ---------------------------------------------------------------------------------------------


class Autoencoded(NamedTuple):
    """The posterior's mean and log-variance, what the decoder made of a draw of it, and the value it was made from."""

    mean: Latent
    logvar: Latent
    output: Array
    x: Any


def _autoencoder(config: ConfigDict, model: MedM2G, stage: rounds.Stage, rows: Rows) -> Recipe:
    (kind,) = stage.subjects
    family = model.families[kind]

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None):
        x = batch[kind]
        return x, row_keys(key, jax.tree.leaves(x)[0].shape[0])

    def features(params: Params, prepared) -> Autoencoded:
        x, keys = prepared
        mean, logvar = model.posterior(params, kind, x)
        z = mean + jnp.exp(0.5 * logvar) * row_normal(keys, mean.shape[1:], 0)
        return Autoencoded(mean, logvar, family.reconstruct(under(params, f"{kind}/vae"), z, x), x)

    def finish(params: Params, batches: Iterable) -> dict:
        encode = jax.jit(lambda p, x: model.posterior(p, kind, x)[0])
        means = [encode(params, batch[kind]) for batch in batches]
        return {"scales": {kind: float(1.0 / jnp.std(jnp.concatenate(means)))}}

    losses: dict[str, Callable] = {"kl": lambda f: kl_per_dimension(f.mean, f.logvar)}
    losses |= {name: lambda f, loss=loss: loss(f.output, f.x) for name, loss in family.losses.items()}
    return Recipe(rows, lambda key: init_group(model, key, stage.trains), prepare, features, losses, finish=finish)


# --- align and extract (3.2, 3.3) -----------------------------------------------------------------------------------


class Views(NamedTuple):
    """What the prompt encoders see: a value of each subject, a second view of the images that the visual invariant is
    kept for, and which rows are of one record."""

    first: dict[str, Any]
    second: dict[str, Any]
    same: Bool[Array, "b b"]


class Aligned(NamedTuple):
    """Pooled embeddings of each subject, projections of the two views, and the pair's ln(1/tau)."""

    pooled: dict[str, Float[Array, "b d"]]
    views: dict[str, tuple[Float[Array, "b p"], Float[Array, "b p"]]]
    log_scale: Float[Array, ""]
    same: Bool[Array, "b b"]


def _alignment(config: ConfigDict, model: MedM2G, stage: rounds.Stage, rows: Rows) -> Recipe:
    a, b = stage.subjects if len(stage.subjects) == 2 else (*stage.subjects, "other")
    pair = "_".join(stage.subjects)
    owner = {a: a, b: b if b in model.flows else a}  # a single modality: both are pictures of it, of two contrasts
    # The visual invariant is kept for the imaging modalities whose encoder trains here.
    invariant = [m for m in stage.new if model.flows[m].family.has_views and config.loss.invariant]
    projector = Projector(config.net.projector)

    def make(key: Array) -> Params:
        out = init_group(model, key, stage.trains)
        out[f"pair/{pair}/log_scale"] = jnp.float32(LOG_SCALE_INIT)
        for m in invariant:
            out |= init(projector, f"{m}/projector", key, jnp.zeros((2, model.width)))
        return out

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None) -> Views:
        x = {m: batch[m] if m in batch else batch["about"]["prompt"][a] for m in (a, b)}
        first, second = dict(x), {}
        for i, m in enumerate((a, b)):
            if model.flows[owner[m]].family.has_views:
                first[m] = view(jax.random.fold_in(key, 2 * i), x[m], config.crop)
            if m in invariant:
                second[m] = view(jax.random.fold_in(key, 2 * i + 1), x[m], config.crop)
        return Views(first, second, _same(batch, [(model.flows[owner[m]], x[m]) for m in (a, b)]))

    def features(params: Params, prepared: Views) -> Aligned:
        # Both views go through the tower in one pass.
        pooled, views = {}, {}
        for m in (a, b):
            prompt = model.flows[owner[m]].prompt
            if m in prepared.second:
                both = prompt(params, jnp.concatenate([prepared.first[m], prepared.second[m]])).pooled
                pooled[m], other = jnp.split(both, 2)
                views[m] = tuple(apply(projector, params, f"{m}/projector", z) for z in (pooled[m], other))
            else:
                pooled[m] = prompt(params, prepared.first[m]).pooled
        return Aligned(pooled, views, params[f"pair/{pair}/log_scale"], prepared.same)

    losses: dict[str, Callable] = {
        f"contrast/{pair}": lambda f: info_nce(f.pooled[a], f.pooled[b], f.log_scale, same=f.same)
    }
    for m in invariant:
        losses[f"invariant/{m}"] = lambda f, m=m: invariant_loss(*f.views[m], config.barlow_lambda)
    temporary = ("pair/", *(f"{m}/projector/" for m in invariant))
    return Recipe(rows, make, prepare, features, losses, temporary=temporary)


def _same(batch: Mapping, values: Iterable[tuple[Flow, Any]]) -> Bool[Array, "b b"]:
    """Which rows cannot be told apart: of one record, or alike in one of these values."""
    record = batch["about"]["record"]
    same = record[:, None] == record[None, :]
    for flow, x in values:
        same |= flow.family.alike(x)
    return same


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


class Noised(NamedTuple):
    """A batch on its way: z_t at times t, what the network has to say of it and what its error counts, what the prompt
    is made of, and what stands on its grid (`Flow.on_grid`)."""

    z_t: Latent
    t: Times
    target: Latent
    weight: Float[Array, "b"]
    given: dict[str, tuple[Array, Bool[Array, "b"]]]
    stream: Array | None
    registered: Array | None = None


class Predicted(NamedTuple):
    """What a network had to say, what it said, and what its error counts."""

    target: Latent
    prediction: Latent
    weight: Float[Array, "b"]


def _null(model: MedM2G, frozen: Params, empty: Mapping) -> Params:
    """The centre's C(""), once and for all."""
    return jax.jit(lambda p, x: model.null(p, x))(frozen, empty)


def _times(keys: Array, t: Array | None, among: str = "uniform") -> Times:
    """A noise level a row, or t in all; among: a name in diffusion.TIMES."""
    drawn = jnp.minimum((TIMES[among](row_uniform(keys, "t")) * T).astype(jnp.int32), T - 1)
    return drawn if t is None else jnp.full_like(drawn, t)


def _single_flow(config: ConfigDict, model: MedM2G, stage: rounds.Stage, rows: Rows) -> Recipe:
    (target,) = stage.subjects
    flow = model.flows[target]

    def start(frozen: Params, batches: Iterable, key: Array, empty: Mapping) -> tuple[Params, Params]:
        even = config.net.loud_prompts and rows.prompts
        drawn = {f"{target}/prompt_in/kernel": _evened(model, frozen, batches, rows.prompts)} if even else {}
        return drawn, _null(model, frozen, empty)

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None) -> Noised:
        z0 = model.encode(frozen, target, batch[target])
        keys = row_keys(key, z0.shape[0])
        times = _times(keys, t, config.times)
        eps = row_normal(keys, z0.shape[1:], 0)
        keep = row_uniform(keys, "drop_prompt") >= config.drop_prompt
        about = batch.get("about", {})
        given = {
            m: (model.flows[m].prompt(frozen, about["prompt"][m]).tokens, keep & about["present"][m])
            for m in rows.prompts
        }
        process = flow.process
        z_t, aim = process.add_noise(z0, times, eps), process.target(z0, times, eps)
        return Noised(z_t, times, aim, process.weight(times, config.min_snr), given, _stream(batch, target))

    def features(params: Params, p: Noised) -> Predicted:
        prompt = prompt_context(flow.null(params), p.given, p.t.shape[0])
        return Predicted(p.target, flow.predict(params, p.z_t, p.t, prompt, None, p.stream), p.weight)

    return Recipe(
        rows,
        lambda key: init_group(model, key, stage.trains),
        prepare,
        features,
        {f"eps/{target}": lambda f: denoising_loss(*f)},
        times=EVAL_TIMES,
        start=start,
    )


def _evened(model: MedM2G, frozen: Params, batches: Iterable, prompts: Sequence[str]) -> Float[Array, "d d"]:
    """What `prompt_in` multiplies tokens by at first: their directions evened out, one a feature in the mean.

    Alignment spends few directions of the shared space on most of what it says: a report's side moves its tokens five
    times as far as the kind of its lesion, and a flow learns by how far it is moved. The inverse square root of the
    second moment of prompts (ZCA whitening), with a ridge for directions that hardly occur.
    """

    @jax.jit
    def moment(params: Params, about: Mapping) -> tuple[Array, Array]:
        total, count = jnp.zeros((model.width, model.width)), jnp.float32(0)
        for m in prompts:
            tokens = model.flows[m].prompt(params, about["prompt"][m]).tokens.astype(jnp.float32)
            there = about["present"][m].astype(jnp.float32)
            total += jnp.einsum("b, b n i, b n j -> i j", there, tokens, tokens, precision=HIGHEST)
            count += there.sum() * tokens.shape[1]
        return total, count

    sums = [moment(frozen, batch["about"]) for batch in batches]
    second = sum(total for total, _ in sums) / jnp.maximum(sum(count for _, count in sums), 1)
    value, vector = jnp.linalg.eigh(second)
    root = jnp.sqrt(jnp.maximum(value, 0.0) + RIDGE * value.mean() + jnp.finfo(jnp.float32).tiny)
    kernel = (vector / root) @ vector.T
    loud = jnp.sqrt(jnp.sum((kernel @ second) * kernel) / model.width)
    return kernel / jnp.maximum(loud, jnp.finfo(jnp.float32).tiny)


def _stream(batch: Mapping, m: str) -> Array | None:
    return batch.get("about", {}).get("stream", {}).get(m)


# --- rounds (3.4, 3.5, Eq. 5-6) -------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What V reads (Eq. 6): latents at their own noise level, and the contrast they are of."""

    z: Latent
    t: Times
    stream: Array | None


class Others(NamedTuple):
    """Other contrasts of one modality, k a row, flat (b k): what V reads, and which are there (b k)."""

    source: Source
    has: Bool[Array, "b k"]


class Earlier(NamedTuple):
    """A partner of an earlier round: what V reads, and the rows of each target that it guides."""

    source: Source
    guides: dict[str, Bool[Array, "b"]]


class Pair(NamedTuple):
    """A batch of a round, by modality: each flow's latents on their way, and the sources that guide the others.

    clean: rows of translation, whose sources are clean; in the rest all share one time. counts: rows whose flow learns
    (None: all). partner: rows that the partner guides (None: all). beside: which of the partner's other contrasts guide
    a flow beside it.
    """

    noised: dict[str, Noised]
    sources: dict[str, Source]
    others: dict[str, Others]
    earlier: dict[str, Earlier]
    clean: Bool[Array, "b"]
    counts: dict[str, Bool[Array, "b"]] | None
    partner: dict[str, Bool[Array, "b"]]
    beside: dict[str, Bool[Array, "b k"]]
    same: Bool[Array, "b b"]


class Paired(NamedTuple):
    """Each flow's prediction, V's pooled output of each source, and the rows that count."""

    predicted: dict[str, Predicted]
    pooled: dict[str, Float[Array, "b d"]]
    clean: Bool[Array, "b"]
    counts: dict[str, Bool[Array, "b"]] | None
    same: Bool[Array, "b b"]


def _round(config: ConfigDict, model: MedM2G, stage: rounds.Stage, rows: Rows) -> Recipe:
    subjects, flows = stage.subjects, {m: model.flows[m] for m in stage.subjects}
    targets = (stage.target,) if stage.target else subjects
    partner = dict(zip(subjects, reversed(subjects), strict=True)) if len(subjects) == 2 else {}

    def start(frozen: Params, batches: Iterable, key: Array, empty: Mapping) -> tuple[Params, Params]:
        """phi_s of Eq. 5: f_B's free rows start as rows drawn from C_B's tokens of training data. And theta_c reads a
        guide as its flow has learnt to read a prompt, where config.guide_init says so; its output is zero all the same.
        """
        batch = next(iter(batches))
        drawn = {}
        for m in stage.new if config.guide_init == "prompt" else ():
            for name in frozen:
                if name.startswith(f"{m}/unet/") and (read := PROMPT.search(name)):
                    drawn[name.replace(read[0], GUIDE[read[1]])] = jnp.copy(frozen[name])
        for i, m in enumerate(stage.new):
            tokens = jax.jit(lambda p, x, m=m: flows[m].prompt(p, x).tokens)(frozen, batch[m])
            flat = tokens.reshape(-1, tokens.shape[-1]).astype(jnp.float32)
            odds = None
            if "has" in batch["about"]:  # where a record lacks the modality, its place in the batch is blank
                has = jnp.repeat(batch["about"]["has"][m], tokens.shape[1])
                odds = has / jnp.maximum(has.sum(), 1)
            count = flows[m].adapt.count
            chosen = jax.random.choice(jax.random.fold_in(key, i), flat.shape[0], (count,), replace=False, p=odds)
            drawn[f"{m}/adapt/rows"] = flat[chosen]
        return drawn, _null(model, frozen, empty)

    def prepare(frozen: Params, batch: Mapping, key: Array, t: Array | None = None) -> Pair:
        about = batch["about"]
        z0 = {m: model.encode(frozen, m, batch[m]) for m in subjects}
        keys = row_keys(key, z0[subjects[0]].shape[0])
        times = _times(keys, t)
        eps = {m: row_normal(keys, z.shape[1:], i) for i, (m, z) in enumerate(z0.items())}
        z_t = {m: flows[m].process.add_noise(z, times, eps[m]) for m, z in z0.items()}
        # One draw a row serves both flows: translation (clean source) or joint generation (source at the same t).
        clean = row_uniform(keys, "clean") < config.clean
        if t is not None:  # held out: always translation
            clean = jnp.ones_like(clean)
        streams = {m: _stream(batch, m) for m in subjects}
        # A flow that trains on must not forget what it does with nobody to guide it: half of these rows by its prompt.
        alone = {}
        for i, m in enumerate(subjects):
            if f"{m}/flow" in stage.trains and config.alone and t is None:
                alone[m] = row_uniform(keys, f"alone/{i}")
        guided = {m: u >= config.alone for m, u in alone.items()}
        noised, sources, others = {}, {}, {}
        for i, m in enumerate(subjects):
            keep = row_uniform(keys, f"drop_prompt/{i}") >= config.drop_prompt
            if m in alone:
                keep = jnp.where(guided[m], keep, alone[m] < config.alone / 2)
            given = {}
            if m in partner and config.drop_prompt < 1:
                other = partner[m]
                present = about["has"][other] if "has" in about else True
                given = {other: (flows[other].prompt(frozen, batch[other]).tokens, keep & present)}
            # What an open flow did with its earlier partners it did by prompt, by guide and by both.
            practised = row_uniform(keys, f"practised/{i}") < PRACTISED_PROMPT
            for other in stage.earlier[m] if m in stage.earlier else ():
                has = about["practises"][m][other] & practised
                given[other] = (model.flows[other].prompt(frozen, about["earlier"][other]).tokens, has)
            if m in targets:
                process = flows[m].process
                aim, weight = process.target(z0[m], times, eps[m]), process.weight(times, config.min_snr)
                noised[m] = Noised(z_t[m], times, aim, weight, given, streams[m])
            sources[m] = Source(_where(clean, z0[m], z_t[m]), jnp.where(clean, 0, times), streams[m])
        for i, m in enumerate(rows.contrasts):
            some = about["others"][m]
            flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
            each = lambda x: jnp.repeat(x, rows.others, axis=0)  # noqa: E731
            z = model.encode(frozen, m, jax.tree.map(flat, some["x"]))
            noise = flat(row_normal(keys, (rows.others, *z.shape[1:]), 100 + i))
            source_t = each(jnp.where(clean, 0, times))
            z = _where(each(clean), z, flows[m].process.add_noise(z, source_t, noise))
            has = some["has"] & guided[m][:, None] if m in guided else some["has"]
            others[m] = Others(Source(z, source_t, flat(some["stream"])), has)
        earlier = {}
        for i, m in enumerate(rows.partners):
            z = model.encode(frozen, m, about["earlier"][m])
            source_t = jnp.where(clean, 0, times)
            z = _where(clean, z, model.flows[m].process.add_noise(z, source_t, row_normal(keys, z.shape[1:], 200 + i)))
            by = {target: has[m] for target, has in about["practises"].items() if m in has}
            by = {target: has & guided[target] if target in guided else has for target, has in by.items()}
            earlier[m] = Earlier(Source(z, source_t, about["earlier_stream"][m]), by)
        by_partner = dict(about.get("partner", {}))
        by_partner |= {m: about["has"][partner[m]] for m in stage.earlier if m in partner and m not in by_partner}
        for m, some in guided.items():
            by_partner[m] = some & by_partner[m] if m in by_partner else some
        beside = {m: about["beside"][m] for m in rows.beside if m in targets}
        beside = {m: has & guided[m][:, None] if m in guided else has for m, has in beside.items()}
        for m, on in about.get("grid", {}).items():
            if m in guided:
                on = jax.tree.map(lambda x, m=m: x & guided[m].reshape(-1, *(1,) * (x.ndim - 1)), on)
            if near := _near(model.flows, m, partner, sources, others, earlier, on):
                noised[m] = noised[m]._replace(registered=flows[m].on_grid(near))
        counts = None
        if "has" in about:
            counts = {m: about["has"][m] & about["has"][partner.get(m, m)] for m in subjects}
            counts |= {m: about["has"][m] for m in (*rows.contrasts, *stage.earlier)}  # guided by whatever there is
        same = _same(batch, [(flows[m], batch[m]) for m in subjects])
        return Pair(noised, sources, others, earlier, clean, counts, by_partner, beside, same)

    def features(params: Params, p: Pair) -> Paired:
        sources = {m: flows[m].source(params, *p.sources[m]) for m in partner if partner[m] in targets}
        others = {m: flows[m].source(params, *o.source)[0] for m, o in p.others.items()}
        before = {m: model.flows[m].source(params, *e.source)[0] for m, e in p.earlier.items()}
        predicted = {}
        for m, n in p.noised.items():
            guides = [sources[partner[m]][0]] if m in partner else []
            if m in p.partner and guides:
                guides = [mask(guides[0], p.partner[m])]
            if m in p.others:
                guides.append(_side_by_side(others[m], p.others[m].has))
            if m in p.beside:
                guides.append(_side_by_side(others[partner[m]], p.beside[m]))
            guides += [mask(before[e], x.guides[m]) for e, x in p.earlier.items() if m in x.guides]
            prompt = prompt_context(flows[m].null(params), n.given, n.t.shape[0])
            prediction = flows[m].predict(params, n.z_t, n.t, prompt, concat(guides), n.stream, n.registered)
            predicted[m] = Predicted(n.target, prediction, n.weight)
        pooled = {m: pooled for m, (_, pooled) in sources.items()}
        return Paired(predicted, pooled, p.clean, p.counts, p.same)

    def flow_loss(f: Paired, m: str) -> Array:
        return denoising_loss(*f.predicted[m], rows=None if f.counts is None else f.counts[m])

    losses: dict[str, Callable] = {f"eps/{m}": lambda f, m=m: flow_loss(f, m) for m in targets}
    if partner and not stage.target:
        # Central alignment in the output space as well: V's pooled outputs, among rows with a clean source (rows of
        # different t would give the pair away by t).
        def contrast(f: Paired) -> Array:
            there = f.clean if f.counts is None else f.clean & jnp.all(jnp.stack([*f.counts.values()]), axis=0)
            a, b = f.pooled.values()
            return info_nce(a, b, -jnp.log(config.contrast_tau), there, f.same)

        losses[f"contrast/{stage.name}"] = contrast
    return Recipe(
        rows,
        lambda key: init_group(model, key, stage.trains),
        prepare,
        features,
        losses,
        times=EVAL_TIMES,
        start=start,
    )


def _near(
    flows: Mapping[str, Flow],
    m: str,
    partner: Mapping[str, str],
    sources: Mapping[str, Source],
    others: Mapping[str, Others],
    earlier: Mapping[str, Earlier],
    on: Mapping[str, Any],
) -> list[OnGrid]:
    """The sources of flow m that may lie on its grid; on: where they do, as a batch has it in about["grid"]."""

    def near(name: str, source: Source, rows: Array) -> OnGrid:
        signal, _ = flows[name].process.at(source.t, source.z)  # alpha_0 is 1 but for 4e-4
        return OnGrid(name, source.z, jnp.where(source.t[:, None, None, None] > 0, signal, 1.0), source.stream, rows)

    other = partner.get(m)  # of a text there is no slot
    out = [near(other, sources[other], on["partner"])] if "partner" in on and _slot(flows[m], other) else []
    of_before = on.get("earlier", {}).items()
    out += [near(name, earlier[name].source, rows) for name, rows in of_before if _slot(flows[m], name)]
    for name, places in ((m, "others"), (other, "beside")):
        if name in others and places in on:
            (b, k), source = others[name].has.shape, others[name].source
            each = lambda x, i, b=b, k=k: x.reshape(b, k, *x.shape[1:])[:, i]  # noqa: E731
            out += [near(name, Source(*(each(x, i) for x in source)), on[places][:, i]) for i in range(k)]
    return out


def _slot(flow: Flow, modality: str | None) -> bool:
    """Has the flow's UNet input channels for images of this modality on its grid?"""
    return any(split_stream(stream)[0] == modality for stream in flow.slots)


def _where(rows: Bool[Array, "b"], x: Latent, y: Latent) -> Latent:
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


def _side_by_side(flat: Context, has: Bool[Array, "b k"]) -> Context:
    """Contexts of k sources a row, (b k) rows of them, as one context a row; absent ones masked."""
    b, k = has.shape
    own = mask(flat, has.reshape(-1))
    return Context(own.tokens.reshape(b, -1, own.tokens.shape[-1]), own.bias.reshape(b, -1))
