"""Any to any: latent cross-guided generation (section 3.4) from what is given to what is wanted.

All wanted flows start from noise and move in lockstep. At every step each flow A is told

    its prompt  C_B(x_B) of everything given                            (the null prompt if nothing is)
    its guide   V_B([z^B, f_B]) of what is given (clean, level 0) and of what is being made (at the current t)
    beside z_t  the latents of those of them that lie on its grid, where it was trained to read them there

and classifier-free guidance moves it away from the prediction with the null prompt and no guide. What lies on
its grid a flow keeps in both halves, and where that is given also its guide: guidance would overshoot what the flow has
before its eyes (docs/quality.md). Where a source ->
flow pair was trained, all tokens of a context are used; for other pairs only its pooled token, since only pooled
vectors are aligned. What is the same at every
step is made once (`tell_flows`). This file builds the denoiser of a request; `diffusion.sample_some` moves by it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from medm2g_jax.arrays import Params
from medm2g_jax.diffusion import (
    SAMPLERS,
    SPACINGS,
    Denoise,
    Denoised,
    Row,
    State,
    Streams,
    guided,
    padded_table,
    remembered,
    sample_some,
)
from medm2g_jax.errors import UserError
from medm2g_jax.keys import row_normal, salt
from medm2g_jax.modality import split_stream
from medm2g_jax.model import MedM2G, OnGrid, guide_parts, null_context, pooled_context, prompt_parts
from medm2g_jax.nn.attention import Context, concat

PROMPTS = ("given", "none")
GUIDES = ("trained", "all", "none")
REGISTER = ("trained", "made", "none")
# The parts of a batch that guidance compares, and which of them have the prompt and the guide: all at once, or first
# the prompt and then the guide beside it.
PARTS = {False: ((False, True), (False, True)), True: ((False, True, True), (False, False, True))}


@dataclass(frozen=True)
class Request:
    """Everything about a generation that shapes its executable, and its steps; guidance, eta and seeds come beside it.

    Attributes:
      given, make: streams.
      steps, sampler, spacing: see `diffusion.sample`. Steps and spacing are traced: see `program`.
      guide: "cond" leaves the guide out of the unconditional half of guidance, but for a flow that reads given sources
        on its grid; "both" keeps it there (CoDi).
      prompts: "given", or "none" for the null prompt whatever is given.
      guides: those of "trained" pairs, "all", or "none".
      apart: guides have a guidance scale of their own, apart from that of prompts.
      register: what lies on the grid of a flow that was trained to read it there: "trained" takes all that is given and
        made for such, "made" what is made alone, "none" nothing.
      prompt_pairs, guide_pairs, registered_pairs: (source, target) modalities that were trained; (m, m) is another
        contrast of m.
    """

    given: tuple[str, ...]
    make: tuple[str, ...]
    steps: int = 50
    sampler: str = "ddim"
    spacing: str = "auto"
    guide: str = "cond"
    prompts: str = "given"
    guides: str = "trained"
    apart: bool = False
    prompt_pairs: tuple[tuple[str, str], ...] = ()
    guide_pairs: tuple[tuple[str, str], ...] = ()
    register: str = "trained"
    registered_pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        table = dict(prompts=PROMPTS, guides=GUIDES, guide=("cond", "both"), register=REGISTER)
        table |= dict(sampler=tuple(SAMPLERS), spacing=SPACINGS)
        for name, allowed in table.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if not self.make:
            raise UserError("nothing to make: name at least one stream")
        repeated = [s for s in self.make if self.make.count(s) > 1]
        if repeated:
            raise UserError(f"stream {repeated[0]!r} is wanted twice; more samples of it are asked for by count")
        twice = set(self.given) & set(self.make)
        if twice:
            raise UserError(f"stream {sorted(twice)[0]!r} is both given and wanted")

    def program(self) -> "Request":
        """The same for all requests that one executable serves."""
        return replace(self, steps=1, spacing="auto")

    def link(self, source: str, target: str) -> str | None:
        """How stream `source` guides stream `target`: with all "tokens", its "pooled" token, or not (None)."""
        a, b = _modality(source), _modality(target)
        if source == target or self.guides == "none":
            return None
        if a == b and (":" not in source or ":" not in target):
            return None  # a picture whose contrast is not stated may be the very one that is wanted
        if (a, b) in self.guide_pairs:
            return "tokens"
        return "pooled" if self.guides == "all" and a != b else None

    def registered(self, source: str, target: str) -> bool:
        """Does stream `source` stand on `target`'s input channels?"""
        if self.register == "none" or (self.register == "made" and source in self.given):
            return False
        trained = (_modality(source), _modality(target)) in self.registered_pairs
        return trained and self.link(source, target) == "tokens"

    def told(self, source: str, target: str) -> str | None:
        """How given stream `source` prompts stream `target`."""
        if source not in self.given or self.prompts == "none":
            return None
        return "tokens" if (_modality(source), _modality(target)) in self.prompt_pairs else "pooled"

    def pairs(self) -> dict[str, str]:
        """Which contexts are used: {"text -> ct": "prompt tokens, guide tokens", ...}."""
        out = {}
        make = with_bridges(self)
        for target in make:
            for source in (*self.given, *make):
                ways = {"prompt": self.told(source, target), "guide": self.link(source, target)}
                words = [f"{what} {how}" for what, how in ways.items() if how]
                words += ["registered"] if self.registered(source, target) else []
                if words and source != target:
                    out[f"{source} -> {target}"] = ", ".join(words)
        return out

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The wanted streams, those together that guide each other; different groups are independent of each other."""
        make, groups = with_bridges(self), []
        for stream in make:
            linked = [g for g in groups if any(self.link(s, stream) or self.link(stream, s) for s in g)]
            groups = [g for g in groups if g not in linked] + [[*(s for g in linked for s in g), stream]]
        wanted = (tuple(s for s in self.make if s in g) for g in groups)
        return tuple(g for g in wanted if g)


def _modality(stream: str) -> str:
    return split_stream(stream)[0]


def with_bridges(request: Request) -> tuple[str, ...]:
    """The wanted streams, and the flows taken along so that trained pairs link all of them.

    Wanted streams that no chain of trained pairs among themselves links take along the modalities on the shortest path
    between them: CT and X-ray meet through text.
    """
    make = list(request.make)
    if request.guides == "none":
        return tuple(make)
    neighbours: dict[str, set[str]] = {}
    for a, b in request.guide_pairs:
        neighbours.setdefault(a, set()).add(b)
    given = {_modality(s) for s in request.given}
    for stream in request.make[1:]:
        path = _shortest_path(neighbours, _modality(request.make[0]), _modality(stream))
        make += [m for m in path if m not in given and m not in {_modality(s) for s in make}]
    return tuple(make)


def _shortest_path(neighbours: Mapping[str, set[str]], start: str, end: str) -> tuple[str, ...]:
    paths = [(start,)]
    while paths and paths[0][-1] != end:
        path = paths.pop(0)
        paths += [(*path, m) for m in sorted(neighbours.get(path[-1], ())) if m not in path]
    return paths[0] if paths else ()


# --- the denoiser ---------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What flows are told of what is given, the same at every step.

    Attributes:
      null: the null prompt, {} where there is no centre.
      encoded: latents of given streams that guide.
      clean: V of these, see `_contexts`.
      prompts: wanted stream -> given stream -> what its prompt is made of.
    """

    null: Params
    encoded: dict[str, Array]
    clean: dict[str, tuple[Context, Context]]
    prompts: dict[str, dict[str, tuple[Array, Bool[Array, "b"]]]]


def tell_flows(
    model: MedM2G, request: Request, params: Params, given: Mapping[str, Any], empty: Mapping, keys: Array
) -> Told:
    """What the flows of a request are told, by the networks that are not asked again: C, V and the autoencoders.

    Args:
      given: {stream: a batch's value: images (b h w 1) in [-1, 1], or ids (b n)}.
      empty: ids of the empty text, (1 n); {} where there is no text.
      keys: one a sample (b,).
    """
    used = {s for links in _links(request).values() for s in links}
    encoded = {s: model.encode(params, _modality(s), x) for s, x in given.items() if s in used}
    clean = _contexts(model, params, encoded, jnp.int32(0))
    prompts = _prompts(model, request, with_bridges(request), params, given, keys.shape[0])
    return Told(model.null(params, empty), encoded, clean, prompts)


def _links(request: Request) -> dict[str, dict[str, str]]:
    """Wanted stream -> the streams that guide it, and how."""
    make = with_bridges(request)
    return {a: {s: how for s in (*request.given, *make) if (how := request.link(s, a))} for a in make}


def build_denoiser(model: MedM2G, request: Request, params: Params, told: Told, rows: int, guidance: Any) -> Denoise:
    """The denoiser of a request: denoise(z, t) -> {stream: (z0, eps)} of the wanted streams (and bridges)."""
    params, make, links = {**params, **told.null}, with_bridges(request), _links(request)
    encoded, clean, prompts = told.encoded, told.clean, told.prompts
    sources = {s for used in links.values() for s in used}
    by_pixel = {a for a in make if any(request.registered(s, a) for s in request.given)}
    # With neither prompt nor guide there is nothing to guide by, and one half is enough.
    bare = not any(prompts.values()) and not sources
    # Without a barrier XLA's CPU compiler keeps float32 copies of all bfloat16 parameters through the whole loop.
    half = any(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))

    prompted, guided_by = PARTS[request.apart]
    parts = 1 if bare else len(prompted)

    def in_parts(z: Streams, t: Array) -> Denoised:
        own, z = jax.lax.optimization_barrier((params, z)) if half else (params, z)
        available = clean | _contexts(model, own, {s: x for s, x in z.items() if s in sources}, t)
        out = {}
        for s in make:
            m, index = split_stream(s)
            flow, count = model.flows[m], parts * rows
            times, streams = jnp.broadcast_to(t, (count,)), jnp.full((count,), index, jnp.int32)
            z_t = jnp.concatenate([z[s]] * parts)
            null = flow.null(own)
            prompt = null_context(null, count) if bare else prompt_parts(null, prompts[s], rows, prompted)
            guides = [available[source][how == "pooled"] for source, how in links[s].items()]
            everywhere = request.guide == "both" or s in by_pixel
            has = (True,) * parts if everywhere else guided_by
            guide = guide_parts(concat(guides), has) if guides else None
            near = [
                _on_grid(model, source, encoded[source] if source in encoded else z[source], t, source in encoded)
                for source in links[s]
                if request.registered(source, s)
            ]
            registered = jnp.tile(flow.on_grid(near), (parts, 1, 1, 1)) if near else None
            prediction = flow.predict(own, z_t, times, prompt, guide, streams, registered)
            out[s] = flow.process.split(prediction, z_t, times)
        return out

    return in_parts if bare else guided(in_parts, guidance)


def _contexts(model: MedM2G, params: Params, z: Streams, t: Array) -> dict[str, tuple[Context, Context]]:
    """Stream -> (all tokens of V, its pooled token)."""
    out = {}
    for s, latent in z.items():
        m, index = split_stream(s)
        rows = jnp.full((latent.shape[0],), index, jnp.int32)
        tokens, pooled = model.flows[m].source(params, latent, jnp.broadcast_to(t, rows.shape), rows)
        out[s] = (tokens, pooled_context(pooled, model.width**0.5))
    return out


def _on_grid(model: MedM2G, stream: str, z: Array, t: Array, given: bool) -> OnGrid:
    m, index = split_stream(stream)
    rows = z.shape[0]
    signal, _ = model.flows[m].process.at(jnp.broadcast_to(t, (rows,)), z)
    signal = jnp.ones((rows, 1, 1, 1)) if given else signal
    return OnGrid(m, z, signal, jnp.full((rows,), index, jnp.int32), jnp.ones((rows,), bool))


def _prompts(
    model: MedM2G, request: Request, make: Sequence[str], params: Params, given: Mapping[str, Any], rows: int
) -> dict[str, dict[str, tuple[Array, Bool[Array, "b"]]]]:
    """What the prompt of each wanted stream is made of: C_B of everything given."""
    if request.prompts == "none":
        return {target: {} for target in make}
    everyone = jnp.ones((rows,), bool)
    out: dict[str, dict] = {target: {} for target in make}
    for s, x in given.items():
        encoded = model.flows[_modality(s)].prompt(params, x)
        unit = encoded.pooled / jnp.linalg.norm(encoded.pooled, axis=-1, keepdims=True)
        pooled = unit[:, None].astype(encoded.tokens.dtype)
        for target in make:
            out[target][s] = (encoded.tokens if request.told(s, target) == "tokens" else pooled, everyone)
    return out


def build_sampler(model: MedM2G, request: Request) -> Callable[..., State]:
    """sample(params, told, keys, guidance, eta, table, state, begin, end) -> the state after these steps, for jit.
    Neither steps nor spacing of the request is in it: they are the table's.

    Args of the returned function:
      told: of `tell_flows`.
      keys: one a sample (b,); noise is a function of it and the stream's name.
      guidance: a scalar; where `request.apart` two, of prompts and of guides.
      eta: a scalar.
      table: of `table_of`.
      state: of the steps before; what it holds before the first, `blank_state`, is not read.
      begin, end: which steps. After the table's last z are the latents z_0.
    """

    def sampler(
        params: Params, told: Told, keys: Array, guidance: Any, eta: Any, table: Row, state: State, begin: Any, end: Any
    ) -> State:
        denoise = build_denoiser(model, request, params, told, keys.shape[0], guidance)
        start = {s: row_normal(keys, x.shape[1:], salt(f"start {s}")) for s, x in state.z.items()}
        state = state._replace(z={s: jnp.where(begin == 0, x, state.z[s]) for s, x in start.items()})
        return sample_some(denoise, state, keys, table, begin, end, request.sampler, eta)

    return sampler


def table_of(model: MedM2G, request: Request) -> Row:
    """The steps of a request, as `build_sampler`'s function takes them."""
    schedule = next(iter(model.flows.values())).process.schedule  # one for all, which move in lockstep
    return padded_table(request.steps, request.spacing, schedule)


def blank_state(model: MedM2G, request: Request, rows: int) -> State:
    """A state of so many samples that has not begun: zeros."""
    shapes = {s: model.flows[_modality(s)].family.latent_shape for s in with_bridges(request)}
    z = {s: np.zeros((rows, *shape), np.float32) for s, shape in shapes.items()}
    return State(z, remembered(z, request.sampler))


@dataclass(frozen=True)
class Generated:
    """What was made. Synthetic, not for clinical use.

    Attributes:
      samples: stream -> list of str, or float32 (n h w) in the modality's unit.
      pairs: which source -> target contexts were used and how ("prompt tokens", "guide pooled", ...).
      independent: groups of wanted streams that no guide links to each other, where there are several: nothing but
        what is given makes them fit together.
      draws: of each sample, which follow each other in `samples`.
      best_of: how many draws of each sample were ranked, of which these are the best.
      agreement: where some were: the mean cosine of what was kept with what was given, in the aligned space, (n,).
      kept: where some were: which draw was, from 0, (n,).
      latents: stream -> z_0 of each sample.
      notes: what a user has to know of it, a line each: that, what of the given texts was cut, words that were unknown.
    """

    samples: dict[str, Any]
    pairs: dict[str, str]
    seed: int
    independent: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    draws: int = 1
    best_of: int = 1
    agreement: np.ndarray | None = None
    kept: np.ndarray | None = None
    latents: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def mean(self, stream: str) -> Float[np.ndarray, "n h w"]:
        """Of each sample's draws, pixel by pixel, in the modality's unit."""
        return self._drawn(stream).mean(axis=1)

    def std(self, stream: str) -> Float[np.ndarray, "n h w"]:
        """How far they differ, as the standard deviation of `draws` samples; 0 for one draw."""
        x = self._drawn(stream)
        return x.std(axis=1, ddof=1 if self.draws > 1 else 0)

    def _drawn(self, stream: str) -> Float[np.ndarray, "n k h w"]:
        x = np.asarray(self.samples[stream])
        return x.reshape(-1, self.draws, *x.shape[1:])
