"""Latent diffusion of one modality (section 3.1, Eq. 2), prompted by the others: text, xray, ct or mri.

    python -m medm2g_jax.main --config=configs/ldm.py:ct,tiny

Needs its autoencoder and the alignments of its prompts, which are trained first; data: studies with the modality and a
prompt for it in the folder MEDM2G_DATA names, else the phantom.
tiny: on two CPU cores 148 s for xray, 130 s for ct after it, 135 s for text; their prompts alone give what
`samples.png` shows.
sd15: lr 2e-5, batch 256 (text 5e-5, 1024), from SD-1.5 and Versatile Diffusion in MEDM2G_SD_WEIGHTS. Result: not
reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("ldm", words)
