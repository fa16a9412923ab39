"""How numbers are measured: each figure names one of these. Numbers of different protocols are never compared."""

from dataclasses import dataclass

_BOOTSTRAP = "95 %, percentile bootstrap over the rows, 1000 draws"
_WILSON = "95 %, Wilson"


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
        data_range="the modality's window: 2 of images in [-1, 1], which is 1 of images in [0, 1]",
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
    "pixels among draws": Protocol(
        judge="the share of pixels whose truth lies between the least and the greatest of their draws",
        resize="as range1",
        interval=_BOOTSTRAP,
    ),
    "word for word": Protocol(judge="equality of the decoded texts", interval=_WILSON),
    "findings": Protocol(judge="what the source's own labeller reads, micro-averaged", interval=_BOOTSTRAP),
    "gallery, own partner": Protocol(judge="cosine; the n rows; a hit is one's own partner", interval=_BOOTSTRAP),
    "gallery, same words": Protocol(judge="cosine; the n rows; a hit has the same words", interval=_BOOTSTRAP),
    "gallery, same findings": Protocol(
        judge="cosine; the n rows; a hit states the same findings by the source's labeller", interval=_BOOTSTRAP
    ),
    "nearest partner": Protocol(
        judge="cosine; what the source's labeller reads in the report of a row and in that of its nearest of the n",
        interval=_WILSON,
    ),
    "tau 0.07": Protocol(judge="InfoNCE, symmetric, tau 0.07; the negatives are the other rows"),
    "probe": Protocol(
        judge="a CNN trained on real images of this modality, against exact labels",
        resize="at the model's size",
        interval=f"{_WILSON}; of kappa {_BOOTSTRAP}",
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
