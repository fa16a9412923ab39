"""An exported model, or one in the box, as what a run goes on from: `config.upstream_dirs` may name it."""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.config import stage_config, stage_graph
from medm2g_jax.errors import UserError
from medm2g_jax.loading import BOX, exported, in_the_box
from medm2g_jax.train import checkpoint
from medm2g_jax.train.results import group_fingerprint, in_groups


def run_root(name: str, root: epath.Path) -> str:
    """The run root that `name` means: itself, or, of an exported model or one in the box, a folder under `root` that
    holds it as results of stages. What several stages have trained is in each of them as the last has left it.

    Raises:
      UserError: nothing finished is there.
    """
    place = epath.Path(name)
    meta, inside = checkpoint.read_meta(place), place.iterdir() if place.is_dir() else ()
    stages = any(checkpoint.read_meta(folder) for folder in inside)
    if meta is None and not stages and name in in_the_box():  # whatever else a folder of that name holds
        place = BOX / name
        meta = checkpoint.read_meta(place)
    if meta is None or meta["storage"] == "orbax":
        if not stages:
            box = f"; or the name of a model in the box: {', '.join(in_the_box())}" if in_the_box() else ""
            raise UserError(
                f"config.upstream_dirs: no finished stage in {place}; expected a run root, or an exported model{box}"
            )
        return os.fspath(place)
    # Another model of the same name is another folder.
    folder = root / f"{place.name}-{zlib.crc32(json.dumps(meta['crc32'], sort_keys=True).encode()):08x}"
    if checkpoint.read_meta(folder / meta["stage"]) is None:
        _write(folder, place, meta)
    return os.fspath(folder)


def _write(folder: epath.Path, place: epath.Path, meta: Mapping[str, Any]) -> None:
    """The stage that the model is the result of comes last: it is there when all are."""
    params, tokenizers = exported(place, meta, lambda name: True, jnp.float32)
    first = jax.process_index() == 0
    if meta["vocab"] and first:
        paths = {path.name: path for path in tokenizers.iterdir() if path.is_dir()}
        copy_tokenizers(paths, folder / "tokenizers", place.name)
    prints = checkpoint.fingerprints(params)
    config = json.loads((place / "config.json").read_text())
    config = ConfigDict({**config, "listing": tuple(config["listing"])})
    graph = stage_graph(config)
    for name in graph.plan(meta["stage"]):
        groups = [g for g in graph.stages[name].trains if any(in_groups((g,), n) for n in params)]
        if first:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(stage_config(config, name).to_json_best_effort(indent=1))
        checkpoint.save_model(folder / name, _of(params, groups), _meta(meta, graph, name, groups, prints))


def copy_tokenizers(paths: Mapping[str, Any], folder: epath.Path, said: str) -> None:
    """Make them those of a run root: its folder `tokenizers`. said: where they come from, no path: exports hold it."""
    for name, path in paths.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in path.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "done").write_text(f"copied from {said}\n")


def _of(params: Params, groups: list[str]) -> Params:
    return {name: value for name, value in params.items() if in_groups(groups, name)}


def _meta(
    meta: Mapping[str, Any], graph: rounds.Graph, name: str, groups: list[str], prints: Mapping[str, int]
) -> dict[str, Any]:
    """What model.json of a stage says: of what was known when it ended."""
    plan = graph.plan(name)
    owners = {g: stage for stage in plan for g in graph.stages[stage].trains if g in meta["from"]}
    origins = {g: dict(stage=stage, fingerprint=group_fingerprint(prints, g)) for g, stage in owners.items()}
    known = {g.split("/")[0] for g in owners}
    at = {m for m in known if f"{m}/flow" in owners}
    kept = {k: v for k, v in meta.items() if k not in ("crc32", "file", "figures", "slots")}
    return kept | dict(
        stage=name,
        trains=groups,
        rounds=[r for r in meta["rounds"] if r in plan],
        predict={m: p for m, p in meta["predict"].items() if m in at},
        slots={m: s for m, s in meta["slots"].items() if f"{m}/grid" in owners} if "slots" in meta else {},
        scales={kind: s for kind, s in meta["scales"].items() if f"{kind}/vae" in owners},
        figures=[],
        **{"from": origins},
    )
