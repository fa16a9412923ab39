"""What `medm2g evaluate` measures.

    medm2g evaluate --model runs/phantom-tiny --config=configs/tasks.py:phantom

`phantom`: lesion findings of generated images and reports, by exact labels and a probe trained on real phantoms; of
images made from others on their grid (MRI synthesis, MRI -> CT) also their distance from the true one, beside identity,
the mean image and another subject's.
"""

from medm2g_jax.config import tasks_config as _get


def get_config(words=""):
    config = _get(words)
    # What is given, and what is made of it, each where the model was trained for it.
    config.synthesis = (
        (("mri:t1", "mri:t2"), "mri:flair"),
        (("mri:t1", "mri:t2"), "mri:pd"),
        (("mri:t2",), "ct"),
    )
    return config
