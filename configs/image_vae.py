"""Image autoencoder (section 3.1), shared by X-ray, CT and MRI: images to 4-channel latents.

    python -m medm2g_jax.main --config=configs/image_vae.py:tiny

Needs no other stage; data: images of the folder MEDM2G_DATA names, else the phantom.
tiny: 40 s on two CPU cores, phantom, held out: CT 26.9 dB, X-ray 32.1 dB, MRI 25.6 dB (mean image: 16.2, 21.9, 16.1).
sd15: SD-1.5's autoencoder where MEDM2G_SD_WEIGHTS holds it. Result: not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("image_vae", words)
