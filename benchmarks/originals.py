"""torch's side of a benchmark: diffusers' networks, and the wait for a result."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch


def device(options: argparse.Namespace) -> str:
    return "cuda" if options.device == "gpu" else "cpu"


def compiler(options: argparse.Namespace) -> dict[str, str]:
    """What torch.compile takes: on a CPU nothing is compiled, so that a script can be tried without a C++ compiler."""
    return {} if options.device == "gpu" else {"backend": "eager"}


def unet(channels, attention, layers, heads, groups, width):
    """diffusers' UNet of these sizes."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        block_out_channels=channels,
        layers_per_block=layers,
        attention_head_dim=heads,  # diffusers' name for the number of heads, in models of SD-1.x's age
        norm_num_groups=groups,
        cross_attention_dim=width,
    )


def placed(module: torch.nn.Module, options: argparse.Namespace, half: bool = True) -> torch.nn.Module:
    """On the device, channels last; weights in the options' dtype, or with half=False in float32."""
    # jax multiplies float32 in TF32 on GPUs, torch convolves in it: let it multiply so too.
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = getattr(torch, options.dtype) if half else torch.float32
    return module.to(device(options), dtype, memory_format=torch.channels_last)


def normal(options: argparse.Namespace, *shape: int, half: bool = True) -> torch.Tensor:
    """As `placed`: images (b c h w) are channels last."""
    out = torch.randn(shape).to(device(options), getattr(torch, options.dtype) if half else torch.float32)
    return out.contiguous(memory_format=torch.channels_last) if out.ndim == 4 else out


def call(function: Callable, options: argparse.Namespace, grad: bool = False) -> Callable[[], Any]:
    """Run the function, without gradients unless asked for, and wait for its result."""

    def run():
        with contextlib.nullcontext() if grad else torch.no_grad():
            function()
        if options.device == "gpu":
            torch.cuda.synchronize()

    return run
