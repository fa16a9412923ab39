"""Results of stages: found by name, checked against the config that wants them, loaded by group.

A result holds what its stage trained; `model.json` names, for every other group, the stage and the fingerprint it
comes from. So ct_mri's result is the four-modality model, and nothing is stored twice.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.config import stage_graph
from medm2g_jax.convert import converted, weights
from medm2g_jax.data.contents import contents_of
from medm2g_jax.data.pipeline import registers
from medm2g_jax.data.source import extents, ranges
from medm2g_jax.device import host_device, jit
from medm2g_jax.diffusion import Process
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES
from medm2g_jax.model import MedM2G, build, init_group
from medm2g_jax.nn.attention import traced_for
from medm2g_jax.train import checkpoint, data_record

LINEAGE = "lineage.json"
AGAIN = "train again: "
PREDICT = "predict"  # the one field of a flow's own that all who stand on it have to say alike


@dataclass(frozen=True)
class Upstream:
    """What a stage reads: parameters, latent scales, and where each group came from."""

    params: Params
    scales: dict[str, float]
    lineage: dict[str, dict[str, Any]]
    standing_in: tuple[str, ...]  # stages whose result was initialised instead (upstream="init")
    own: tuple[str, ...]  # names among params that no other result or folder holds: this one has to
    rounds: tuple[str, ...]  # that its results stand on
    predict: dict[str, str]  # what each flow's UNet predicts
    slots: dict[str, tuple[str, ...]]  # the streams that may stand on its input channels
    registered: tuple[tuple[str, str], ...]  # (source, target) that were trained to do so
    licences: tuple[str, ...] = ()  # of converted weights, and of what its results stand on


def trains(stage: rounds.Stage, name: str) -> bool:
    return in_groups(stage.trains, name)


def in_groups(groups: Iterable[str], name: str) -> bool:
    return re.match(rounds.group_regex(groups), name) is not None


def shared(config: ConfigDict) -> dict[str, Any]:
    """The fields that all stages of a run root agree on, as plain JSON values."""
    everything = json.loads(config.to_json_best_effort())
    del everything["data"]["accept"]  # says what may differ, and is none of it
    for field in ("registered", "weights"):
        if not everything["data"][field]:
            del everything["data"][field]  # results of before it was a field stay good
    if everything["schedule"] == Process.schedule:
        del everything["schedule"]  # these too
    return {field: everything[field] for field in rounds.SHARED if field in everything}


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
      UserError: it was made with other shared fields, or is a flow that predicts something else than its config says;
        names the field, both values, and what to type.
    """
    elsewhere = () if name == config.stage else config.upstream_dirs
    for place in (root, *(epath.Path(d) for d in elsewhere)):
        meta = checkpoint.read_meta(place / name)
        if meta is None:
            continue
        other_data = rounds.tuned(config.stage) is not None  # a fine-tune may be of any
        different = [
            found
            for found in differences(meta["shared"], shared(config))
            if not (other_data and found[0].startswith("data."))
            and not moved(place, config, found, meta["weights"] if "weights" in meta else None)
        ]
        if different:
            field, old, new = different[0]
            words = meta["shared"]["preset"] + ("," + meta["shared"]["variant"] if meta["shared"]["variant"] else "")
            raise UserError(
                f"{place / name} was made with config.{field}={old!r}, this config has {new!r}; type the same words "
                f"({config_path(config.stage)}:{words}) or start afresh with --workdir=ANOTHER_FOLDER"
            )
        _hold_predictions(place / name, config, name, meta)
        return place / name
    return None


def _hold_predictions(folder: epath.Path, config: ConfigDict, name: str, meta: Mapping[str, Any]) -> None:
    """Hold a finished flow to what its config says that it predicts.

    Raises:
      UserError: it predicts something else; names both, and what to type.
    """
    if name != config.stage and name not in config.stages:
        return  # not of this config's plan
    field, own = ("", config) if name == config.stage else (f"stages.{name}.", config.stages[name])
    if PREDICT not in own or PREDICT not in meta:
        return
    for learnt in meta[PREDICT].values():
        if own[PREDICT] not in (learnt, "auto"):
            raise UserError(
                f"{folder} was trained with config.{PREDICT}={learnt!r}, this config has config.{field}{PREDICT}="
                f"{own[PREDICT]!r}; type --config.{field}{PREDICT}={learnt}, or start afresh with "
                "--workdir=ANOTHER_FOLDER"
            )


def moved(
    place: epath.Path, config: ConfigDict, difference: tuple[str, Any, Any], prints: Mapping[str, int] | None
) -> bool:
    """Is this difference one of places alone, with the same in both?

    Args:
      place: the run root that was made with the other one.
      difference: (field, old, new), of `differences`.
      prints: of the converted weights then, as `weights_prints` gives them; None where nobody knows.

    Raises:
      UserError: data of other contents; says what differs.
    """
    field, old, new = difference
    if field == "data.source":
        before = data_record.read(place)
        if before is None:
            return False
        now = contents_of(config)
        if now.fingerprint not in (before["fingerprint"], config.data.accept):
            raise UserError(data_record.differ(place, before, now, config.data.accept))
        return True
    if field == "weights" and old and new and prints is not None:
        now = weights_prints(new, tuple(prints))
        return now == dict(prints)
    return False


def weights_prints(folder: str, parts: Sequence[str]) -> dict[str, int]:
    """One number for each of these folders of converted weights that is there, from the CRCs of its tensors."""
    return {
        part: zlib.crc32(json.dumps(converted.read(folder, part).meta["crc32"], sort_keys=True).encode())
        for part in parts
        if folder and converted.exists(folder, part)
    }


def stands_on(config: ConfigDict, trains: Sequence[str], upstream: Upstream) -> dict[str, Any]:
    """What a stage stands on: where each group comes from that it reads, and the converted weights in it."""
    begun = [g for g in trains if begins(config, g)]
    parts = {weights.source_of(g)[0] for g in begun}
    parts |= {origin["weights"] for origin in upstream.lineage.values() if "weights" in origin}
    return {"from": dict(upstream.lineage), "weights": weights_prints(config.weights, sorted(parts))}


def record_lineage(config: ConfigDict, folder: epath.Path, trains: Sequence[str], upstream: Upstream) -> None:
    """Write what a stage that begins stands on, beside its checkpoints: whoever resumes it compares."""
    if jax.process_index() == 0 and not _steps(folder):
        (folder / LINEAGE).write_text(json.dumps(stands_on(config, trains, upstream), indent=1))


def read_lineage(folder: epath.Path) -> dict[str, Any] | None:
    """`stands_on` of a stage, finished or begun; None where it has not learnt anything yet."""
    meta = checkpoint.read_meta(folder)
    if meta is not None:
        return {"from": meta["from"], "weights": meta["weights"] if "weights" in meta else {}}
    path = folder / LINEAGE
    return json.loads(path.read_text()) if _steps(folder) and path.exists() else None


def _steps(folder: epath.Path) -> bool:
    saves = folder / "checkpoints"
    return saves.exists() and any(path.name.isdigit() for path in saves.iterdir())


def stale(config: ConfigDict, root: epath.Path, plan: Sequence[str]) -> dict[str, str]:
    """Stages that do not stand any more on what they were trained on, and why: to go on from them would join weights
    with latents of another scale."""
    out: dict[str, str] = {}
    for name in plan:
        folder = find(root, config, name) or root / name
        record = read_lineage(folder)
        if record is None:
            continue
        for group, origin in record["from"].items():
            if "weights" in origin or origin["stage"] == name or "fingerprint" not in origin:
                continue
            owner = origin["stage"]
            there = find(root, config, owner)
            if owner in out:
                out[name] = f"{owner} has to be trained again"
            elif there is None:
                out[name] = f"{owner}, which it stands on, is gone"
            elif group_fingerprint(checkpoint.read_meta(there)["fingerprints"], group) != origin["fingerprint"]:
                out[name] = f"{owner} has been trained again since"
        now = weights_prints(config.weights, tuple(record["weights"]))
        other = [part for part, value in now.items() if record["weights"][part] != value]
        if other:
            out[name] = f"{config.weights}/{other[0]} was converted again since, from other files"
    return out


def refuse_stale(config: ConfigDict, root: epath.Path, todo: Sequence[tuple[str, str]]) -> None:
    """Go on only where every stage of a plan still stands on what it was trained on.

    Raises:
      UserError: names those that do not, why, and what to type.
    """
    again = {name: what.removeprefix(AGAIN) for name, what in todo if what.startswith(AGAIN)}
    if again:
        folders = " ".join(os.fspath(find(root, config, name) or root / name) for name in again)
        raise UserError(
            f"{', '.join(again)}: to be trained again ({next(iter(again.values()))}); bring back what was there, or "
            f"delete what stands on it and run the same command: rm -r {folders}"
        )


def config_path(stage: str) -> str:
    if rounds.tuned(stage):
        return "configs/finetune.py"
    return f"configs/{stage.split('_')[0]}.py" if stage.startswith(("align_", "ldm_")) else f"configs/{stage}.py"


def config_words(config: ConfigDict, stage: str) -> str:
    """What follows --config= to run a stage with this config's preset and variant."""
    words = [stage.split("_", 1)[1]] if stage.startswith(("align_", "ldm_")) else [*(rounds.tuned(stage) or ())]
    words += [config.preset] + ([config.variant] if config.variant else []) + listing_words(config.listing)
    return f"{config_path(stage)}:{','.join(words)}"


def listing_words(listing: tuple[str, ...]) -> list[str]:
    """The words after the colon of a config that choose a listing."""
    name = next((name for name, known in rounds.LISTINGS.items() if known == tuple(listing)), None)
    if name is not None:
        return [] if name == "default" else [name]
    return ["+".join(listing), *(["alone"] if len(listing) == 1 else [])]


def graph_of(config: ConfigDict, root: epath.Path) -> rounds.Graph:
    """The stage graph of a run: with upstream="init", rounds before config.stage without a result are absent."""
    before = config.listing if rounds.tuned(config.stage) else ()
    before = config.listing[: config.listing.index(config.stage)] if config.stage in config.listing else before
    absent = [r for r in before if config.upstream == "init" and find(root, config, r) is None]
    return stage_graph(config, tuple(absent))


def latent_scales(config: ConfigDict, root: epath.Path, graph: rounds.Graph) -> dict[str, float] | None:
    """Kind -> scale of its latents, of the autoencoders that config.stage stands on; None before they are done."""
    scales: dict[str, float] = {}
    for owner in dict.fromkeys(graph.owners(config.stage).values()):
        if graph.stage(owner).verb == "vae":
            folder = find(root, config, owner)
            if folder is None:
                return None
            scales |= checkpoint.read_meta(folder)["scales"]
    return scales


def converted_stage(config: ConfigDict, name: str) -> bool:
    """Does this stage count as done since converted weights hold its result? Autoencoders do, where a run has some."""
    if rounds.tuned(name):
        return False
    trains = rounds.graph(config.listing).stage(name).trains
    return name != config.stage and all(g.endswith("/vae") and begins(config, g) for g in trains)


def load_upstream(
    config: ConfigDict,
    root: epath.Path,
    graph: rounds.Graph,
    place: Callable,
    dtype: Any = None,
    vocab: Mapping[str, int] | None = None,
) -> Upstream:
    """Every group that config.stage reads and does not train first itself, from the stages that own them.

    What has no result comes from converted weights and, with upstream="init", starts fresh where these have nothing.

    Args:
      graph: the run's own.
      place: (name, shape) -> sharding.
      dtype: of frozen parameters, None to keep float32; what trains on is read in float32 all the same.
      vocab: sizes of the tokenizers; what stands in for missing results is made with them.
    """
    stage = graph.stage(config.stage)
    params: Params = {}
    scales: dict[str, float] = {}
    predict: dict[str, str] = {}
    slots: dict[str, tuple[str, ...]] = {}
    registered: dict[tuple[str, str], None] = {}
    lineage: dict[str, dict] = {}
    missing, standing_in, groups_in, done, licences = [], [], [], set(), set()
    owners = graph.owners(config.stage)
    for owner in dict.fromkeys(owners.values()):
        folder = find(root, config, owner)
        groups = [g for g, s in owners.items() if s == owner]
        if folder is None:
            given = converted_stage(config, owner)
            if given or config.upstream == "init":
                groups_in += groups
                standing_in += [] if given else [owner]
            else:
                missing.append(owner)
            continue
        meta = checkpoint.read_meta(folder)
        done |= set(meta["rounds"])
        licences |= set(meta["licences"])
        for some, stored in (
            ([g for g in groups if g not in stage.trains], dtype),
            (set(groups) & {*stage.trains}, None),
        ):
            regex = re.compile(rounds.group_regex(sorted(some)))
            if some:
                params |= checkpoint.load_model(
                    folder,
                    names=lambda n, regex=regex: regex.match(n) is not None,
                    shardings=lambda n, x: place(n, x.shape),
                    dtype=stored,
                )
        scales |= meta["scales"]
        predict |= meta["predict"]
        if "slots" in meta:  # results of before have none
            slots |= tuples(meta["slots"])
            registered |= dict.fromkeys(tuples(meta["pairs"]["registered"]))
        # What lies in another run root is found there again.
        there = {} if folder.parent == root else {"run": os.path.abspath(folder.parent)}
        lineage |= {g: there | origin if "stage" in origin else origin for g, origin in meta["from"].items()}
        for g in groups:
            lineage[g] = dict(stage=owner, fingerprint=group_fingerprint(meta["fingerprints"], g), **there)
    if missing:
        raise UserError(f"{config.stage}: no result of {', '.join(missing)} in {root}")
    own: tuple[str, ...] = ()
    if groups_in:
        predict |= predictions(config, groups_in)
        for some, stored in (
            ([g for g in groups_in if g not in stage.trains], dtype or jnp.float32),
            ([g for g in groups_in if g in stage.trains], jnp.float32),
        ):
            if some:
                stood, origins, more, fresh = stand_in(config, some, place, stored, vocab)
                params |= stood
                lineage |= origins
                scales |= more
                own += fresh
    # A group that trains here may start from converted weights as well.
    begun = (*groups_in, *stage.trains)
    used = {weights.source_of(g)[0] for g in begun if begins(config, g)}
    licences |= {converted.read(config.weights, part).meta["licence"] for part in used}
    ordered = tuple(r for r in config.listing if r in done)
    return Upstream(
        params=params,
        scales=scales,
        lineage=lineage,
        standing_in=tuple(standing_in),
        own=own,
        rounds=ordered,
        predict=predict,
        slots=slots,
        registered=tuple(registered),
        licences=tuple(sorted(licences)),
    )


def begins(config: ConfigDict, group: str) -> bool:
    """Do converted weights begin this group, where the run has some?"""
    owner, part = group.split("/")
    kind = MODALITIES[owner].kind if owner in MODALITIES and part != "vae" else owner
    return f"{kind}/{part}" in config.begin and weights.offers(config.weights, group)


def predictions(config: ConfigDict, groups: Sequence[str]) -> dict[str, str]:
    """What the UNets among these groups predict, as their own stages' configs say: {modality: name}.

    Raises:
      UserError: converted weights are to begin one, and it is to predict anything but what they do, eps; or one is to
        predict eps where the schedule ends without signal.
    """
    found = {}
    for group in groups:
        modality, part = group.split("/")
        name = f"ldm_{modality}"
        if part != "flow":
            continue
        field = "config" if name == config.stage else f"config.stages.{name}"
        begun = begins(config, group)
        told = (config if name == config.stage else config.stages[name]).predict
        found[modality] = told if told != "auto" else "eps" if begun else "sample"
        if begun and found[modality] != "eps":
            raise UserError(
                f"{field}.predict={told!r}, but {name} begins from the converted weights in {config.weights}, which "
                "predict eps; leave it at 'auto', or start afresh with --config.weights="
            )
        if config.schedule == "zero_snr" and found[modality] == "eps":
            raise UserError(
                f"config.schedule='zero_snr' ends without signal, where eps tells nothing of what is to be made, and "
                f"{name} predicts eps ({field}.predict={told!r}); leave it at 'scaled_linear', or let the flow predict "
                "v or sample"
            )
    return found


def slots_of(graph: rounds.Graph, name: str) -> dict[str, tuple[str, ...]]:
    """The slots of each flow that a round before stage `name`, or this one, gave input channels for its sources."""
    until = list(graph.stages)[: list(graph.stages).index(name) + 1]
    given = dict.fromkeys(m for s in until if s not in graph.absent for m in graph.stages[s].registered)
    return {m: graph.slots(m) for m in given}


def stand_in(
    config: ConfigDict, groups: Sequence[str], place: Callable, dtype: Any, vocab: Mapping[str, int]
) -> tuple[Params, dict[str, dict], dict[str, float], tuple[str, ...]]:
    """(parameters, lineage, latent scales, fresh names) of groups without a result: converted weights, else fresh."""
    model = build_model(config, vocab, {})
    key = jax.random.fold_in(jax.random.key(config.seed), 0x5EED)
    shapes = {n: x.shape for n, x in jax.eval_shape(lambda k: init_group(model, k, groups), key).items()}
    params, lineage, scales = converted_params(config, groups, shapes, place, dtype)
    fresh = tuple(n for n in shapes if n not in params)
    made = fresh_params(lambda k: init_group(model, k, groups), key, {n: place(n, shapes[n]) for n in fresh}, dtype)
    for group in groups:
        regex = re.compile(rounds.group_regex((group,)))
        names = [n for n in fresh if regex.match(n)]
        if group not in lineage:
            lineage[group] = dict(stage=config.stage)
        elif names:
            lineage[group] |= dict(stage=config.stage, fresh=names)
    return params | made, lineage, scales, fresh


def fresh_params(init: Callable, key: Any, placed: Mapping[str, Any], dtype: Any = jnp.float32) -> Params:
    """Those parameters that `placed` gives a sharding, of all that init(key) makes.

    Accelerators are handed what the host has drawn: their generators would each give other values for one seed.
    """
    key, host = fresh_key(key), host_device()
    if jax.default_backend() == "cpu" or host is None:
        return fresh_program(init, placed, dtype)(key)
    with jax.default_device(host), traced_for("cpu"):
        made = jax.jit(_drawn(init, placed, dtype))(jax.device_put(key, host))
    return {
        name: jax.make_array_from_callback(made[name].shape, at, np.asarray(made.pop(name)).__getitem__)
        for name, at in placed.items()
    }


def fresh_key(key: Any) -> Any:
    """Of the hardware generator: its program compiles in a third of the time, and initial values need no more."""
    return jax.random.key(jax.random.bits(key), impl="unsafe_rbg")


def fresh_program(init: Callable, placed: Mapping[str, Any], dtype: Any = jnp.float32) -> Callable:
    """What `fresh_params` runs where the device that draws is the one that trains: jitted, of a `fresh_key`."""
    return jit(_drawn(init, placed, dtype), out_shardings=dict(placed))


def _drawn(init: Callable, placed: Mapping[str, Any], dtype: Any) -> Callable:
    def some(k):
        made = init(k)
        return {name: made[name].astype(dtype) for name in placed}

    return some


def converted_params(
    config: ConfigDict, groups: Sequence[str], shapes: Mapping[str, tuple], place: Callable, dtype: Any
) -> tuple[Params, dict[str, dict], dict[str, float]]:
    """What converted weights have of some groups, where it came from, and the latent scales that belong to it."""
    net = json.loads(config.net.to_json_best_effort())
    params, lineage, scales = {}, {}, {}
    for group in groups:
        if not begins(config, group):
            continue
        regex = re.compile(rounds.group_regex((group,)))
        mine = {n: tuple(s) for n, s in shapes.items() if regex.match(n)}
        found, lineage[group] = weights.load(config.weights, group, mine, net, place, dtype)
        params |= found
        if group.endswith("/vae"):
            scales |= weights.folder_of(config.weights, group, net).meta["scales"]
    return params, lineage, scales


def build_model(
    config: ConfigDict,
    vocab: Mapping[str, int],
    scales: Mapping[str, float],
    dtype: Any = jnp.float32,
    predict: Mapping[str, str] | None = None,
    slots: Mapping[str, Sequence[str]] | None = None,
) -> MedM2G:
    """The recipe of all modalities of the config's listing; slots: as the config's own graph has them, if not said."""
    if slots is None:
        slots = slots_of(stage_graph(config), config.stage)
    net, graph = tuples(json.loads(config.net.to_json_best_effort())), rounds.graph(config.listing)
    options = dict(remat=config.remat, centred=bool(graph.centre), slots=slots)
    options |= dict(predict=predict, schedule=config.schedule, rank=config.rank if "rank" in config else 0)
    return build(net, graph.modalities, vocab, scales, config.image_size, dtype, **options)


def tuples(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: tuples(v) for k, v in x.items()}
    return tuple(tuples(v) for v in x) if isinstance(x, list) else x


def describe(config: ConfigDict, graph: rounds.Graph, data, upstream: Upstream, model: MedM2G) -> dict[str, Any]:
    """model.json of a result, without what only the finished parameters tell."""
    stage = graph.stage(config.stage)
    done = [name for name in config.listing if name in (*upstream.rounds, config.stage)]
    origins = dict(upstream.lineage) | {g: {"stage": config.stage} for g in stage.trains}
    flows = [m for m in graph.modalities if f"{m}/flow" in origins]
    # Where no record says that its images share a grid, the channels for them have learnt nothing.
    learnt = ((s, m) for m, near in stage.registered.items() for s in near if registers(data.source, s, m))
    registered = (*upstream.registered, *learnt)
    return {
        "stage": config.stage,
        "shared": shared(config),
        "trains": list(stage.trains),
        "from": origins,
        "rounds": done,
        "pairs": graph.trained_pairs(flows, done) | {"registered": tuple(dict.fromkeys(registered))},
        "ranges": ranges(data.source),
        "extents": extents(data.source),
        "slots": {m: model.flows[m].slots for m in graph.modalities if model.flows[m].slots},
        "predict": {m: model.flows[m].process.predict for m in flows},
        "vocab": data.vocab,
        "lengths": dict(data.lengths),
        "scales": dict(upstream.scales),
        "modalities": {m: asdict(MODALITIES[m]) for m in graph.modalities},
        "weights": stands_on(config, stage.trains, upstream)["weights"],
        "licences": sorted({r.licence for r in data.source.records if r.licence} | set(upstream.licences)),
        "standing_in": list(upstream.standing_in),
        "note": "Synthetic output. Not for clinical use.",
    }


def group_fingerprint(fingerprints: Mapping[str, int], group: str) -> int:
    """One number for a group of a result, from the fingerprints of its leaves."""
    regex = re.compile(rounds.group_regex((group,)))
    text = ";".join(f"{n}={v}" for n, v in sorted(fingerprints.items()) if regex.match(n))
    return zlib.crc32(text.encode())
