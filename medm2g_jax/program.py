"""What a compiled program holds, read from its text (`compiled.as_text()`): arrays in memory, collectives, copies.

The text is HLO after all passes, of one device: an instruction a line, with the shape that it makes there. What stands
inside a fusion is never an array in memory; all else is, but for other names of the same bytes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import jax.extend

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ALIASES = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|[a-z]\S*) ([a-z][\w-]*)\((.*)")


class Instruction(NamedTuple):
    """One line: its name, what it makes as (dtype, dimensions) of each array, its opcode, and the line's rest."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    rest: str


class Collective(NamedTuple):
    """An exchange between devices: its kind, the bytes of its whole result on one device, and how many take part."""

    kind: str
    size: int
    devices: int

    @property
    def moved(self) -> float:
        """Bytes that a device sends where they go round a ring."""
        share = (self.devices - 1) / max(self.devices, 1)
        if self.kind == "reduce-scatter":  # of devices times what is left
            return self.size * (self.devices - 1)
        return self.size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


def computations(text: str) -> dict[str, list[Instruction]]:
    """Name -> instructions of every computation of the program."""
    out: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = out.setdefault(head[1], [])
        elif part := _INSTRUCTION.match(line):
            shapes = tuple((d, _dims(dims)) for d, dims in _SHAPE.findall(part[2]) if d in BYTES)
            current.append(Instruction(part[1], shapes, part[3], part[4]))
    return out


def arrays(text: str) -> Iterator[tuple[str, tuple[int, ...], Instruction]]:
    """(dtype, dimensions, instruction) of everything that the program puts into memory."""
    program = computations(text)
    inside = {
        name
        for body in program.values()
        for i in body
        if i.opcode in ("fusion", "reduce", "reduce-window", "map", "scatter", "sort", "select-and-scatter")
        for name in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", i.rest)
    }
    for name, body in program.items():
        for i in body if name not in inside else ():
            if i.opcode not in _ALIASES:
                for dtype, dims in i.shapes:
                    yield dtype, dims, i


def largest(text: str) -> tuple[int, str]:
    """(bytes, "f32[8,4096,4096] fusion") of the largest array."""
    return max((size(d, dims), f"{d}[{','.join(map(str, dims))}] {i.opcode}") for d, dims, i in arrays(text))


def size(dtype: str, dims: Iterable[int]) -> int:
    return BYTES[dtype] * prod(dims)


Shapes = Iterable[tuple[int, ...]]


def wide_copies(text: str, weights: Mapping[str, Shapes], also: Shapes = ()) -> dict[str, bool]:
    """Of each weight that is looked for: does the program hold an array of its dimensions, in any order, in float32?

    Args:
      weights: name -> its shape as a whole and on one device, of those that are handed over in less.
      also: shapes of what is float32 by right, as of parameters that train: no weight of such a shape is looked for.
    """
    held = {_plain(dims) for dtype, dims, _ in arrays(text) if dtype == "f32"}
    right = {_plain(shape) for shape in also}
    asked = {name: {_plain(shape) for shape in shapes} for name, shapes in weights.items()}
    return {name: bool(shapes & held) for name, shapes in asked.items() if not shapes & right}


def square_scores(text: str, tokens: int) -> list[str]:
    """Arrays that hold the scores of all of so many tokens with each other."""
    found = (f"{d}[{','.join(map(str, dims))}] {i.opcode}" for d, dims, i in arrays(text) if dims.count(tokens) > 1)
    return sorted(set(found))


def collectives(text: str) -> Counter[Collective]:
    """How many of each there are; those in a loop's body count once."""
    out: Counter[Collective] = Counter()
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions[1]) if partitions else 1
    for body in computations(text).values():
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                sizes = [size(*shape) for shape in i.shapes]
                # The result of "-start" is a pair: what goes in, and what comes out.
                whole = sum(sizes) if kind == i.opcode or kind == "all-reduce" else max(sizes)
                out[Collective(kind, whole, _group(i.rest, everyone))] += 1
    return out


def traffic(found: Counter[Collective]) -> dict[str, dict[str, float | int]]:
    """kind -> {"count", "bytes": that one device sends}."""
    out: dict[str, dict[str, float | int]] = {}
    for one, count in found.items():
        own = out.setdefault(one.kind, {"count": 0, "bytes": 0.0})
        own["count"] += count
        own["bytes"] += count * one.moved
    return out


def products(jaxpr: Any) -> tuple[float, float]:
    """(FLOPs of all matrix products and convolutions of a traced program, those that a compiler's count leaves out): it
    counts the body of a loop once, however often it runs."""
    whole = out = 0.0
    for eqn in jaxpr.eqns:
        inner = [products(sub) for value in eqn.params.values() for sub in _jaxprs(value)]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        whole += times * sum(a for a, _ in inner)
        out += sum(times * b + (times - 1) * (a - b) for a, b in inner)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
            depth = prod(kernel) // kernel[numbers.rhs_spec[0]]
        else:
            continue
        whole += 2.0 * depth * prod(eqn.outvars[0].aval.shape)
    return whole, out


def _jaxprs(value: Any) -> Iterator[Any]:
    """The programs inside a parameter of an equation."""
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, jax.extend.core.ClosedJaxpr):
            yield one.jaxpr
        elif isinstance(one, jax.extend.core.Jaxpr):
            yield one


def _group(rest: str, everyone: int) -> int:
    """Devices that one exchange is between: replica_groups={{0,1},{2,3}} or [4,2]<=[8]; where it is {}, all."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return int(counted[1]) if counted else everyone


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _plain(shape: Iterable[int]) -> tuple[int, ...]:
    """Dimensions in order, without those of one."""
    return tuple(sorted(n for n in shape if n > 1))
