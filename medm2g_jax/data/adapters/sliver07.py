"""SLIVER07: contrast-enhanced CT of the abdomen with masks of the liver.

    training-part1/liver-orig001.mhd + .raw, liver-seg001.mhd + .raw ... training-part2/liver-orig020.mhd

MetaImage, 512 x 512, HU, either byte order; needs SimpleITK (`pip install 'medm2g-jax[itk]'`). Slices that show liver
are kept; the challenge's test scans come without masks and are left out. Traps: scans lie in their files one way and
the other, origins of masks need not be those of their scans (voxels are). No official split, no text: a template.

The rules allow the data for work on liver segmentation alone; what that means for you is printed.
"""

import re
from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.errors import UserError

_ACCESS = (
    "By registration at grand-challenge.org. Its rules: for developing liver SEGMENTATION only, not to be passed on, "
    "no commercial use of what is trained on it. To train a generative model with it, ask the organisers first and "
    "keep their answer."
)


def _find(root: Root) -> Iterator[Case | Left]:
    found = root.files("**/liver-orig*.mhd")
    if not found:
        raise UserError(f"{root.path}: no liver-orig001.mhd in it; expected the unpacked training-part1 and -part2")
    masks = {name.rpartition("/")[2]: name for name in root.files("**/liver-seg*.mhd")}
    for scan in found:
        number = re.sub(r"\D", "", scan.rpartition("/")[2])
        mask = masks.get(f"liver-seg{number}.mhd")
        if mask is None:
            yield Left(f"liver{number}", "no mask of the liver (of the challenge's test)")
            continue
        text = "Contrast-enhanced abdominal CT at the level of the liver."
        yield Case(f"liver{number}", f"liver{number}", {"ct": Image(scan)}, text=text, origin="template", mask=mask)


ADAPTERS = (
    Adapter(
        name="sliver07",
        title="SLIVER07: segmentation of the liver, MICCAI 2007",
        licence="SLIVER07 rules (liver segmentation research only)",
        access=_ACCESS,
        find=_find,
        streams=("ct",),
        share=0.0,
    ),
)
