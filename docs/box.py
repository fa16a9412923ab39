"""docs/box.png: the phantom's own images of six test subjects, and what the model in the box makes from their reports.

    python docs/box.py
"""

from pathlib import Path

import numpy as np

import medm2g_jax
from medm2g_jax.data.open import source_of
from medm2g_jax.data.source import labels
from medm2g_jax.evaluate.pictures import grid
from medm2g_jax.evaluate.samples import samples
from medm2g_jax.modality import stream_word

if __name__ == "__main__":
    model = medm2g_jax.load("phantom")
    source = source_of(model.meta["shared"])
    found = labels(source)
    large = [i for i, r in enumerate(source.records) if r.split == "test" and found(i).size == "large"]
    chosen = [i for kind in ("effusion", "mass", "opacity") for i in [i for i in large if found(i).kind == kind][:2]]
    rng = np.random.default_rng(0)
    reports = [source.read(i, "text", rng) for i in chosen]
    given, made = {"text": reports}, {}
    for stream in ("xray", "ct"):
        made |= samples(model, given, [stream], len(chosen), seed=0)
    made |= samples(model, {"ct": made["ct"]}, ["mri:t2"], len(chosen), seed=0)
    rows = []
    for stream, of in {"xray": "the report", "ct": "the report", "mri:t2": "the CT that was made"}.items():
        rows.append((f"{stream_word(stream)}, real", [source.read(i, stream, rng) for i in chosen]))
        rows.append((f"{stream_word(stream)}, made from {of}", list(made[stream])))
    title = "The model in the box: the phantom's own images, and what is made from their reports alone"
    grid(Path(__file__).with_name("box.png"), rows, reports, title=title)
