"""Stable Diffusion's autoencoder (83,653,863 parameters): one image of 512 x 512 pixels to latents, and back.

python -m benchmarks.vae [--device=gpu --dtype=bfloat16]
"""

import functools

from benchmarks.common import Task, main

FULL = dict(channels=(128, 256, 512, 512), layers=2, groups=32)
SMALL = dict(channels=(8, 16, 16, 16), layers=1, groups=8)


def _sizes(options, method):
    """Sizes, and (side, channels) of the input."""
    pixels = 64 if options.small else 512
    return SMALL if options.small else FULL, (pixels, 3) if method == "encode" else (pixels // 8, 4)


def ours(options, method):
    from benchmarks.ours import call, normal, params
    from medm2g_jax.device import activation_dtype
    from medm2g_jax.nn.image_vae import ImageVAE

    sizes, (side, channels) = _sizes(options, method)
    net = ImageVAE(**sizes, dtype=activation_dtype(options.dtype))
    weights = params(net, normal(1, 64, 64, 3), dtype=options.dtype)
    return call(lambda p, x: net.apply(p, x, method=method), weights, normal(1, side, side, channels))


def torch(options, compiled, method):
    import torch
    from diffusers import AutoencoderKL

    from benchmarks.originals import call, compiler, normal, placed

    sizes, (side, channels) = _sizes(options, method)
    levels = len(sizes["channels"])
    net = AutoencoderKL(
        block_out_channels=sizes["channels"],
        layers_per_block=sizes["layers"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=sizes["groups"],
        latent_channels=4,
    )
    function = getattr(placed(net, options).eval(), method)
    function = torch.compile(function, **compiler(options)) if compiled else function
    x = normal(options, 1, channels, side, side)
    return call(lambda: function(x), options)


def _task(method, goals):
    methods = {"ours": functools.partial(ours, method=method), "torch": functools.partial(torch, method=method)}
    return Task("vae", f"VAE {method}, 512 px", **methods, pairs=4, goals=goals)


TASKS = [_task("encode", {}), _task("decode", {"stock": 1.35})]

if __name__ == "__main__":
    main(TASKS)
