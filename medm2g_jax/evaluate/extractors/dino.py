"""RAD-DINO (Perez-Garcia et al. 2024): DINOv2's ViT-B/14, trained on chest X-rays, in transformers' layout. Its 768
features are the class token's state after the last norm."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.convert.rules import SAME, Rule, layer
from medm2g_jax.evaluate.extractors.layers import Maps
from medm2g_jax.nn.layers import Attention, gelu, layer_norm

EPS = 1e-6
HEAD = 64  # features of a head
SIZES = ("width", "layers", "ff", "patch")


class Dino(nn.Module):
    width: int = 768
    layers: int = 12
    ff: int = 3072
    patch: int = 14

    @nn.compact
    def __call__(self, x: Maps) -> tuple[list[Maps], Float[Array, "b d"]]:
        """Normalised pixels -> (the states of the patches after the last norm, as a map; features)."""
        zeros = nn.initializers.zeros_init()
        p = self.patch
        x = nn.Conv(self.width, (p, p), p, "VALID", precision="highest", name="patch")(x)
        b, h, w, c = x.shape
        first = jnp.broadcast_to(self.param("class", zeros, (1, 1, c)), (b, 1, c))
        x = jnp.concatenate([first, x.reshape(b, h * w, c)], 1) + self.param("position", zeros, (1, h * w + 1, c))
        for i in range(self.layers):
            at = f"layer_{i}_"
            scale = [self.param(f"{at}scale_{k}", zeros, (c,)) for k in (1, 2)]
            attention = Attention(max(1, c // HEAD), qkv_bias=True, name=f"{at}attn")
            x += scale[0] * attention(layer_norm(f"{at}norm_1", jnp.float32, EPS)(x))
            y = gelu(nn.Dense(self.ff, name=f"{at}fc_1")(layer_norm(f"{at}norm_2", jnp.float32, EPS)(x)))
            x += scale[1] * nn.Dense(c, name=f"{at}fc_2")(y)
        x = layer_norm("norm", jnp.float32, EPS)(x)
        return [x[:, 1:].reshape(b, h, w, c)], x[:, 0]


def rules(layers: int, prefix: str) -> list[Rule]:
    """transformers' names, of the published files."""
    out = [Rule(f"embeddings.{a}", f"{prefix}/{b}", SAME)
           for a, b in (("cls_token", "class"), ("position_embeddings", "position"))]  # fmt: skip
    out += layer("embeddings.patch_embeddings.projection", f"{prefix}/patch", "conv")
    out += layer("layernorm", f"{prefix}/norm", "norm")
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}.", f"{prefix}/layer_{i}_"
        for k in (1, 2):
            out += layer(f"{theirs}norm{k}", f"{ours}norm_{k}", "norm")
            out += layer(f"{theirs}mlp.fc{k}", f"{ours}fc_{k}", "dense")
            out.append(Rule(f"{theirs}layer_scale{k}.lambda1", f"{ours}scale_{k}", SAME))
        for name in ("query", "key", "value"):
            out += layer(f"{theirs}attention.attention.{name}", f"{ours}attn/{name[0]}", "dense")
        out += layer(f"{theirs}attention.output.dense", f"{ours}attn/out", "dense")
    return out


def sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Of a network whose tensors have these shapes, and the side of its images."""
    width, _, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"]
    layers = len({key.split(".")[2] for key in shapes if key.startswith("encoder.layer.")})
    side = patch * math.isqrt(shapes["embeddings.position_embeddings"][1] - 1)
    return dict(width=width, layers=layers, ff=shapes["encoder.layer.0.mlp.fc1.weight"][0], patch=patch, side=side)


def pixels(x: Float[Array, "b h w 1"], net: dict[str, Any]) -> Maps:
    """Images in [-1, 1], with the side, mean and standard deviation that the file's folder names."""
    x = jax.image.resize((x + 1) / 2, (x.shape[0], net["side"], net["side"], 1), "cubic", antialias=True)
    return (x - jnp.asarray(net["mean"])) / jnp.asarray(net["std"])
