"""Data sets that are read as they are downloaded: one table, one file a set (or a family of them). A new set is one
file here and one row."""

from medm2g_jax.data.adapters import (
    acdc,
    brain_tumor,
    brats2020,
    chestxray14,
    chexpert,
    folder,
    gold_atlas,
    ixi,
    medicat,
    mimic_cxr,
    openi,
    rsna,
    siim,
    sliver07,
    synthrad,
)
from medm2g_jax.data.case import Adapter
from medm2g_jax.errors import UserError

_XRAYS_AND_TEXTS = (mimic_cxr, medicat, openi, chestxray14, chexpert, siim, rsna)
_VOLUMES = (synthrad, gold_atlas, brats2020, ixi, acdc, sliver07, brain_tumor)
ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter for module in (*_XRAYS_AND_TEXTS, *_VOLUMES, folder) for adapter in module.ADAPTERS
}


def adapter_of(name: str) -> Adapter:
    """The adapter of a set.

    Raises:
      UserError: no such set; lists those there are.
    """
    if name not in ADAPTERS:
        raise UserError(f"data set {name!r}: expected one of {', '.join(ADAPTERS)}")
    return ADAPTERS[name]
