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
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medm2g_jax.modality import MODALITIES, split_stream

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
            if modality.kind == "text":
                path = folder / f"{stem}.txt"
                path.write_text(value + "\n")
            else:
                path = folder / f"{stem}.png"
                _write_png(path, value, modality.window)
                with (folder / f"{stem}.npy").open("wb") as f:
                    np.save(f, np.asarray(value, np.float32))
            written.append(path)
    units = {s: dict(unit=m.unit, window=m.window) for s in samples if (m := MODALITIES[split_stream(s)[0]]).window}
    listing = {"note": NOTE, **record, "units": units, "files": [p.name for p in written]}
    (folder / "generated.json").write_text(json.dumps(listing, indent=1))
    return written


def _write_png(path: epath.Path, image: np.ndarray, window: tuple[float, float]) -> None:
    low, high = window
    grey = np.uint8(np.clip((image - low) / (high - low) * 255, 0, 255).round())
    text = PngInfo()
    text.add_text("Description", NOTE)
    text.add_text("Window", f"{low} {high}")
    with path.open("wb") as f:
        Image.fromarray(grey).save(f, format="PNG", pnginfo=text)
