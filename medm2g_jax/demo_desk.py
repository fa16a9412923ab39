"""The desk behind the page of `medm2g demo`: one model, requests that take turns, and what came of each.

A request is an `Order`; `Desk.make` is a generator of how far it is, and last of its `Result`. Whoever closes the
generator cancels the request, as `Desk.cancel` does: while it waits at once, while it samples after the steps that run.
Passes hold one sample, so that one executable serves any number of draws, and of steps. The model is loaded, and the
first order's program compiled, by a thread of the desk's own, while the page comes up. This file knows no page.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medm2g_jax import volumes
from medm2g_jax.data import formats
from medm2g_jax.data.marks import LISTING
from medm2g_jax.data.phantom.report import swap_side
from medm2g_jax.data.picture import Picture
from medm2g_jax.data.volume import Volume, check_modality, ranged, single, stack
from medm2g_jax.data.write import write_samples
from medm2g_jax.demo_near import Found, find
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated
from medm2g_jax.inference import LARGE, Model
from medm2g_jax.limits import check_sampling
from medm2g_jax.loading import described, makes
from medm2g_jax.modality import MODALITIES, Modality, split_stream, stream_word
from medm2g_jax.train.log import duration
from medm2g_jax.vectors import Vectors

MOST_VOXELS = 2**27  # of a file that is dropped; 512 slices of 512 x 512
MOST_TEXT = 2000  # characters
MOST_DRAWS, MOST_STEPS = 16, 250
MOST_WAITING = 8
KEPT = 32  # results whose files are kept
EVERY = 0.3  # seconds between two looks at how far a request is
EXAMPLE = "large mass in the left upper lung ."


@dataclasses.dataclass(frozen=True)
class Able:
    """What a model can do, as its model.json and config.json say before it is loaded.

    Attributes:
      name: the stage's, and the folder's that it was asked for by.
      make, give: names of modalities.
      defaults: of sampling.
      ranges: what 16-bit files count over.
      size: pixels a side of what it makes.
      licences: of the data it was trained on.
    """

    name: str
    make: tuple[str, ...]
    give: tuple[str, ...]
    defaults: Mapping[str, Any]
    ranges: Mapping[str, Any]
    size: int
    licences: tuple[str, ...] = ()

    def texts(self) -> tuple[str, ...]:
        """Of what may be given, what is typed."""
        return tuple(m for m in self.give if not MODALITIES[m].is_image)

    def images(self) -> tuple[str, ...]:
        """Of what may be given, what is dropped."""
        return tuple(m for m in self.give if MODALITIES[m].is_image)

    def first(self) -> "Order":
        """What is asked for when the page opens: of an example's sentence an image of each modality, or else all of
        nothing."""
        images = [MODALITIES[m] for m in self.make if MODALITIES[m].is_image]
        streams = tuple(m.streams[min(2, len(m.streams) - 1)] for m in images) or self.make
        given = {m: EXAMPLE for m in self.texts()[:1] if images}
        numbers = {name: self.defaults[name] for name in ("steps", "guidance", "eta", "sampler")}
        return Order(given, streams, **numbers)


def able(path: str) -> Able:
    """What the model at a path can do, in no time.

    Raises:
      UserError: see `loading.described`.
    """
    root, meta = described(path)
    give = tuple(m for m in meta["modalities"] if f"{m}/clip" in meta["from"])
    sample = json.loads((root / "config.json").read_text())["sample"]
    size = meta["shared"]["image_size"]
    name = f"{Path(path).resolve().name}, {meta['stage']}"
    return Able(name, makes(meta), give, sample, meta["ranges"], size, tuple(meta["licences"]))


# --- what is asked for ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """An image that is given: what the model reads of a file, and the volume's slice that it is, if any."""

    picture: Picture
    cut: volumes.Cut | None = None


@dataclasses.dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
      given: stream -> a text, or `Given`.
      make: streams.
    """

    given: Mapping[str, str | Given]
    make: tuple[str, ...]
    steps: int
    guidance: float | int
    eta: float | int
    sampler: str
    seed: int = 0
    draws: int = 1
    guides: str = "trained"

    def numbers(self) -> dict[str, Any]:
        """What `Model.generate` takes beside what is given and wanted."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:]}


def checked(order: Order) -> Order:
    """The order, if it may be made here.

    Raises:
      UserError: it may not; says what is expected and what was found.
    """
    numbers = order.numbers()
    check_sampling("{}", **{name: numbers[name] for name in ("steps", "guidance", "eta", "seed", "draws")})
    for name, most in (("draws", MOST_DRAWS), ("steps", MOST_STEPS)):
        if numbers[name] > most:
            raise UserError(f"{name}: expected at most {most} on this page, found {numbers[name]}")
    if not order.make:
        raise UserError("nothing to make: tick at least one box under “Make”")
    for stream in order.make:
        if stream in order.given:
            raise UserError(f"{stream_word(stream)} is both given and wanted: remove it, or untick it under “Make”")
    for stream, value in order.given.items():
        if isinstance(value, str) and len(value) > MOST_TEXT:
            raise UserError(f"{stream_word(stream)}: expected at most {MOST_TEXT} characters, found {len(value)}")
    return order


def slices_of(path: str, modality: Modality) -> int:
    """How many axial slices are in a file that is dropped; 1 of a picture.

    Raises:
      UserError: see `read`.
    """
    image = _loaded(path, modality)
    return 1 if isinstance(image, Picture) or 1 in image.values.shape else len(stack(image, "axial"))


def read(path: str, stream: str, ranges: Mapping[str, Any], number: int | None = None) -> Given:
    """What a file that is dropped gives.

    Args:
      ranges: what 16-bit files of a stream count over.
      number: of a volume's axial slice; None for the middle one.

    Raises:
      UserError: of no known format, broken, too large, or of another modality than the stream's; names the file,
        without its folder.
    """
    modality, word = MODALITIES[split_stream(stream)[0]], f"{stream_word(stream)}, given"
    image = _loaded(path, modality)
    if isinstance(image, Picture):
        if image.span is not None and image.pixels.dtype == np.uint16 and stream in ranges:
            image = dataclasses.replace(image, span=tuple(ranges[stream]))
        return Given(dataclasses.replace(image, path=word))
    with _named(path):
        image = ranged(image, modality)
        if 1 not in image.values.shape:
            count = len(stack(image, "axial"))
            image = single(image, count // 2 if number is None else number, "axial")
        cut = volumes.cut(dataclasses.replace(image, path=word), stream)
        (picture,) = cut.pictures()
    return Given(picture, cut)


def _loaded(path: str, modality: Modality) -> Picture | Volume:
    with _named(path):
        image = formats.load(path, MOST_VOXELS)
        check_modality(image, modality)
    return image


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors name the file as its owner does: where it was put here is nobody's business."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{Path(path).parent}/", "")) from error


def mirrored(order: Order) -> Order:
    """The same request of the mirrored patient: left and right are exchanged in texts and images, and the noise stays.

    Raises:
      UserError: nothing that is given has a side.
    """
    if not has_side(order):
        raise UserError("expected “left” or “right” in the report, or an image: nothing that is given has a side")
    return dataclasses.replace(order, given={stream: _mirrored(value) for stream, value in order.given.items()})


def has_side(order: Order) -> bool:
    """Is there anything to exchange in what is given?"""
    return any(_mirrored(value) != value for value in order.given.values())


def _mirrored(value: str | Given) -> str | Given:
    if isinstance(value, str):
        return swap_side(value)
    picture = value.picture
    axis = next((n for n, code in enumerate(picture.orientation or "PL") if code in "LR"), None)
    if axis is None:  # a sagittal slice
        return value
    # The mirrored patient's slice lies where the slice does; its file's grid says nothing of the mirror.
    return Given(dataclasses.replace(picture, pixels=np.flip(picture.pixels, axis)), value.cut)


# --- what came of it ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
      text: in words.
      share: of the work, 0 to 1; None where nobody can say.
    """

    text: str
    share: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """One order, and what was made of it."""

    order: Order
    made: Generated


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a request gave.

    Attributes:
      rows: as it was asked for; behind it, where that was asked for, of the mirrored patient.
      files: form -> the file of all that was made.
      seconds: that it took.
    """

    rows: tuple[Made, ...]
    files: Mapping[str, str]
    seconds: float


class _Cancelled(Exception):
    pass


class _Work:
    """A request in the queue: what its thread tells whoever waits for it."""

    def __init__(self, whose: str):
        self.whose = whose
        self.cancelled = threading.Event()
        self.progress = Progress("waiting")
        self.result: Result | Found | None = None
        self.error: Exception | None = None


class Desk:
    """One model, and the requests that wait for it.

    Args:
      able: what it can do.
      load: gives it; called by a thread of the desk's own.
      folder: for the files of results, which whoever made it takes away.
    """

    def __init__(self, able: Able, load: Callable[[], Model], folder: str):
        self.able = able
        self.folder = folder
        self._line: list[_Work] = []
        self._results: collections.deque[Path] = collections.deque()
        self._moved = threading.Condition()
        self._vectors: dict[str, Vectors] = {}
        self._known: set[tuple] = set()  # requests whose programs are compiled
        self._first: concurrent.futures.Future[Result | None] = concurrent.futures.Future()
        self._model: concurrent.futures.Future[Model] = concurrent.futures.Future()
        self._loader = threading.Thread(target=self._begin, args=(load,), daemon=True)
        self._loader.start()

    def _begin(self, load: Callable[[], Model]) -> None:
        """Load the model and make the first order, which is on the page when that comes up. What goes wrong is said to
        whoever asks for either."""
        last = None
        try:
            self._model.set_result(load())
            if sum(x.nbytes for x in self._model.result().params.values()) < LARGE:  # else nobody waits for it unasked
                *_, last = self.make(self.able.first())
            self._first.set_result(last)
        except Exception as error:
            for one in (self._model, self._first):
                if not one.done():
                    one.set_exception(error)

    def first(self) -> Iterator[Progress | Result | None]:
        """The first order's result, made once for all who open the page; None of a model that is too large to do that
        unasked."""
        start = time.monotonic()
        while not self._first.done():
            what = "compiling and making the first images" if self._model.done() else "loading the model"
            yield Progress(f"{what}, {duration(time.monotonic() - start)}")
            with contextlib.suppress(TimeoutError):
                concurrent.futures.wait([self._first], EVERY)
        yield self._first.result()

    def make(self, order: Order, before: Result | None = None, whose: str = "") -> Iterator[Progress | Result]:
        """Make what is asked for; closing the generator cancels. One that is cancelled ends without a result.

        Args:
          before: what the mirrored patient's is to be shown beside: `order` is then that of `mirrored`.
          whose: name that `cancel` takes.

        Raises:
          UserError: it cannot be made, or too many wait.
        """
        order = checked(order)
        yield from self._in_turn(lambda work: self._made(work, order, before), whose)

    def nearest(self, result: Result, whose: str = "") -> Iterator[Progress | Found]:
        """What lies nearest, in the aligned space, to what a result was made of and to what was made, among subjects of
        the data that the model was trained on which it has not seen; takes its turn, and is cancelled, as `make` is.

        Raises:
          UserError: the model has no vectors of any of it, these data are not there, or may not be shown.
        """
        yield from self._in_turn(lambda work: self._nearest(work, result.rows[0]), whose)

    def _in_turn(self, job: Callable[[_Work], Any], whose: str) -> Iterator[Any]:
        work, start = _Work(whose), time.monotonic()
        thread = threading.Thread(target=self._run, args=(work, job), daemon=True)
        with self._moved:
            if len(self._line) > MOST_WAITING:
                raise UserError(f"{MOST_WAITING} requests wait already; try again when some are done")
            self._line.append(work)
        thread.start()
        try:
            while thread.is_alive() and not work.cancelled.is_set():
                place = self._place(work)
                said = Progress(f"waiting its turn, {place} before it") if place else work.progress
                yield dataclasses.replace(said, text=f"{said.text}, {duration(time.monotonic() - start)}")
                thread.join(EVERY)
        finally:
            work.cancelled.set()
            with self._moved:
                self._moved.notify_all()
        if work.error is not None:
            raise work.error
        if work.result is not None:
            yield work.result

    def cancel(self, whose: str) -> None:
        """Cancel all that somebody has asked for."""
        with self._moved:
            for work in self._line:
                if work.whose == whose:
                    work.cancelled.set()
            self._moved.notify_all()

    def _place(self, work: _Work) -> int:
        with self._moved:
            return self._line.index(work) if work in self._line else 0

    def _run(self, work: _Work, job: Callable[[_Work], Any]) -> None:
        try:
            with self._moved:
                self._moved.wait_for(lambda: self._line[0] is work or work.cancelled.is_set())
            self._check(work)
            work.result = job(work)
        except _Cancelled:
            pass
        except Exception as error:  # for the thread that waits, which raises it again
            work.error = error
        finally:
            with self._moved:
                self._line.remove(work)
                self._moved.notify_all()

    def _check(self, work: _Work) -> None:
        if work.cancelled.is_set():
            raise _Cancelled

    def _made(self, work: _Work, order: Order, before: Result | None) -> Result:
        start = time.monotonic()
        work.progress = Progress("loading the model")
        model = self._model.result()
        self._check(work)
        given = _values(order)
        program = tuple(given), order.make, order.sampler, order.guides
        # The first part of a new combination compiles its program, and nobody can say for how long.
        compiling = "" if program in self._known else "compiling this combination, which is done once, and "
        draws = max(order.draws, model.usual_best_of(tuple(given), order.make, order.draws))
        work.progress = Progress(f"{compiling}making {_of(1, draws)}", 0.0 if not compiling else None)
        pace, drawn = _Pace(draws * order.steps), 0

        def watch(step: int, steps: int) -> None:
            self._check(work)
            work.progress = pace.after(drawn * steps + step, f"{_of(drawn + 1, draws)}, step {step} of {steps}")

        def tell(done: int, total: int) -> None:
            nonlocal drawn
            self._check(work)
            drawn = done
            text = f"making {_of(done + 1, total)}" if done < total else "decoding"
            work.progress = Progress(text, done / total)

        made = model.generate(given, order.make, rows=1, tell=tell, watch=watch, **order.numbers())
        self._known.add(program)
        self._check(work)
        work.progress = Progress("writing the files", 1.0)
        rows = (*(before.rows[:1] if before else ()), Made(order, made))
        return Result(rows, self._files(model, rows), time.monotonic() - start)

    def _nearest(self, work: _Work, row: Made) -> Found:
        work.progress = Progress("loading the model")
        model = self._model.result()

        def say(text: str) -> None:
            self._check(work)
            work.progress = Progress(text)

        made = {s: x[0] for s, x in row.made.samples.items() if MODALITIES[split_stream(s)[0]].is_image}
        return find(model, _values(row.order), made, self._vectors, say)

    def _files(self, model: Model, rows: tuple[Made, ...]) -> dict[str, str]:
        """A file a form of all that was made, each marked as synthetic in it."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._results.append(folder)
        if len(self._results) > KEPT:
            shutil.rmtree(self._results.popleft(), ignore_errors=True)
        name = f"medm2g_seed{rows[0].order.seed}"
        cut = _grid(rows[0].order)
        files = {}
        for form in ("png", "dicom", *(["nifti"] if cut is not None else [])):
            into = folder / form / name
            for row in rows:
                record = dict(given=_said(row.order), **model.provenance(**row.order.numbers()))
                write_samples(into, row.made, record, form, cut if form == "nifti" else None)
            files[form] = shutil.make_archive(str(folder / f"{name}_{form}"), "zip", into.parent)
        files["json"] = shutil.copy(folder / "png" / name / LISTING, folder / f"{name}.json")
        for form in ("png", "dicom", "nifti"):
            shutil.rmtree(folder / form, ignore_errors=True)
        return files


class _Pace:
    """How far a request of so many steps is, and how long the rest takes at the pace of what is behind it. What comes
    before the first report does not count: a program may have been compiled then."""

    def __init__(self, steps: int):
        self._steps = steps
        self._first: tuple[float, int] | None = None

    def after(self, done: int, what: str) -> Progress:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        began, before = self._first
        left = ""
        if done > before and done < self._steps:
            left = f", {duration((now - began) / (done - before) * (self._steps - done))} left"
        return Progress(f"making {what}{left}", done / self._steps)


def _of(number: int, total: int) -> str:
    return "it" if total == 1 else f"draw {number} of {total}"


def _grid(order: Order) -> volumes.Cut | None:
    """Where what is made lies: on the slice that is given, where one is."""
    return next((v.cut for v in order.given.values() if isinstance(v, Given) and v.cut is not None), None)


def _values(order: Order) -> dict[str, Any]:
    """What is given, as `Model.generate` takes it."""
    return {s: v if isinstance(v, str) else v.picture for s, v in order.given.items()}


def _said(order: Order) -> dict[str, str]:
    """What was given, for the record: of an image its size alone, since a file's name may name a patient."""
    size = functools.partial(" x ".join)
    return {
        s: v if isinstance(v, str) else f"an image of {size(map(str, v.picture.pixels.shape))} pixels"
        for s, v in order.given.items()
    }
