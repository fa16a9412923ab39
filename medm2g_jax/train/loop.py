"""Runs a plan: every missing upstream stage, then the one asked for. One loop and one train step serve all stages.

A run root holds one folder a stage, and what the stages share:

    runs/phantom-tiny/
      tokenizers/                     trained once on all training texts
      latents/                        of images, where `config.latents` has them kept (`data.latents`)
      image_vae/ text_vae/ align_text_xray/ ... text_ct/
        config.json versions.json     what this stage ran with
        checkpoints/STEP              trainable, EMA, optimizer, step
        model/ model.json             its result, there only when finished
        log.jsonl tensorboard/ *.png  numbers, and the picture it ends with

Everything random is a function of (seed, stage, step, global row, stream), so that a run killed at any moment and
started again by the same command ends with the same bits.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.config import stage_config
from medm2g_jax.data import pipeline
from medm2g_jax.data.latents import Latents
from medm2g_jax.data.source import Source
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import activation_dtype, jit
from medm2g_jax.errors import UserError
from medm2g_jax.keys import salt
from medm2g_jax.model import MedM2G
from medm2g_jax.recipes import Recipe
from medm2g_jax.train import checkpoint, latents, results, sharding
from medm2g_jax.train.log import SLOW, Log, memory, versions
from medm2g_jax.train.setup import Setup, assemble, frozen_dtype
from medm2g_jax.train.state import State, create

# What may differ between a stopped stage and the command that resumes it.
FREE = (
    "steps",
    "log_every",
    "eval_every",
    "eval_rows",
    "checkpoint_every",
    "show_every",
    "keep",
    "mesh",
    "dtype",
    "sample",
    "upstream",
    "upstream_dirs",
    "stages",
    "preset_reason",
    "data_reason",
    "remat",
    "latents",
    "side_by_side",
)
START_BATCHES = FINISH_BATCHES = 8


@dataclass(frozen=True)
class Data:
    """The source of a run and what reads its texts: no tokenizers, and no lengths, where the run has no text."""

    source: Source
    tokenizers: Tokenizers | None
    lengths: dict[str, int]
    size: int
    latents: Latents | None = None  # of images, for rows that have some

    def batches(self, rows: pipeline.Rows, split: str, batch: int, seed: int, start: int = 0, process=(0, 1)):
        return pipeline.batches(
            self.source,
            rows,
            split,
            batch,
            seed,
            size=self.size,
            tokenizers=self.tokenizers,
            lengths=self.lengths,
            latents=self.latents,
            start=start,
            process=process,
        )

    def fixed(
        self, rows: pipeline.Rows, split: str, count: int, seed: int = 0, practise: bool = False
    ) -> pipeline.Batch:
        """A held-out batch (`pipeline.fixed`); of the training records, which is said, where the source holds out none
        that fit."""
        if split != "train" and not self.holds(rows, split):
            _say_once(
                f"  no record is held out ({split}) for {pipeline.needs(rows)}: training records stand in for them"
            )
            split = "train"
        return pipeline.fixed(
            self.source,
            rows,
            split,
            count,
            seed,
            size=self.size,
            tokenizers=self.tokenizers,
            lengths=self.lengths,
            latents=self.latents,
            practise=practise,
        )

    def streams(self, names: Sequence[str], split: str, count: int, seed: int = 0) -> dict[str, Any]:
        """Values of these very streams, of records that hold them all, always the same; {} where none does."""
        return pipeline.of_streams(
            self.source, names, split, count, seed, tokenizers=self.tokenizers, lengths=self.lengths
        )

    def holds(self, rows: pipeline.Rows, split: str) -> int:
        """How many records of the split serve these rows."""
        return sum(map(len, pipeline.fitting(self.source, rows, split)))

    @property
    def vocab(self) -> dict[str, int]:
        """Sizes of the tokenizers."""
        return dict(self.tokenizers.sizes) if self.tokenizers else {}

    @property
    def empty(self) -> dict[str, np.ndarray]:
        """Ids of the empty text, one row: the null prompt."""
        return {k: ids[None] for k, ids in self.tokenizers.encode("", self.lengths).items()} if self.tokenizers else {}


@functools.cache
def _say_once(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


class Stopped(Exception):
    """The run was asked to stop (SIGTERM) and has saved its state."""


class _StopFlag:
    """Turns SIGTERM into an answer that the loop asks for between steps.

    Of several processes each may be signalled at another moment, or only one of them: there jax catches the signal, and
    all agree on a step (`jax.distributed` must be running, which it is).
    """

    def __init__(self):
        self._set = False
        self._alone = jax.process_count() == 1
        if self._alone:
            self._old = signal.signal(signal.SIGTERM, self._raise_flag)

    def _raise_flag(self, *_):
        self._set = True

    def at(self, step: int) -> bool:
        """Is this the step to stop at? Every process must ask after every step."""
        return self._set if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self):
        if self._alone:
            signal.signal(signal.SIGTERM, self._old)


def run_stage(
    config: ConfigDict,
    root: epath.Path,
    data: Data,
    plan_eta: float = 0.0,
    show: Callable[..., list[dict]] | None = None,
    ceiling: Callable[..., Any] | None = None,
) -> dict:
    """Train one stage, all of whose upstream results exist, and write its result. Returns the result's model.json.

    Args:
      plan_eta: seconds that the stages after this one are expected to take.
      show: called with (config, graph, folder, model, params, data, meta, log, step) after the last step, and every
        config.show_every: draws the stage's picture and returns its figures, as plain values.
      ceiling: called alike, but for the log, before the first step of a fine-tune.
    """
    folder = root / config.stage
    began = time.time()
    mesh = sharding.make_mesh(config.mesh)
    graph = results.graph_of(config, root)
    if graph.stage(config.stage).verb == "align" and config.accumulate > 1:
        raise UserError(
            f"{config.stage}: config.accumulate={config.accumulate} would change the loss, whose negatives are the "
            "rows of one batch; leave it at 1 and choose config.batch"
        )
    if graph.stage(config.stage).target and not config.eval_rows:
        raise UserError(
            f"{config.stage}: config.eval_rows=0 leaves nothing to tell by whether a fine-tune ends no worse than it "
            "began; expected at least 1"
        )
    sharding.check_batch(config.batch, mesh)
    _record(config, graph, folder)

    dtype = activation_dtype(config.dtype)
    place = lambda name, shape: sharding.param_sharding(name, shape, mesh)  # noqa: E731
    upstream = results.load_upstream(config, root, graph, place, frozen_dtype(dtype), data.vocab)
    results.record_lineage(config, folder, graph.stage(config.stage).trains, upstream)
    cached = latents.chosen(config, root, graph, data.source)
    setup = assemble(config, graph, mesh, data.vocab, upstream.scales, upstream.predict, upstream.slots, dtype, cached)
    spec = setup.recipe
    plain = dataclasses.replace(spec.rows, latents=())  # of the pixels themselves
    few = data.holds(spec.rows, "train")
    if few < config.batch and jax.process_index() == 0:
        print(f"  {config.stage}: a batch of {config.batch} rows from {few} training records: rows repeat", flush=True)

    seed = (config.seed + salt(config.stage)) % 2**31
    host = (jax.process_index(), jax.process_count())

    def loader(start: int, rows: pipeline.Rows = plain):
        return data.batches(rows, "train", config.batch, seed, start, host)

    key = jax.random.fold_in(jax.random.key(config.seed), salt(config.stage))
    trainable, frozen = _parameters(config, setup, upstream, data, loader, key, mesh)
    if (cached or config.latents == "on") and jax.process_index() == 0:
        print(
            f"  {config.stage}: latents of {', '.join(cached) or 'nothing'} are read from {root / 'latents'}",
            flush=True,
        )
    if cached:
        made = latents.make(config, root, setup, data.source, upstream.lineage, frozen, mesh)
        data = dataclasses.replace(data, latents=made)
    state_shardings = setup.layout
    state = jit(lambda p: create(p, setup.tx), out_shardings=state_shardings)(trainable)
    del trainable
    train_step, eval_step = setup.programs(config.remat)
    norm = jit(optax.global_norm)

    saves = checkpoint.Checkpoints(folder / "checkpoints", keep=config.keep)
    total = config.steps * config.accumulate
    log = Log(folder, config.stage, config.steps, data.source.open)
    stop = _StopFlag()
    try:
        restored = saves.restore(_abstract(state, state_shardings))
        if restored is not None:
            state = State(**restored[0])
        step = int(state.step)
        log.open_at(step // config.accumulate, plan_eta)
        log.write_config(config)
        waited = time.time() - began
        if waited > SLOW:
            log.say(f"  parameters in place after {waited:.0f} s; the first step compiles its program")
        held_out = _held_out(data, setup, config, mesh) if config.eval_rows else []

        def evaluate(state: State) -> float | None:
            if not held_out:
                return None
            loss, terms = _evaluate(eval_step, spec, state.ema, frozen, held_out, key)
            log.write_scalars(
                step // config.accumulate, {"held out/loss": loss} | {f"held out/{k}": v for k, v in terms.items()}
            )
            if setup.stage.target:
                what = f", {spec.rows.rehearse:.0%} of it practice" if spec.rows.rehearse else ""
                log.say(f"  held-out loss after {step // config.accumulate} steps{what}: {loss:.4g}")
            return loss

        def described(params: Params) -> tuple[MedM2G, dict]:
            """The model with the stage's parameters, and what model.json says of it."""
            meta, model = results.describe(config, graph, data, upstream, setup.model), setup.model
            if spec.finish is None:
                return model, meta
            some = (sharding.put_batch(b, mesh) for b in islice(loader(0), FINISH_BATCHES))
            scales = spec.finish({**frozen, **params}, some).get("scales", {})
            model = dataclasses.replace(model, scales=model.scales | scales)
            return model, meta | {"scales": meta["scales"] | scales}

        def drawn(params: Params, model: MedM2G, meta: dict, into: epath.Path, step: int) -> list[dict]:
            if show is None:
                return []
            everything = _here({**frozen, **params})  # which all hosts have a part in
            if jax.process_index() != 0:
                return []
            rest = dict(config=config, graph=graph, model=model, params=everything, data=data, meta=meta, log=log)
            return show(folder=into, step=step, **rest)

        if setup.stage.target and step == 0:  # what it begins with may stay the best
            if ceiling is not None and jax.process_index() == 0:
                whole = {**frozen, **state.ema}
                about = results.describe(config, graph, data, upstream, setup.model)
                ceiling(
                    config=config, graph=graph, folder=folder, model=setup.model, params=whole, data=data, meta=about
                )
            saves.save(0, _as_dict(state), metric=evaluate(state))
        batches = iter(loader(step, spec.rows)) if step < total else iter(())

        def ahead() -> Any:
            """The next batch, on its way to the devices while a step runs; or the data's mistake, for its turn."""
            try:
                return sharding.put_batch(next(batches), mesh) if step < total else None
            except UserError as error:
                return error

        stopping, batch = False, ahead()
        while step < total:
            if isinstance(batch, UserError):  # what has been learnt so far is kept, where nobody waits for other hosts
                if step >= config.accumulate and jax.process_count() == 1:
                    saves.save(step // config.accumulate, _as_dict(state))
                    saves.wait()
                    log.sync()
                raise batch
            state, metrics = train_step(state, frozen, batch, key)
            step += 1
            batch = ahead()
            stopping = stopping or stop.at(step)
            if step % config.accumulate:
                continue
            done = step // config.accumulate
            last = step == total
            if done % config.log_every == 0 or done == 1 or last:
                values = {k: float(v) for k, v in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise UserError(
                        f"{config.stage}: loss is {values['loss']} at step {done}; the last good checkpoint is in "
                        f"{folder / 'checkpoints'}. Lower config.lr (now {config.lr}), with a fresh --workdir"
                    )
                values["norm/parameters"] = float(norm(state.trainable))
                log.write_scalars(done, values | memory())
                shown = {k.replace("/", " "): v for k, v in values.items() if not k.startswith("norm/")}
                log.progress(done, shown, plan_eta)
                if last:
                    norms = {k.removeprefix("norm/gradient/"): v for k, v in values.items() if k.count("/") > 2}
                    log.say(f"  {config.stage}: gradient norms: " + ", ".join(f"{k} {v:.3g}" for k, v in norms.items()))
                    if waited > SLOW:
                        log.say("  now the held-out loss and the stage's samples")
            if last or (config.eval_every and done % config.eval_every == 0):
                saves.save(done, _as_dict(state), metric=evaluate(state))
            elif done % config.checkpoint_every == 0:
                saves.save(done, _as_dict(state))
            if config.show_every and done % config.show_every == 0 and not last:
                # Its pictures go to TensorBoard alone, and where they were meanwhile is not said.
                with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
                    drawn(state.ema, *described(state.ema), epath.Path(scratch), done)
                log.say(f"  samples of step {done} are in TensorBoard")
            if done % config.checkpoint_every == 0 or last:
                log.sync()
            if stopping and not last:
                saves.save(done, _as_dict(state), force=True)
                saves.wait()
                log.sync()
                raise Stopped(
                    f"{config.stage}: stopped at step {done} of {config.steps}, saved; the same command resumes"
                )
        saves.wait()
        close = getattr(batches, "close", None)
        if close:
            close()
        best, params = _best(saves, state, state_shardings)
        if setup.stage.target:
            log.say(f"  the best held-out loss is that of step {best} of {config.steps}, which is kept")
        del state  # its slots make room for the samples
    finally:
        stop.close()
        saves.close()

    kept = {k: v for k, v in params.items() if not k.startswith(spec.temporary)}
    kept |= {k: frozen[k].astype(jnp.float32) for k in upstream.own if k in frozen}
    model, meta = described(kept)
    meta["step"] = best
    meta["parameters"] = int(sum(v.size for v in kept.values()))
    meta["figures"] = []
    meta["figures"] = drawn(params, model, meta, folder, config.steps)
    meta["finished"] = time.time()
    meta["seconds"] = round(meta["finished"] - began, 1)  # of this process: a resumed stage counts its last part
    checkpoint.save_model(folder, kept, meta)
    log.close()
    return checkpoint.read_meta(folder)


def _here(params: Params) -> Params:
    """Parameters that process 0 can use without the others: there on its first device, elsewhere on the host."""
    if jax.process_count() == 1:
        return params
    whole = {k: multihost_utils.process_allgather(v, tiled=True) for k, v in params.items()}
    return jax.device_put(whole, jax.local_devices()[0]) if jax.process_index() == 0 else whole


def _as_dict(state: State) -> dict[str, Any]:
    return dict(step=state.step, trainable=state.trainable, ema=state.ema, opt=state.opt)


def _abstract(state: State, shardings: State) -> dict[str, Any]:
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return _as_dict(abstract)


def _parameters(
    config: ConfigDict,
    setup: Setup,
    upstream: results.Upstream,
    data: Data,
    loader: Callable,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
) -> tuple[Params, Params]:
    """(trainable, frozen): converted weights, fresh parameters for the rest, then what earlier stages trained of them
    (an open partner or flow), then what `start` draws from data."""
    spec, placed = setup.recipe, setup.placed
    frozen = {k: v for k, v in upstream.params.items() if not setup.trains(k)}
    sizes = {name: x.shape for name, x in setup.shapes.items()}
    place = lambda name, shape: placed[name]  # noqa: E731
    before = {k: v for k, v in upstream.params.items() if setup.trains(k)}
    regexes = {g: re.compile(rounds.group_regex((g,))) for g in setup.stage.trains}
    first = [g for g, regex in regexes.items() if not any(map(regex.match, before))]
    begun, _, _ = results.converted_params(config, first, sizes, place, jnp.float32)
    rest = {n: at for n, at in placed.items() if n not in begun and n not in before}
    fresh = results.fresh_params(spec.init, key, rest) if rest else {}
    trainable = {**begun, **fresh, **before}
    if spec.start is not None:
        first = (sharding.put_batch(batch, mesh) for batch in islice(loader(0), START_BATCHES))
        empty = jax.device_put(data.empty, sharding.replicated(mesh))
        drawn, extra = spec.start({**frozen, **before}, first, key, empty)
        trainable |= {k: jax.device_put(v, placed[k]) for k, v in drawn.items() if k in fresh}
        frozen |= jax.device_put(extra, sharding.replicated(mesh))
    return trainable, frozen


def _held_out(data: Data, setup: Setup, config: ConfigDict, mesh) -> list[Any]:
    """config.eval_rows held-out rows, no more than the stage trains on, in batches of config.batch at most: what fits
    in memory for a train step fits here. A fine-tune, of which the best is kept, is held to what it practises too."""
    rows, count = setup.recipe.rows, min(config.eval_rows, config.batch * config.steps)
    whole = data.fixed(rows, "val", count, practise=bool(setup.stage.target))
    count, shards = len(jax.tree.leaves(whole)[0]), mesh.shape["data"] * mesh.shape["fsdp"]
    size = min(config.batch, count)
    size = size // shards * shards or size
    parts = [jax.tree.map(lambda x, i=i: x[i : i + size], whole) for i in range(0, count - size + 1, size)]
    if size % shards or jax.process_count() > 1:
        return [jax.device_put(part, sharding.replicated(mesh)) for part in parts]
    return [sharding.put_batch(part, mesh) for part in parts]


def _evaluate(eval_step, spec: Recipe, params: Params, frozen: Params, parts, key) -> tuple[float, dict[str, float]]:
    """Held-out loss and its terms: the mean over the batches and the recipe's fixed times, with fixed noise."""
    at = [(t, part) for part in parts for t in spec.times or (None,)]
    out = [
        eval_step(params, frozen, part, jax.random.fold_in(key, 2**30 + i), None if t is None else jnp.int32(t))
        for i, (t, part) in enumerate(at)
    ]
    loss = float(np.mean([float(value) for value, _ in out]))
    return loss, {k: float(np.mean([float(terms[k]) for _, terms in out])) for k in out[0][1]}


def _best(saves: checkpoint.Checkpoints, state: State, shardings: State) -> tuple[int, Params]:
    """The EMA of the best checkpoint (the last one, unless an earlier evaluation was better)."""
    best = saves.best()
    if best is None:
        return int(state.step), state.ema
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.ema, shardings.ema)
    return best, saves.restore_item(best, "ema", abstract)


def _record(config: ConfigDict, graph: rounds.Graph, folder: epath.Path) -> None:
    """Write the resolved config and the versions; a folder that was begun with another config is an error."""
    path = folder / "config.json"
    stood_on = results.read_lineage(folder)
    prints = None if stood_on is None else stood_on["weights"]
    now = json.loads(config.to_json_best_effort())
    if results.PREDICT in now:  # what "auto" means here, so that it can be compared
        (now[results.PREDICT],) = results.predictions(config, graph.stage(config.stage).trains).values()
    if path.exists() and (folder / "checkpoints").exists():
        before = json.loads(path.read_text())
        for field, old, new in results.differences(before, now):
            free = field.split(".")[0] in FREE or field == "data.accept"
            if not free and not results.moved(folder.parent, config, (field, old, new), prints):
                raise UserError(
                    f"{folder} was begun with config.{field}={old!r}, this command has {new!r}; give it back, or start "
                    "afresh with --workdir=ANOTHER_FOLDER"
                )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1, sort_keys=True))
        (folder / "versions.json").write_text(json.dumps(versions(), indent=1))


def plan_stages(config: ConfigDict, root: epath.Path) -> list[tuple[str, str]]:
    """[(stage, what happens)] of this config's plan: "done", "resume", "train", "initialised" (upstream="init"), or
    "train again: " and why, of what does not stand on what it was trained on any more.

    Raises:
      UserError: upstream="require" and a stage is missing; names the command that makes it.
    """
    if config.upstream not in ("train", "init", "require"):
        raise UserError(f"config.upstream={config.upstream!r}: expected train, init or require")
    out = []
    plan = results.graph_of(config, root).plan(config.stage)
    stale = results.stale(config, root, plan)
    for name in plan:
        if name in stale:
            what = results.AGAIN + stale[name]
        elif results.find(root, config, name) is not None or results.converted_stage(config, name):
            what = "done"
        elif name != config.stage and config.upstream == "require":
            raise UserError(
                f"{config.stage} needs the result of {name}, and there is none in {root}; make it with\n  "
                f"python -m medm2g_jax.main --config={results.config_words(config, name)} --workdir={root}"
            )
        elif name != config.stage and config.upstream == "init":
            what = "initialised"
        else:
            what = "resume" if (root / name / "checkpoints").exists() else "train"
        out.append((name, what))
    return out


def stage_configs(config: ConfigDict, todo: list[tuple[str, str]]) -> dict[str, ConfigDict]:
    return {name: stage_config(config, name) for name, what in todo if what in ("train", "resume")}
