"""A prepared folder as a TensorFlow Datasets set, stored as ArrayRecord, written and read without TensorFlow.

    build("mri_set", "mri_set", "~/tensorflow_datasets")    # then --config.data.source=tfds:prepared/mri_set

Features: `id`, `subject`, one `Image` a stream ("ct", "mri_t2"; the bytes of the file, no pixel is decoded), `text`,
and `row`, the manifest's line without images and text: units, ranges, places, licence, what shares a grid. What a
record lacks is empty, which our reader takes for missing; of sets whose records do not all hold the same streams other
readers have to look at it before they decode.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from medm2g_jax.data.contents import contents
from medm2g_jax.data.manifest import Manifest
from medm2g_jax.data.shards import Shards, split_name
from medm2g_jax.data.source import images_of, key_of
from medm2g_jax.errors import UserError

SPLITS = {"train": "train", "val": "validation", "test": "test"}
LOOKED_AT = 32  # images of a stream, for its number of bits; readers go by each file's own
_PNG, _OTHER = b"\x89PNG\r\n\x1a\n", (b"\xff\xd8\xff", b"II*\0", b"MM\0*")


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One prepared folder; the config is made from it."""

    VERSION = tfds.core.Version("1.0.0")
    name = "prepared"

    def __init__(self, folder: str | Path, name: str, data_dir: str | Path | None):
        """See `build`."""
        self._source = Manifest(folder, size=1, template_text=True)
        self._shards = Shards()
        super().__init__(
            data_dir=data_dir,
            config=tfds.core.BuilderConfig(
                name=name, version=self.VERSION, description=f"{self._source.name}, prepared"
            ),
            file_format="array_record",
        )

    def _info(self) -> tfds.core.DatasetInfo:
        streams = sorted({s for r in self._source.records for s in r.streams})
        features: dict[str, Any] = dict.fromkeys(("id", "subject", "row"), tfds.features.Text())
        for stream in streams:
            key = key_of(stream)
            features[key] = tfds.features.Text()
            if images_of((stream,)):
                features[key] = tfds.features.Image(shape=(None, None, 1), dtype=self._dtype(stream))
        licences = ", ".join(sorted(filter(None, self._source.licences)))
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description="Medical images and reports, prepared.",
            license=licences or None,
            metadata=tfds.core.MetadataDict(contents=contents(self._source).fingerprint),
            disable_shuffling=True,  # records in the manifest's order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        held = {r.split for r in self._source.records}
        return {name: self._generate_examples(split) for split, name in SPLITS.items() if split in held}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        streams = [f for f in self.info.features if f not in ("id", "subject", "row")]
        for index, record in enumerate(self._source.records):
            if record.split != split:
                continue
            keys = {key_of(s): s for s in record.streams}
            example = {"id": record.id, "subject": record.subject, "row": json.dumps(self._row(index))}
            for key in streams:
                if key not in keys:
                    example[key] = b"" if isinstance(self.info.features[key], tfds.features.Image) else ""
                elif images_of((keys[key],)):
                    example[key] = self._content(index, keys[key])
                else:
                    example[key] = self._source.read(index, keys[key], np.random.default_rng(0))
            yield index, example

    def _row(self, index: int) -> dict[str, Any]:
        """The manifest's line of a record; its images by their features' names."""
        record = self._source.records[index]
        row: dict[str, Any] = dict(id=record.id, subject=record.subject, split=record.split, images={})
        for stream in images_of(record.streams):
            key = key_of(stream)
            for field, value in self._source.entry(index, stream).items():
                row.setdefault(field, {})[key] = key if field == "images" else value
        row["registered"] = [key_of(s) for s in record.grid]
        row["synthetic"] = [key_of(s) for s in record.synthetic]
        return row | {"license": record.licence}

    def _content(self, index: int, stream: str) -> bytes:
        name = self._source.entry(index, stream)["images"]
        packed = split_name(name)
        content = self._shards.read(*packed) if packed else Path(name).read_bytes()
        if not content.startswith((_PNG, *_OTHER)):
            raise UserError(
                f"row {self._source.records[index].id!r}: {name}: no PNG, JPEG or TIFF, which is what TFDS keeps; "
                "prepare the set first"
            )
        return content

    def _dtype(self, stream: str) -> type[np.generic]:
        """uint16 where one of the first images has 16 bits."""
        holders = (i for i, r in enumerate(self._source.records) if stream in r.streams)
        for index in (i for i, _ in zip(holders, range(LOOKED_AT), strict=False)):
            content = self._content(index, stream)
            if not content.startswith(_PNG) or content[24] == 16:  # a TIFF may; its bits are not in one place
                return np.uint16 if not content.startswith(_OTHER[0]) else np.uint8
        return np.uint8


def build(folder: str | Path, name: str, data_dir: str | Path | None = None) -> str:
    """Write a prepared folder as the TFDS set "prepared/`name`"; returns the data spec that reads it. One that is there
    already is left as it is. Of a set that is not open its owner alone may enter the folder.

    Args:
      data_dir: TFDS's own default if None; where it is another, TFDS_DATA_DIR has to say so when it is read.

    Raises:
      UserError: the folder cannot be opened, an image is in no file that TFDS keeps, the name is none of a set, or that
        of one which holds something else.
    """
    try:
        builder = Prepared(folder, name, None if data_dir is None else Path(data_dir).expanduser())
        place = Path(builder.data_dir)
        if place.exists() and builder.info.metadata.get("contents") != contents(builder._source).fingerprint:
            raise UserError(f"{place}: a TFDS set of other contents; delete it, or name another")
        if not builder._source.open:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.parent.chmod(0o700)
        builder.download_and_prepare()
    except ValueError as error:
        raise UserError(f"tfds:prepared/{name}: {' '.join(str(error).split())[:300]}") from error
    return f"tfds:prepared/{name}"
