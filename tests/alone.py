"""Models of less than the paper's three pairs, each trained on the phantom for a few steps: CT-MRI pairs without any
text, contrasts of MRI (the round alone, on a base that nobody has trained), CT and nothing else.

    python tests/alone.py ROOT
"""

import sys

from absl import flags
from micro import micro, unmeasured

from medm2g_jax import run

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    drawn = run.show
    # What the other stages end with is tested elsewhere, and half of the time.
    shown = (("mri",), "mri"), (("ct",), "ldm_ct")
    run.show = lambda config, **rest: drawn(config=config, **rest) if (config.listing, config.stage) in shown else []

    config = unmeasured(micro("ct_mri", "tiny,alone", steps=3))
    config.stages.ldm_mri.drop_prompt = 1.0  # every row reads the null prompt
    run.run(config, f"{sys.argv[1]}/ct_mri")
    run.run(micro("mri", "tiny", steps=3, listing=("mri",), upstream="init"), f"{sys.argv[1]}/mri")
    run.run(unmeasured(micro("ldm", "ct,tiny,alone", steps=3, predict="v")), f"{sys.argv[1]}/ct")

    # A fine-tune in a run root of its own, and one in that of its rounds.
    config = micro("finetune", "mri_to_ct,full,tiny,alone", steps=4, eval_every=2, accelerate=4)
    config.upstream_dirs = (f"{sys.argv[1]}/ct_mri",)
    config.data.train = 64
    run.run(config, f"{sys.argv[1]}/tuned")
    run.run(micro("finetune", "mri_to_ct,lora,tiny,alone", steps=3, rank=2), f"{sys.argv[1]}/ct_mri")
