"""Generated samples onto disk, marked as synthetic in name, file and list.

DIR/ct_000.png       8-bit, the modality's window, "synthetic" in the file's text fields
DIR/ct_000.npy       float32 (h w) in the modality's unit
DIR/text_000.txt
DIR/generated.json   what was made, from what, with which seed, through which pairs
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from medm2g_jax.data.formats import format_of
from medm2g_jax.data.picture import Picture
from medm2g_jax.modality import MODALITIES, Modality, split_stream

NOTE = "Synthetic, made by medm2g_jax. Not for clinical use."


def write_samples(folder: epath.PathLike, samples: Mapping[str, Any], record: Mapping[str, Any]) -> list[epath.Path]:
    """Write samples (stream -> list of str, or float32 (n h w) in the modality's unit) and return the files' paths."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stream, values in samples.items():
        modality = MODALITIES[split_stream(stream)[0]]
        for i, value in enumerate(values):
            stem = f"{stream.replace(':', '-')}_{i:03d}"
            if not modality.is_image:
                path = folder / f"{stem}.txt"
                path.write_text(value + "\n")
            else:
                path = folder / f"{stem}.png"
                format_of(path.name).write(path, shown(value, modality), _notes(modality))
                with (folder / f"{stem}.npy").open("wb") as f:
                    np.save(f, np.asarray(value, np.float32))
            written.append(path)
    units = {s: dict(unit=m.unit, window=m.window) for s in samples if (m := MODALITIES[split_stream(s)[0]]).window}
    listing = {"note": NOTE, **record, "units": units, "files": [p.name for p in written]}
    (folder / "generated.json").write_text(json.dumps(listing, indent=1))
    return written


def shown(values: Float[np.ndarray, "h w"], modality: Modality) -> Picture:
    """Values in the modality's unit as an 8-bit picture over its window."""
    levels = np.round((modality.normalise(values) + 1) * 127.5).astype(np.uint8)
    return Picture(levels, span=(0, 255))


def _notes(modality: Modality) -> dict[str, str]:
    low, high = modality.window
    return {"Description": NOTE, "Window": f"{low} {high}"}
