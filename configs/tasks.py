"""What `medm2g evaluate` measures.

    medm2g evaluate --model runs/phantom-tiny --config=configs/tasks.py:phantom

`phantom`: lesion findings of generated images and reports, by exact labels and a probe trained on real phantoms; where
contrasts of a modality guide each other, one made from two others beside one alone, identity and the mean image.
"""

from medm2g_jax.config import tasks_config as _get


def get_config(words=""):
    config = _get(words)
    config.synthesis = (("mri:t1", "mri:t2"), "mri:flair")  # MRI synthesis: what is given, and what is made of it
    return config
