"""Round 3 of section 3.5, CT and MRI: MRI learns, CT is frozen. Its result is the model of all four modalities.

    python -m medm2g_jax.main --config=configs/ct_mri.py:tiny

Needs every other stage of the listing, trained first; data: subjects with a CT and an MRI in the folder MEDM2G_DATA
names, else the phantom.
sd15: result not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("ct_mri", words)
