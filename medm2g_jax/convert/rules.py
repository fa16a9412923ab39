"""The two-way table engine: which tensor of theirs is which parameter of ours, and how its axes lie.

A table is a list of `Rule(theirs, ours, transform)`, written layer by layer (`layer`) and spelled out for the sizes at
hand, so that it reads both ways. `match` goes through a source once: every parameter of our network takes exactly one
tensor and every tensor is taken exactly once, or a `UserError` lists what is missing, left over or of the wrong shape.
What our network has, names and shapes, comes from the network itself (`parameters`), never from the table.

Two rules with the same `ours` are two spellings of one tensor: the source decides; the first is the one written out.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from medm2g_jax.convert.files import Output, Tensor, some
from medm2g_jax.errors import UserError
from medm2g_jax.model import init


@dataclass(frozen=True)
class Transform:
    """How a tensor's axes lie, both ways. Works on any array of `rank` axes (None: of any), values or not."""

    rank: int | None
    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Of the result of `forward`; None where it does not apply."""
        if self.rank not in (None, len(shape)):
            return None
        return self.forward(np.broadcast_to(np.int8(0), shape)).shape

    def shape_back(self, shape: Sequence[int]) -> tuple[int, ...]:
        return self.backward(np.broadcast_to(np.int8(0), shape)).shape


SAME = Transform(None, lambda x: x, lambda x: x)
LINEAR = Transform(2, lambda x: x.T, lambda x: x.T)  # (out in) <-> (in out)
CONV = Transform(4, lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINT = Transform(4, lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # 1x1 convolution <-> Dense

_BIAS = ("bias", "bias", SAME)
# kind of layer -> its leaves: (theirs, ours, transform)
LAYERS = {
    "norm": (("weight", "scale", SAME), _BIAS),
    "dense": (("weight", "kernel", LINEAR), _BIAS),
    "matrix": (("weight", "kernel", LINEAR),),  # dense without bias
    "in_out": (("weight", "kernel", SAME), _BIAS),  # GPT-2 stores (in out)
    "conv": (("weight", "kernel", CONV), _BIAS),
    "filter": (("weight", "kernel", CONV),),  # convolution without bias
    "point": (("weight", "kernel", POINT), _BIAS),
    "embedding": (("weight", "embedding", SAME),),
    "old_norm": (("gamma", "scale", SAME), ("beta", "bias", SAME)),
}


@dataclass(frozen=True)
class Rule:
    theirs: str
    ours: str
    transform: Transform


@dataclass(frozen=True)
class Step:
    """One tensor of a source and what becomes of it."""

    name: str  # the new one
    tensor: Tensor
    apply: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]

    def output(self) -> Output:
        return Output(self.shape, self.tensor.dtype, lambda: self.apply(self.tensor.read()))


def layer(theirs: str, ours: str, kind: str) -> list[Rule]:
    """The rules of one layer's leaves."""
    return [Rule(f"{theirs}.{a}", f"{ours}/{b}", transform) for a, b, transform in LAYERS[kind]]


def parameters(module: Any, prefix: str, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Names, behind prefix/, and shapes of what `module` has; nothing is computed."""
    tree = jax.eval_shape(lambda key: init(module, prefix, key, *args, **kwargs), jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}


def match(
    rules: Iterable[Rule],
    found: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    ignore: str = r"(?!)",
    tied: Mapping[str, str] | None = None,
    hint: str = "",
) -> list[Step]:
    """The steps that make `expected` out of `found`.

    Args:
      expected: our names and shapes.
      what: said in errors: the file and the part of it.
      ignore: keys that nobody needs (buffers).
      tied: keys that repeat another key's values; checked, and not taken.
      hint: ends the error.

    Raises:
      UserError: lists what is missing, left over or of the wrong shape.
    """
    spellings: dict[str, list[Rule]] = {}
    for rule in rules:
        spellings.setdefault(rule.ours, []).append(rule)
    untold = [name for name in expected if name not in spellings]
    if untold:  # our own mistake: the table does not know the network
        raise ValueError(f"{what}: no rule for {some(untold)}")
    steps, missing, wrong, taken = [], [], [], set()
    for name, shape in expected.items():
        rule = next((r for r in spellings[name] if r.theirs in found and _fits(r, found, shape)), None)
        rule = rule or next((r for r in spellings[name] if r.theirs in found), None)
        if rule is None:
            missing.append(spellings[name][0].theirs)
            continue
        taken.add(rule.theirs)
        tensor = found[rule.theirs]
        if rule.transform.shape(tensor.shape) != shape:
            back = rule.transform.shape_back(shape)
            wrong.append(f"{rule.theirs} (expected {list(back)}, found {list(tensor.shape)})")
            continue
        steps.append(Step(name, tensor, rule.transform.forward, shape))
    left = [k for k in found if k not in taken and not re.search(ignore, k) and k not in (tied or {})]
    trouble = [
        f"{len(items)} {label}: {some(items)}"
        for label, items in (("missing", missing), ("of the wrong shape", wrong), ("left over", left))
        if items
    ]
    if trouble:
        raise UserError(f"{what}: {'; '.join(trouble)}" + (f". {hint}" if hint else ""))
    for key, twin in (tied or {}).items():
        if key in found and not np.array_equal(found[key].read(), found[twin].read()):
            raise UserError(f"{what}: {key} should repeat {twin}, and differs; such a network is not one of ours")
    return steps


def _fits(rule: Rule, found: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    return rule.transform.shape(found[rule.theirs].shape) == shape


def back(rules: Iterable[Rule], ours: Mapping[str, Tensor], what: str) -> list[Step]:
    """The steps that make their layout out of ours: every tensor of ours is taken by the first rule that names it.

    Raises:
      UserError: a parameter that their layout has no place for.
    """
    first: dict[str, Rule] = {}
    for rule in rules:
        first.setdefault(rule.ours, rule)
    homeless = [name for name in ours if name not in first]
    if homeless:
        raise UserError(f"{what}: {some(homeless)} has no place in this format")
    return [
        Step(first[n].theirs, t, first[n].transform.backward, first[n].transform.shape_back(t.shape))
        for n, t in ours.items()
    ]


def part(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys start with prefix, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in found.items() if key.startswith(prefix)}


def outputs(steps: Iterable[Step]) -> dict[str, Output]:
    """What `files.write_safetensors` takes."""
    return {step.name: step.output() for step in steps}
