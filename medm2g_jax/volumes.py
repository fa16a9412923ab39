"""A model over a volume: read slice by slice, made slice by slice, put back on the volume's own grid.

    medm2g translate -i mr.nii.gz -o ct.nii.gz --model RUN --from mri:t2 --draws 8 --uncertainty std.nii.gz
    medm2g generate --model RUN --given mri:t2=mr.nii.gz --make ct,mri:flair --out OUT

All slices of a volume are one sample to the noise, which is a function of (seed, draw, stream) alone: what differs from
one slice to the next is what was given, so that neighbours do not flicker. Slices whose pixels are not square are
brought to square ones for the networks, and what is made of them back.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from medm2g_jax.data import formats
from medm2g_jax.data.marks import notes
from medm2g_jax.data.picture import Picture
from medm2g_jax.data.volume import (
    MOST_VOXELS,
    Volume,
    apart,
    from_slices,
    on_one_grid,
    plane_of,
    ranged,
    resample,
    slices,
    squared,
    stack,
    stack_affine,
)
from medm2g_jax.data.write import deviation
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, Modality, split_stream, stream_word
from medm2g_jax.train.log import duration

Say = Callable[[str], Any]
EVERY = 5.0  # seconds between two lines of progress, at least
UNLIKE = 1.2  # times as wide as any image of training


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A volume as a batch of slices, and the way back (`data.write.Grid`).

    Attributes:
      source: as it was read, with the range that it counts over.
      square: the same with square pixels in the plane; the source itself where its own are.
      plane: of `volume.PLANES`.
      modality: what it is of.
    """

    source: Volume
    square: Volume
    plane: str
    modality: Modality

    def __len__(self) -> int:
        return len(stack(self.source, self.plane))

    def pictures(self) -> list[Picture]:
        """Its slices, as radiologists see them."""
        return slices(self.square, self.plane)

    def holds(self, stream: str) -> bool:
        """Do images of a stream lie on its slices? A projection does not."""
        return _modality(stream).shares_grid(self.modality)

    def volume(self, stream: str, values: Float[np.ndarray, "n h w"]) -> Volume:
        """What was made of its slices, in the modality's unit, on the source's voxels."""
        made = from_slices(values, self.square, _modality(stream), self.plane)
        if self.square is self.source:
            return made
        return dataclasses.replace(resample(made, self.source.spacing), affine=self.source.affine)

    def seen(self, size: int) -> str:
        """What networks of `size` pixels a side lose of it, in words; "" where they lose nothing."""
        (_, height, width), mm = stack(self.square, self.plane).shape, _pixel(self.square, self.plane)
        side = max(height, width)
        if side <= size:
            return ""
        said = f"{height} x {width} pixels, {height * mm:.0f} x {width * mm:.0f} mm"
        coarse = f"{size} x {size}: {mm * side / size:.3g} mm a pixel for {mm:.3g}"
        return f"slices of {said}, are read and made as {coarse}; nothing finer is in what is made"

    def unlike(self, extents: Mapping[str, Sequence[int | float]]) -> str:
        """How its slices' field of view differs from that of images a model was trained on, in words; "" where it does
        not, or nobody knows.

        Args:
          extents: of the model, see `data.source.extents`.
        """
        known = [span for stream, span in extents.items() if _modality(stream) is self.modality]
        if not known:
            return ""
        low, high = min(span[0] for span in known), max(span[1] for span in known)
        (_, height, width), mm = stack(self.square, self.plane).shape, _pixel(self.square, self.plane)
        side = max(height, width) * mm
        if low / UNLIKE <= side <= high * UNLIKE:
            return ""
        size, do = ("larger", "pad") if side < low else ("smaller", "crop")
        span = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
        return (
            f"slices of {height * mm:.0f} x {width * mm:.0f} mm; the images of training are {span} mm wide: what these "
            f"show is {size} to the networks than what they know; {do} the volume"
        )


def _modality(stream: str) -> Modality:
    return MODALITIES[split_stream(stream)[0]]


def _pixel(volume: Volume, plane: str) -> float:
    """mm from one row to the next."""
    return float(np.linalg.norm(stack_affine(volume, plane)[:3, 1]))


def cut(volume: Volume, stream: str, plane: str = "axial") -> Cut:
    """A volume of a stream as slices. A volume of one slice has but one plane, whatever is asked for.

    Raises:
      UserError: the file says it is of another modality, or there is no such plane.
    """
    plane = plane_of(volume) if min(volume.values.shape) == 1 else plane
    volume = ranged(volume, _modality(stream))
    return Cut(volume, squared(volume, plane), plane, _modality(stream))


def opened(given: Mapping[str, Any], plane: str = "axial", single: bool = False) -> tuple[dict[str, list], Cut | None]:
    """What is given, volumes as their slices; and the grid that these have, None where no volume is among it.

    Args:
      given: stream -> value or values, as `Model.generate` takes them, or one `Volume` or the path of one.
      single: a file of one slice is a volume too; else it is a picture, as which it is left for `Model.generate`.

    Raises:
      UserError: a file that cannot be read, volumes on different grids, or pictures beside a volume.
    """
    values = {s: list(v) if isinstance(v, (list, tuple)) else [v] for s, v in given.items()}
    volumes = {s: v for s, items in values.items() if isinstance(v := _loaded(s, items), Volume)}
    if not volumes or not single and all(_is_picture(v) for v in volumes.values()):
        return values, None
    cuts = {s: cut(v, s, plane) for s, v in volumes.items()}
    first = next(iter(cuts.values()))
    for one in cuts.values():
        _check_same_grid(first.source, one.source)
    if other := [s for s in values if _modality(s).is_image and s not in cuts]:
        raise UserError(
            f"{other[0]}: pictures, and {next(iter(cuts))} is a volume; expected volumes on one grid, and texts"
        )
    return values | {s: one.pictures() for s, one in cuts.items()}, first


def _is_picture(volume: Volume) -> bool:
    return bool(volume.path) and min(volume.values.shape) == 1


def _loaded(stream: str, items: Sequence[Any]) -> Any:
    """The one value of an image stream, read where it is a path; None of several values, which are pictures."""
    if not _modality(stream).is_image or len(items) != 1:
        return None
    return formats.load(items[0], MOST_VOXELS) if isinstance(items[0], (str, Path)) else items[0]


def _check_same_grid(a: Volume, b: Volume) -> None:
    if on_one_grid(a, b):
        return
    shapes = (" x ".join(map(str, stack(one, "axial").shape)) for one in (a, b))
    far = apart(a, b)
    what = f"up to {far:.3g} mm apart" if far < np.inf else f"{' and '.join(shapes)} voxels"
    names = " and ".join(one.path or "a volume" for one in (a, b))
    raise UserError(f"{names}: {what}; expected volumes on one grid: resample one of them")


def generate(
    model: Model, given: Mapping[str, list], cut: Cut, make: Sequence[str], say: Say = print, **options: Any
) -> Generated:
    """Make streams of a volume's slices, one sample each (`Model.generate`, whose options these are, but for `count`
    and `numbers`).

    Args:
      given, cut: of `opened`.
      say: is told how far it is.

    Raises:
      UserError: see `Model.generate`.
    """
    passes = [made for _, made in _passes(model, given, range(len(cut)), make, say, **options)]
    joined = {
        s: np.concatenate([m.samples[s] for m in passes])
        if _modality(s).is_image
        else [text for m in passes for text in m.samples[s]]
        for s in passes[0].samples
    }
    parts = {name: [getattr(m, name) for m in passes] for name in ("agreement", "kept")}
    return dataclasses.replace(
        passes[0],
        samples=joined,
        notes=(*_told(passes), *_odd(cut, model)),
        latents={s: np.concatenate([m.latents[s] for m in passes]) for s in passes[0].latents},
        **{name: None if some[0] is None else np.concatenate(some) for name, some in parts.items()},
    )


def _odd(cut: Cut, model: Model) -> Iterator[str]:
    """What is to say of a volume as a model's networks see it."""
    extents = model.meta["extents"] if "extents" in model.meta else {}  # results of before have none
    drawn = cut.source.path and model.meta["shared"]["data"]["source"] == "phantom"
    said = "this model was trained on the phantom alone, and makes that of whatever it is given" if drawn else ""
    return filter(None, (said, cut.seen(model.size), cut.unlike(extents)))


def _told(passes: Sequence[Generated]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for made in passes for note in made.notes))


def _passes(
    model: Model,
    given: Mapping[str, list],
    numbers: Sequence[int],
    make: Sequence[str],
    say: Say,
    *,
    draws: int = 1,
    best_of: int | None = None,
    rows: int | None = None,
    **options: Any,
) -> Iterator[tuple[Sequence[int], Generated]]:
    """(numbers of slices, what was made of them) until all are made; all draws of a slice are in one pass. The last
    pass is filled up, so that it needs no executable of its own."""
    rows, count = rows or model.defaults["rows"], len(numbers)
    most = max(1, rows // max(draws, best_of or 1))
    some = math.ceil(count / math.ceil(count / most))  # passes of about one size, so that little of the last is filler
    start = told = time.time()
    first = 0.0
    for at in range(0, count, some):
        chosen = [numbers[min(i, count - 1)] for i in range(at, at + some)]
        values = {s: items if len(items) == 1 else [items[i] for i in chosen] for s, items in given.items()}
        made = model.generate(
            values, make, count=some, draws=draws, best_of=best_of, rows=rows, numbers=[0] * some, **options
        )
        done, now = min(at + some, count), time.time()
        yield numbers[at:done], _cut_off(made, done - at)
        first = first or now - start
        rate = (now - start - first) / (done - some) if done > some else first / done  # the first compiles
        if done == count:
            began = f"{duration(first)} for the first {some}, with compiling, then " if done > some else ""
            ended = "" if began else ", with compiling"
            say(f"{count} slice{'s' * (count > 1)} in {duration(now - start)}: {began}{rate:.2g} s a slice{ended}")
        elif now - told > EVERY:
            left = f"  {rate:.2g} s a slice  {duration((count - done) * rate)} left" if done > some else ""
            say(f"{done}/{count} slices{left}")
            told = now


def _cut_off(made: Generated, count: int) -> Generated:
    """The first samples of those that were made, with all their draws."""
    return dataclasses.replace(
        made,
        samples={s: x[: count * made.draws] for s, x in made.samples.items()},
        latents={s: x[: count * made.draws] for s, x in made.latents.items()},
        agreement=None if made.agreement is None else made.agreement[:count],
        kept=None if made.kept is None else made.kept[:count],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Translated:
    """What was made of a volume. Synthetic, not for clinical use.

    Attributes:
      mean: stream -> the volume, of several draws their mean, in the modality's unit on the source's grid.
      std: of several draws, stream -> their standard deviation; {} of one.
      about: what `formats.write_volume` is to write into its file, of the mean and of the deviation.
      pairs, notes: see `Generated`.
    """

    mean: dict[str, Volume]
    std: dict[str, Volume]
    about: tuple[dict[str, str], dict[str, str]]
    pairs: Mapping[str, str]
    notes: tuple[str, ...]


def translate(
    model: Model,
    given: Mapping[str, Any],
    make: Sequence[str],
    *,
    plane: str = "axial",
    draws: int = 1,
    seed: int = 0,
    say: Say = print,
    **options: Any,
) -> Translated:
    """Make images of a volume; no more of the draws is kept than their mean and deviation. Of a slice that holds one
    value alone, as beyond the end of a head, nothing is made: it becomes the window's lower end.

    Args:
      given: stream -> a `Volume` or the path of one (a file, a folder of DICOM); several of one grid; and texts.
      make: image streams that lie on slices.
      plane: which slices are made.
      draws, seed, options: of `Model.generate`.
      say: is told how far it is.

    Raises:
      UserError: no volume is given, or it cannot be read, or is empty; what is wanted is no slice; see
        `Model.generate`.
    """
    values, cut = opened(given, plane, single=True)
    if cut is None:
        raise UserError(f"given {', '.join(given) or 'nothing'}: expected a volume, or the path of one")
    if odd := [s for s in make if not cut.holds(s)]:
        raise UserError(f"{odd[0]!r}: {stream_word(odd[0])} is no slice of a volume; expected images of slices")
    shape = stack(cut.square, cut.plane).shape
    full = _filled(values, len(cut))
    if not full:
        raise UserError(f"{cut.source.path or 'the volume'}: every {cut.plane} slice of it holds one value alone")
    maps = {s: np.zeros((2, *shape), np.float32) for s in make}
    for stream, (mean, _) in maps.items():
        mean[:] = _modality(stream).window[0]
    passes = []
    for some, made in _passes(model, values, full, make, say, draws=draws, seed=seed, **options):
        for stream, (mean, std) in maps.items():
            mean[some], std[some] = made.mean(stream), made.std(stream)
        passes.append(dataclasses.replace(made, samples={}, latents={}))
    record = model.provenance(seed=seed, **options)
    how = f"{record['steps']} steps of {record['sampler']}, of {' and '.join(given)}, {cut.plane}"
    which = [f"{what} of {draws} draws, {how}" for what in ("mean", "std")] if draws > 1 else [how, ""]
    empty = len(cut) - len(full)
    left = f"{empty} slice{'s' * (empty > 1)} of one value alone were left empty" if empty else ""
    return Translated(
        {s: cut.volume(s, mean) for s, (mean, _) in maps.items()},
        {s: deviation(cut.volume(s, std)) for s, (_, std) in maps.items()} if draws > 1 else {},
        (notes(record, which[0]), notes(record, which[1])),
        passes[0].pairs,
        (*_told(passes), *_odd(cut, model), *filter(None, (left,))),
    )


def shows(picture: Picture) -> bool:
    """Is there something to see in it, more than one value?"""
    pixels = np.asarray(picture.pixels, np.float32)
    return float(np.ptp(pixels)) > 1e-6 * float(np.abs(pixels).max())  # resampling rounds


def _filled(values: Mapping[str, list], count: int) -> list[int]:
    """Numbers of the slices in which there is something to see."""
    own = [items for items in values.values() if isinstance(items[0], Picture)]
    return [i for i in range(count) if any(shows(items[i]) for items in own)]
