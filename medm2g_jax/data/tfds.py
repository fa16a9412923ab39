"""TensorFlow Datasets stored as ArrayRecord, read without TensorFlow.

Images may be `Image` features (files of 8 or 16 bits, read as any other file is) or `Tensor` features of (h w) or
(h w 1): uint8 counts from -1 to +1 over 0 .. 255, uint16 as `data.check` says, floats over [-1, 1].
`Tensor(..., optional=True)` may be missing; an empty text is no text, and no bytes are no image. Bytes of a text that
are no UTF-8 become U+FFFD. A text feature `row`, which `data.tfds_builder` writes, says what a manifest's line does:
id, licence, units and ranges, what shares a grid, what a model made.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from medm2g_jax.data import manifest_rows
from medm2g_jax.data.check import Examined, Item
from medm2g_jax.data.formats import raster
from medm2g_jax.data.picture import MOST_PIXELS, Picture, Span, network_input
from medm2g_jax.data.said import Said
from medm2g_jax.data.source import SURROGATE, Record, check_subjects, identity, images_of, is_open, stream_of
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, split_stream

SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}


class Tfds:
    """A `Source` over one TFDS data set. Opening it reads every example once, images not decoded."""

    def __init__(
        self,
        name: str,
        size: int,
        features: Mapping[str, str] | None = None,
        splits: Mapping[str, str] = SPLITS,
        data_dir: str | None = None,
        ranges: Mapping[str, Span] | None = None,
        most_pixels: int = MOST_PIXELS,
        registered: bool = False,
        part: bool = False,
    ):
        """Open the prepared data set `name`.

        Args:
          features: feature -> stream, or -> "subject"; by default those named like one ("ct", "mri_t2", "text",
            "subject"). Without subjects every example is a subject of its own.
          splits: the set's split -> train, val or test; the set need not have them all.
          data_dir: TFDS's own default if None.
          ranges, most_pixels, registered, part: see `Manifest`.

        Raises:
          UserError: the set is not there, not ArrayRecord, lacks a feature, or has a subject in two splits.
        """
        import tensorflow_datasets as tfds  # slow to import

        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except (ValueError, FileNotFoundError) as error:  # DatasetNotFoundError is a ValueError; it lists all of TFDS
            raise UserError(f"tfds:{name}: {str(error).splitlines()[0]} (data_dir {data_dir or 'default'})") from error
        info, self.name, self._size = builder.info, name, size
        if features is None:
            features = {f: "subject" if f == "subject" else stream_of(f) for f in info.features}
            features = {feature: stream for feature, stream in features.items() if stream}
        wrong = {f: s for f, s in features.items() if f not in info.features or (s != "subject" and not stream_of(s))}
        if wrong or not set(features.values()) - {"subject"}:
            raise UserError(
                f"tfds:{name}: its features are {', '.join(sorted(info.features))}; expected a map from these to "
                f"streams, found {wrong or dict(features)}"
            )
        skip = {f: tfds.decode.SkipDecoding() for f, s in features.items() if _is_image(s)}
        try:
            self._data = {
                split: builder.as_data_source(split, decoders=skip) for split in splits if split in info.splits
            }
        except NotImplementedError as error:
            raise UserError(
                f'tfds:{name}: {builder.data_dir} is not ArrayRecord; prepare it with file_format="array_record"'
            ) from error
        if not self._data:
            raise UserError(f"tfds:{name}: not prepared in {builder.data_dir}, or none of its splits is in {splits}")

        self._features = {stream: feature for feature, stream in features.items()}
        # Image files go the way of all image files; what else there is TFDS decodes.
        files = {f for f in features if isinstance(info.features[f], tfds.features.Image)}
        files = {f for f in files if info.features[f].np_dtype in (np.uint8, np.uint16)}
        self._decode = {
            s: None if f in files else info.features[f].decode_example_np for f, s in features.items() if _is_image(s)
        }
        self._most_pixels = most_pixels
        licence = info.redistribution_info.license or ""
        self.records: Sequence[Record] = []
        self._places: list[tuple[str, int]] = []
        self._said: list[Mapping[str, Said]] = []
        rows = "row" in info.features and isinstance(info.features["row"], tfds.features.Text)
        lost = 0
        for split, data in self._data.items():
            for i in range(len(data)):
                example = data[i]
                held = tuple(s for s, f in self._features.items() if s != "subject" and not _missing(example[f]))
                if held:
                    subject = self._features.get("subject")
                    try:
                        who = f"{split}/{i}" if subject is None else identity(example[subject])
                    except UserError as error:
                        raise UserError(f"tfds:{name}: example {split}/{i}: {subject!r}: {error}") from None
                    lost += sum(_text(example[self._features[s]])[1] for s in held if not _is_image(s))
                    grid = images_of(held) if registered else ()
                    record, said = Record(f"{split}/{i}", who, splits[split], held, licence, grid), {}
                    if rows:
                        record, said = _of_row(f"tfds:{name}: example {split}/{i}", example["row"], record)
                    self.records.append(record)
                    self._places.append((split, i))
                    self._said.append(said)
        self.open = all(map(is_open, self.licences)) if rows else is_open(licence)
        if lost:
            logging.warning("data %s: %d bytes of texts that are no UTF-8 became U+FFFD", name, lost)
        stats = [file.stat() for file in epath.Path(builder.data_dir).iterdir()]
        self._stamp = (sum(stat.length for stat in stats), int(max(stat.mtime for stat in stats)))
        self._folder = str(builder.data_dir)
        self._examined = Examined(name, ranges or {}, most_pixels, self._items, part)
        check_subjects(f"tfds:{name}", ((r.subject, r.split, f"example {r.id}") for r in self.records))

    @property
    def licences(self) -> dict[str, int]:
        """How many records are under which licence, as the data set's info puts it."""
        return dict(Counter(record.licence for record in self.records))

    def read(self, index: int, stream: str, rng: np.random.Generator) -> np.ndarray | str:
        """See `Source.read`; nothing here is random.

        Raises:
          UserError: an image of a dtype, shape or range that is not described above.
        """
        del rng
        if not _is_image(stream):
            return _text(self._value(index, stream))[0]
        picture = self._examined.ranged(stream, self._picture(index, stream))
        return network_input(picture, MODALITIES[split_stream(stream)[0]], self._size)

    def check(self, cache: epath.PathLike | None = None, say: Callable[[str], Any] | None = None) -> None:
        """See `source.check`: decodes every image once, and finds the range of the 16-bit ones."""
        self._examined.check(cache, say)

    @property
    def ranges(self) -> dict[str, Span]:
        """See `source.ranges`."""
        return self._examined.ranges

    @property
    def extents(self) -> dict[str, Span]:
        """See `source.extents`."""
        return self._examined.extents

    @property
    def steady(self) -> tuple[str, ...]:
        """See `source.steady`: all images."""
        return images_of({stream for record in self.records for stream in record.streams})

    def _items(self) -> Iterator[Item]:
        for index, record in enumerate(self.records):
            for stream in filter(_is_image, record.streams):
                read = functools.partial(self._picture, index, stream)
                yield Item("", stream, f"{self._folder}/{record.id} {stream}", self._stamp, read)

    def _value(self, index: int, stream: str) -> Any:
        split, number = self._places[index]
        return self._data[split][number][self._features[stream]]

    def _picture(self, index: int, stream: str) -> Picture:
        value = self._value(index, stream)
        where = f"tfds:{self.name}: example {self.records[index].id}, {stream}"
        decode = self._decode[stream]
        picture = _picture(decode(value), where) if decode else raster.decode(value, where, self._most_pixels)
        said = self._said[index].get(stream)
        return said.of(picture, MODALITIES[split_stream(stream)[0]]) if said else picture


def _is_image(stream: str) -> bool:
    modality = MODALITIES.get(stream.partition(":")[0])
    return modality is not None and modality.is_image


def _of_row(where: str, value: bytes | str, record: Record) -> tuple[Record, Mapping[str, Said]]:
    """The record, and what is said of its streams, as the manifest's line has it; its split stays the set's own."""
    try:
        row = manifest_rows.checked(where, json.loads(value))
    except ValueError as error:
        raise UserError(f"{where}: 'row' is no JSON ({type(error).__name__})") from None
    grid = row.about.registered or ()
    grid = record.streams if grid is True else tuple(map(stream_of, grid))
    made = tuple(map(stream_of, row.about.synthetic))
    order = {stream_of(key): place for place, key in enumerate(row.images)}  # TFDS has one of its own
    streams = tuple(sorted(record.streams, key=lambda s: order.get(s, len(order))))
    full = dataclasses.replace(
        record,
        id=row.id,
        streams=streams,
        licence=row.about.licence,
        grid=record.grid or images_of(s for s in streams if s in grid),
        synthetic=tuple(s for s in streams if s in made),
    )
    return full, {stream_of(key): said for key, said in row.about.said.items()}


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, bytes | str) and not value)


def _text(value: bytes | str) -> tuple[str, int]:
    """The text, and how many bytes or half characters of it became U+FFFD."""
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
    return SURROGATE.sub("\ufffd", text), len(SURROGATE.findall(text))


def _picture(image: np.ndarray, where: str) -> Picture:
    flat = image
    if image.ndim == 3 and image.shape[-1] in (1, 3):
        mean = image.mean(-1)
        flat = mean if np.issubdtype(image.dtype, np.floating) else np.round(mean).astype(image.dtype)
    if flat.ndim != 2:
        raise UserError(f"{where}: expected an image (h w), (h w 1) or (h w 3), found {image.shape}")
    if image.dtype in (np.uint8, np.uint16):
        return Picture(flat, (0, np.iinfo(image.dtype).max), path=where)
    if not np.issubdtype(image.dtype, np.floating) or not (np.abs(flat) <= 1).all():
        raise UserError(f"{where}: expected uint8, uint16, or floats in [-1, 1], found {image.dtype} outside that")
    return Picture(flat, (-1, 1), path=where)
