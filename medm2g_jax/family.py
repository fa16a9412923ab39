"""What a kind of modality picks: its networks, and all that depends on text being ids and images being pixels.

Two classes with the same members, one a kind, in `FAMILIES`; nothing else asks what kind a modality is of. Where the
rest of the package has to know whether a modality can be looked at, it asks `Modality.is_image`.

A value x of a modality in a batch is for images (b h w 1) in [-1, 1], for texts {"clip": (b n), "bert": (b m),
"gpt2": (b k)} ids. An image that was encoded before (`data.latents`) is {"latent": (b h w c), "pixels": (b h w 1)}, the
pixels there only if C reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from medm2g_jax.arrays import Latent
from medm2g_jax.autoencode import token_cross_entropy
from medm2g_jax.nn.clip import CLIPText, CLIPVision, clip_pixels
from medm2g_jax.nn.context import ImageContext, TextContext
from medm2g_jax.nn.image_vae import ImageVAE
from medm2g_jax.nn.text_unet import TextUNet
from medm2g_jax.nn.text_vae import TextVAE, decode_beam, decode_greedy
from medm2g_jax.nn.unet import UNet


@dataclass(frozen=True)
class TextFamily:
    """Texts as three rows of ids: C_T reads CLIP's, the autoencoder encodes BERT's and decodes GPT-2's."""

    net: Mapping[str, Any]
    vocab: Mapping[str, int]
    size: int  # of images; texts have none
    dtype: Any

    has_views = False  # no crop of a sentence says the same: the visual invariant (3.3) is for images

    def vae(self) -> nn.Module:
        own = self.net["text_vae"]
        return TextVAE(bert_vocab=self.vocab["bert"], gpt2_vocab=self.vocab["gpt2"], **own, dtype=self.dtype)

    def clip(self) -> nn.Module:
        own = self.net["clip_text"]
        return CLIPText(vocab=self.vocab["clip"], **own, projection=self.net["width"], dtype=self.dtype)

    def unet(self, **options: Any) -> nn.Module:
        return TextUNet(**self.net["text_unet"], width=self.net["width"], dtype=self.dtype, **options)

    def context(self, **options: Any) -> nn.Module:
        own = self.net["text_context"]
        latent = self.net["text_unet"]["latent"]
        return TextContext(**own, width=self.net["width"], latent=latent, dtype=self.dtype, **options)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.net["text_unet"]["latent"],)

    def shapes(self, batch: int) -> Any:
        """A value of `batch` rows, in shapes."""
        return {name: jax.ShapeDtypeStruct((batch, n), jnp.int32) for name, n in text_lengths(self.net).items()}

    def clip_input(self, x: Any) -> Array:
        """What C_M reads of a value."""
        return x["clip"]

    def clip_example(self) -> Array:
        return jnp.zeros((1, self.net["clip_text"]["length"]), jnp.int32)

    def alike(self, x: Any) -> Bool[Array, "b b"]:
        """Which rows C_M cannot tell apart: those of the same words."""
        return jnp.all(x["clip"][:, None] == x["clip"][None, :], axis=-1)

    def latent(self, x: Any) -> None:
        """The posterior mean that a value brings along; texts bring none."""
        del x

    def vae_input(self, x: Any) -> Array:
        """What the autoencoder encodes of a value."""
        return x["bert"]

    def vae_example(self) -> tuple[Array, ...]:
        return jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32)

    def reconstruct(self, params: Any, z: Latent, x: Any) -> Array:
        """What the autoencoder's losses compare with the value: logits of its next tokens."""
        return self.vae().apply({"params": params}, z, x["gpt2"], method="logits")

    @property
    def losses(self) -> dict[str, Callable[[Array, Any], Array]]:
        """Reconstruction terms of the autoencoder, of (what `reconstruct` gives, the value)."""
        pad = self.vae().pad
        return {"ce": lambda logits, x: token_cross_entropy(logits, x["gpt2"], pad)}

    def decode(self, params: Any, z: Latent, beams: int = 1) -> Array:
        """Unscaled latents -> GPT-2 ids (b n): the likeliest token at each place, or the likeliest text that so many
        beams find."""
        length = text_lengths(self.net)["gpt2"]
        if beams == 1:
            return decode_greedy(self.vae(), params, z, length)
        return decode_beam(self.vae(), params, z, length, beams)


@dataclass(frozen=True)
class ImageFamily:
    """Grey images, one channel; the autoencoder and C read them in as many colours as their weights have."""

    net: Mapping[str, Any]
    vocab: Mapping[str, int]  # of texts; images have none
    size: int
    dtype: Any

    has_views = True

    def vae(self) -> nn.Module:
        return ImageVAE(**self.net["image_vae"], dtype=self.dtype)

    def clip(self) -> nn.Module:
        return CLIPVision(**self.net["clip_image"], projection=self.net["width"], dtype=self.dtype)

    def unet(self, **options: Any) -> nn.Module:
        channels = self.net["image_vae"]["latent"]
        own = self.net["image_unet"]
        return UNet(**own, out_channels=channels, width=self.net["width"], dtype=self.dtype, **options)

    def context(self, **options: Any) -> nn.Module:
        return ImageContext(**self.net["image_context"], width=self.net["width"], dtype=self.dtype, **options)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        side = self.size // self._factor
        return side, side, self.net["image_vae"]["latent"]

    @property
    def _factor(self) -> int:
        """Pixels a latent position."""
        return self.net["image_vae"]["patch"] * 2 ** (len(self.net["image_vae"]["channels"]) - 1)

    def shapes(self, batch: int) -> Any:
        return jax.ShapeDtypeStruct((batch, self.size, self.size, 1), jnp.float32)

    def clip_input(self, x: Any) -> Array:
        return clip_pixels(x["pixels"] if isinstance(x, Mapping) else x, self.net["clip_image"]["image"])

    def clip_example(self) -> Array:
        side = self.net["clip_image"]["image"]
        return jnp.zeros((1, side, side, 3))

    def alike(self, x: Any) -> Bool[Array, "b b"]:
        """None: no two pictures are the same."""
        rows = jax.tree.leaves(x)[0].shape[0]
        return jnp.zeros((rows, rows), bool)

    def latent(self, x: Any) -> Latent | None:
        """The posterior mean that a value brings along, unscaled; None of pixels."""
        return x["latent"] if isinstance(x, Mapping) else None

    def vae_input(self, x: Any) -> Array:
        return jnp.repeat(x, self.net["image_vae"]["colours"], axis=-1)

    def vae_example(self) -> tuple[Array, ...]:
        side = 2 * self._factor
        return (jnp.zeros((1, side, side, self.net["image_vae"]["colours"])),)

    def reconstruct(self, params: Any, z: Latent, x: Any) -> Array:
        return self.vae().apply({"params": params}, z, method="decode").astype(jnp.float32)

    @property
    def losses(self) -> dict[str, Callable[[Array, Any], Array]]:
        return {
            "l1": lambda y, x: jnp.mean(jnp.abs(y - x)),
            "mse": lambda y, x: jnp.mean(jnp.square(y - x)),
        }

    def decode(self, params: Any, z: Latent, beams: int = 1) -> Array:
        """Unscaled latents -> images (b h w 1) in [-1, 1], the mean of the colours. Nothing is searched here."""
        del beams
        y = self.vae().apply({"params": params}, z, method="decode")
        return jnp.clip(y.astype(jnp.float32).mean(-1, keepdims=True), -1.0, 1.0)


Family = TextFamily | ImageFamily
FAMILIES = {"text": TextFamily, "image": ImageFamily}


def text_lengths(net: Mapping[str, Any] | ConfigDict) -> dict[str, int]:
    """Ids of a text in each tokenizer's format, from `config.net`."""
    return dict(clip=net["clip_text"]["length"], bert=net["bert_length"], gpt2=net["gpt2_length"])
