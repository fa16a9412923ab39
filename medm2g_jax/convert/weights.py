"""A converted folder -> the parameters of a run's groups, each tensor read straight into its shards.

    <image modality>/flow <- sd15   <text>/flow <- vd      <image modality>/clip, <text>/clip <- clip
    image/vae             <- sd15   text/vae    <- optimus

Guides have no published weights. A few leaves are ours and start fresh beside the published ones: the embedding of a
modality's streams, and `prompt_in` where it was not fitted.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medm2g_jax.arrays import Params
from medm2g_jax.convert import converted
from medm2g_jax.convert.converted import Converted
from medm2g_jax.convert.files import Tensor, open_tensors, some
from medm2g_jax.errors import UserError
from medm2g_jax.modality import KINDS, MODALITIES

PROMPT_IN = "prompt_in.safetensors"  # beside sd15's weights: it takes clip as well, whichever is converted later
# (kind, group) -> folder, and our module -> the folder's
_SOURCES: dict[tuple[str, str], tuple[str, dict[str, str]]] = {
    ("image", "flow"): ("sd15", {"unet": "unet", "prompt_in": "prompt_in"}),
    ("text", "flow"): ("vd", {"unet": "unet", "prompt_in": "prompt_in"}),
    ("image", "vae"): ("sd15", {"vae": "vae"}),
    ("text", "vae"): ("optimus", {"vae": "vae"}),
    ("image", "clip"): ("clip", {"clip": "vision"}),
    ("text", "clip"): ("clip", {"clip": "text"}),
}
FRESH = r".*/(stream/embedding|prompt_in/kernel)$"


def source_of(group: str) -> tuple[str, dict[str, str]] | None:
    """("ct/flow") -> the folder its weights come from and the names of the modules in it; None for guides."""
    owner, _, name = group.partition("/")
    kind = owner if owner in KINDS and name == "vae" else MODALITIES[owner].kind
    return _SOURCES.get((kind, name))


def offers(weights: str, group: str) -> bool:
    """Do converted weights, where a run has some, say how this group starts?"""
    return bool(weights) and source_of(group) is not None


def folder_of(weights: str, group: str, net: Mapping[str, Any]) -> Converted:
    """The open folder that holds a group.

    Raises:
      UserError: it is not there (names the command), or its networks have other sizes than `net`, config.net.
    """
    part, _ = source_of(group)
    found = converted.read(weights, part)
    if part == "sd15" and (found.folder / PROMPT_IN).is_file():
        found.tensors.update(open_tensors(found.folder / PROMPT_IN))
    for name, sizes in found.meta["net"].items():
        for field, value in sizes.items() if isinstance(sizes, dict) else ():
            own = net[name].get(field, value)
            if _plain(own) != _plain(value):
                raise UserError(
                    f"{found.folder}: {name}.{field} is {value}, config.net.{name}.{field} is {own}; choose the preset "
                    f"that these weights are for, or --config.net.{name}.{field}={value}"
                )
    return found


def _plain(x: Any) -> Any:
    return [_plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def load(
    weights: str,
    group: str,
    shapes: Mapping[str, tuple[int, ...]],
    net: Mapping[str, Any],
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
    dtype: Any = np.float32,
) -> tuple[Params, dict[str, Any]]:
    """The group's parameters that the folder has, and where they came from (for model.json).

    Args:
      weights: the folder that holds sd15/ clip/ vd/ optimus/.
      shapes: names and shapes of the group, as the network has them.
      place: (name, shape) -> sharding.

    Raises:
      UserError: the folder is missing, or does not fit the network.
    """
    found = folder_of(weights, group, net)
    modules = source_of(group)[1]
    taken: dict[str, str] = {}
    for name in shapes:
        owner, module, rest = name.split("/", 2)
        there = f"{modules[module]}/{rest}"
        if there in found.tensors or not re.match(FRESH, name):
            taken[name] = there
    missing = [there for there in taken.values() if there not in found.tensors]
    if missing:
        raise UserError(f"{found.folder}: {len(missing)} missing of {group}: {some(missing)}; convert it again")
    wrong = [
        f"{there} (expected {list(shapes[name])}, found {list(found.tensors[there].shape)})"
        for name, there in taken.items()
        if found.tensors[there].shape != tuple(shapes[name])
    ]
    if wrong:
        raise UserError(
            f"{found.folder}: {len(wrong)} of {group} do not fit config.net or the tokenizers: {some(wrong, 3)}"
        )
    unfitted = source_of(group)[0] == "sd15" and group.endswith("/flow") and "prompt_in/kernel" not in found.tensors
    if unfitted and jax.process_index() == 0:
        print(
            f"warning: {found.folder / PROMPT_IN} is not there: {group} starts without what lets it read prompts of "
            f"the shared space; fit it with medm2g convert prompt_in --to {weights}",
            flush=True,
        )
    params = {name: put(found.tensors[there], place(name, shapes[name]), dtype) for name, there in taken.items()}
    return params, {"weights": source_of(group)[0], "fingerprint": fingerprint(found, taken.values())}


def tokenizers(weights: str) -> dict[str, Path]:
    """The folders of the three tokenizers that belong to converted weights.

    Raises:
      UserError: one is not there; names what brings it.
    """
    out = {}
    for name, part in (("clip", "clip"), ("bert", "optimus"), ("gpt2", "optimus")):
        out[name] = Path(weights) / part / "tokenizers" / name
        if not out[name].is_dir():
            raise UserError(
                f"{out[name]}: no tokenizer there, and its network was trained with one; copy its files into that "
                f"folder (tokenizer.json, or vocab and merges), or delete {Path(weights) / part} and convert again:\n  "
                + converted.COMMANDS[part].format(weights)
            )
    return out


def fingerprint(found: Converted, names) -> int:
    """One number for some tensors of a folder, from their CRCs."""
    known = found.meta["crc32"]
    prints = {n: known[n] if n in known else zlib.crc32(found.tensors[n].read().tobytes()) for n in names}
    return zlib.crc32(";".join(f"{n}={v}" for n, v in sorted(prints.items())).encode())


def put(tensor: Tensor, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    """A tensor of a file as an array on a mesh: of every shard only its own part is read and cast."""
    path, shape = Path(tensor.file), tensor.shape
    if not shape:
        return jax.device_put(tensor.read().astype(dtype), sharding)
    # Unmapped with the last reference to it, at the end of this call: its pages never add up.
    mapped = np.memmap(path, tensor.dtype, "r", tensor.offset, shape)
    return jax.make_array_from_callback(shape, sharding, lambda index: np.array(mapped[index], dtype))
