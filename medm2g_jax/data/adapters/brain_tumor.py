"""Brain tumor MRI and CT scan (Kaggle, chenghanpu), from which the paper took its CT-MRI pairs. To be held in doubt.

    train_input.npy, train_output.npy, val_..., test_...    (n 256 256) float64; spelt traininput.npy and so on as well

MRI in, CT out, slice by slice: so the title says, the files do not. The description counts 4,500 pairs, on disk are
810; whether the split is by patient nobody says; users find outputs that look empty. So each pair is looked at before
any is taken: blank slices and pairs that have nothing in common (mutual information) are left out, and where most are
such the set is refused, with the counts. A pair lies on one grid, as the set says (both brought to a template). Its
values are in no unit, and count from the lowest to the 99.5th percentile over all files of a side. Better pairs:
`synthrad`, `gold_atlas`.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from medm2g_jax.data import checks
from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.data.formats.content import DAMAGED
from medm2g_jax.data.picture import Span
from medm2g_jax.errors import UserError

_SIDES = {"mri": "input", "ct": "output"}  # MRI's grid counts
_SHOWN = 2**16  # values of a slice, every so many-th slice, of which percentiles are taken


def _find(root: Root) -> Iterator[Case | Left]:
    named = {name.rpartition("/")[2].lower().replace("_", "").replace("-", ""): name for name in root.files("**/*.*")}
    files = {
        split: {stream: named[f"{split}{side}.npy"] for stream, side in _SIDES.items() if f"{split}{side}.npy" in named}
        for split in ("train", "val", "test")
    }
    files = {split: both for split, both in files.items() if both}
    if not files or any(len(both) < 2 for both in files.values()):
        raise UserError(f"{root.path}: expected pairs of files, train_input.npy and train_output.npy, in it")
    arrays = {split: {s: _array(root, name) for s, name in both.items()} for split, both in files.items()}
    spans = {stream: _span([both[stream] for both in arrays.values()]) for stream in _SIDES}
    pairs = {
        (split, n): _wrong(both["mri"][n], both["ct"][n])
        for split, both in arrays.items()
        for n in range(min(len(array) for array in both.values()))
    }
    counts = Counter(filter(None, pairs.values()))
    if counts.total() * 2 > len(pairs):
        why = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        raise UserError(
            f"{root.path}: {counts.total()} of {len(pairs)} pairs are of no use ({why}); expected most to be pairs of "
            "MRI and CT. Other sets of pairs: synthrad, gold_atlas"
        )
    for split, both in arrays.items():
        if len(both["mri"]) != len(both["ct"]):
            yield Left(split, "more images on one side than on the other; the last are left out")
    for (split, n), wrong in pairs.items():
        name = f"{split}-{n:04d}"
        if wrong:
            yield Left(name, wrong)
        else:
            images = {s: Image(files[split][s], str(n), spans[s]) for s in _SIDES}
            yield Case(name, name, images, split, registered=True)


def _array(root: Root, name: str) -> np.ndarray:
    path = root.file(name)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise UserError(f"{path}: not a whole NumPy file ({type(error).__name__} in reading it)") from error
    if array.ndim != 3 or array.dtype.kind not in "iuf":
        raise UserError(f"{path}: {array.dtype} of shape {array.shape}; expected slices (n h w)")
    return array


def _span(arrays: list[np.ndarray]) -> Span:
    chosen = (one.reshape(-1) for array in arrays for one in array[:: len(array) // 64 + 1])
    some = np.concatenate([one[:: max(1, one.size // _SHOWN)] for one in chosen])
    some = some[np.isfinite(some)]
    low, high = (float(some.min()), float(np.percentile(some, 99.5))) if len(some) else (0.0, 1.0)
    return low, high if high > low else low + 1


def _wrong(mri: np.ndarray, ct: np.ndarray) -> str:
    """What is wrong with a pair, in words that can be counted; "" where nothing is."""
    if mri.shape != ct.shape:
        return "a pair of different shapes"
    if not (np.isfinite(mri).all() and np.isfinite(ct).all()):
        return "a pair with values that are no numbers"
    for word, values in (("MRI", mri), ("CT", ct)):
        if checks.blank(values):
            return f"a pair whose {word} is blank"
    return checks.pair(mri[None], ct[None])


ADAPTERS = (
    Adapter(
        name="brain_tumor",
        title="Brain tumor MRI and CT scan (Kaggle, chenghanpu)",
        licence="not stated",
        access="Kaggle; made from TCIA's CPTAC-GBM and TCGA-GBM, whose terms hold. Doubtful: see the counts, look at "
        "preview.png. Its split is not known to be by patient.",
        find=_find,
        streams=("mri", "ct"),
    ),
)
