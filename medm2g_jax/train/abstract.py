"""A stage in shapes: what a plan compiles for machines that are not here, and a run ahead of the stage's turn."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medm2g_jax.config import stage_graph
from medm2g_jax.data.latents import DTYPE
from medm2g_jax.data.pipeline import Rows
from medm2g_jax.data.source import Source
from medm2g_jax.device import activation_dtype
from medm2g_jax.family import text_lengths
from medm2g_jax.modality import MODALITIES
from medm2g_jax.model import MedM2G, init_group
from medm2g_jax.train import latents, results, sharding
from medm2g_jax.train.setup import Setup, assemble, frozen_dtype
from medm2g_jax.train.state import State, create


def abstract_batch(rows: Rows, batch: int, model: MedM2G) -> dict[str, Any]:
    """Shapes of a global batch of `rows`, as data/pipeline.py makes it."""

    def value(modality: str) -> Any:
        return model.flows[modality].family.shapes(batch)

    def encoded(modality: str, pixels: Sequence[str] = ()) -> Any:
        if modality not in rows.latents:
            return value(modality)
        latent = jax.ShapeDtypeStruct((batch, *model.flows[modality].family.latent_shape), DTYPE)
        return {"latent": latent} | ({"pixels": value(modality)} if modality in pixels else {})

    def flags(*shape: int, dtype: Any = bool) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    out = {m: encoded(m, rows.pixels) for m in rows.require}
    if rows.merge:
        out[rows.merge] = value(rows.any_of[0])
    several = [m for m in rows.require if len(MODALITIES[m].streams) > 1]
    about: dict[str, Any] = {}
    if several:
        about["stream"] = {m: flags(dtype=jnp.int32) for m in several}
    if rows.prompts:
        about["prompt"] = {m: value(m) for m in rows.prompts}
        about["present"] = {m: flags() for m in rows.prompts}
    if rows.identify:
        about["record"] = flags(dtype=jnp.int32)
    if rows.contrasts or rows.earlier:
        about["has"] = {m: flags() for m in rows.require}
    if rows.contrasts:
        about["partner"] = {m: flags() for m in rows.contrasts}
        split = lambda x: x.update(shape=(batch, rows.others, *x.shape[1:]))  # noqa: E731
        about["others"] = {
            m: {
                "x": jax.tree.map(split, encoded(m)),
                "stream": flags(rows.others, dtype=jnp.int32),
                "has": flags(rows.others),
            }
            for m in rows.contrasts
        }
    if rows.beside:
        about["beside"] = {m: flags(rows.others) for m in rows.beside}
    for m, partners in rows.earlier:
        about.setdefault("earlier", {}).update({p: encoded(p, rows.pixels) for p in partners})
        about.setdefault("earlier_stream", {}).update({p: flags(dtype=jnp.int32) for p in partners})
        about.setdefault("practises", {})[m] = {p: flags() for p in partners}
        if near := [p for p in partners if MODALITIES[m].shares_grid(MODALITIES[p])]:
            about.setdefault("grid", {})[m] = {"earlier": {p: flags() for p in near}}
    for m in rows.registered:
        near = {"partner": flags()} if len(rows.require) > 1 else {}
        near |= {"others": flags(rows.others)} if m in rows.contrasts else {}
        near |= {"beside": flags(rows.others)} if m in rows.beside else {}
        about.setdefault("grid", {}).setdefault(m, {}).update(near)
    return out | ({"about": about} if about else {})


def abstract_stage(
    config: ConfigDict,
    vocab: Mapping[str, int],
    mesh: Mesh,
    backend: str = "tpu",
    absent: Sequence[str] = (),
    scales: Mapping[str, float] | None = None,
    cached: Sequence[str] = (),
) -> tuple[Setup, tuple[State, dict, dict, Any]]:
    """(config.stage put together, the arguments (state, frozen, batch, key) of its train step as shapes placed on the
    mesh): what `loop.run_stage` has.

    Args:
      absent: rounds that were never run (rounds.Graph).
      scales: of the latents, which are constants of the program; 1 where they do not matter.
      cached: modalities whose images come as latents.
    """
    graph = stage_graph(config, tuple(absent))
    dtype = activation_dtype(config.dtype, backend)
    predict = results.predictions(config, tuple(graph.owners(config.stage)))
    slots = results.slots_of(graph, config.stage)
    setup = assemble(config, graph, mesh, vocab, scales or {}, predict, slots, dtype, cached)
    spec, model = setup.recipe, setup.model

    key = jax.eval_shape(lambda: jax.random.key(0))
    upstream = jax.eval_shape(lambda k: init_group(model, k, tuple(graph.owners(config.stage))), key)
    frozen = {k: v.update(dtype=frozen_dtype(dtype) or v.dtype) for k, v in upstream.items() if not setup.trains(k)}
    batch = abstract_batch(spec.rows, config.batch, model)
    extra: dict[str, Any] = {}
    if spec.start is not None:
        empty = {name: jax.ShapeDtypeStruct((1, n), jnp.int32) for name, n in text_lengths(config.net).items()}
        plain = abstract_batch(dataclasses.replace(spec.rows, latents=()), config.batch, model)
        _, extra = jax.eval_shape(lambda f, b, k, e: spec.start(f, [b], k, e), frozen, plain, key, empty)

    at = lambda tree, where: jax.tree.map(lambda x: x.update(sharding=where), tree)  # noqa: E731
    state = jax.tree.map(
        lambda x, where: x.update(sharding=where),
        jax.eval_shape(lambda p: create(p, setup.tx), setup.shapes),
        setup.layout,
    )
    frozen = {k: v.update(sharding=sharding.param_sharding(k, v.shape, mesh)) for k, v in frozen.items()}
    frozen |= at(extra, sharding.replicated(mesh))
    return setup, (state, frozen, at(batch, sharding.batch_sharding(mesh)), at(key, sharding.replicated(mesh)))


def compile_ahead(config: ConfigDict, root: epath.Path, source: Source, vocab: Mapping[str, int]) -> bool:
    """Compile the programs of a stage whose turn comes next into the run's compilation cache, where it will find them:
    its first parameters, its train step and its held-out loss. On a CPU a stage begins with as much compiling as a
    minute of it takes, on one core of those that a small model leaves idle.

    Returns whether that could be done: not before the autoencoders it stands on are done, whose latents' scales are
    constants of its programs, and not for networks so large that a compiler takes a machine's memory.
    """
    graph = results.graph_of(config, root)
    scales = results.latent_scales(config, root, graph)
    if scales is None or config.remat or config.weights:
        return False
    mesh = sharding.make_mesh(config.mesh)
    cached = latents.chosen(config, root, graph, source)
    setup, (state, frozen, batch, _) = abstract_stage(
        config, vocab, mesh, jax.default_backend(), graph.absent, scales, cached
    )
    key, t = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    before = {group for group in graph.owners(config.stage) if group in setup.stage.trains}
    fresh = {n: at for n, at in setup.placed.items() if not results.in_groups(before, n)}
    if fresh:
        drawn_from = jax.eval_shape(results.fresh_key, key)
        results.fresh_program(setup.recipe.init, fresh).lower(drawn_from).compile()
    train_step, eval_step = setup.programs(config.remat)
    train_step.lower(state, frozen, batch, key).compile()
    if config.eval_rows >= config.batch:
        eval_step.lower(state.ema, frozen, batch, key, None if setup.recipe.times is None else t).compile()
    return True
