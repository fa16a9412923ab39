"""Round 2 of the paper's other listing (section 4: text-Xray, text-MRI, MRI-CT), in a run root of its own.

    python -m medm2g_jax.main --config=configs/text_mri.py:tiny

Needs round text_xray, the MRI flow and what they stand on, trained first; data: studies with a report and an MRI in the
folder MEDM2G_DATA names, else the phantom.
sd15: result not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("text_mri", words, listing="text_mri")
