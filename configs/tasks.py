"""What `medm2g evaluate` measures: a row a task.

    medm2g evaluate --model runs/phantom-tiny --config=configs/tasks.py:translation

findings: lesion findings of generated images and reports, by the data set's exact labels and a probe trained on real
images; on the phantom alone. synthesis: (what is given, what is made), images made from others, each where the model
was trained for it and the data hold it. regression: steps of the regression UNet beside it (0: none). reports: images
that reports are made from, and how both are cleaned. sets: (what is given, what is made), free samples as a set.
"""

from medm2g_jax.config import tasks_config as _get

TASKS = dict(
    phantom=dict(
        findings=True,
        synthesis=(
            (("mri:t1", "mri:t2"), "mri:flair"),
            (("mri:t1", "mri:t2"), "mri:pd"),
            (("mri:t2",), "ct"),
        ),
    ),
    # MRI -> CT (the paper's table 6), on the phantom, or with --data on one's own pairs
    translation=dict(
        synthesis=(
            (("mri:t2",), "ct"),
            (("mri:t1",), "ct"),
            (("mri",), "ct"),
            (("ct",), "mri:t2"),
            (("ct",), "mri"),
        ),
        regression=800,
    ),
    # one contrast of MRI from others (tables 2 and 7: T1 + T2 -> FLAIR and PD)
    mri=dict(
        synthesis=(
            (("mri:t1", "mri:t2"), "mri:flair"),
            (("mri:t1", "mri:t2"), "mri:pd"),
            (("mri:t1", "mri:flair"), "mri:t2"),
            (("mri:t1", "mri:t2", "mri:flair"), "mri:t1ce"),
        ),
        regression=800,
    ),
    # reports (table 1: IU X-ray, MIMIC-CXR; cleaned as R2Gen does)
    reports=dict(reports=("xray", "ct"), cleaning="r2gen"),
    # images from reports as a set (tables 4 and 5); FID needs more test records than the shared space has features
    images=dict(sets=(("text", "xray"), ("text", "ct")), rows=1000),
)


def get_config(words=""):
    return _get(words, TASKS)
