"""eps_theta(z_t, t, prompt, guide) of an image flow: Stable Diffusion 1.5's UNet at any size (section 3.1, Eq. 2),
with theta_c (section 3.4, Eq. 6) in every transformer block.

    z (b h w 4) -> conv_in -> down_0 .. down_L -> mid -> up_0 .. up_L -> norm_out, SiLU, conv_out -> eps (b h w 4)

The way through a UNet is written here once, as `Level` and `through`; `text_unet` goes it with other operators. up_0
is the deepest. The outputs of conv_in, of every block on the way down and of every downsampling are kept; each block on
the way up takes the last one kept, behind its own input on the channel axis.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medm2g_jax.arrays import Times
from medm2g_jax.errors import UserError
from medm2g_jax.nn.attention import Context
from medm2g_jax.nn.layers import GroupNorm, ResBlock, Transformer, conv, faint, time_embedding, upsample, zeros

Hidden = Float[Array, "b ..."]  # (b h w c) in an image UNet, flat (b c*positions) in a text UNet


class Operators(NamedTuple):
    """What differs between the kinds. A function that has a layer makes it in its caller's scope."""

    layer: str  # of `ResBlock`: "conv" or "fc"
    positions: int  # features of a hidden state, per channel
    downsample: Callable[[Hidden, int, Any], Hidden]  # of x to so many features in this dtype; leaf downsample
    upsample: Callable[[Hidden, int, Any], Hidden]  # leaf upsample
    tokens: Callable[[Hidden], Float[Array, "b n c"]]  # what a transformer sees
    hidden: Callable[[Float[Array, "b n c"], Hidden], Hidden]  # back to the form of the second argument


class Level(nn.Module):
    """Residual blocks, each with a transformer behind it where `attention` says so, then a change of resolution.

    Returns what came out of each block and of the change of resolution, for the way up; the last is the level's output.
    """

    operators: Operators
    channels: int
    attention: Sequence[bool]
    resample: str  # "downsample", "upsample" or ""
    heads: int
    groups: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        time: Float[Array, "b t"],
        prompt: Context,
        guide: Context | None,
        kept: Sequence[Hidden] = (),
    ) -> list[Hidden]:
        op, dtype = self.operators, self.dtype
        features = self.channels * op.positions
        res_block, transformer = (nn.remat(m) if self.remat else m for m in (ResBlock, Transformer))
        outputs = []
        for j, attention in enumerate(self.attention):
            if kept:
                x = jnp.concatenate([x, kept[-1 - j]], axis=-1)
            x = res_block(features, self.groups, layer=op.layer, dtype=dtype, name=f"res_{j}")(x, time)
            if attention:
                site = transformer(self.heads, self.groups, dtype, name=f"attn_{j}")
                x = op.hidden(site(op.tokens(x), prompt, guide), x)
            outputs.append(x)
        if self.resample:
            outputs.append(getattr(op, self.resample)(x, features, dtype))
        return outputs


def through(
    net: nn.Module,
    operators: Operators,
    x: Hidden,
    time: Float[Array, "b t"],
    prompt: Context,
    guide: Context | None,
) -> Hidden:
    """From behind the first layer to before norm_out, inside `net.__call__`, with the sizes that `net` has."""

    def level(name, channels, attention, resample):
        return Level(
            operators, channels, attention, resample, net.heads, net.groups, net.dtype, net.remat, name=name
        )

    last = len(net.channels) - 1
    kept = [x]
    for i, channels in enumerate(net.channels):
        down = level(f"down_{i}", channels, (net.attention[i],) * net.layers, "downsample" if i < last else "")
        kept += down(kept[-1], time, prompt, guide)
    x = level("mid", net.channels[-1], (True, False), "")(kept[-1], time, prompt, guide)[-1]
    for i, channels in enumerate(reversed(net.channels)):
        blocks = net.layers + 1
        up = level(f"up_{i}", channels, (net.attention[last - i],) * blocks, "upsample" if i < last else "")
        x = up(x, time, prompt, guide, kept[-blocks:])[-1]
        del kept[-blocks:]
    return x


IMAGE = Operators(
    layer="conv",
    positions=1,
    downsample=lambda x, features, dtype: conv(features, "downsample", dtype, stride=2)(x),
    upsample=lambda x, features, dtype: conv(features, "upsample", dtype)(upsample(x)),
    tokens=lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    hidden=lambda tokens, like: tokens.reshape(like.shape),
)


class UNet(nn.Module):
    """The noise in z_t, given the noise level, a prompt and, from other flows, a guide.

    What lies on z_t's own grid, pixel by pixel, may come in beside it (`registered`): a 3x3 convolution of its own adds
    to conv_in's output. It belongs to the guide (leaf guide) and starts at zero, as theta_c does.

    Attributes:
      channels: of each level; each level but the last halves height and width.
      attention: per level, whether its blocks have transformers. The middle always has one.
      layers: blocks a level on the way down; one more on the way up.
      heads: of every attention, whatever its width.
      width: of the contexts' tokens.
      streams: of the modality; more than one adds an embedding of the stream to the noise level's.
      remat: recompute each block's activations on the way back.
    """

    channels: Sequence[int] = (320, 640, 1280, 1280)
    attention: Sequence[bool] = (True, True, True, False)
    layers: int = 2
    heads: int = 8
    groups: int = 32
    out_channels: int = 4
    width: int = 768
    streams: int = 1
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "b h w c"],
        t: Times,
        prompt: Context,
        guide: Context | None = None,
        stream: Int[Array, "b"] | None = None,
        registered: Float[Array, "b h w s"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """eps at z_t, float32."""
        factor = 2 ** (len(self.channels) - 1)
        if z_t.shape[1] % factor or z_t.shape[2] % factor:
            raise UserError(
                f"a UNet of {len(self.channels)} levels needs latents whose height and width are multiples of "
                f"{factor}, found {z_t.shape[1]} x {z_t.shape[2]}"
            )
        check_width(self.width, prompt, guide)
        time = time_embedding(t, stream, self.channels[0], self.streams, self.dtype)
        x = conv(self.channels[0], "conv_in", self.dtype)(z_t)
        if registered is not None:
            x += conv(self.channels[0], "guide", self.dtype, use_bias=False, kernel_init=zeros)(registered)
        x = through(self, IMAGE, x, time, prompt, guide)
        x = jax.nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        return conv(self.out_channels, "conv_out", self.dtype, kernel_init=faint)(x).astype(jnp.float32)


def check_width(width: int, *contexts: Context | None) -> None:
    """Contexts of another width would give parameters of another shape.

    Raises:
      UserError: names both widths.
    """
    for ctx in contexts:
        if ctx is not None and ctx.tokens.shape[-1] != width:
            raise UserError(f"this network reads contexts of width {width}, found one of width {ctx.tokens.shape[-1]}")
