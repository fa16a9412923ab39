"""The positive control of `medm2g audit`: a flow of CT trained until it knows 200 subjects by heart, and the same flow
trained for as many steps on 5,000; a line of JSON each. Other numbers, for a first try:

    python tests/memorised.py ROOT
    python tests/memorised.py ROOT 200,1000 0 3000     # subjects, seeds, steps

Each run root compiles for itself, unless JAX_COMPILATION_CACHE_DIR names a folder for all.
"""

import contextlib
import io
import json
import sys

from absl import flags
from micro import micro, unmeasured

from medm2g_jax import audit, fill, run
from medm2g_jax.loading import load

NET = {
    "image_unet.channels": (32, 64),
    "image_unet.attention": (False, True),
    "image_vae.channels": (32,),
}
DEFAULTS = ["200,5000", "0,1,2", "3000"]  # subjects, seeds, steps


def config_of(subjects: int, seed: int, steps: int):
    """CT alone, 32 px: an autoencoder, then the flow, which nothing prompts."""
    config = unmeasured(micro("ldm", "ct,tiny,alone", steps=steps, batch=16, eval_rows=0, log_every=500))
    for path, value in NET.items():
        part, leaf = path.split(".")
        config.net[part][leaf] = value
    config.seed, config.data.train, config.data.val, config.data.test = seed, subjects, 0, 400
    config.sample.steps = 50  # in two it says the mean of what it knows, which is near to nobody
    config.stages.image_vae.steps = 2 * steps // 5
    for stage in (config, *config.stages.values()):
        stage.checkpoint_every = steps
    return config


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    run.show = lambda **rest: []
    root, *own = sys.argv[1:]
    subjects, seeds, steps = own + DEFAULTS[len(own) :]
    for seed in map(int, seeds.split(",")):
        for count in map(int, subjects.split(",")):
            folder = f"{root}/{count}-{seed}"
            with contextlib.redirect_stdout(io.StringIO()):
                run.run(config_of(count, seed, int(steps)), folder)
            model = load(folder)
            source = fill.data_of(model, "phantom")
            said: list[str] = []
            reasons = audit.audit(model, source, folder, rows=100, seed=seed, say=said.append)
            told = dict(subjects=count, seed=seed, steps=int(steps), verdict="flagged" if reasons else "passes")
            figures = [line.strip() for line in said if line.startswith("  nothing ->")]
            print(json.dumps(told | dict(reasons=reasons, figures=figures)), flush=True)
