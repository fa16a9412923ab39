"""Latents of images, kept on disk, so that no stage runs a frozen autoencoder over an image a second time.

What training reads of the posterior (section 3.1) is its mean, times the kind's scale (`MedM2G.encode`): that mean is
kept, unscaled, of images that are a function of record and stream alone (`source.steady`).

    RUN/latents/mri_t2/
      latents.json       what they are of: autoencoder, data, image size, range of 16-bit images; dtype, shape, count
      0000.npy ...       (PART h w c); row r of part p is of image PART p + r of the stream, counted over the records
                         of training and validation; NaN where no stage has needed it so far

A part is written beside its place and then put there, so that a killed run leaves whole ones. What is there and is not
what is expected is an error that says what to delete, and is never read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from medm2g_jax.data.source import Source
from medm2g_jax.errors import UserError

# Rounding to float16 is 2e-4 of the latents' standard deviation, root mean square, 9e-4 at most (measured at 64 px); it
# is relative, so other scales change nothing. bfloat16 activations round eight times as much.
DTYPE = np.float16
PART = 2048  # images; at 512 px 64 MB
NAME = "latents.json"
SPLITS = ("train", "val")  # what stages read


@dataclass(frozen=True, eq=False)
class Store:
    """The latents of one stream on disk.

    Attributes:
      records: the numbers of all records of SPLITS that hold it, in order.
      about: what latents.json has to say.
    """

    folder: Path
    records: Int[np.ndarray, "n"]
    about: Mapping[str, Any]

    @property
    def parts(self) -> int:
        return -(-len(self.records) // PART)

    def hold(self) -> None:
        """Compare what is there with what is expected, and begin where nothing is.

        Raises:
          UserError: it is of another autoencoder, of other data, or of another form.
        """
        path, expected = self.folder / NAME, json.loads(json.dumps(dict(self.about)))
        if not path.exists():
            if any(self.folder.glob("*.npy")):
                raise self._stale(path, "file", "latents.json beside its parts", "none")
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{NAME}.part"
            part.write_text(json.dumps(expected, indent=1))
            part.replace(path)
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise self._stale(path, "file", "JSON", type(error).__name__) from error
        if not isinstance(found, dict):
            raise self._stale(path, "file", "a JSON object", type(found).__name__)
        for field in dict.fromkeys((*expected, *found)):
            if expected.get(field) != found.get(field):
                raise self._stale(path, field, expected.get(field), found.get(field))

    def part(self, number: int) -> Float[np.ndarray, "n h w c"] | None:
        """A part as it is on disk, not read yet; None where there is none.

        Raises:
          UserError: it is broken, or of another shape.
        """
        path = self._path(number)
        if not path.exists():
            return None
        shape = (len(self._of(number)), *self.about["shape"])
        try:
            found = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:  # cut short, or no array at all
            raise self._stale(path, "file", f"{shape} {np.dtype(DTYPE)}", f"a broken one ({error})") from error
        if (found.shape, found.dtype) != (shape, np.dtype(DTYPE)):
            raise self._stale(path, "array", f"{shape} {np.dtype(DTYPE)}", f"{found.shape} {found.dtype}")
        return found

    def missing(self, number: int, wanted: Int[np.ndarray, "m"]) -> Int[np.ndarray, "k"]:
        """The rows of a part that are of the records `wanted` and not there yet."""
        rows = np.flatnonzero(np.isin(self._of(number), wanted))
        found = self.part(number)
        return rows if found is None else rows[~_there(found)[rows]]

    def record(self, number: int, row: int) -> int:
        """Which record a row of a part is of."""
        return int(self._of(number)[row])

    def write(self, number: int, rows: Int[np.ndarray, "k"], values: Float[np.ndarray, "k h w c"]) -> None:
        """Add rows to a part."""
        found = self.part(number)
        whole = np.full((len(self._of(number)), *self.about["shape"]), np.nan, DTYPE) if found is None else found.copy()
        whole[rows] = values
        path = self._path(number)
        beside = path.with_name(f"{path.name}.part")
        with open(beside, "wb") as file:
            np.save(file, np.asarray(whole))
        beside.replace(path)

    def _of(self, number: int) -> Int[np.ndarray, "n"]:
        return self.records[number * PART : (number + 1) * PART]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.npy"

    def _stale(self, path: Path, field: str, expected: Any, found: Any) -> UserError:
        return UserError(
            f"{path}: {field}: expected {expected!r}, found {found!r}; these latents are not of this run's autoencoder "
            f"and images. Delete them, and the same command makes them anew: rm -r {self.folder}"
        )


def store(root: Path, source: Source, stream: str, about: Mapping[str, Any]) -> Store:
    """Where the latents of one stream are kept in a run root. about: all that they have to be of."""
    records = np.asarray([i for i, r in enumerate(source.records) if r.split in SPLITS and stream in r.streams], int)
    form = {"dtype": np.dtype(DTYPE).name, "count": len(records), "part": PART}
    return Store(root / "latents" / stream.replace(":", "_"), records, {**about, **form})


class Latents:
    """Reads the latents of some streams, one at a time; threads may share it."""

    def __init__(self, stores: Mapping[str, Store]):
        """stores: of one shape, and not none."""
        self.blank = np.zeros(next(iter(stores.values())).about["shape"], DTYPE)  # where a record has no such stream
        self._stores = dict(stores)
        self._parts = {name: [s.part(p) for p in range(s.parts)] for name, s in stores.items()}

    def __call__(self, index: int, stream: str) -> Float[np.ndarray, "h w c"]:
        """The latent of an image of record `index`."""
        records = self._stores[stream].records
        place = int(np.searchsorted(records, index))
        if place < len(records) and records[place] == index:
            part = self._parts[stream][place // PART]
            found = None if part is None else np.array(part[place % PART])
            if found is not None and not np.isnan(found[0, 0, 0]):
                return found
        raise ValueError(f"no latent of {stream} of record {index}: no stage has needed it")


def _there(part: Float[np.ndarray, "n h w c"]) -> Bool[np.ndarray, "n"]:
    """Which rows have been made: one number of each tells, and no more is read."""
    return ~np.isnan(part[:, 0, 0, 0])
