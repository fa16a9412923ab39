"""TensorFlow Datasets stored as ArrayRecord, read without TensorFlow.

Images may be `Image` features (8-bit) or `Tensor` features of (h w) or (h w 1): uint8 and uint16 are taken as windowed
over their whole range, floats as in [-1, 1]. `Tensor(..., optional=True)` may be missing; an empty text is no text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from medm2g_jax.data import images
from medm2g_jax.data.source import Record, check_subjects, is_open, stream_of
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

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
    ):
        """Open the prepared data set `name`.

        Args:
          features: feature -> stream, or -> "subject"; by default those named like one ("ct", "mri_t2", "text",
            "subject"). Without subjects every example is a subject of its own.
          splits: the set's split -> train, val or test; the set need not have them all.
          data_dir: TFDS's own default if None.

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
        self._decode = {s: info.features[f].decode_example_np for f, s in features.items() if _is_image(s)}
        licence = info.redistribution_info.license or ""
        self.open = is_open(licence)
        self.records: Sequence[Record] = []
        self._places: list[tuple[str, int]] = []
        for split, data in self._data.items():
            for i in range(len(data)):
                example = data[i]
                held = tuple(s for s, f in self._features.items() if s != "subject" and not _missing(example[f]))
                if held:
                    subject = self._features.get("subject")
                    who = f"{split}/{i}" if subject is None else _text(example[subject])
                    self.records.append(Record(f"{split}/{i}", who, splits[split], held, licence))
                    self._places.append((split, i))
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
        split, number = self._places[index]
        value = self._data[split][number][self._features[stream]]
        if not _is_image(stream):
            return _text(value)
        try:
            grey = _grey(self._decode[stream](value))
        except UserError as error:
            raise UserError(f"tfds:{self.name}: example {self.records[index].id}, {stream}: {error}") from error
        return images.square(grey, self._size)[..., None]


def _is_image(stream: str) -> bool:
    modality = MODALITIES.get(stream.partition(":")[0])
    return modality is not None and modality.kind == "image"


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, bytes | str) and not value)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _grey(image: np.ndarray) -> Float[np.ndarray, "h w"]:
    flat = image.mean(-1) if image.ndim == 3 and image.shape[-1] in (1, 3) else image
    if flat.ndim != 2:
        raise UserError(f"expected an image (h w), (h w 1) or (h w 3), found {image.shape}")
    if image.dtype in (np.uint8, np.uint16):
        return (flat / (np.iinfo(image.dtype).max / 2) - 1).astype(np.float32)
    if not np.issubdtype(image.dtype, np.floating) or not (np.abs(flat) <= 1).all():
        raise UserError(f"expected uint8, uint16, or floats in [-1, 1], found {image.dtype} outside that")
    return flat.astype(np.float32)
