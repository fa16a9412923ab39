"""Round 2 of section 3.5, text and CT: CT learns, text is frozen (section 3.4, Eq. 5-6). The main example.

    python -m medm2g_jax.main --config=configs/text_ct.py:tiny

Needs round text_xray, the CT flow and what they stand on, trained first; data: studies with a report and a CT in the
folder MEDM2G_DATA names, else the phantom.
tiny: 66 to 90 s on two CPU cores, with all it stands on 7 to 13 minutes; phantom, `medm2g evaluate`: lesion side right
in 1.00 of the CTs made from reports (by the guide alone 0.99), finding F1 of reports from CTs, best of 4, 0.85.
sd15: result not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("text_ct", words)
