"""Round 1 of section 3.5, text and X-ray: both learn to guide the other (section 3.4, Eq. 5-6).

    python -m medm2g_jax.main --config=configs/text_xray.py:tiny

Needs both flows and what they stand on, trained first; data: studies with a report and an X-ray in the folder
MEDM2G_DATA names, else the phantom.
tiny: 84 to 105 s on two CPU cores; phantom, `medm2g evaluate`: lesion side right in 1.00 of the X-rays from reports
(by the guide alone 0.98), finding F1 of reports from X-rays 0.86 (best constant report 0.33).
sd15: result not reproduced yet.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("text_xray", words)
