"""From a run's folder to a model that generates: `load`."""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from medm2g_jax import cache, rounds
from medm2g_jax.arrays import Params
from medm2g_jax.config import weights_folder
from medm2g_jax.convert import weights
from medm2g_jax.convert.converted import exists as converted_exists
from medm2g_jax.convert.files import open_tensors
from medm2g_jax.convert.packed import SCALE, unpack
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import activation_dtype, use_compilation_cache
from medm2g_jax.diffusion import Process
from medm2g_jax.errors import UserError
from medm2g_jax.inference import Model
from medm2g_jax.modality import adopt
from medm2g_jax.model import MedM2G, build, init_group, merged
from medm2g_jax.train import checkpoint
from medm2g_jax.train.results import group_fingerprint, tuples

BOX = epath.Path(__file__).parent / "models"


def newest_result(root: epath.Path) -> epath.Path:
    """The folder of the finished stage of a run root that makes most: with the most rounds behind it, or else the most
    flows, the newest of those. A fine-tune is named by whoever means it, unless there is nothing else.

    Raises:
      UserError: nothing there can generate; says the command that makes something that does.
    """
    done = []
    for folder in root.iterdir() if root.is_dir() else ():
        meta = checkpoint.read_meta(folder) if folder.is_dir() else None
        if meta is not None and makes(meta):
            general = rounds.tuned(folder.name) is None
            done.append((general, len(meta["rounds"]), len(makes(meta)), meta["finished"], folder))
    if not done:
        raise UserError(
            f"{root}: no finished round or flow in it; train one with "
            f"python -m medm2g_jax.main --config=configs/text_ct.py:tiny --workdir={root}"
            + "".join(f", or take the model in the box, {name}" for name in in_the_box()[:1])
        )
    return max(done, key=lambda d: d[:4])[4]


def makes(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The modalities that a result can generate: those whose UNet it comprises; of a round those that it guides."""
    part = "guide" if meta["rounds"] else "flow"
    return tuple(m for m in meta["modalities"] if f"{m}/{part}" in meta["from"] and f"{m}/flow" in meta["from"])


def in_the_box() -> tuple[str, ...]:
    """Names of the models that come with the package, which `load` takes in place of a path."""
    return tuple(sorted(p.name for p in BOX.iterdir() if (p / "model.json").exists())) if BOX.is_dir() else ()


def locate(path: str) -> epath.Path:
    """The folder that `load` reads: `path` where a result or an exported model is in it, else its newest result; where
    neither is there, the model of that name in the box.

    Raises:
      UserError: see `newest_result`.
    """
    root = epath.Path(path)
    if checkpoint.read_meta(root) is not None:
        return root
    try:
        return newest_result(root)
    except UserError:
        if path in in_the_box():  # whatever else a folder of that name holds
            return BOX / path
        raise


def described(path: str) -> tuple[epath.Path, dict[str, Any]]:
    """(folder, what its model.json says) of what `load` reads, in no time; its modalities are registered.

    Raises:
      UserError: nothing finished there, or nothing that generates.
    """
    root = locate(path)
    meta = checkpoint.read_meta(root)
    if not makes(meta):
        raise UserError(f"{root}: {meta['stage']} generates nothing; name the folder of a round or flow, or a run root")
    adopt(meta["modalities"], str(root / "model.json"))
    return root, meta


def load(path: str, modalities: Sequence[str] | None = None, dtype: str = "float32") -> Model:
    """A trained model.

    Args:
      path: a run root (its newest finished round, or single flow where there is none), one stage's folder in it, an
        exported folder, or the name of a model in the box.
      modalities: make only these, which leaves the other UNets unread; all by default. Anything may be given all the
        same.
      dtype: in which parameters are stored: "float32", or "bfloat16" for half the memory. Activations have it too, on
        CPU, which has no bfloat16 arithmetic, float32.

    Raises:
      UserError: nothing finished there, or a stage it stands on has been trained again since.
    """
    root, meta = described(path)
    wanted = makes(meta)
    if modalities is not None:
        unknown = [m for m in modalities if m not in wanted]
        if unknown:
            raise UserError(f"modalities: {unknown[0]!r} is not among what {root} makes: {', '.join(wanted)}")
        wanted = tuple(m for m in wanted if m in modalities)
    stored = activation_dtype(dtype)
    shared = meta["shared"]
    model = build(
        {"loud_prompts": False} | tuples(shared["net"]),  # results of before do not name it
        tuple(meta["modalities"]),
        meta["vocab"],
        meta["scales"],
        shared["image_size"],
        jnp.float32 if jax.default_backend() == "cpu" else stored,
        predict=meta["predict"],
        schedule=shared["schedule"] if "schedule" in shared else Process.schedule,
        slots=meta["slots"] if "slots" in meta else {},  # results of before have none
        centred=bool(rounds.graph(shared["listing"]).centre),
    )
    # Of what is only given, everything but its UNet: C for prompts, V, f and the autoencoder for guides.
    unread = {m for m in meta["modalities"] if m not in wanted}

    def needed(name: str) -> bool:
        owner, part = name.split("/")[:2]
        return owner not in unread or part not in ("unet", "prompt_in", "null", "lora")

    if meta["storage"] not in STORAGES:
        raise UserError(f"{root / 'model.json'}: storage {meta['storage']!r}; this version reads {', '.join(STORAGES)}")
    params, tokenizers = STORAGES[meta["storage"]](root, meta, model, needed, stored)
    for name in wanted:
        params = merged(params, name)
    texts = Tokenizers.load(tokenizers, shared["net"]["report_words"]) if meta["vocab"] else None
    config = json.loads((root / "config.json").read_text())
    return Model(model, params, texts, meta, config["sample"], wanted)


def _from_run(
    root: epath.Path, meta: Mapping, model: MedM2G, needed: Callable[[str], bool], dtype: Any
) -> tuple[Params, epath.Path]:
    """Parameters of a stage's result: its own, and those of the stages and converted weights that it stands on."""
    use_compilation_cache(root.parent / "xla_cache")
    params: Params = {}
    stages: dict[epath.Path, list[str]] = {}
    for group, origin in meta["from"].items():
        if "stage" in origin:
            run = epath.Path(origin["run"]) if "run" in origin else root.parent
            stages.setdefault(run / _plain_name(root, origin["stage"]), []).append(group)
    for folder, groups in stages.items():
        found = checkpoint.read_meta(folder)
        if found is None:
            raise UserError(f"{root} stands on {folder}, which is not there (or not finished); copy the whole run root")
        for group in groups:
            origin = meta["from"][group]
            expected = None if "weights" in origin else origin.get("fingerprint")
            if expected is not None and expected != group_fingerprint(found["fingerprints"], group):
                raise UserError(
                    f"{folder}: {group} has been trained again since {root} was; train {meta['stage']} again too "
                    f"(delete {root} and run its command)"
                )
        regex = re.compile(rounds.group_regex(groups))
        names = [n for n in found["shapes"] if regex.match(n) and needed(n)]
        if names:
            params |= checkpoint.load_model(folder, names=set(names).__contains__, dtype=dtype)
    converted = [group for group, origin in meta["from"].items() if "weights" in origin]
    return params | _converted(root, meta, model, needed, converted, dtype), root.parent / "tokenizers"


def _from_export(
    root: epath.Path, meta: Mapping, model: MedM2G, needed: Callable[[str], bool], dtype: Any
) -> tuple[Params, epath.Path]:
    use_compilation_cache(cache.compiled())
    return exported(root, meta, needed, dtype)


def exported(root: epath.Path, meta: Mapping, needed: Callable[[str], bool], dtype: Any) -> tuple[Params, epath.Path]:
    """Parameters of a model that `medm2g convert export --as safetensors` or `hub` wrote, compared with its CRCs, and
    the folder of its tokenizers.

    Raises:
      UserError: the file is damaged, or another than the one that was exported.
    """
    path = Path(root) / (meta["file"] if "file" in meta else "weights.safetensors")  # exports of before name none
    params: Params = {}
    tensors = open_tensors(path)
    if set(tensors) != set(meta["crc32"]):
        raise UserError(f"{path}: model.json names other tensors; export the model again")

    def read(name: str) -> np.ndarray:
        value = tensors[name].read()
        if zlib.crc32(value.tobytes()) != meta["crc32"][name]:
            raise UserError(f"{path} is damaged: the CRC of {name} differs; export or download the model again")
        return value

    for name in tensors:
        if needed(name) and not name.endswith(SCALE):
            scale = read(name + SCALE) if name + SCALE in tensors else None
            params[name] = jnp.asarray(unpack(name, read(name), scale), dtype)
    return params, root / "tokenizers"


STORAGES = {"orbax": _from_run, "safetensors": _from_export}  # as model.json names them


def _plain_name(root: epath.Path, stage: str) -> str:
    if not stage.isidentifier():
        raise UserError(f"{root / 'model.json'}: names a stage {stage!r}, which is no name; not a file to trust")
    return stage


def _converted(
    root: epath.Path, meta: Mapping, model: MedM2G, needed: Callable[[str], bool], groups: Sequence[str], dtype: Any
) -> Params:
    """The groups of a model that no stage trained, from the converted weights that its run was started with, where they
    were then or where MEDM2G_SD_WEIGHTS says that they are now."""
    if not groups:
        return {}
    net = tuples(meta["shared"]["net"])
    places = dict.fromkeys(p for p in (meta["shared"]["weights"], weights_folder()) if p)
    shapes = jax.eval_shape(lambda key: init_group(model, key, groups), jax.random.key(0))
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: Params = {}
    for group in groups:
        origin = meta["from"][group]
        regex = re.compile(rounds.group_regex((group,)))
        mine = {n: x.shape for n, x in shapes.items() if regex.match(n)}
        mine = {n: s for n, s in mine.items() if n not in origin.get("fresh", ())}
        if not any(map(needed, mine)):
            continue
        there = [place for place in places if converted_exists(place, origin["weights"])]
        for place in there:  # the folder may have moved, and another may stand where it was: contents tell
            found, now = weights.load(place, group, mine, net, lambda name, shape: local, dtype)
            if now["fingerprint"] == origin["fingerprint"]:
                params |= {name: value for name, value in found.items() if needed(name)}
                break
        else:
            part = origin["weights"]
            looked = " and ".join(f"{place}/{part}" for place in there or places) or f"no folder of {part}"
            why = "was converted again, from other files, since" if there else "is not there any more, as when"
            raise UserError(
                f"{looked} {why} {root} was trained; say where the weights are that it stands on, as in "
                f"MEDM2G_SD_WEIGHTS=FOLDER, or train {meta['stage']} again"
            )
    return params
