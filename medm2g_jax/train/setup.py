"""A stage put together: networks, losses, optimizer and where all of it lives. The loop runs what the plan compiles.

Nothing is allocated here: parameters are shapes and places.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.device import jit
from medm2g_jax.model import MedM2G
from medm2g_jax.recipes import Recipe, recipe
from medm2g_jax.train import optim, results, sharding
from medm2g_jax.train.state import State, create, make_eval_step, make_train_step


@dataclass(frozen=True)
class Setup:
    """A stage of one run on one mesh.

    Attributes:
      shapes, placed: of what trains, by name.
      layout: the shardings of its State.
      train_step, eval_step: see `train.state`; `programs` jits them.
    """

    graph: rounds.Graph
    stage: rounds.Stage
    model: MedM2G
    recipe: Recipe
    tx: optax.GradientTransformation
    shapes: dict[str, jax.ShapeDtypeStruct]
    placed: dict[str, NamedSharding]
    layout: State
    train_step: Callable
    eval_step: Callable
    _jitted: dict[bool, tuple[Callable, Callable]] = field(default_factory=dict, repr=False, compare=False)

    def trains(self, name: str) -> bool:
        return results.trains(self.stage, name)

    def programs(self, save_memory: bool) -> tuple[Callable, Callable]:
        """(train_step, eval_step), jitted, the same ones at every call. save_memory: see `device.jit`."""
        if save_memory not in self._jitted:
            whole = dict(out_shardings=(self.layout, None), donate_argnums=0)
            steps = jit(self.train_step, save_memory=save_memory, **whole), jit(self.eval_step, save_memory=save_memory)
            self._jitted[save_memory] = steps
        return self._jitted[save_memory]


_LAST: dict[tuple, Setup] = {}  # the last one that was assembled, by what it is made of


def assemble(
    config: ConfigDict,
    graph: rounds.Graph,
    mesh: Mesh,
    vocab: Mapping[str, int],
    scales: Mapping[str, float],
    predict: Mapping[str, str],
    slots: Mapping[str, Sequence[str]],
    dtype: Any,
    cached: Sequence[str] = (),
) -> Setup:
    """config.stage in the run's graph. The same one as at the last call where all that it is made of is the same: what
    was traced and compiled ahead of a stage is then what it runs.

    Args:
      vocab, scales, predict, slots: of tokenizers, of latents, and of the flows that were trained before.
      dtype: of activations.
      cached: modalities whose images come as latents (`latents.chosen`).

    Raises:
      UserError: the batch does not divide over the mesh, or a field holds what there is not.
    """
    sharding.check_batch(config.batch, mesh)
    made_of = config.to_json_best_effort(sort_keys=True), graph, mesh, str(dtype), tuple(cached)
    made_of += tuple(tuple(sorted((k, str(v)) for k, v in of.items())) for of in (vocab, scales, predict, slots))
    if made_of in _LAST:
        return _LAST[made_of]
    stage = graph.stage(config.stage)
    first = [g for g in stage.trains if g not in stage.reads]  # a flow that trains on predicts what it did before
    predict = {**predict, **results.predictions(config, first)}
    slots = {**slots, **{m: graph.slots(m) for m in stage.registered}}
    model = results.build_model(config, vocab, scales, dtype, predict, slots)
    spec = recipe(config, model, graph, cached)
    shapes = jax.eval_shape(spec.init, jax.eval_shape(lambda: jax.random.key(0)))
    placed = {name: sharding.param_sharding(name, x.shape, mesh) for name, x in shapes.items()}
    tx = optim.make(config, shapes)

    def where(path, leaf):
        # Optimizer slots and EMA beside their parameter, counters everywhere.
        names = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        return placed[names[-1]] if names and names[-1] in placed else sharding.replicated(mesh)

    layout = jax.tree_util.tree_map_with_path(where, jax.eval_shape(lambda p: create(p, tx), shapes))
    steps = make_train_step(spec, config, tx), make_eval_step(spec, config)
    _LAST.clear()
    _LAST[made_of] = Setup(graph, stage, model, spec, tx, shapes, placed, layout, *steps)
    return _LAST[made_of]


def frozen_dtype(dtype: Any) -> Any:
    """In which frozen parameters are held beside activations of this dtype: None is as they are stored."""
    return None if dtype == jnp.float32 else dtype
