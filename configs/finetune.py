"""Fine-tune what a round has learnt, for one task, on the data at hand; ends no worse than it began.

    python -m medm2g_jax.main --config=configs/finetune.py:mri_to_ct,lora,tiny --workdir=MINE \\
        --config.upstream_dirs="('runs/phantom-tiny',)" --config.data.source=manifest:DIR

Tasks: report (from X-rays), ct_report, xray and ct (from reports), mri_to_ct, ct_to_mri, mri (one contrast from the
others). How: full (the target's UNet and its guide), guide (theta_c and the channels for sources on its grid alone),
lora (low-rank additions to the UNet's kernels; --config.rank). mri_to_ct takes --config.accelerate=4, MRI as from a
faster acquisition, and --config.keep_lines=block or density.

Begins from the finished rounds in its own run root or in --config.upstream_dirs, whose data may be others, or from
converted weights (--config.upstream=init). Prints the autoencoder's ceiling on these data first, measures the held-out
loss before the first step and on the way, and keeps the best.
"""

from medm2g_jax.config import get_config as _get


def get_config(words=""):
    return _get("finetune", words)
