"""Text autoencoder (section 3.1), Optimus: BERT encoder, GPT-2 decoder, one latent vector a report.

    python -m medm2g_jax.main --config=configs/text_vae.py:tiny

Needs no other stage; data: texts of the folder MEDM2G_DATA names, else the phantom.
tiny: 39 s on two CPU cores, phantom, held out: 0.89 of reports come back word for word, finding F1 0.98.
sd15: Optimus where MEDM2G_SD_WEIGHTS holds it. Result: not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("text_vae", words)
