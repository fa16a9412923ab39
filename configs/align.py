"""Central alignment and visual invariant (sections 3.2 and 3.3, Eq. 3-4) of one pair of modalities.

    python -m medm2g_jax.main --config=configs/align.py:text_ct,tiny

Pairs: text_xray, text_ct, ct_mri; text_mri in the listing of configs/text_mri.py. Needs the alignments before it in the
listing, which are trained first; data: studies with both modalities in the folder MEDM2G_DATA names, else the phantom.
tiny: 67 s for text_xray and 45 s for text_ct on two CPU cores; phantom, held out, reports of the same findings
count as one: retrieval@1 0.80 and 0.64 (chance 0.07, 0.06).
sd15: CLIP-L from MEDM2G_SD_WEIGHTS. Result: not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("align", words)
