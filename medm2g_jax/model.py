"""Flow, what one modality owns (C, eps_theta, V, f), and MedM2G, a dict of flows and the two autoencoders.

Both are recipes without weights: pure functions of a flat dict of parameters, modality first,

    ct/clip/...       C_CT, prompt encoder (3.2)            ct/context/...  V_CT, context encoder (3.4)
    ct/prompt_in/...  shared space -> what the UNet reads   ct/adapt/...    f_CT, guided adaptation (Eq. 5)
    ct/unet/...       eps_theta (Eq. 2); .../guide/... inside it is theta_c (Eq. 6)
    image/vae/...     the autoencoder that all modalities of a kind share

Freezing, sharding, conversion and loading are comprehensions over these names. This file is where they are flattened
and unflattened, and where a kind picks its classes (`FAMILIES`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float

from medm2g_jax.arrays import Latent, Params, Times
from medm2g_jax.keys import salt
from medm2g_jax.modality import MODALITIES, Modality
from medm2g_jax.nn.attention import Context, concat, context, mask
from medm2g_jax.nn.clip import CLIPText, CLIPVision, Encoded, clip_pixels
from medm2g_jax.nn.context import Adaptation, ImageContext, TextContext
from medm2g_jax.nn.image_vae import ImageVAE
from medm2g_jax.nn.text_unet import TextUNet
from medm2g_jax.nn.text_vae import TextVAE
from medm2g_jax.nn.unet import UNet

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


# --- what a kind picks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The networks of one kind; each field builds a module from the config's sizes."""

    vae: Callable[..., nn.Module]
    clip: Callable[..., nn.Module]
    unet: Callable[..., nn.Module]
    context: Callable[..., nn.Module]


def _text_family(net: Mapping, vocab: Mapping[str, int], dtype) -> Family:
    t = net["text_vae"]
    return Family(
        vae=lambda: TextVAE(bert_vocab=vocab["bert"], gpt2_vocab=vocab["gpt2"], **t, dtype=dtype),
        clip=lambda: CLIPText(vocab=vocab["clip"], **net["clip_text"], projection=net["width"], dtype=dtype),
        unet=lambda **k: TextUNet(**net["text_unet"], width=net["width"], dtype=dtype, **k),
        context=lambda **k: TextContext(
            **net["text_context"], width=net["width"], latent=net["text_unet"]["latent"], dtype=dtype, **k
        ),
    )


def _image_family(net: Mapping, vocab: Mapping[str, int], dtype) -> Family:
    latent = net["image_vae"]["latent"]
    return Family(
        vae=lambda: ImageVAE(**net["image_vae"], dtype=dtype),
        clip=lambda: CLIPVision(**net["clip_image"], projection=net["width"], dtype=dtype),
        unet=lambda **k: UNet(**net["image_unet"], out_channels=latent, width=net["width"], dtype=dtype, **k),
        context=lambda **k: ImageContext(**net["image_context"], width=net["width"], dtype=dtype, **k),
    )


FAMILIES = {"text": _text_family, "image": _image_family}


# --- one modality ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """What one modality owns. Methods are pure functions of the flat parameters."""

    modality: Modality
    clip: nn.Module
    unet: nn.Module
    context: nn.Module
    adapt: nn.Module
    prompt_in: nn.Module
    latent_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.modality.name

    def prompt(self, params: Params, x: Any) -> Encoded:
        """C_M(x) (3.2): tokens (b n d) in the shared space and the pooled vector (b d), not normalised.

        x: ids {"clip": (b n)} of texts, or images (b h w 1) in [-1, 1], resized on device.
        """
        if self.modality.kind == "text":
            return apply(self.clip, params, f"{self.name}/clip", x["clip"])
        return apply(self.clip, params, f"{self.name}/clip", clip_pixels(x, self.clip.image))

    def eps(
        self,
        params: Params,
        z_t: Latent,
        t: Times,
        prompt: Context,
        guide: Context | None = None,
        stream: Array | None = None,
    ) -> Latent:
        """eps_theta(z_t, t, C(y)) of Eq. 2; with a guide eps_theta_c(z_t, t, V_B([z_t^B, f_B])) of Eq. 6.

        The prompt is in the shared space; `prompt_in` maps its tokens to what this UNet reads.
        """
        tokens = apply(self.prompt_in, params, f"{self.name}/prompt_in", prompt.tokens)
        return apply(
            self.unet, params, f"{self.name}/unet", z_t, t, Context(tokens, prompt.bias), guide, self._at(stream)
        )

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
        """Fresh parameters of the named groups ("clip", "flow", "guide"; see rounds.GROUPS)."""
        z, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,), jnp.int32)
        stream = self._at(jnp.zeros((1,), jnp.int32))
        out: Params = {}
        if "clip" in groups:
            text = self.modality.kind == "text"
            x = jnp.zeros((1, self.clip.length), jnp.int32) if text else jnp.zeros((1, *(2 * (self.clip.image,)), 3))
            out |= init(self.clip, f"{self.name}/clip", key, x)
        if "flow" in groups:
            out |= init(self.prompt_in, f"{self.name}/prompt_in", key, example.tokens)
            out |= init(self.unet, f"{self.name}/unet", key, z, t, example, None, stream)
        if "guide" in groups:
            out |= init(self.adapt, f"{self.name}/adapt", key)
            f = jnp.zeros((self.adapt.count, self.adapt.width))
            out |= init(self.context, f"{self.name}/context", key, z, t, f, stream)
            unet = init(self.unet, f"{self.name}/unet", key, z, t, example, example, stream)
            out |= {name: value for name, value in unet.items() if "/guide/" in name}
        return out


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MedM2G:
    """The flows of a run by modality, the autoencoders by kind, and the scale that gives each kind's latents unit
    variance. `width` is that of the shared space, d."""

    flows: dict[str, Flow]
    vaes: dict[str, nn.Module]
    scales: dict[str, float]
    width: int

    def encode(self, params: Params, name: str, x: Any) -> Latent:
        """z_0 of modality `name`: the posterior mean times the kind's scale.

        x: ids {"bert": (b n)} of texts, or images (b h w 1) in [-1, 1], replicated to the autoencoder's channels.
        """
        mean, _ = self.posterior(params, self.flows[name].modality.kind, x)
        return mean.astype(jnp.float32) * self.scales[self.flows[name].modality.kind]

    def posterior(self, params: Params, kind: str, x: Any) -> tuple[Latent, Latent]:
        """Mean and log-variance of the autoencoder's posterior, unscaled."""
        x = x["bert"] if kind == "text" else jnp.repeat(x, self.vaes[kind].colours, axis=-1)
        return apply(self.vaes[kind], params, f"{kind}/vae", x, method="encode")

    def decode_image(self, params: Params, kind: str, z: Latent) -> Float[Array, "b h w 1"]:
        """Scaled latents -> images in [-1, 1], the mean of the three channels."""
        x = apply(self.vaes[kind], params, f"{kind}/vae", z / self.scales[kind], method="decode")
        return jnp.clip(x.astype(jnp.float32).mean(-1, keepdims=True), -1.0, 1.0)


def prompt_context(
    null: Float[Array, "1 n d"],
    prompts: Mapping[str, tuple[Float[Array, "b m d"], Bool[Array, "b"]]],
) -> Context:
    """The prompt of a batch: one slot of tokens a source, absent ones masked per row, so that one executable serves
    mixed batches. A row without any source has the null prompt C_T("").

    Args:
      null: tokens of the null prompt.
      prompts: source -> (tokens, which rows have it).
    """
    rows = [has for _, has in prompts.values()]
    b = rows[0].shape[0]
    any_ = jnp.any(jnp.stack(rows), axis=0)
    slots = [mask(context(jnp.broadcast_to(null, (b, *null.shape[1:]))), ~any_)]
    return concat(slots + [mask(context(tokens), has) for tokens, has in prompts.values()])


def pooled_context(pooled: Float[Array, "b d"], scale: float = 1.0) -> Context:
    """The one-token context of a pooled vector, for sources whose tokens this flow was never trained on: only pooled
    vectors are aligned. scale: sqrt(d) for V's unit vectors, 1 for prompts, whose tokens have about unit norm."""
    return context(scale * pooled[:, None].astype(jnp.float32))


def build(
    net: Mapping,
    modalities: Sequence[str],
    vocab: Mapping[str, int],
    scales: Mapping[str, float],
    image_size: int,
    dtype=jnp.float32,
    remat: bool = False,
) -> MedM2G:
    """The recipe of the flows of `modalities` and of the autoencoders of all kinds.

    Args:
      net: sizes, `config.net`.
      vocab: of the three tokenizers, {"clip": v, "bert": v, "gpt2": v}.
      scales: kind -> latent scale, 1/std of the training latents.
      image_size: pixels a side.
      dtype: of activations.
    """
    families = {kind: family(net, vocab, dtype) for kind, family in FAMILIES.items()}
    factor = net["image_vae"]["patch"] * 2 ** (len(net["image_vae"]["channels"]) - 1)
    side = image_size // factor
    latents = {"image": (side, side, net["image_vae"]["latent"]), "text": (net["text_unet"]["latent"],)}
    width = net["width"]
    flows = {}
    for name in modalities:
        modality = MODALITIES[name]
        family, streams = families[modality.kind], len(modality.streams)
        flows[name] = Flow(
            modality=modality,
            clip=family.clip(),
            unet=family.unet(streams=streams, remat=remat),
            context=family.context(streams=streams),
            adapt=Adaptation(count=net["adapt"], width=width, dtype=dtype),
            prompt_in=nn.Dense(
                width,
                use_bias=False,
                dtype=dtype,
                precision=jax.lax.Precision.HIGHEST,
                kernel_init=lambda key, shape, dtype=jnp.float32: jnp.eye(*shape, dtype=dtype),
            ),
            latent_shape=latents[modality.kind],
        )
    scales = {kind: float(scales.get(kind, 1.0)) for kind in FAMILIES}
    return MedM2G(flows, {kind: f.vae() for kind, f in families.items()}, scales, width)


def init_group(model: MedM2G, key: Array, groups: Sequence[str]) -> Params:
    """Fresh parameters of groups such as ("ct/guide", "text/vae")."""
    out: Params = {}
    for i, owner in enumerate(dict.fromkeys(g.split("/")[0] for g in groups)):
        own = jax.random.fold_in(key, i)
        kinds = [g.split("/")[1] for g in groups if g.split("/")[0] == owner]
        if "vae" in kinds:
            vae = model.vaes[owner]
            if owner == "text":
                args = (jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32))
            else:
                side = vae.patch * 2 ** (len(vae.channels) - 1) * 2
                args = (jnp.zeros((1, side, side, vae.colours)),)
            out |= init(vae, f"{owner}/vae", own, *args)
        if owner in model.flows:
            example = context(jnp.zeros((1, 2, model.width)))
            out |= model.flows[owner].init(own, [k for k in kinds if k != "vae"], example)
    return out
