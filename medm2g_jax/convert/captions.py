"""Short captions by a small grammar, general and of the chest: what `prompt_in` is fitted on (our own words)."""

import itertools
import random

_THINGS = ("a dog", "two birds", "an old bridge", "a red kettle", "the harbour", "a wooden chair", "a child")
_THINGS += ("a lighthouse", "a bowl of plums", "a bicycle", "a stone wall", "some tulips", "a train", "the moon")
_PLACES = ("in the snow", "by a river", "at night", "on a hill", "in an empty street", "under a grey sky", "on a table")
_MANNERS = ("a photograph of", "a pencil drawing of", "an oil painting of", "a close view of", "a small picture of", "")
_FINDINGS = ("a mass", "an opacity", "a nodule", "a pleural effusion", "consolidation", "atelectasis", "a cavity")
_FINDINGS += ("a thickened wall", "an enlarged lymph node", "a calcified granuloma", "interstitial markings")
_SIZES = ("small", "large", "faint", "dense", "well-defined", "ill-defined")
_LEVELS = ("upper", "middle", "lower")
_SIDES = ("left", "right")
_IMAGES = ("chest radiograph", "CT slice of the chest", "MRI of the chest", "frontal X-ray", "axial CT slice")
_NORMAL = ("the heart size is normal", "the lungs are clear", "no pneumothorax", "the bones are unremarkable")
_NORMAL += ("no effusion is seen", "the mediastinum is not widened", "lines and tubes are in place")


def captions(count: int, seed: int = 0) -> list[str]:
    """`count` different captions, half of them general, half of chest images; the first of them is the empty one."""
    rng = random.Random(seed)
    general = [" ".join(w for w in words if w) for words in itertools.product(_MANNERS, _THINGS, _PLACES)]
    chest = []
    for finding, size, level, side in itertools.product(_FINDINGS, _SIZES, _LEVELS, _SIDES):
        article, _, noun = finding.rpartition(" ")
        named = f"{size} {noun}" if article else f"{size} {finding}"
        form = rng.randrange(3)
        image, normal = rng.choice(_IMAGES), rng.choice(_NORMAL)
        chest.append(
            (
                f"findings : {named} in the {side} {level} lung . {normal} .",
                f"{image} with {named} in the {side} {level} zone",
                f"impression : {normal} . {named} , {side} {level} lobe .",
            )[form]
        )
    rng.shuffle(general)
    rng.shuffle(chest)
    mixed = [text for pair in zip(general, chest, strict=False) for text in pair]
    if count > len(mixed):
        raise ValueError(f"{count} captions asked for, the grammar has {len(mixed)}")
    return ["", *mixed[: count - 1]]
