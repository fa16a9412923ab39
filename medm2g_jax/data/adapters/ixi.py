"""IXI: T1, T2 and PD of the heads of some 600 healthy people, from three hospitals in London.

    IXI002-Guys-0828-T1.nii.gz    IXI{id}-{site}-{number}-{T1,T2,PD,MRA,DTI-00 .. DTI-16}.nii.gz

flat, or in a folder for each archive (IXI-T1/, IXI-T2/ ...). Subjects with all three of T1, T2 and PD are taken; MRA
and DTI (of which the last is a derived map) are left alone. Traps: T1 is stored in another orientation and on another
grid, and the head has moved since: T2 and PD, which share a grid, are brought onto T1 together, by affine registration
with mutual information, as SynDiff's authors did (with FSL). Without it (`--register none`) a model that learns pairs
stays near 17 dB. There is no official split. SynDiff took the first 40 subjects, 25 / 5 / 10, and 100 slices of each:
`--limit 40 --split 0.625,0.125,0.25` gives as many, not the same ones in each part.
"""

import re
from collections.abc import Iterator

from medm2g_jax.data.case import Adapter, Case, Image, Left, Root
from medm2g_jax.errors import UserError

_STREAMS = {"mri:t1": "T1", "mri:t2": "T2", "mri:pd": "PD"}  # T1's grid counts
_NAME = re.compile(r"(IXI\d+)-(\w+)-(\d+)-(T1|T2|PD)\.nii(\.gz)?")


def _find(root: Root) -> Iterator[Case | Left]:
    found: dict[str, dict[str, str]] = {}
    sites: dict[str, str] = {}
    for name in root.files("**/IXI*.nii*"):
        if said := _NAME.fullmatch(name.rpartition("/")[2]):
            subject, sites[said[1]], kind = said[1], said[2], said[4]
            if kind in found.setdefault(subject, {}):
                yield Left(f"{subject}-{said[3]}", f"a second {kind} of one subject")
            else:
                found[subject][kind] = name
    if not found:
        raise UserError(f"{root.path}: no IXI002-Guys-0828-T1.nii.gz or the like in it; expected the unpacked archives")
    for subject, files in sorted(found.items()):
        if missing := [kind for kind in _STREAMS.values() if kind not in files]:
            yield Left(subject, f"without its {' and '.join(missing)}")
            continue
        images = {stream: Image(files[kind]) for stream, kind in _STREAMS.items()}
        yield Case(subject, subject, images, info={"site": sites[subject]})


ADAPTERS = (
    Adapter(
        name="ixi",
        title="IXI, Information eXtraction from Images (Imperial College London)",
        licence="CC BY-SA 3.0",
        access="Free, brain-development.org: the archives IXI-T1, IXI-T2 and IXI-PD.",
        find=_find,
        streams=tuple(_STREAMS),
        register="affine",
    ),
)
