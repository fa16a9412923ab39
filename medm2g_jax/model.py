"""Flow, what one modality owns (C, eps_theta, V, f), and MedM2G, a dict of flows and the two autoencoders.

Both are recipes without weights: pure functions of a flat dict of parameters, modality first,

    ct/clip/...       C_CT, prompt encoder (3.2)            ct/context/...  V_CT, context encoder (3.4)
    ct/prompt_in/...  shared space -> what the UNet reads   ct/adapt/...    f_CT, guided adaptation (Eq. 5)
    ct/null/token     the null prompt, where there is no centre whose C("") it could be
    ct/unet/...       eps_theta (Eq. 2); .../guide/... inside it is theta_c (Eq. 6), guide/kernel what it reads of
                      sources on its own grid
    ct/lora/...      low-rank additions to kernels of eps_theta, by their names (fine-tunes)
    image/vae/...     the autoencoder that all modalities of a kind share

Freezing, sharding, conversion and loading are comprehensions over these names. This file is where they are flattened
and unflattened. What depends on a modality's kind is `family`'s.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from medm2g_jax.arrays import Latent, Params, Times
from medm2g_jax.diffusion import Process
from medm2g_jax.family import FAMILIES, Family
from medm2g_jax.keys import salt
from medm2g_jax.modality import MODALITIES, Modality, centre
from medm2g_jax.nn.attention import Context, concat, context, mask
from medm2g_jax.nn.clip import Encoded
from medm2g_jax.nn.context import Adaptation

NULL = "null/tokens"  # where C("") of the centre stands among the parameters, once it has been computed

# --- flat names -----------------------------------------------------------------------------------------------------


def under(params: Mapping[str, Any], prefix: str) -> dict:
    """The nested parameters of the module whose flat names start with prefix/."""
    cut = len(prefix) + 1
    return unflatten_dict({k[cut:]: v for k, v in params.items() if k.startswith(prefix + "/")}, sep="/")


def apply(module: nn.Module, params: Mapping[str, Any], prefix: str, *args, **kwargs) -> Any:
    """module.apply with the parameters under prefix."""
    return module.apply({"params": under(params, prefix)}, *args, **kwargs)


def init(module: nn.Module, prefix: str, key: Array, *args, **kwargs) -> Params:
    """Fresh parameters of one module, by flat name.

    Randomness depends on the key and on the module's name without its modality: with equal sizes two modalities then
    have the same program, and the second finds it in the compilation cache.
    """
    tree = module.init(jax.random.fold_in(key, salt(prefix.partition("/")[2])), *args, **kwargs)["params"]
    return {f"{prefix}/{name}": value for name, value in flatten_dict(tree, sep="/").items()}


# --- one modality ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """What one modality owns. Methods are pure functions of the flat parameters.

    Attributes:
      slots: the streams that may stand on the UNet's input channels, where they lie on its grid; () for none.
      centred: the centre is among the flows, so that the null prompt is its C(""); else each flow has a token of its
        own for it, zero at first.
      rank: of its low-rank additions; 0 where it has none.
    """

    modality: Modality
    family: Family
    process: Process
    clip: nn.Module
    unet: nn.Module
    context: nn.Module
    adapt: nn.Module
    prompt_in: nn.Module
    centred: bool
    slots: tuple[str, ...] = ()
    rank: int = 0

    @property
    def name(self) -> str:
        return self.modality.name

    def prompt(self, params: Params, x: Any) -> Encoded:
        """C_M(x) (3.2): tokens (b n d) in the shared space and the pooled vector (b d), not normalised.

        x: a batch's value of the modality; images are resized on device.
        """
        return apply(self.clip, params, f"{self.name}/clip", self.family.clip_input(x))

    def null(self, params: Params) -> Float[Array, "1 n d"]:
        """Tokens of the null prompt."""
        return params[NULL] if self.centred else params[f"{self.name}/null/token"][None]

    def predict(
        self,
        params: Params,
        z_t: Latent,
        t: Times,
        prompt: Context,
        guide: Context | None = None,
        stream: Array | None = None,
        registered: Array | None = None,
    ) -> Latent:
        """The UNet's own answer to (z_t, t, C(y)) of Eq. 2; with a guide (z_t, t, V_B([z_t^B, f_B])) of Eq. 6. What it
        means is `process`'s to say.

        The prompt is in the shared space; `prompt_in` maps its tokens to what this UNet reads. registered: `on_grid`.
        """
        params = merged(params, self.name)
        tokens = apply(self.prompt_in, params, f"{self.name}/prompt_in", prompt.tokens)
        told = [Context(tokens, prompt.bias), guide, self._at(stream)]
        told += [] if registered is None else [registered]
        return apply(self.unet, params, f"{self.name}/unet", z_t, t, *told)

    def on_grid(self, sources: Iterable["OnGrid"]) -> Float[Array, "b h w s"]:
        """Sources on this flow's grid as its UNet's input channels: a slot a stream of `slots`, holding the latent and
        how much of it is signal: 1 where it is clean, alpha_t where it is at noise level t, 0 where there is none.

        The sources of one row are of different streams; those of streams without a slot are left out.
        """
        shape = self.family.latent_shape
        filled: dict[str, Array] = {}
        for source in sources:
            streams = MODALITIES[source.modality].streams
            filling = jnp.concatenate([source.z, jnp.broadcast_to(source.signal, (*source.z.shape[:-1], 1))], axis=-1)
            for index, stream in enumerate(streams):
                if stream in self.slots:
                    on = source.on if source.stream is None else source.on & (source.stream == index)
                    mine = jnp.where(on[:, None, None, None], filling, 0.0)
                    filled[stream] = filled[stream] + mine if stream in filled else mine
        rows = next(iter(filled.values())).shape[0]
        empty = jnp.zeros((rows, *shape[:-1], shape[-1] + 1))
        return jnp.concatenate([filled[s] if s in filled else empty for s in self.slots], axis=-1)

    def source(
        self, params: Params, z: Latent, t: Times, stream: Array | None = None
    ) -> tuple[Context, Float[Array, "b d"]]:
        """V_M([z_t, f_M]) (Eq. 6) as the context that other flows attend to, and its unit pooled vector."""
        f = apply(self.adapt, params, f"{self.name}/adapt")
        tokens, pooled = apply(self.context, params, f"{self.name}/context", z, t, f, self._at(stream))
        return context(tokens), pooled

    def _at(self, stream: Array | None) -> Array | None:
        return stream if self.modality.contrasts else None

    def init(self, key: Array, groups: Sequence[str], example: Context) -> Params:
        """Fresh parameters of the named groups (the second words of rounds.GROUPS)."""
        z, t = jnp.zeros((1, *self.family.latent_shape)), jnp.zeros((1,), jnp.int32)
        stream = self._at(jnp.zeros((1,), jnp.int32))
        out: Params = {}
        if "clip" in groups:
            out |= init(self.clip, f"{self.name}/clip", key, self.family.clip_example())
        if "flow" in groups:
            out |= init(self.prompt_in, f"{self.name}/prompt_in", key, example.tokens)
            out |= init(self.unet, f"{self.name}/unet", key, z, t, example, None, stream)
            if not self.centred:
                out[f"{self.name}/null/token"] = jnp.zeros((1, example.tokens.shape[-1]))
        if "grid" in groups or "guide" in groups:
            channels = len(self.slots) * (z.shape[-1] + 1)
            near = [jnp.zeros((*z.shape[:-1], channels))] if "grid" in groups and channels else []
            unet = init(self.unet, f"{self.name}/unet", key, z, t, example, example, stream, *near)
            ours = {n: n.startswith(f"{self.name}/unet/guide/") for n in unet if "/guide/" in n}
            out |= {n: unet[n] for n, on_grid in ours.items() if ("grid" if on_grid else "guide") in groups}
        if "lora" in groups:
            shapes = jax.eval_shape(lambda: init(self.unet, f"{self.name}/unet", key, z, t, example, example, stream))
            out |= low_rank({n: x.shape for n, x in shapes.items()}, self.name, self.rank, key)
        if "guide" in groups:
            out |= init(self.adapt, f"{self.name}/adapt", key)
            f = jnp.zeros((self.adapt.count, self.adapt.width))
            out |= init(self.context, f"{self.name}/context", key, z, t, f, stream)
        return out


def low_rank(shapes: Mapping[str, tuple[int, ...]], name: str, rank: int, key: Array) -> Params:
    """Fresh additions W + a b to the kernels of modality `name`'s UNet (Hu et al. 2022): a (fan in, rank) of variance
    1 / fan in, b (rank, fan out) zero, so that they change nothing at first. A convolution's kernel counts as a matrix
    of its last axis."""
    out: Params = {}
    for i, (kernel, shape) in enumerate(sorted(shapes.items())):
        if kernel.startswith(f"{name}/unet/") and kernel.endswith("/kernel") and len(shape) > 1:
            fan_in, stem = math.prod(shape[:-1]), kernel.replace("/unet/", "/lora/", 1)
            own = jax.random.fold_in(key, i)
            out[f"{stem}/a"] = jax.random.normal(own, (fan_in, rank)) * fan_in**-0.5
            out[f"{stem}/b"] = jnp.zeros((rank, shape[-1]))
    return out


def merged(params: Params, name: str) -> Params:
    """The parameters with modality `name`'s low-rank additions in its UNet's kernels, and no longer beside them."""
    prefix = f"{name}/lora/"
    added = {n.removesuffix("/a"): x for n, x in params.items() if n.startswith(prefix) and n.endswith("/a")}
    if not added:
        return params
    out = {n: x for n, x in params.items() if not n.startswith(prefix)}
    for stem, a in added.items():
        kernel = stem.replace("/lora/", "/unet/", 1)
        change = (a @ params[f"{stem}/b"]).reshape(out[kernel].shape)
        out[kernel] = out[kernel] + change.astype(out[kernel].dtype)
    return out


class OnGrid(NamedTuple):
    """A source that may lie on a flow's grid: its latent, how much of it is signal (b 1 1 1), which stream of its
    modality it is (None: the first), and the rows where it does."""

    modality: str
    z: Latent
    signal: Float[Array, "b 1 1 1"]
    stream: Int[Array, "b"] | None
    on: Bool[Array, "b"]


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MedM2G:
    """The flows of a run by modality, the families of their kinds, and the scale that gives each kind's latents unit
    variance. `width` is that of the shared space, d."""

    flows: dict[str, Flow]
    families: dict[str, Family]
    scales: dict[str, float]
    width: int

    def encode(self, params: Params, name: str, x: Any) -> Latent:
        """z_0 of modality `name`: the posterior mean, which may have been computed before, times the kind's scale.

        x: a batch's value of the modality.
        """
        kind = self.flows[name].modality.kind
        mean = self.families[kind].latent(x)
        if mean is None:
            mean, _ = self.posterior(params, kind, x)
        return mean.astype(jnp.float32) * self.scales[kind]

    def decode(self, params: Params, name: str, z: Latent, beams: int = 1) -> Array:
        """Scaled latents of modality `name` -> images (b h w 1) in [-1, 1], or GPT-2 ids (b n). beams: of texts."""
        kind = self.flows[name].modality.kind
        return self.families[kind].decode(under(params, f"{kind}/vae"), z / self.scales[kind], beams)

    def posterior(self, params: Params, kind: str, x: Any) -> tuple[Latent, Latent]:
        """Mean and log-variance of the autoencoder's posterior, unscaled."""
        family = self.families[kind]
        return apply(family.vae(), params, f"{kind}/vae", family.vae_input(x), method="encode")

    def null(self, params: Params, empty: Mapping[str, Array]) -> Params:
        """{NULL: C("") of the centre, tokens (1 n d)}, from the ids of the empty text; {} where there is no centre."""
        name = centre().name
        centred = any(flow.centred for flow in self.flows.values())
        return {NULL: self.flows[name].prompt(params, empty).tokens} if centred else {}


# --- what a UNet is told --------------------------------------------------------------------------------------------

Given = Mapping[str, tuple[Float[Array, "b m d"], Bool[Array, "b"]]]  # source -> (tokens, which rows have it)


def null_context(null: Float[Array, "1 n d"], rows: int) -> Context:
    """The null prompt of so many rows."""
    return context(jnp.broadcast_to(null, (rows, *null.shape[1:])))


def prompt_context(null: Float[Array, "1 n d"], prompts: Given, rows: int) -> Context:
    """The prompt of a batch: one slot of tokens a source, absent ones masked per row, so that one executable serves
    mixed batches. A row without any source has the null prompt."""
    slots = [mask(context(tokens), has) for tokens, has in prompts.values()]
    if not slots:
        return null_context(null, rows)
    someone = jnp.any(jnp.stack([has for _, has in prompts.values()]), axis=0)
    return concat([mask(null_context(null, rows), ~someone), *slots])


def prompt_parts(null: Float[Array, "1 n d"], prompts: Given, rows: int, told: Sequence[bool]) -> Context:
    """The prompts of the parts of a batch that guidance compares, one under the other: those that are not told have
    the null prompt."""
    repeated = {
        s: (jnp.tile(x, (len(told), 1, 1)), jnp.concatenate([has & part for part in told]))
        for s, (x, has) in prompts.items()
    }
    return prompt_context(null, repeated, len(told) * rows)


def guide_parts(guide: Context, told: Sequence[bool]) -> Context:
    """The guide of these parts; those that are not told have none."""
    none = mask(guide, jnp.zeros(guide.bias.shape[:1], bool))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *(guide if part else none for part in told))


def pooled_context(pooled: Float[Array, "b d"], scale: float = 1.0) -> Context:
    """The one-token context of a pooled vector, for sources whose tokens this flow was never trained on: only pooled
    vectors are aligned. scale: sqrt(d) for V's unit vectors, 1 for prompts, whose tokens have about unit norm."""
    return context(scale * pooled[:, None].astype(jnp.float32))


# --- making one -----------------------------------------------------------------------------------------------------


def build(
    net: Mapping,
    modalities: Sequence[str],
    vocab: Mapping[str, int],
    scales: Mapping[str, float],
    image_size: int,
    dtype=jnp.float32,
    remat: bool = False,
    predict: Mapping[str, str] | None = None,
    schedule: str = Process.schedule,
    centred: bool = True,
    slots: Mapping[str, Sequence[str]] | None = None,
    rank: int = 0,
) -> MedM2G:
    """The recipe of the flows of `modalities` and of the autoencoders of their kinds.

    Args:
      net: sizes, `config.net`.
      vocab: of the three tokenizers, {"clip": v, "bert": v, "gpt2": v}; {} where no modality is text.
      scales: kind -> latent scale, 1/std of the training latents.
      image_size: pixels a side.
      dtype: of activations.
      predict: modality -> what its UNet predicts, where it is not eps.
      schedule: of the noise of all flows, which move in lockstep.
      centred: the centre's C is trained, so that C("") is the null prompt (`rounds.Graph.centre`).
      slots: modality -> `Flow.slots`, of those that have any.
      rank: of fresh low-rank additions.
    """
    kinds = dict.fromkeys(MODALITIES[m].kind for m in modalities)
    families = {kind: FAMILIES[kind](net, vocab, image_size, dtype) for kind in kinds}
    width = net["width"]
    gain = width**0.5 if net["loud_prompts"] else 1.0
    flows = {}
    for name in modalities:
        modality = MODALITIES[name]
        family, streams = families[modality.kind], len(modality.streams)
        flows[name] = Flow(
            modality=modality,
            family=family,
            process=Process(predict[name] if predict and name in predict else Process.predict, schedule),
            clip=family.clip(),
            unet=family.unet(streams=streams, remat=remat),
            context=family.context(streams=streams),
            adapt=Adaptation(count=net["adapt"], width=width, dtype=dtype),
            prompt_in=nn.Dense(
                width,
                use_bias=False,
                dtype=dtype,
                precision=jax.lax.Precision.HIGHEST,
                kernel_init=lambda key, shape, dtype=jnp.float32: gain * jnp.eye(*shape, dtype=dtype),
            ),
            centred=centred,
            slots=tuple(slots[name]) if slots and name in slots else (),
            rank=rank,
        )
    scales = {kind: float(scales.get(kind, 1.0)) for kind in kinds}
    return MedM2G(flows, families, scales, width)


def init_group(model: MedM2G, key: Array, groups: Sequence[str]) -> Params:
    """Fresh parameters of groups such as ("ct/guide", "text/vae")."""
    out: Params = {}
    for i, owner in enumerate(dict.fromkeys(g.split("/")[0] for g in groups)):
        own = jax.random.fold_in(key, i)
        parts = [g.split("/")[1] for g in groups if g.split("/")[0] == owner]
        if "vae" in parts:
            family = model.families[owner]
            out |= init(family.vae(), f"{owner}/vae", own, *family.vae_example())
        if owner in model.flows:
            example = context(jnp.zeros((1, 2, model.width)))
            out |= model.flows[owner].init(own, [p for p in parts if p != "vae"], example)
    return out
