"""A look-alike of a downloaded set, prepared, trained on for a few steps, and something generated with the result.

    python tests/prepared.py SET FOLDER
"""

import sys
from pathlib import Path

import look_alikes
import look_alikes_volumes
import numpy as np
from absl import flags
from micro import micro, unmeasured

import medm2g_jax
from medm2g_jax import prepare, run
from medm2g_jax.data.adapters import adapter_of
from medm2g_jax.data.manifest import Manifest

# Set -> writer of its look-alike, the stage that it can serve, its words, listing, and what is asked for in the end.
XRAY = ("ldm", "xray,tiny,alone", "default", "xray")
PAIR = ("ct_mri", "tiny,alone", "default", "ct")
CONTRASTS = ("mri", "tiny", ("mri",), "mri:t1")
SETS = {
    "mimic_cxr": (look_alikes.mimic_cxr, "text_xray", "tiny,alone", "default", "text"),
    "openi": (look_alikes.openi_nlm, "text_xray", "tiny,alone", "default", "text"),
    "chestxray14": (look_alikes.chestxray14, "text_xray", "tiny,alone", "default", "xray"),
    "medicat": (look_alikes.medicat, "text_mri", "tiny,alone", "default", "mri"),
    "chexpert": (look_alikes.chexpert, *XRAY),
    "siim": (look_alikes.siim, *XRAY),
    "rsna": (look_alikes.rsna, *XRAY),
    "synthrad": (lambda folder: look_alikes_volumes.synthrad(folder, 2023), *PAIR),
    "gold_atlas": (look_alikes_volumes.gold_atlas, *PAIR),
    "brain_tumor": (look_alikes_volumes.brain_tumor, *PAIR),
    "brats2020": (look_alikes_volumes.brats2020, *CONTRASTS),
    "ixi": (look_alikes_volumes.ixi, *CONTRASTS),
    "acdc": (look_alikes_volumes.acdc, "text_mri", "tiny,alone", "default", "mri"),
    "sliver07": (look_alikes_volumes.sliver07, "ldm", "ct,tiny,alone", "default", "ct"),
}

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    flags.FLAGS.mark_as_parsed()
    run.show = lambda **rest: []  # what stages end with is tested elsewhere

    write, target, words, listing, make = SETS[name]
    root = write(folder / "downloaded")
    manifest = prepare.prepare(adapter_of(name), root, folder / "prepared", prepare.Order(workers=1, keep_ids=True))

    config = unmeasured(micro(target, words, steps=2, listing=listing, batch=2))
    config.data.source, config.data.template_text = f"manifest:{manifest.parent}", True
    if target == "mri":  # the round alone, as its config has it
        config.upstream = "init"
    run.run(config, str(folder / "run"))

    model = medm2g_jax.load(folder / "run")
    source = Manifest(manifest.parent, model.size, template_text=True)
    given = {}
    if target != "ldm":  # from the first record that has something else
        index, record = next((i, r) for i, r in enumerate(source.records) if make in r.streams and len(r.streams) > 1)
        stream = next(s for s in record.streams if s != make)
        picture = source.picture(index, stream)  # None of a text
        given = {stream: picture or source.read(index, stream, np.random.default_rng(0))}
    made = model.generate(given, [make], count=1, steps=2)
    print(f"made {make} of {', '.join(given) or 'nothing'}: {len(made.samples[make])}")
