"""Results of stages: found by name, checked against the config that wants them, loaded by group.

A result holds what its stage trained; `model.json` names, for every other group, the stage and the fingerprint it
comes from. So ct_mri's result is the four-modality model, and nothing is stored twice.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES
from medm2g_jax.model import MedM2G, build
from medm2g_jax.train import checkpoint


@dataclass(frozen=True)
class Upstream:
    """What a stage reads: parameters, latent scales, and where each group came from."""

    params: Params
    scales: dict[str, float]
    lineage: dict[str, dict[str, Any]]
    standing_in: tuple[str, ...]  # stages whose result was initialised instead (upstream="init")


def trains(stage: rounds.Stage, name: str) -> bool:
    return re.match(rounds.group_regex(stage.trains), name) is not None


def shared(config: ConfigDict) -> dict[str, Any]:
    """The fields that all stages of a run root agree on, as plain JSON values."""
    everything = json.loads(config.to_json_best_effort())
    return {field: everything[field] for field in rounds.SHARED}


def differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted field, old, new) of every leaf that differs; a field on one side only counts as None on the other."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*before, *now))
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if before == now else [(path, before, now)]


def find(root: epath.Path, config: ConfigDict, name: str) -> epath.Path | None:
    """The folder of a finished stage: in this run root, then, but for the stage that config itself asks for, in
    config.upstream_dirs; None where there is none.

    Raises:
      UserError: it was made with other shared fields; names the field, both values, and what to type.
    """
    elsewhere = () if name == config.stage else config.upstream_dirs
    for place in (root, *(epath.Path(d) for d in elsewhere)):
        meta = checkpoint.read_meta(place / name)
        if meta is None:
            continue
        different = differences(meta["shared"], shared(config))
        if different:
            field, old, new = different[0]
            words = meta["shared"]["preset"] + ("," + meta["shared"]["variant"] if meta["shared"]["variant"] else "")
            raise UserError(
                f"{place / name} was made with config.{field}={old!r}, this config has {new!r}; type the same words "
                f"({config_path(config.stage)}:{words}) or start afresh with --workdir=ANOTHER_FOLDER"
            )
        return place / name
    return None


def config_path(stage: str) -> str:
    return f"configs/{stage.split('_')[0]}.py" if stage.startswith(("align_", "ldm_")) else f"configs/{stage}.py"


def config_words(config: ConfigDict, stage: str) -> str:
    """What follows --config= to run a stage with this config's preset and variant."""
    words = [stage.split("_", 1)[1]] if stage.startswith(("align_", "ldm_")) else []
    words += [config.preset] + ([config.variant] if config.variant else [])
    names = {listing: name for name, listing in rounds.LISTINGS.items()}
    words += [names[config.listing]] if names.get(config.listing, "default") != "default" else []
    return f"{config_path(stage)}:{','.join(words)}"


def load_upstream(config: ConfigDict, root: epath.Path, place: Callable, dtype=None) -> Upstream:
    """Every group that config.stage reads and does not train first itself, from the stages that own them.

    Args:
      place: (name, shape) -> sharding.
      dtype: of frozen parameters, None to keep float32.
    """
    graph = rounds.graph(config.listing, config.get("freeze", "paper"))
    params: Params = {}
    scales: dict[str, float] = {}
    lineage: dict[str, dict] = {}
    missing = []
    owners = graph.owners(config.stage)
    for owner in dict.fromkeys(owners.values()):
        folder = find(root, config, owner)
        if folder is None:
            missing.append(owner)
            continue
        groups = [g for g, s in owners.items() if s == owner]
        regex = re.compile(rounds.group_regex(groups))
        meta = checkpoint.read_meta(folder)
        params |= checkpoint.load_model(
            folder,
            names=lambda n, regex=regex: regex.match(n) is not None,
            shardings=lambda n, x: place(n, x.shape),
            dtype=dtype,
        )
        scales |= meta["scales"]
        lineage |= meta["from"]
        lineage |= {g: dict(stage=owner, fingerprint=group_fingerprint(meta["fingerprints"], g)) for g in groups}
    if missing:
        raise UserError(f"{config.stage}: no result of {', '.join(missing)} in {root}")
    return Upstream(params, scales, lineage, tuple(missing))


def build_model(config: ConfigDict, vocab: Mapping[str, int], scales: Mapping[str, float], dtype=jnp.float32) -> MedM2G:
    """The recipe of all modalities of the config's listing."""
    net = json.loads(config.net.to_json_best_effort())
    modalities = rounds.graph(config.listing).modalities
    return build(tuples(net), modalities, vocab, scales, config.image_size, dtype, config.remat)


def tuples(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: tuples(v) for k, v in x.items()}
    return tuple(tuples(v) for v in x) if isinstance(x, list) else x


def describe(config: ConfigDict, stage: rounds.Stage, data, upstream: Upstream, model: MedM2G) -> dict[str, Any]:
    """model.json of a result, without what only the finished parameters tell."""
    graph = rounds.graph(config.listing, config.get("freeze", "paper"))
    plan = graph.plan(config.stage)
    done = [name for name in plan if graph.stages[name].verb == "round"]
    return {
        "stage": config.stage,
        "shared": shared(config),
        "trains": list(stage.trains),
        "from": dict(upstream.lineage) | {g: {"stage": config.stage} for g in stage.trains},
        "rounds": done,
        "pairs": graph.trained_pairs(done),
        "vocab": dict(data.tokenizers.sizes),
        "lengths": dict(data.lengths),
        "scales": dict(upstream.scales),
        "modalities": {m: asdict(MODALITIES[m]) for m in graph.modalities},
        "licences": sorted({r.licence for r in data.source.records if r.licence}),
        "standing_in": list(upstream.standing_in),
        "note": "Synthetic output. Not for clinical use.",
    }


def group_fingerprint(fingerprints: Mapping[str, int], group: str) -> int:
    """One number for a group of a result, from the fingerprints of its leaves."""
    regex = re.compile(rounds.group_regex((group,)))
    text = ";".join(f"{n}={v}" for n, v in sorted(fingerprints.items()) if regex.match(n))
    return zlib.crc32(text.encode())
