"""A model of MRI alone, from studies with several contrasts: each contrast made from any others (MRI synthesis).

    python -m medm2g_jax.main --config=configs/mri.py:tiny

Needs no text and no other modality: autoencoder, C_MRI (two contrasts of a study are a pair), the flow and the round in
which contrasts guide each other are trained first; data: studies with at least two contrasts in the folder MEDM2G_DATA
names, else the phantom.
tiny: phantom, `medm2g evaluate`: T1 + T2 -> FLAIR 25.0 dB, T2 alone 23.9, T2 taken for FLAIR 22.8, the mean image 17.4,
the autoencoder 27.9; minutes on two CPU cores, see docs/quality.md.
sd15: result not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("mri", words, listing=("mri",))
