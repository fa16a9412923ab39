"""Guided sampling: 50 DDIM steps of a small UNet on one 16 x 16 x 4 latent, both halves of guidance as one batch.

python -m benchmarks.ddim [--device=gpu --dtype=bfloat16]

Ours is one program (`diffusion.sample`), as `generate` runs it; torch's a loop in Python over
diffusers' DDIMScheduler.
"""

from benchmarks.common import MEDIUM, TINY, Task, main

GUIDANCE = 7.5


def _sizes(options):
    """Sizes, images, side of the latent, steps."""
    return (TINY, 1, 8, 5) if options.small else (MEDIUM, 1, 16, 50)


def ours(options, sizes=None):
    import jax
    import jax.numpy as jnp

    from benchmarks.ours import call, normal, params
    from medm2g_jax.device import activation_dtype
    from medm2g_jax.diffusion import Process, guided, sample
    from medm2g_jax.nn.attention import context
    from medm2g_jax.nn.unet import UNet

    sizes, b, side, steps = sizes or _sizes(options)
    net = UNet(**sizes, dtype=activation_dtype(options.dtype))
    z, prompt = normal(b, side, side, 4), context(normal(2 * b, 77, sizes["width"]))
    weights = params(net, jnp.concatenate([z, z]), jnp.zeros(2 * b), prompt, dtype=options.dtype)

    def run(weights, z, prompt):
        def halves(z, t):
            both, times = jnp.concatenate([z[""], z[""]]), jnp.broadcast_to(t, 2 * b)
            return {"": Process().split(net.apply(weights, both, times, prompt), both, times)}

        keys = jax.random.split(jax.random.key(0), b)
        return sample(guided(halves, GUIDANCE), {"": z}, keys, "ddim", steps)

    return call(run, weights, z, prompt)


def torch(options, compiled, sizes=None):
    import torch
    from diffusers import DDIMScheduler

    from benchmarks.originals import call, compiler, device, normal, placed, unet

    sizes, b, side, steps = sizes or _sizes(options)
    net = placed(unet(**sizes), options).eval()
    net = torch.compile(net, **compiler(options)) if compiled else net
    z_start, prompt = normal(options, b, 4, side, side), normal(options, 2 * b, 77, sizes["width"])
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps, device=device(options))

    def sample():
        z = z_start
        for t in scheduler.timesteps:
            unconditional, conditional = net(torch.cat([z, z]), t, prompt).sample.chunk(2)
            eps = unconditional + GUIDANCE * (conditional - unconditional)
            z = scheduler.step(eps, t, z).prev_sample

    return call(sample, options)


TASKS = [Task("ddim", "guided DDIM, small UNet, 50 steps", ours, torch, pairs=6, goals={"stock": 1.05})]

if __name__ == "__main__":
    main(TASKS)
