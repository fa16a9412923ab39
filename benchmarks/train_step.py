"""A training step of a small UNet: 16 latents of 16 x 16 x 4, eps loss, AdamW; and where its time goes.

python -m benchmarks.train_step [--profile] [--device=gpu --dtype=bfloat16]

Weights are float32 in both; bfloat16 is that of activations, in torch by autocast.
"""

import json

from benchmarks import profile
from benchmarks.common import MEDIUM, TINY, Task, main, parser, run_child

PROFILED = 5  # steps


def _sizes(options):
    """Sizes, batch, side of the latent."""
    return (TINY, 2, 8) if options.small else (MEDIUM, 16, 16)


def our_step(options, sizes=None):
    """(step(state, z_t, t, prompt, eps) -> (state, loss), compiled and with its state donated; its arguments)."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.ours import normal, params
    from medm2g_jax.device import activation_dtype, jit
    from medm2g_jax.diffusion import denoising_loss
    from medm2g_jax.nn.attention import context
    from medm2g_jax.nn.unet import UNet

    sizes, b, side = sizes or _sizes(options)
    net = UNet(**sizes, dtype=activation_dtype(options.dtype))
    z, eps = normal(b, side, side, 4), normal(b, side, side, 4, seed=2)
    t, prompt = jnp.arange(b) * (1000 // b), context(normal(b, 77, sizes["width"]))
    weights = params(net, z, t, prompt)
    tx = optax.adamw(1e-4, weight_decay=0.01)

    def step(state, z, t, prompt, eps):
        weights, slots = state
        loss, grads = jax.value_and_grad(lambda w: denoising_loss(eps, net.apply(w, z, t, prompt)))(weights)
        updates, slots = tx.update(grads, slots, weights)
        return (optax.apply_updates(weights, updates), slots), loss

    return jit(step, donate_argnums=0), ((weights, tx.init(weights)), z, t, prompt, eps)


def ours(options, sizes=None):
    import jax

    step, (state, *batch) = our_step(options, sizes)

    def call():
        nonlocal state
        state, loss = step(state, *batch)
        jax.block_until_ready((state, loss))

    return call


def torch(options, compiled, sizes=None):
    import torch

    from benchmarks.originals import call, compiler, device, normal, placed, unet

    sizes, b, side = sizes or _sizes(options)
    net = placed(unet(**sizes), options, half=False).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01)
    net = torch.compile(net, **compiler(options)) if compiled else net
    z, eps = (normal(options, b, 4, side, side, half=False) for _ in range(2))
    prompt = normal(options, b, 77, sizes["width"], half=False)
    t = torch.arange(b, device=device(options)) * (1000 // b)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device(options), torch.bfloat16, enabled=options.dtype == "bfloat16"):
            prediction = net(z, t, prompt).sample
        torch.nn.functional.mse_loss(prediction.float(), eps).backward()
        optimizer.step()

    return call(step, options, grad=True)


def profile_ours(options):
    """Seconds a step by kind of operation."""
    import jax

    step, (state, *batch) = our_step(options)
    program = step.lower(state, *batch).compile()
    structure = jax.tree.structure((state, *batch))
    slots, inputs = jax.tree.leaves(state), jax.tree.leaves(batch)

    def call():
        nonlocal slots
        *slots, _ = jax.block_until_ready(jax.tree.leaves(program(*jax.tree.unflatten(structure, slots + inputs))))

    return profile.our_kinds(call, program.as_text(), PROFILED)


def profile_torch(options):
    return profile.torch_kinds(torch(options, False), PROFILED, options.device == "gpu")


def where(options):
    """Seconds a step by kind of operation, of "ours" and "torch", each from a process of its own."""
    return {side: run_child("train_step", options, "profile", side) for side in ("ours", "torch")}


TASKS = [Task("train_step", "small UNet, training step", ours, torch, pairs=10, goals={"stock": 1.75})]

if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--profile", action="store_true", help="where a step's time goes, not how long it takes")
    options = arguments.parse_args()
    if options.child and options.child[0] == "profile":
        print(json.dumps((profile_ours if options.child[1] == "ours" else profile_torch)(options)))
    elif options.profile:
        print(profile.table(**where(options)))
    else:
        main(TASKS, options)
