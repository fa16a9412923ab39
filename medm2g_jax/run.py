"""A whole run: resolve the run root and the data, print the plan, train what is missing, write the report."""

import functools
import itertools
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from medm2g_jax import beside, rounds
from medm2g_jax.config import get_config, stage_config, stage_graph
from medm2g_jax.convert import weights
from medm2g_jax.data import pipeline
from medm2g_jax.data.contents import contents
from medm2g_jax.data.open import OWN, source_of
from medm2g_jax.data.source import Source, labeller
from medm2g_jax.data.source import check as check_files
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import measure_compiler_options, use_compilation_cache
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.report import write_report
from medm2g_jax.evaluate.show import ceiling, data_picture, show
from medm2g_jax.family import text_lengths
from medm2g_jax.limits import check
from medm2g_jax.modality import MODALITIES, centre
from medm2g_jax.recipes import rows_of
from medm2g_jax.train import data_record, loop, results
from medm2g_jax.train.disk import worded
from medm2g_jax.train.owner import owned
from medm2g_jax.unpack import copy_tokenizers, run_root

# Rough relative cost of a stage of the tiny preset, seconds on two cores: the first guess of the plan's ETA, corrected
# by what has been measured.
_SECONDS = {"vae": 55.0, "align": 95.0, "ldm": 150.0, "round": 110.0}


def default_workdir(config: ConfigDict) -> str:
    """runs/<data>-<preset>[-<variant>][-<listing>]."""
    source = config.data.source
    data = source if ":" not in source else (epath.Path(source.partition(":")[2]).name or "data")
    words = [data, config.preset, *([config.variant] if config.variant else [])]
    return "runs/" + "-".join([*words, *results.listing_words(config.listing)[:1]])


def open_data(config: ConfigDict, root: epath.Path, source: Source | None = None) -> loop.Data:
    """The source of a config, or one's own, and its tokenizers: those of the run root, else trained on all its training
    texts; none where no round of the listing holds the centre.

    Raises:
      UserError: the data are not those that the run root was begun with, or some of its files are broken.
    """
    source = source_of(config) if source is None else source
    data_record.hold(root, config.data.source, contents(source), config.data.accept)
    if jax.process_index() == 0:
        check_files(source, root / "opened.json", functools.partial(print, flush=True))
    graph = rounds.graph(config.listing)
    if all(MODALITIES[m].is_image for m in graph.modalities):
        return loop.Data(source, None, {}, config.image_size)
    folder = root / "tokenizers"
    if not (folder / "done").exists() and jax.process_index() == 0:
        _tokenizers_of(config.upstream_dirs, folder)
    begun = results.begins(config, f"{centre().name}/clip")  # its tokenizer belongs to it, and with it the others
    if not (folder / "done").exists() and begun and jax.process_index() == 0:
        copy_tokenizers(weights.tokenizers(config.weights), folder, "converted weights")
    if not (folder / "done").exists() and jax.process_index() == 0:
        texts = pipeline.texts(source, "train", config.seed)
        Tokenizers.train(texts, folder, config.net.vocabulary)
        (folder / "done").write_text(f"trained on {len(texts)} texts of {source.name}\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizers")
        if not (folder / "done").exists():
            raise UserError(
                f"process {jax.process_index()} of {jax.process_count()} does not see {folder}, which process 0 wrote; "
                "--workdir must be a place that all processes share: a bucket (gs://...) or a mounted file system"
            )
    tokenizers = Tokenizers.load(folder, config.net.report_words)
    return loop.Data(source, tokenizers, text_lengths(config.net), config.image_size)


def _tokenizers_of(roots: Sequence[str], folder: epath.Path) -> None:
    """Copy the tokenizers of the first of these run roots that has some: what was trained there reads no others."""
    known = (epath.Path(root) / "tokenizers" for root in roots)
    there = next((path for path in known if (path / "done").exists()), None)
    if there is not None:
        copy_tokenizers({path.name: path for path in there.iterdir() if path.is_dir()}, folder, there.parent.name)


def served(config: ConfigDict, root: epath.Path, source: Source, todo: Sequence[tuple[str, str]]) -> dict[str, int]:
    """How many training records serve each stage that is to train.

    Raises:
      UserError: none serves one of them; says what they hold, and which listing they would do for.
    """
    counts = {}
    for name, own in loop.stage_configs(config, todo).items():
        rows = rows_of(own, results.graph_of(own, root))
        counts[name] = sum(map(len, pipeline.fitting(source, rows, "train")))
        if not counts[name]:
            held = Counter(s for r in source.records if r.split == "train" for s in r.streams)
            there = ", ".join(f"{s} {n}" for s, n in sorted(held.items())) or "nothing"
            raise UserError(
                f"data {source.name!r}: stage {name} needs training records with {pipeline.needs(rows)}, and there are "
                f"none; they hold {there}. {_fitting_listing(config, source)}".rstrip(". ")
            )
    return counts


def _fitting_listing(config: ConfigDict, source: Source) -> str:
    """What to type for what the records hold: all pairs that they have, the centre's first, else one modality alone."""
    held = [{s.partition(":")[0] for s in r.streams} for r in source.records if r.split == "train"]
    rounds_ = {name for listing in rounds.LISTINGS.values() for name in listing}  # those that have a config file
    pairs = [f"{a}_{b}" for a, b in itertools.combinations(MODALITIES, 2) if any({a, b} <= h for h in held)]
    pairs = [name for name in pairs if name in rounds_]
    single = [m for m in MODALITIES if any(m in h for h in held)]
    asked = [(pairs[-1], "+".join(pairs) + (",alone" if len(pairs) == 1 else ""))] if pairs else []
    asked += [(name, f"{name},alone") for name in pairs]
    asked += [(m, f"{m},alone") for m in single if MODALITIES[m].contrasts]
    asked += [("ldm", f"{m},alone") for m in single]
    best = 0, ""
    for target, words in asked:
        typed = f"{config.preset},{words}"
        count = _serve(get_config(target, typed), source)
        best = max(best, (count, f"--config={results.config_path(target)}:{typed}"), key=lambda x: x[0])
    return f"These data do for {best[1]}" if best[0] else ""


def _serve(config: ConfigDict, source: Source) -> int:
    """How many training records the stage of this config's plan has that fewest serve."""
    stages = [stage_config(config, name) for name in stage_graph(config).plan(config.stage)]
    rows = [rows_of(own, stage_graph(own)) for own in stages]
    return min(sum(map(len, pipeline.fitting(source, row, "train"))) for row in rows)


def described(
    config: ConfigDict, root: epath.Path, todo: Sequence[tuple[str, str]], source: Source | None = None
) -> str:
    """What was resolved, and the stages of the plan: what there is of them, and how many records of the source serve
    those that are to train.

    Raises:
      UserError: no record serves one of them.
    """
    words = config.preset + (f",{config.variant}" if config.variant else "")
    lines = [
        f"medm2g_jax: {config.stage}, preset {words} ({config.preset_reason})",
        f"data {config.data.source} ({config.data_reason}); run root {root}",
    ]
    if source is not None:
        splits = Counter(r.split for r in source.records)
        lines.append(f"records: {splits['train']} to train on, {splits['val']} held out, {splits['test']} to test")
    counts = {} if source is None else served(config, root, source, todo)
    width = max(len(name) for name, _ in todo)
    for i, (name, what) in enumerate(todo, 1):
        batch = stage_config(config, name).batch
        few = f", fewer than its batch of {batch}: rows repeat" if counts.get(name, batch) < batch else ""
        of = f"  {counts[name]} training records{few}" if name in counts else ""
        lines.append(f"  {i:2d}. {name:{width}s}  {what:11s}{of}".rstrip())
    graph = stage_graph(config)
    near = [(s, m) for name, _ in todo for m, some in graph.stages[name].registered.items() for s in some]
    if source is not None and near and not any(pipeline.registers(source, *pair) for pair in near):
        lines.append(
            "  note: no record says that its images share one grid, so what is given guides by its context alone, not "
            "pixel by pixel; where they do: --config.data.registered=True"
        )
    for name, what in todo:
        if what == "done" and results.find(root, config, name) is None:
            lines.append(f"  note: {name} comes from the converted weights in {config.weights}")
    never = [name.removeprefix("ldm_") for name, what in todo if name.startswith("ldm_") and what == "initialised"]
    for word in (MODALITIES[m].word for m in never):
        lines.append(f"  note: the {word} base has never seen a {word}; only what this run trains of it does")
    return "\n".join(lines)


def run(
    config: ConfigDict,
    workdir: str | None = None,
    source: Source | None = None,
    arguments: Sequence[str] | None = None,
) -> epath.Path:
    """Train config.stage and, before it, what it stands on (config.upstream). Returns the run root.

    Args:
      source: one's own data in place of what config.data names.
      arguments: of the command that the config comes from, where stages may train side by side (`beside`).
    """
    began = time.time()
    check(config)
    stage_graph(config).stage(config.stage)  # that it can be is said before anything is written
    root = epath.Path(workdir or default_workdir(config))
    config = with_run_roots(config, root)
    if (own := os.environ.get(beside.STAGE)) and arguments is not None:
        beside.stage(stage_config(config, own), root, open_data)
    if source is not None:  # recorded as what it is: nobody shall measure this model on what config.data names instead
        config = config.copy_and_resolve_references()
        config.data.source, config.data_reason = f"{OWN}:{source.name}", "handed over in Python"
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda *_: None
    use_compilation_cache(root / "xla_cache")
    todo = loop.plan_stages(config, root)
    source = source_of(config) if source is None and loop.stage_configs(config, todo) else source
    say(described(config, root, todo, source))
    say(f"on {len(jax.devices())} x {jax.devices()[0].device_kind}")
    results.refuse_stale(config, root, todo)
    if not loop.stage_configs(config, todo):
        say(f"{config.stage} is done: {root / config.stage}")
        return root
    measure_compiler_options()
    with worded(root), owned(root, say):
        _train(config, root, source, arguments, say)
    say(f"{config.stage}: all done in {time.time() - began:.0f} s")
    return root


def with_run_roots(config: ConfigDict, root: epath.Path) -> ConfigDict:
    """The config with a run root for each exported model among config.upstream_dirs."""
    if config.upstream_dirs:
        config = config.copy_and_resolve_references()
        config.upstream_dirs = tuple(run_root(name, root) for name in config.upstream_dirs)
    return config


def _train(
    config: ConfigDict,
    root: epath.Path,
    source: Source,
    arguments: Sequence[str] | None,
    say: Callable[[str], Any],
) -> None:
    """Train what is missing, in a run root that is this run's own."""
    first = jax.process_index() == 0
    todo = loop.plan_stages(config, root)  # again: another run may just have ended
    results.refuse_stale(config, root, todo)
    configs = loop.stage_configs(config, todo)
    data = open_data(config, root, source)
    if data.tokenizers:
        say(f"vocabularies {data.tokenizers.sizes}")
    graph = results.graph_of(config, root)
    if source.open and first:
        data_picture(data, root / f"{source.name}.png", graph.modalities)

    guess = {name: _SECONDS[graph.stages[name].verb] for name in configs}
    plan = {name: {*graph.plan(name)} - {name} for name in graph.plan(config.stage)}
    if arguments is not None and beside.pays(config, len(plan)):
        vaes = {name for name in plan if graph.stages[name].verb == "vae"}
        beside.train(beside.tasks([*configs], plan, vaes, guess), arguments, root, say)
    else:
        _one_by_one(configs, guess, root, data, say)
    truncated = data.tokenizers.truncated if data.tokenizers else {}
    cut = ", ".join(f"{name} {share:.1%}" for name, share in truncated.items() if share)
    if cut:
        say(f"texts that were longer than the networks read, and were cut: {cut}")
    if first:
        report = write_report(root, config.listing, labeller(source))
        say(f"\nwrote {report}" + ("" if "://" in str(report) else f"; look at {Path(report).resolve().as_uri()}"))
    if config.stage == graph.last or graph.stages[config.stage].verb == "round":
        whole = f"{root}/{config.stage}" if graph.stages[config.stage].target else root
        tool = _tool()
        say(f"next, any to any:\n  {tool} {_next_command(graph, config.stage, root)}")
        say(f"the same in the browser:\n  {tool} demo --model {whole}")
        say(f"how good it is:\n  {tool} evaluate --model {whole}")


def _one_by_one(
    configs: Mapping[str, ConfigDict],
    guess: Mapping[str, float],
    root: epath.Path,
    data: loop.Data,
    say: Callable[[str], Any],
) -> None:
    spent: dict[str, float] = {}
    for i, (name, stage) in enumerate(configs.items()):
        ratio = sum(spent.values()) / sum(guess[s] for s in spent) if spent else 1.0
        rest = ratio * sum(guess[s] for s in list(configs)[i + 1 :])
        say(f"\n== {name} ({i + 1} of {len(configs)})")
        start = time.time()
        meta = loop.run_stage(stage, root, data, plan_eta=rest, show=show, ceiling=ceiling)
        spent[name] = time.time() - start
        size = meta["parameters"] / 1e6
        say(f"  {name}: done in {spent[name]:.0f} s, {size:.2f} M parameters -> {root / name}")


def _tool() -> str:
    """`medm2g`, or where it is while its environment is not the shell's, as after `make demo`."""
    beside = Path(sys.executable).with_name("medm2g")
    if shutil.which("medm2g") or not beside.exists():
        return "medm2g"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _next_command(graph: rounds.Graph, name: str, root: epath.Path) -> str:
    """A `generate` on the model that this run has just finished, without the tool's own name."""
    stage = graph.stages[name]
    command = f"generate --model {root}"
    if stage.verb != "round":
        return f"{command} --make {stage.subjects[0]} --out {root}/generated"
    a, b = stage.subjects if len(stage.subjects) == 2 else MODALITIES[stage.subjects[0]].streams[1:3]
    if stage.target:
        command, (a, b) = f"{command}/{name}", (b, a) if stage.target == a else (a, b)
    text = 'text="large mass in the left upper lung . heart size is normal ."'
    given = f"{a}=IMAGE.png" if MODALITIES[a.partition(":")[0]].is_image else text
    return f"{command} --given {given} --make {b} --out {root}/generated"
