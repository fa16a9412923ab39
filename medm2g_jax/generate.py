"""Any to any: latent cross-guided generation (section 3.4) from what is given to what is wanted.

All wanted flows start from noise and move in lockstep through one `lax.scan`. At every step each flow A sees

    its prompt  C_B(x_B) of everything given                            (the null prompt C_T("") if nothing is)
    its guide   V_B([z^B, f_B]) of what is given (clean, level 0) and of what is being made (at the current t)

and classifier-free guidance moves it away from the prediction with the null prompt and no guide. Where a source ->
flow pair was trained, all tokens of a context are used; for other pairs only its pooled token, since only pooled
vectors are aligned.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from medm2g_jax.arrays import Params
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import jit
from medm2g_jax.diffusion import guide_eps, sampler_step, sampler_table
from medm2g_jax.errors import UserError
from medm2g_jax.keys import row_normal, salt
from medm2g_jax.modality import MODALITIES, centre, split_stream
from medm2g_jax.model import MedM2G, pooled_context, prompt_context, under
from medm2g_jax.nn.attention import Context, concat, mask
from medm2g_jax.nn.text_vae import decode_greedy

PROMPTS = ("given", "none")
GUIDES = ("trained", "all", "none")
LARGE = 2**30  # bytes of parameters from which memory counts for more than the last bit of speed


@dataclass(frozen=True)
class Request:
    """Everything about a generation that shapes its executable; guidance, eta and seeds are traced instead.

    Attributes:
      given, make: streams.
      steps, sampler: see `diffusion.sampler_table`, `diffusion.sampler_step`.
      guide: "cond" leaves the guide out of the unconditional half of guidance; "both" keeps it there (CoDi).
      prompts: "given", or "none" for the null prompt whatever is given.
      guides: those of "trained" pairs, "all", or "none".
      prompt_pairs, guide_pairs: (source, target) modalities that were trained.
    """

    given: tuple[str, ...]
    make: tuple[str, ...]
    steps: int = 50
    sampler: str = "ddim"
    guide: str = "cond"
    prompts: str = "given"
    guides: str = "trained"
    prompt_pairs: tuple[tuple[str, str], ...] = ()
    guide_pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for name, allowed in (("prompts", PROMPTS), ("guides", GUIDES), ("guide", ("cond", "both"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if not self.make:
            raise UserError("nothing to make: name at least one stream")
        twice = set(self.given) & set(self.make)
        if twice:
            raise UserError(f"stream {sorted(twice)[0]!r} is both given and wanted")

    def guided(self, source: str, target: str) -> str | None:
        """How stream `source` guides stream `target`: with all "tokens", its "pooled" token, or not (None)."""
        a, b = _modality(source), _modality(target)
        if source == target or a == b or self.guides == "none":
            return None
        if (a, b) in self.guide_pairs:
            return "tokens"
        return "pooled" if self.guides == "all" else None


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


def build_sampler(model: MedM2G, request: Request) -> Callable[..., dict[str, Array]]:
    """sample(params, given, empty, keys, guidance, eta) -> {stream: latent z_0 (b ...)}, for jit.

    Args of the returned function:
      given: {stream: images (b h w 1) in [-1, 1] or ids {"clip", "bert"} (b n)}.
      empty: ids of the empty text, (1 n).
      keys: one a sample (b,); noise is a function of it and the stream's name.
      guidance, eta: scalars.
    """
    table = sampler_table(request.steps)
    make = with_bridges(request)
    guides = {a: tuple(s for s in (*request.given, *make) if request.guided(s, a)) for a in make}
    has_prompt = bool(request.given) and request.prompts == "given"
    sources = {s for used in guides.values() for s in used}

    def contexts(params: Params, z: Mapping[str, Array], t: Array) -> dict:
        """Stream -> (all tokens of V, its pooled token)."""
        out = {}
        for s, latent in z.items():
            if s in sources:
                m, index = split_stream(s)
                rows = jnp.full((latent.shape[0],), index, jnp.int32)
                tokens, pooled = model.flows[m].source(params, latent, jnp.broadcast_to(t, rows.shape), rows)
                out[s] = (tokens, pooled_context(pooled, model.width**0.5))
        return out

    def guide_of(target: str, available: Mapping[str, tuple[Context, Context]]) -> Context | None:
        parts = [available[s][request.guided(s, target) == "pooled"] for s in guides[target]]
        return concat(parts) if parts else None

    def sample(params: Params, given: Mapping[str, Any], empty: Mapping, keys: Array, guidance, eta) -> dict:
        b = keys.shape[0]
        null = model.flows[centre().name].prompt(params, empty).tokens
        prompts = _prompts(model, params, request, make, given, null, b) if has_prompt else {}
        nothing = prompt_context(null, {"": (jnp.zeros((b, 1, null.shape[-1])), jnp.zeros((b,), bool))})
        clean = contexts(
            params,
            {s: model.encode(params, _modality(s), given[s]) for s in request.given if s in sources},
            jnp.int32(0),
        )
        z = {s: _noise(keys, model.flows[_modality(s)].latent_shape, s, "start") for s in make}

        half = any(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))

        def step(z: dict, row):
            i, at = row
            # Without this XLA's CPU compiler keeps float32 copies of all bfloat16 parameters through the whole loop.
            own, z = jax.lax.optimization_barrier((params, z)) if half else (params, z)
            t = at.t.astype(jnp.int32)
            available = clean | contexts(own, z, t)
            out = {}
            for s in make:
                m, index = split_stream(s)
                guide = guide_of(s, available)
                eps = _guided_eps(
                    model.flows[m],
                    own,
                    z[s],
                    t,
                    index,
                    prompts.get(s),
                    nothing,
                    null,
                    guide,
                    guidance,
                    request.guide,
                )
                noise = _noise(jax.vmap(jax.random.fold_in, (0, None))(keys, i), z[s].shape[1:], s, "step")
                out[s] = sampler_step(request.sampler, at, z[s], eps, noise, eta)
            return out, None

        z, _ = jax.lax.scan(step, z, (jnp.arange(request.steps), table))
        return z

    return sample


def _noise(keys: Array, shape: tuple[int, ...], stream: str, what: str) -> Array:
    return row_normal(keys, shape, salt(f"{what} {stream}"))


def _prompts(model: MedM2G, params: Params, request: Request, make, given, null, b) -> dict[str, Context]:
    """The prompt of each wanted stream: C_B of everything given."""
    encoded = {s: model.flows[_modality(s)].prompt(params, given[s]) for s in request.given}
    everyone = jnp.ones((b,), bool)
    out = {}
    for target in make:
        slots = {}
        for s, e in encoded.items():
            trained = (_modality(s), _modality(target)) in request.prompt_pairs
            unit = e.pooled / jnp.linalg.norm(e.pooled, axis=-1, keepdims=True)
            slots[s] = (e.tokens if trained else unit[:, None].astype(e.tokens.dtype), everyone)
        out[target] = prompt_context(null, slots)
    return out


def _guided_eps(flow, params, z, t, index, prompt, nothing, null, guide, guidance, guide_in) -> Array:
    """eps of one flow. Both halves of guidance go through the UNet as one batch; with neither prompt nor guide there is
    nothing to guide by, and one half is enough."""
    b = z.shape[0]
    times = jnp.broadcast_to(t, (b,))
    stream = jnp.full((b,), index, jnp.int32)
    if prompt is None and guide is None:
        return flow.eps(params, z, times, nothing, None, stream)
    if prompt is None:
        prompt = nothing
    # The unconditional half: the null prompt's slot alone, in the same layout of tokens.
    n = null.shape[1]
    slot = jnp.arange(prompt.tokens.shape[1]) < n
    null_bias = jnp.where(slot, nothing.bias[:, :1], prompt.bias.min())
    both = Context(jnp.concatenate([prompt.tokens] * 2), jnp.concatenate([null_bias, prompt.bias]))
    if guide is not None:
        unguided = guide if guide_in == "both" else mask(guide, jnp.zeros((b,), bool))
        guide = Context(jnp.concatenate([guide.tokens] * 2), jnp.concatenate([unguided.bias, guide.bias]))
    twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
    eps = flow.eps(params, twice(z), twice(times), both, guide, twice(stream))
    return guide_eps(*jnp.split(eps, 2), guidance)


@dataclass(frozen=True)
class Generated:
    """samples: stream -> list of str, or float32 (n h w) in the modality's unit. `pairs`: which source -> target
    contexts were used and how ("prompt tokens", "guide pooled", ...). Synthetic, not for clinical use."""

    samples: dict[str, Any]
    pairs: dict[str, str]
    seed: int
    latents: dict[str, np.ndarray] = field(default_factory=dict, repr=False)


class Generator:
    """A trained model: recipe, parameters and tokenizers. `medm2g_jax.load` makes one from a run."""

    def __init__(
        self,
        model: MedM2G,
        params: Params,
        tokenizers: Tokenizers,
        lengths: Mapping[str, int],
    ):
        self.model, self.params, self.tokenizers, self.lengths = model, params, tokenizers, dict(lengths)
        self.large = sum(p.nbytes for p in params.values()) > LARGE
        self._jitted: dict = {}

    def sample(self, request: Request, given: Mapping[str, Any], keys: Array, guidance: float, eta: float) -> dict:
        """Latents of the wanted streams, from model inputs (see `build_sampler`)."""
        if request not in self._jitted:
            self._jitted[request] = jit(build_sampler(self.model, request), save_memory=self.large)
        empty = self.ids([""])
        return self._jitted[request](self.params, given, empty, keys, jnp.float32(guidance), jnp.float32(eta))

    @functools.cached_property
    def _decode_image(self):
        return jit(lambda p, z: self.model.decode_image(p, "image", z))

    @functools.cached_property
    def _decode_text(self):
        kind, length = centre().kind, self.lengths["gpt2"]

        def decode(params: Params, z: Array) -> Array:
            vae = under(params, f"{kind}/vae")
            return decode_greedy(self.model.vaes[kind], vae, z / self.model.scales[kind], length)

        return jit(decode)

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Model input of a batch of texts."""
        rows = [self.tokenizers.encode(text, self.lengths) for text in texts]
        return {name: np.stack([row[name] for row in rows]) for name in self.lengths}

    def decode(self, stream: str, z: Array) -> Any:
        """Latents -> list of str, or float32 images (n h w 1) in [-1, 1]."""
        if MODALITIES[_modality(stream)].kind == "image":
            return np.asarray(self._decode_image(self.params, z))
        return [self.tokenizers.decode(ids) for ids in np.asarray(self._decode_text(self.params, z))]
