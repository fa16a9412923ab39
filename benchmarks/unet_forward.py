"""Stable Diffusion 1.5's UNet (859,520,964 parameters), forward: one 64 x 64 x 4 latent, 77 prompt tokens.

python -m benchmarks.unet_forward [--device=gpu --dtype=bfloat16]
"""

from benchmarks.common import SD15, TINY, Task, main


def _sizes(options):
    return (TINY, 8) if options.small else (SD15, 64)


def ours(options):
    import jax.numpy as jnp

    from benchmarks.ours import call, normal, params
    from medm2g_jax.device import activation_dtype
    from medm2g_jax.nn.attention import context
    from medm2g_jax.nn.unet import UNet

    sizes, side = _sizes(options)
    net = UNet(**sizes, dtype=activation_dtype(options.dtype))
    inputs = normal(1, side, side, 4), jnp.array([500]), context(normal(1, 77, sizes["width"]))
    return call(net.apply, params(net, *inputs, dtype=options.dtype), *inputs)


def torch(options, compiled):
    import torch

    from benchmarks.originals import call, compiler, device, normal, placed, unet

    sizes, side = _sizes(options)
    net = placed(unet(**sizes), options).eval()
    net = torch.compile(net, **compiler(options)) if compiled else net
    z, prompt = normal(options, 1, 4, side, side), normal(options, 1, 77, sizes["width"])
    t = torch.tensor([500], device=device(options))
    return call(lambda: net(z, t, prompt).sample, options)


TASKS = [Task("unet_forward", "SD-1.5 UNet, forward", ours, torch, pairs=6, goals={"stock": 0.85, "fast": 1.1})]

if __name__ == "__main__":
    main(TASKS)
