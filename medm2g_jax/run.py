"""A whole run: resolve the run root and the data, print the plan, train what is missing, write the report."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.config import check, text_lengths
from medm2g_jax.convert import weights
from medm2g_jax.data import pipeline
from medm2g_jax.data.contents import contents
from medm2g_jax.data.open import open_source
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import use_compilation_cache
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.report import write_report
from medm2g_jax.evaluate.show import data_picture, show
from medm2g_jax.modality import MODALITIES
from medm2g_jax.train import data_record, loop, results
from medm2g_jax.train.disk import worded
from medm2g_jax.train.owner import owned

# Rough relative cost of a stage of the tiny preset, seconds on two cores: the first guess of the plan's ETA, corrected
# by what has been measured.
_SECONDS = {"vae": 40.0, "align": 40.0, "ldm": 70.0, "round": 80.0}


def default_workdir(config: ConfigDict) -> str:
    """runs/<data>-<preset>[-<variant>][-<listing>]."""
    source = config.data.source
    data = source if ":" not in source else (epath.Path(source.partition(":")[2]).name or "data")
    words = [data, config.preset, *([config.variant] if config.variant else [])]
    if config.listing != rounds.LISTINGS["default"]:
        names = {v: k for k, v in rounds.LISTINGS.items()}
        words.append(names.get(config.listing, config.listing[-1]))
    return "runs/" + "-".join(words)


def open_data(config: ConfigDict, root: epath.Path) -> loop.Data:
    """The source of a config and its tokenizers: those of the run root, else trained on all its training texts."""
    graph = rounds.graph(config.listing)
    d = config.data
    source = open_source(
        d.source,
        size=config.image_size,
        seed=config.seed,
        pairs=graph.pairs,
        template_text=d.template_text,
        phantom=dict(train=d.train, val=d.val, test=d.test),
    )
    data_record.hold(root, d.source, contents(source), d.accept)
    folder = root / "tokenizers"
    if not (folder / "done").exists() and config.weights and jax.process_index() == 0:
        for name, path in weights.tokenizers(config.weights).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in path.iterdir():
                (folder / name / file.name).write_bytes(file.read_bytes())
        (folder / "done").write_text("copied from converted weights\n")
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
    return loop.Data(source, tokenizers, text_lengths(config), config.image_size)


def described(config: ConfigDict, root: epath.Path, todo: list[tuple[str, str]]) -> str:
    """What was resolved, and the stages of the plan with what there is of them."""
    words = config.preset + (f",{config.variant}" if config.variant else "")
    lines = [
        f"medm2g_jax: {config.stage}, preset {words} ({config.preset_reason})",
        f"data {config.data.source} ({config.data_reason}); run root {root}",
    ]
    width = max(len(name) for name, _ in todo)
    lines += [f"  {i:2d}. {name:{width}s}  {what}" for i, (name, what) in enumerate(todo, 1)]
    for name, what in todo:
        if what == "done" and results.find(root, config, name) is None:
            lines.append(f"  note: {name} comes from the converted weights in {config.weights}")
    never = [name.removeprefix("ldm_") for name, what in todo if name.startswith("ldm_") and what == "initialised"]
    for word in (MODALITIES[m].word for m in never):
        lines.append(f"  note: the {word} base has never seen a {word}; only guides train on it")
    return "\n".join(lines)


def run(config: ConfigDict, workdir: str | None = None) -> epath.Path:
    """Train config.stage and, before it, what it stands on (config.upstream). Returns the run root."""
    began = time.time()
    check(config)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda *_: None
    root = epath.Path(workdir or default_workdir(config))
    use_compilation_cache(root / "xla_cache")
    todo = loop.plan_stages(config, root)
    say(described(config, root, todo))
    say(f"on {len(jax.devices())} x {jax.devices()[0].device_kind}")
    results.refuse_stale(config, root, todo)
    if not loop.stage_configs(config, todo):
        say(f"{config.stage} is done: {root / config.stage}")
        return root
    with worded(root), owned(root, say):
        _train(config, root, say)
    say(f"{config.stage}: all done in {time.time() - began:.0f} s")
    return root


def _train(config: ConfigDict, root: epath.Path, say: Callable[[str], Any]) -> None:
    """Train what is missing, in a run root that is this run's own."""
    first = jax.process_index() == 0
    todo = loop.plan_stages(config, root)  # again: another run may just have ended
    results.refuse_stale(config, root, todo)
    configs = loop.stage_configs(config, todo)
    data = open_data(config, root)
    counts = {s: sum(r.split == s for r in data.source.records) for s in ("train", "val", "test")}
    say(
        f"data: {counts['train']} records to train on, {counts['val']} held out, {counts['test']} to test; "
        f"vocabularies {data.tokenizers.sizes}",
    )
    if data.source.open and first:
        data_picture(data, root / f"{data.source.name}.png", rounds.graph(config.listing).modalities)

    guess = {name: _SECONDS[rounds.graph(config.listing).stages[name].verb] for name in configs}
    spent: dict[str, float] = {}
    for i, (name, stage) in enumerate(configs.items()):
        ratio = sum(spent.values()) / sum(guess[s] for s in spent) if spent else 1.0
        rest = ratio * sum(guess[s] for s in list(configs)[i + 1 :])
        say(f"\n== {name} ({i + 1} of {len(configs)})")
        start = time.time()
        meta = loop.run_stage(stage, root, data, plan_eta=rest, show=show)
        spent[name] = time.time() - start
        size = meta["parameters"] / 1e6
        say(f"  {name}: done in {spent[name]:.0f} s, {size:.2f} M parameters -> {root / name}")
    cut = ", ".join(f"{name} {share:.1%}" for name, share in data.tokenizers.truncated.items() if share)
    if cut:
        say(f"texts that were longer than the networks read, and were cut: {cut}")
    if first:
        say(f"\nwrote {write_report(root, config.listing, data.source.name == 'phantom')}")
    verb = rounds.graph(config.listing).stages[config.stage].verb
    if verb == "round":
        say(f"next, any to any:\n  {_next_command(config, root)}")


def _next_command(config: ConfigDict, root: epath.Path) -> str:
    """A `medm2g generate` on the model that this run has just finished."""
    a, b = rounds.pair(config.stage)
    if MODALITIES[a].kind == "text":
        given = 'text="large mass in the left upper lung . heart size is normal ."'
    else:
        given = f"{a}=IMAGE.png"
    return f"medm2g generate --model {root} --given {given} --make {b} --out {root}/generated"
