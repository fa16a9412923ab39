"""A fifth modality, all of it: one value, and a source that has its images.

    python tests/pet_round.py ROOT UPSTREAM     # config.upstream: train, init
"""

import sys

from absl import flags
from micro import micro

from medm2g_jax import modality, run
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.source import Record

modality.register(modality.Modality("pet", "image", "PET", window=(0.0, 10.0), unit="SUV", dicom="PT"))


class PetSource:
    """Text and PET of the phantom's subjects: the CT slice stands in for an uptake image."""

    name, open = "pet", True

    def __init__(self, size: int):
        self.phantom = Phantom(size=size, seed=0, train=48, val=12, test=4, pairs=(("text", "ct"),))
        self.records = [Record(r.id, r.subject, r.split, ("text", "pet"), r.licence) for r in self.phantom.records]

    def read(self, index, stream, rng):
        return self.phantom.read(index, {"pet": "ct"}.get(stream, stream), rng)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    config = micro("text_pet", steps=3, listing=("text_pet",), upstream=sys.argv[2])
    run.run(config, sys.argv[1], source=PetSource(config.image_size))
