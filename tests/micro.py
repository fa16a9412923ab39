"""A run small enough for tests: the tiny preset cut to 32 px, a few steps and narrow networks; the same code.

    python tests/micro.py text_ct ct_mri ROOT     # those stages and all they stand on

`train` does so in a process of its own: one device, and no checks of annotations, are sooner compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from medm2g_jax.config import get_config

NET = {
    "width": 32,
    "image_vae.channels": (16,),
    "image_vae.groups": 4,
    "image_unet.channels": (16,),
    "image_unet.attention": (False,),  # in the middle alone: each site costs every program a tenth of its compilation
    "image_unet.heads": 2,
    "image_unet.groups": 4,
    "text_vae.width": 32,
    "text_vae.layers": 1,
    "text_vae.heads": 2,
    "text_vae.ff": 64,
    "text_vae.latent": 16,
    "text_unet.channels": (16,),
    "text_unet.attention": (False,),
    "text_unet.heads": 2,
    "text_unet.groups": 4,
    "text_unet.latent": 16,
    "clip_text.width": 32,
    "clip_text.layers": 1,
    "clip_text.heads": 2,
    "clip_text.ff": 64,
    "clip_image.width": 32,
    "clip_image.layers": 1,
    "clip_image.heads": 2,
    "clip_image.ff": 64,
    "clip_image.patch": 16,
    "clip_image.image": 32,
    "image_context.heads": 2,
    "image_context.channels": (8, 16),
    "text_context.heads": 2,
    "adapt": 2,
    "projector": 16,
}


def micro(target: str, words: str = "tiny", steps: int = 4, listing="default", **own):
    """The config of a stage at test size; `own` overrides top-level fields, in upstream stages as well."""
    config = get_config(target, words, listing)
    fields = {f"net.{k}": v for k, v in NET.items()}
    fields |= {"image_size": 32, "data.train": 96, "data.val": 32, "data.test": 16}
    fields |= {"sample.steps": 2, "sample.rows": 16}
    for path, value in fields.items():
        *parents, leaf = path.split(".")
        at = config
        for parent in parents:
            at = at[parent]
        at[leaf] = value
    own = {"steps": steps, "batch": 8, "log_every": 2, "checkpoint_every": 100, "eval_rows": 8} | own
    for at in (config, *config.stages.values()):
        for field, value in own.items():
            if field in at:
                at[field] = value
    return config


def micro_stage(stage: str, **own):
    """`micro` of a stage by its own name: "ldm_ct"."""
    target, _, subject = stage.partition("_") if stage.startswith(("align_", "ldm_")) else (stage, "", "")
    return micro(target, f"{subject},tiny" if subject else "tiny", **own)


def unmeasured(config):
    """The config with nothing held out of its upstream stages, which saves a program each."""
    for stage in config.stages.values():
        stage.eval_rows = 0
    return config


def model_of(target: str, words: str = "tiny", listing="default", tokenizers=None, parts: str = ""):
    """A `Model` of a round, at test size, with random parameters whose V says nothing: what reaches a flow and where it
    goes is tested, not what is made. Of one with text, the tokenizers; of one that makes nothing, the only `parts` it
    has: "clip"."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from medm2g_jax.config import stage_graph
    from medm2g_jax.inference import Model
    from medm2g_jax.model import init_group
    from medm2g_jax.train import results

    config = micro(target, words, listing=listing)
    vocab = tokenizers.sizes if tokenizers else {}
    recipe, graph = results.build_model(config, vocab, {}), stage_graph(config)
    stage = graph.stage(target)
    groups = [g for g in dict.fromkeys((*stage.reads, *stage.trains)) if g.endswith(parts)]
    shapes = jax.eval_shape(lambda k: init_group(recipe, k, tuple(groups)), jax.random.key(0))
    rng = np.random.default_rng(0)
    spread = lambda shape: np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.5  # noqa: E731
    params = {n: jnp.asarray(rng.normal(size=x.shape) * spread(x.shape), x.dtype) for n, x in shapes.items()}
    params = {n: jnp.zeros_like(v) if "/guide/out/" in n else v for n, v in params.items()}
    pairs = graph.trained_pairs(graph.modalities, (target,))
    pairs["registered"] = tuple((s, m) for m, near in stage.registered.items() for s in near)
    lengths = {"clip": config.net.clip_text.length} if tokenizers else {}
    meta = dict(stage=target, lengths=lengths, pairs=pairs, shared=results.shared(config), ranges={}, rounds=[target])
    return Model(recipe, params, tokenizers, meta | {"licences": [], "from": {}}, dict(config.sample))


def flags(devices: int) -> str:
    """XLA_FLAGS of a process of so many devices, which compiles as fast as the tests' own (conftest.py)."""
    return re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ.get("XLA_FLAGS", ""))


def train(script: str, *arguments: str, seconds: float = 500) -> str:
    """Run a Python file of this folder on one CPU device; returns what it printed."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags(1), PYTHONPATH=str(Path(__file__).parents[1]))
    line = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


if __name__ == "__main__":
    from absl.flags import FLAGS

    from medm2g_jax import run

    FLAGS.mark_as_parsed()
    drawn = run.show
    *targets, root = sys.argv[1:]
    # What the stages before them end with is tested elsewhere, and half of the time.
    run.show = lambda config, **rest: drawn(config=config, **rest) if config.stage in targets else []
    for target in targets:
        run.run(unmeasured(micro(target, steps=3)), root)
