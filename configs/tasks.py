"""What `medm2g evaluate` measures: a row a task.

    medm2g evaluate --model runs/phantom-tiny --config=configs/tasks.py:translation
    medm2g evaluate --model RUN --config=configs/tasks.py:table6 --data manifest:PELVIS --out results

findings: lesion findings of generated images and reports, by the data set's exact labels and a probe trained on real
images; on the phantom alone. synthesis: (what is given, what is made), images made from others, each where the model
was trained for it and the data hold it. regression: steps of the regression and of the pix2pix beside it (0: none).
reports: images that reports are made from, and how both are cleaned. sets: (what is given, what is made), free samples
as a set. readers: do generated images help who trains a network on real ones (`evaluate.downstream`): what is given and
made, for a classifier and a segmenter, and how large the comparison is. joint: (what is given, what is made together of
it): do they show one patient? space: streams; does one find its partner in the shared space, and how far do modalities
lie apart? protocols: public evaluators whose figures are printed beside ours. paper, published: what it, and what
others have printed, and what keeps one from comparing; printed first, and below the figures.
"""

from medm2g_jax.config import tasks_config as _get

REPORTS = dict(reports=("xray", "ct"), cleaning="r2gen")
TRANSLATION = dict(
    synthesis=(
        (("mri:t2",), "ct"),
        (("mri:t1", "mri:t2"), "mri:pd"),
    ),
    regression=800,
)
# FID wants more test records than the shared space has features
IMAGES = dict(sets=(("text", "xray"), ("text", "ct"), ("text", "mri")), rows=1000)
TABLE6 = dict(
    synthesis=(
        (("mri:t2",), "ct"),
        (("mri:t1",), "ct"),
        (("mri",), "ct"),
        (("ct",), "mri:t2"),
        (("ct",), "mri"),
    ),
    protocols=("selfrdb", "syndiff"),
    regression=800,
)
SELFRDB = dict(protocols=("selfrdb",), regression=800)


def _one_from_one(pairs):
    return tuple(((source,), target) for source, target in (pair.split() for pair in pairs.split(", ")))


DOWNSTREAM = dict(
    readers=dict(classified=((("text",), "xray"),), segmented=((("mri:t2",), "ct"),), base=1000, asked=500, steps=200),
    rows=500,
)

TASKS = dict(
    phantom=dict(
        findings=True,
        synthesis=(
            (("mri:t1", "mri:t2"), "mri:flair"),
            (("mri:t1", "mri:t2"), "mri:pd"),
            (("mri:t2",), "ct"),
        ),
    ),
    reports=REPORTS,
    translation=TRANSLATION,
    images=IMAGES,
    mri=dict(
        synthesis=(
            (("mri:t1", "mri:t2"), "mri:flair"),
            (("mri:t1", "mri:t2"), "mri:pd"),
            (("mri:t1", "mri:flair"), "mri:t2"),
        ),
        regression=800,
    ),
    table1=REPORTS
    | dict(
        paper="IU X-ray: BLEU-1 0.533, BLEU-4 0.212, ROUGE-L 0.416; MIMIC-CXR: 0.412, 0.142, 0.309. Split, cleaning "
        "and what is cut off are not printed; R2Gen's own code cuts references at 60 and 100 words."
    ),
    table2=dict(
        synthesis=(
            (("mri:t2", "mri:t1ce", "mri:flair"), "mri:t1"),
            (("mri:t1", "mri:t1ce", "mri:flair"), "mri:t2"),
            (("mri:t2", "mri:pd"), "mri:t1"),
            (("mri:t1", "mri:pd"), "mri:t2"),
        ),
        protocols=("selfrdb", "syndiff"),
        regression=800,
        paper="BraTS: T1 29.89 dB, 95.36 %; T2 30.51, 96.60. IXI: T1 32.45, 97.64; T2 34.81, 98.23. Data range and "
        "mask are not printed: they alone move PSNR by 6 dB.",
    ),
    table3=dict(
        paper="PSNR and SSIM of images made from texts: a free sample has no true pixels to be compared with, and the "
        "columns are set wrongly (ten values, nine heads). Measured instead: table4 and table5."
    ),
    table4=IMAGES
    | dict(paper="FID: ChestX-ray14 1.84, ACDC 15.89, SLIVER07 6.89; extractor, resize and count are not printed."),
    table5=IMAGES
    | dict(
        paper="MIMIC-CXR: FID 1.7, MS-SSIM 0.38 (called better where it is higher; among draws it is less that is more "
        "diverse); chest X-ray: FID 9.76. The extractor is not printed."
    ),
    table6=TABLE6
    | dict(
        paper="pelvis: T2 -> CT 27.45 dB, 89.23 %; T1 -> CT 26.08, 88.34; accelerated 28.13, 89.99 and 26.94, 87.23 "
        "(configs/finetune.py:mri_to_ct with config.accelerate). Data range, mask and split are not printed."
    ),
    table7=dict(
        findings=True,
        synthesis=((("mri:t1", "mri:t2"), "mri:pd"), (("mri:t2",), "ct")),
        paper="each of its rows is a training of its own, as --config.stages.align_text_xray.loss.invariant=0 and so "
        "of the other pairs has no VI; BraTS has no PD, so that its column is IXI's at best.",
    ),
    downstream=DOWNSTREAM,
    table8=DOWNSTREAM
    | dict(
        paper="CheXpert AUC 89.5 at 1 % of the labels, 90.4 at 100 %, with its generated data 91.9 and 92.7; SIIM Dice "
        "57.8, 65.5 and 60.1, 68.2; RSNA mAP 15.9, 27.4 and 18.2, 30.3. How many were generated, of whose reports, "
        "mixed in or before, and steps are not printed, nor what as many real ones would give. Detection by boxes is "
        "not measured here.",
    ),
    chexpert=dict(
        readers=dict(
            classified=((("text",), "xray"),),
            findings=("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
            base=0,
            asked=5000,
            steps=2000,
        ),
        rows=1000,
    ),
    # The paper's pictures, as what can be measured of them.
    figure4=REPORTS
    | dict(
        sets=(("text", "xray"), ("text", "ct")),
        joint=((("text",), ("ct", "mri", "xray")),),
        paper="chosen cases of reports, of images from reports, and of three modalities made together.",
    ),
    figure5=dict(
        synthesis=((("mri:t2", "mri:pd"), "mri:t1"), (("mri",), "ct")),
        sets=(("ct", "xray"),),
        regression=800,
        paper="chosen cases of IXI, the pelvis, and CT -> X-ray, which no round of section 3.5 trains.",
    ),
    figure6=TABLE6 | dict(paper="chosen cases of MRI -> CT beside other models, whose weights are not here."),
    figure7=dict(
        space=("text", "xray", "ct", "mri"),
        paper="t-SNE with and without VI: two models; --config.stages.align_text_xray.loss.invariant=0 and so of the "
        "other pairs trains the one without.",
    ),
    # What others measure by, and their own figures.
    selfrdb_ixi=SELFRDB
    | dict(
        synthesis=_one_from_one("mri:t2 mri:t1, mri:t1 mri:t2, mri:pd mri:t1, mri:t1 mri:pd"),
        published="SelfRDB on IXI, its README: T2 -> T1 31.63 dB, 95.64 %; T1 -> T2 31.28, 95.03; PD -> T1 31.23, "
        "95.64; T1 -> PD 32.17, 95.15. Its split is not that of `medm2g prepare ixi`.",
    ),
    selfrdb_brats=SELFRDB
    | dict(
        synthesis=_one_from_one("mri:t2 mri:t1, mri:t1 mri:t2, mri:flair mri:t2, mri:t2 mri:flair"),
        published="SelfRDB on BraTS 2021, its README: T2 -> T1 28.85 dB, 93.70 %; T1 -> T2 27.58, 92.99; FLAIR -> T2 "
        "26.85, 91.66; T2 -> FLAIR 27.98, 90.01. It scales each slice by itself and scores inside a mask of "
        "T1 above 0.1; here the subject is scaled, and the whole slice counts.",
    ),
    selfrdb_pelvis=SELFRDB
    | dict(
        synthesis=_one_from_one("mri:t2 ct, mri:t1 ct"),
        published="SelfRDB on the pelvis (Gold Atlas), its README: T2 -> CT 29.18 dB, 93.28 %; T1 -> CT 27.55, 92.29. "
        "Its split is not that of `medm2g prepare gold_atlas`.",
    ),
    synthrad2025=dict(
        synthesis=((("mri",), "ct"),),
        protocols=("synthrad2025",),
        regression=800,
        rows=100_000,  # all slices: a volume is of all that its subject has
        published="SynthRAD2025 task 1, the best of 12 (arXiv 2605.13555): MAE 64.8 HU, PSNR about 30 dB, MS-SSIM "
        "about 0.936, of whole volumes inside the challenge's mask; here of a subject's slices at the model's size.",
    ),
    chexgenbench=dict(
        sets=(("text", "xray"),),
        protocols=("chexgenbench",),
        rows=5000,
        published="CheXGenBench (arXiv 2505.10496), its README: FID by RAD-DINO of MIMIC-CXR's test set, prompts of "
        "LLaVA-Rad: Sana 54.23, the best; RadEdit 69.70; LLM-CXR 71.24; SD-1.5 118.93. It has alignment by BioViL-T; "
        "here the cosine by the model's own encoders. Its privacy: `medm2g audit`; its utility: the task chexpert.",
    ),
    rexrank=dict(
        reports=("xray",),
        protocols=("rexrank",),
        rows=5000,
        published="ReXrank on IU X-ray, results/result_iu_xray.csv @0a1fd6b: BLEU-2 0.244 CheXpertPlus (CheXpert and "
        "MIMIC), 0.242 VLCI, 0.195 MedVersa, which its RadCliQ puts first, 0.079 GPT-4V. Of findings and impression: "
        "prepare with --clean mimic-sections. SembScore, RadGraph, RadCliQ and GREEN need weights that are not here.",
    ),
    table9=dict(
        synthesis=((("mri:t1", "mri:t2"), "mri:pd"), (("mri:t2",), "ct")),
        sets=(("text", "xray"),),
        paper="MIMIC-CXR: FID 2.7 (1.7 in table 5), T1 + T2 -> PD 34.12 dB on BraTS, which has no PD; pelvis 27.45 dB.",
    ),
)


def get_config(words=""):
    return _get(words, TASKS)
