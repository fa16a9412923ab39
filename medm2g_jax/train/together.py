"""Stages that do not stand on each other train side by side where a device is a CPU: a step of one small network keeps
one core busy and the others now and then."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
from ml_collections import ConfigDict


def at_once(config: ConfigDict, stages: Iterable[ConfigDict]) -> int:
    """How many of these stages train at a time: config.at_once, where it says so, else two small ones on a CPU's cores.

    One on accelerators, which a step fills, among several processes, which would have to agree, and of networks whose
    activations are recomputed for want of memory.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return 1
    small = not config.weights and not any(stage.remat for stage in stages)
    return config.at_once or (2 if small and (os.cpu_count() or 1) > 1 else 1)


def run(
    needs: Mapping[str, Collection[str]],
    seconds: Mapping[str, float],
    train: Callable[[str], Any],
    workers: int,
    stop: Callable[[], Any],
) -> None:
    """Train every stage once all that it needs has ended: the one first behind which most is waiting.

    Args:
      needs: what each stage stands on, of these stages, in an order in which they can run.
      seconds: what each is expected to take, on one scale.
      workers: at most so many at a time; one: in this thread, in the order of `needs`.
      stop: asks whatever runs to save and end. Called at the first error, or Ctrl-C, which is raised when all have.
    """
    if workers == 1:
        for name in needs:
            train(name)
        return
    behind = dict(seconds)
    for name in reversed(list(needs)):
        behind[name] += max((behind[other] for other in needs if name in needs[other]), default=0.0)
    waiting, ended, running = list(needs), set[str](), dict[Future, str]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                ready = sorted((s for s in waiting if ended.issuperset(needs[s])), key=lambda s: -behind[s])
                for name in ready[: workers - len(running)]:
                    waiting.remove(name)
                    running[pool.submit(train, name)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    ended.add(running.pop(future))
                    future.result()
        except BaseException:
            stop()
            raise
