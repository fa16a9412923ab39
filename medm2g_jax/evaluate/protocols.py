"""How numbers are measured: each figure names one of these. Numbers of different protocols are never compared."""

from dataclasses import dataclass

from medm2g_jax.data.clean import CLEANINGS

_BOOTSTRAP = "95 %, percentile bootstrap over the subjects, where they are known, else the rows, 1000 draws"
_WILSON = "95 %, Wilson; of several rows a subject, the bootstrap"


@dataclass(frozen=True)
class Protocol:
    """How a number was measured, in words; a field that means nothing here is empty.

    Attributes:
      data_range: what the greatest difference of two pixels is taken to be.
      window: over which pixels, and how they are averaged.
      resize: of the images, before they are compared.
      judge: the extractor, labeller or gallery.
      interval: how it was drawn.
    """

    judge: str = ""
    data_range: str = ""
    window: str = ""
    resize: str = ""
    interval: str = ""


PROTOCOLS: dict[str, Protocol] = {
    "range1": Protocol(
        data_range="the modality's window: 2 of images in [-1, 1], which to PSNR, though not to SSIM, is 1 of "
        "images in [0, 1]",
        window="the whole image; PSNR of the mean squared error over all rows, else the mean over rows; local "
        "statistics in uniform 7 x 7 windows",
        resize="at the model's size, as its networks read them",
        interval=_BOOTSTRAP,
    ),
    "range1, each image": Protocol(
        data_range="as range1",
        window="the whole image; PSNR of each image, averaged over the rows",
        resize="as range1",
        interval=_BOOTSTRAP,
    ),
    "range1, [0, 1]": Protocol(
        data_range="1 of images brought from [-1, 1] to [0, 1], where the SSIM of the literature is measured",
        window="the whole image, mean over the rows; SSIM in uniform 7 x 7 windows, MS-SSIM in Gaussian ones of "
        "11 x 11, sigma 1.5, of as many scales as its name says",
        resize="as range1",
        interval=_BOOTSTRAP,
    ),
    "masked": Protocol(
        data_range="as range1, [0, 1]",
        window="the pixels in a mask, of the body or the brain; PSNR of the mean over rows of their mean squared "
        "error, else the mean over rows; SSIM in uniform 7 x 7 windows, which see what is around the mask",
        resize="as range1",
        interval=_BOOTSTRAP,
    ),
    "lesion": Protocol(
        data_range="as range1, [0, 1]",
        window="the pixels of a lesion's mask; rows that have a lesion",
        resize="as range1",
        interval=_BOOTSTRAP,
    ),
    "regions": Protocol(
        judge="regions as they are given; HD95 of boundaries by the sides of pixels, the greater of both ways",
        window="each row's region, averaged over the rows; Dice of two empty regions is 1",
        interval=_BOOTSTRAP,
    ),
    "syndiff": Protocol(
        data_range="the greatest value of the made image; each image in [0, 1] over its own maximum",
        window="the middle 256 x 152 where the image is larger; PSNR of each slice, averaged over slices",
        judge="as SynDiff's test.py, github.com/icon-lab/SynDiff @8e5064e",
        interval=_BOOTSTRAP,
    ),
    "selfrdb": Protocol(
        data_range="the greatest value of the real image; each image in [0, 1], times its mask, over its own mean",
        window="the middle of the mask's size; of each slice, SSIM in percent in uniform 7 x 7 windows; averaged over "
        "slices, or over subjects the mean of each",
        judge="as compute_metrics of SelfRDB's utils.py, github.com/icon-lab/SelfRDB @6262ede",
        interval="95 %, percentile bootstrap over the slices or, where they are given, the subjects, 1000 draws",
    ),
    "synthrad2025": Protocol(
        data_range="4095 HU, from -1024 to 3071; MAE is not cut off",
        window="volumes inside a mask; MS-SSIM of five scales in uniform 7 x 7 x 7 windows, averaged within the mask",
        judge="as image_metrics.py of github.com/SynthRAD2025/evaluation @17cac47",
        interval="95 %, percentile bootstrap over the volumes, 1000 draws",
    ),
    "synthrad2025, slices": Protocol(
        data_range="as synthrad2025, after the modality's window has cut both off",
        window="as synthrad2025, of the slices of a subject that were prepared, one upon the other; the mask is the "
        "largest region of each real slice above -500 HU, its holes filled, and not the challenge's",
        judge="as synthrad2025",
        resize="at the model's size, and not on the challenge's grid",
        interval="95 %, percentile bootstrap over the subjects, 1000 draws",
    ),
    "pixels among draws": Protocol(
        judge="the share of pixels whose truth lies between the least and the greatest of their draws",
        resize="as range1",
        interval=_BOOTSTRAP,
    ),
    "word for word": Protocol(judge="equality of the decoded texts", interval=_WILSON),
    **{
        f"words, {how}": Protocol(
            judge=f"both texts cleaned by `--clean {how}`, split at blanks, not cut off, no word made unknown; one "
            "real report each; BLEU of all reports together, ROUGE-L (beta 1.2) and CIDEr-D averaged over them",
            interval=_BOOTSTRAP,
        )
        for how in CLEANINGS
    },
    "rexrank": Protocol(
        judge="as run_eval.py of github.com/rajpurkarlab/CXR-Report-Metric @15a1778, which ReXrank uses: lower case, "
        "full stops are words; BLEU-2 of each report by fast-bleu's rule, averaged",
        interval=_BOOTSTRAP,
    ),
    "findings": Protocol(judge="what the source's own labeller reads, micro-averaged", interval=_BOOTSTRAP),
    "gallery, own partner": Protocol(judge="cosine; the n rows; a hit is one's own partner", interval=_BOOTSTRAP),
    "gallery, same words": Protocol(judge="cosine; the n rows; a hit has the same words", interval=_BOOTSTRAP),
    "gallery, same findings": Protocol(
        judge="cosine; the n rows; a hit states the same findings by the source's labeller", interval=_BOOTSTRAP
    ),
    "gallery, own partner, ties shared": Protocol(
        judge="cosine; the n rows; a hit is one's own partner; rows of equal cosine in the mean over their orders",
        interval=_BOOTSTRAP,
    ),
    "gallery, same words, ties shared": Protocol(
        judge="cosine; the n rows; a hit has the same words; rows of equal cosine in the mean over their orders",
        interval=_BOOTSTRAP,
    ),
    "modalities": Protocol(
        judge="embeddings of unit length; a linear reader (ridge 1) of one half of the subjects, of the modality of "
        "the other half; the ten nearest by cosine; silhouette by Euclidean distance; distance of the modalities' "
        "means",
        interval=f"of what is read {_WILSON}, else {_BOOTSTRAP}; none of the gap",
    ),
    "features": Protocol(
        judge="an extractor, named after @; FID of sample covariances; KID unbiased, kernel (x y / d + 1)^3, all rows "
        "at once; precision, recall, density and coverage by Euclidean balls to the fifth neighbour",
        interval=f"of precision, recall and coverage {_WILSON}, of density {_BOOTSTRAP}: of the rows beside the other "
        "set as it is",
    ),
    "chexgenbench": Protocol(
        judge="as features, by RAD-DINO or Inception, as metrics/fid.py of github.com/Raman1121/CheXGenBench @2f571ea",
        resize="at the model's size, then to 299 x 299 by PIL's bilinear rule in 256 levels, then as the extractor was "
        "trained",
        interval="as features",
    ),
    "niqe": Protocol(
        judge="blocks of 96 x 96 beside those of the images named after @: the training images, or the authors' "
        "photographs; as BasicSR 1.4.2 has it",
        resize="at the model's size, in 256 levels",
        interval=_BOOTSTRAP,
    ),
    "maps": Protocol(
        judge="the maps of an extractor, named after @; LPIPS without learnt weights: channels as unit vectors, "
        "squared distance, averaged over pixels, summed over maps",
        resize="as range1, then as the extractor was trained",
        interval=_BOOTSTRAP,
    ),
    "nearest partner": Protocol(
        judge="cosine; what the source's labeller reads in the report of a row and in that of its nearest of the n",
        interval=_WILSON,
    ),
    "aligned space": Protocol(
        judge="cosine, by the model's own prompt encoders, of what was made with what is given; the mean over its "
        "streams",
        resize="at the model's size",
        interval=_BOOTSTRAP,
    ),
    "tau 0.07": Protocol(judge="InfoNCE, symmetric, tau 0.07; the negatives are the other rows"),
    "probe": Protocol(
        judge="a CNN trained on real images of this modality, against exact labels",
        resize="at the model's size",
        interval=f"{_WILSON}; of kappa {_BOOTSTRAP}",
    ),
    "reader": Protocol(
        judge="a UNet trained on what the row says, at equal steps, the mean of several seeds; AUROC of each finding, "
        "averaged over findings; Dice of masks at 0.5, averaged over images, 1 where both are empty; the likeliest "
        "pixel of an image with a lesion lies in the mask",
        resize="at the model's size",
        interval="95 %, percentile bootstrap over the test's subjects and the seeds, 1000 draws",
    ),
    "neighbours, pixels": Protocol(
        judge="root mean square difference; a row a subject, pools equally large; a copy: its distance "
        "to one training subject, over the mean of the next 10, is below 0.8 of the least among held-out subjects",
        data_range="as range1",
        resize="at the model's size, 64 px at most",
        interval=f"{_BOOTSTRAP}, one a subject; of shares {_WILSON}",
    ),
    "neighbours, aligned space": Protocol(
        judge="as neighbours, pixels, of unit vectors by the model's own prompt encoder",
        resize="at the model's size",
        interval=f"{_BOOTSTRAP}, one a subject; of shares {_WILSON}",
    ),
    "fixed noise": Protocol(judge="mean square error of what the flow predicts, at ten fixed times with fixed noise"),
}
