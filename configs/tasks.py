"""What `medm2g evaluate` measures.

    medm2g evaluate --model runs/phantom-tiny --config=configs/tasks.py:phantom

`phantom`: lesion findings of generated images and reports, by exact labels and a probe trained on real phantoms.
"""

from medm2g_jax.config import tasks_config as _get


def get_config(words=""):
    return _get(words)
