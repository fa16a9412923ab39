"""One unconditional model with inpainting of what is missing: the joint flow of all streams, given nothing, in which
the known ones are held to what they are.

At each step the known streams are replaced by their clean latents with as much noise as the step has (Song et al. 2021,
section 5; RePaint without its jumps back, Lugmayr et al. 2022), and the wanted one is sampled along with them, by the
joint guides alone: no prompt, and no source that is told to be clean. What conditional training adds is the difference.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from medm2g_jax.device import jit
from medm2g_jax.diffusion import Denoised, Streams, sample
from medm2g_jax.evaluate.metrics.image import Images
from medm2g_jax.evaluate.samples import CHUNK
from medm2g_jax.generate import build_denoiser, tell_flows, with_bridges
from medm2g_jax.inference import Model
from medm2g_jax.keys import row_keys, row_normal, salt
from medm2g_jax.modality import split_stream


def can_inpaint(model: Model, given: Sequence[str], target: str) -> bool:
    """Does the model make these streams jointly, linked by trained guides and by no other flow?"""
    make = (*given, target)
    if not {split_stream(s)[0] for s in make} <= set(model.modalities):
        return False
    request = model.request((), make)
    return with_bridges(request) == make and len(request.groups()) == 1


def inpainted(model: Model, given: dict[str, Images], target: str, rows: int, seed: int) -> Images:
    """Images of `target` (rows h w 1), beside known ones; the noise of row i is a function of (seed, i)."""
    request, defaults = model.request((), (*given, target)), model.defaults
    flows = {s: model.model.flows[split_stream(s)[0]] for s in request.make}

    def some(params: dict, known: dict[str, Array], empty: dict, keys: Array) -> Array:
        clean = {s: model.model.encode(params, split_stream(s)[0], x) for s, x in known.items()}
        told = tell_flows(model.model, request, params, {}, empty, keys)
        joint = build_denoiser(model.model, request, params, told, len(keys), defaults["guidance"])

        def denoise(z: Streams, t: Array) -> Denoised:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            times = jnp.broadcast_to(t, (len(keys),))
            noise = {s: row_normal(own, x.shape[1:], salt(f"known {s}")) for s, x in clean.items()}
            held = {s: flows[s].process.add_noise(x, times, noise[s]) for s, x in clean.items()}
            return joint({**z, **held}, t)

        z = {s: row_normal(keys, flow.family.latent_shape, salt(f"start {s}")) for s, flow in flows.items()}
        how = (request.sampler, request.steps, request.spacing, defaults["eta"], flows[target].process.schedule)
        return sample(denoise, z, keys, *how)[target]

    run = jit(some)
    empty = model.ids([""]) if model.tokenizers else {}
    keys, out = row_keys(jax.random.key(seed), rows), []
    for i in range(0, rows, CHUNK):
        part = {s: x[i : i + CHUNK] for s, x in given.items()}
        out.append(np.asarray(run(model.params, part, empty, keys[i : i + CHUNK])))
    return model.decode(target, np.concatenate(out), CHUNK)
