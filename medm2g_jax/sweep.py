"""What training costs. `medm2g plan --sweep`: one stage's train step on one TPU slice, under several meshes and
batches. `medm2g plan --costs`: every stage of a plan, from its traced step alone, in minutes and without a compiler.

Each is compiled by the TPU compiler as `medm2g plan` does it, so memory, FLOPs, bytes and exchanges are the program's
own; the time is a bound. Where a chip computes, reads its memory and exchanges at once, a step takes at least the
longest of

    FLOPs / peak,   bytes accessed / memory's bandwidth,   bytes sent / bandwidth of all links

with the vendor's figures (`plan.CHIPS`). XLA's count of bytes takes each operation's arguments and results as memory,
what stays on the chip too, so the second is no bound but a worst case: it is told and left out.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from medm2g_jax import plan, program
from medm2g_jax.config import stage_config
from medm2g_jax.errors import UserError
from medm2g_jax.nn import attention
from medm2g_jax.plan import CHIPS, GIB, parse_topology
from medm2g_jax.train import results, sharding
from medm2g_jax.train.abstract import abstract_stage

BATCHES = (1, 2, 4, 8, 16, 32)  # rows a chip
Mesh = tuple[int, int, int]


def meshes(chips: int) -> list[Mesh]:
    """(data, fsdp, tensor): rows alone, parameters split over all, over half and, with products split in two, too."""
    found = [(chips, 1, 1), (1, chips, 1)]
    found += [(2, chips // 2, 1), (1, chips // 2, 2)] if chips >= 4 and chips % 2 == 0 else []
    return list(dict.fromkeys(found))


def parse_meshes(text: str, chips: int) -> list[Mesh]:
    """ "8x1x1,1x8x1" -> [(8, 1, 1), (1, 8, 1)].

    Raises:
      UserError: not data x fsdp x tensor, or a product that is not the number of chips.
    """
    out = []
    for word in text.split(","):
        sizes = tuple(int(n) for n in word.split("x") if n.isdigit())
        if len(sizes) != 3 or word.count("x") != 2 or math.prod(sizes) != chips:
            raise UserError(f"--meshes: expected DATAxFSDPxTENSOR whose product is {chips}, found {word!r}")
        out.append(sizes)
    return out


def show(
    config: ConfigDict,
    workdir: str,
    topology: str,
    python: str = "",
    grids: str = "",
    batches: str = "",
    out: str | None = None,
    price: float = 0.0,
) -> None:
    """Sweep config.stage and print its table; the arguments are `medm2g plan`'s.

    Raises:
      UserError: no slice is named, or what `plan.check` and `run` raise.
    """
    if not topology:
        raise UserError("--sweep: say on which slice, as in --topology=v5e:2x4")
    chips = math.prod(plan.parse_topology(topology)[1])
    if batches and not all(word.isdigit() and int(word) for word in batches.split(",")):
        raise UserError(f"--batches: expected rows a chip, as in 1,2,4, found {batches!r}")
    some = parse_meshes(grids, chips) if grids else meshes(chips)
    asked = config.copy_and_resolve_references()
    asked.batch, asked.mesh.data, asked.mesh.fsdp, asked.mesh.tensor = chips, *some[0]
    python = plan.compiler(python)
    plan.check(asked, topology, python)
    root = epath.Path(workdir)
    vocab, whose = plan.vocabularies(config, root)
    path = Path(out or f"results/plan/{config.stage}-{config.preset}-{topology.replace(':', '-')}.json")
    absent = results.graph_of(config, root).absent
    print(f"{config.stage} on {topology}; vocabularies {whose}; rows go to {path}", flush=True)
    rows = run(
        config,
        topology,
        path,
        lambda own: plan.ask(own, vocab, topology, python, absent),
        some,
        tuple(map(int, batches.split(","))) if batches else BATCHES,
        functools.partial(print, flush=True),
    )
    print(table(rows, topology, price))


def costs(config: ConfigDict, workdir: str, out: str | None = None, say: Callable[[str], Any] = print) -> None:
    """Print, and with `out` keep, what a step of each stage of config's plan holds, and what a plan costs at least.

    Raises:
      UserError: `out` holds another plan.
    """
    root = epath.Path(workdir)
    vocab, whose = plan.vocabularies(config, root)
    graph = results.graph_of(config, root)
    about = {"preset": config.preset, "image_size": config.image_size, "listing": list(config.listing)}
    kept = _kept(Path(out), about | {"vocabularies": dict(vocab)}) if out else {"rows": []}
    rows = []
    for name in graph.plan(config.stage):
        row = next((r for r in kept["rows"] if r["stage"] == name), None)
        if row is None:
            row = cost(stage_config(config, name), vocab, graph.absent)
            kept["rows"].append(row)
            if out:
                _keep(Path(out), kept)
        rows.append(row)
    say(f"{config.stage}, preset {config.preset}, {config.image_size} px; vocabularies {whose}")
    say(costs_table(rows))


def _kept(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has, or the beginning of it.

    Raises:
      UserError: it is about something else.
    """
    kept = json.loads(path.read_text()) if path.exists() else {**about, "rows": []}
    found = {k: kept.get(k) for k in about}
    if found != about:
        raise UserError(f"{path} holds {found}, this command asks for {about}; name another --out")
    return kept


def _keep(path: Path, kept: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def cost(config: ConfigDict, vocab: Mapping[str, int], absent: Sequence[str] = ()) -> dict[str, Any]:
    """Of config.stage: rows a step, steps, parameters that train and that do not, FLOPs of a row's products.

    The step is the one for a TPU in bfloat16, with what `remat` computes again.
    """
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    setup, arguments = abstract_stage(config, vocab, mesh, absent=absent)
    with attention.traced_for("tpu"):
        flops, _ = program.products(jax.make_jaxpr(setup.train_step)(*arguments).jaxpr)
    held = {"trained": arguments[0].trainable, "frozen": arguments[1]}
    about = {name: int(sum(x.size for x in jax.tree.leaves(tree))) for name, tree in held.items()}
    steps = config.steps * config.accumulate
    return {"stage": config.stage, "batch": config.batch, "steps": steps, "flops": flops / config.batch} | about


def costs_table(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str] = ("v5e", "v5p")) -> str:
    """Rows of `cost` in Markdown: at peak, so at least."""
    heads = ["stage", "rows x steps", "M trained", "M frozen", "GiB of state and weights", "TFLOP a row"]
    heads += [f"{kind}: rows/s a chip; rows a chip to hide the exchange; $" for kind in kinds]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    total = dict.fromkeys(kinds, 0.0)
    for r in rows:
        # Parameters, their average and two moments in float32, gradients too; what is frozen in bfloat16.
        held = (20 * r["trained"] + 2 * r["frozen"]) / GIB
        cells = [r["stage"], f"{r['batch']} x {r['steps']}", f"{r['trained'] / 1e6:.4g}", f"{r['frozen'] / 1e6:.4g}"]
        cells += [f"{held:.3g}", f"{r['flops'] / 1e12:.3g}"]
        for kind in kinds:
            chip = CHIPS[kind]
            rate = chip.tflops * 1e12 / r["flops"]
            dollars = r["batch"] * r["steps"] / rate / 3600 * chip.price
            total[kind] += dollars
            # Data-parallel: each gradient, float32, goes round a ring twice.
            hidden = 8 * r["trained"] / (chip.link_gb * 1e9) * rate
            cells.append(f"{rate:.4g}; {hidden:.2g}; {dollars:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    said = ", ".join(f"${total[k]:,.0f} on {k} at ${CHIPS[k].price:g} an hour and chip" for k in kinds)
    return "\n".join([*lines, "", f"All of it at peak, so at least: {said} (assumed prices)."])


def run(
    config: ConfigDict,
    topology: str,
    path: Path,
    ask: Callable[[ConfigDict], Mapping[str, Any]],
    grids: Sequence[Mesh] = (),
    batches: Sequence[int] = BATCHES,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Rows {"mesh", "batch", and the compiler's answer}, each written to `path` (JSON) when it is there; what the file
    has is not asked again. Larger batches of a mesh are left out once one does not fit.

    Args:
      ask: what the compiler says of a config's train step on the slice.
      grids: meshes; by default `meshes`.
      batches: rows a chip.

    Raises:
      UserError: the file holds another stage, slice or preset.
    """
    chips = math.prod(parse_topology(topology)[1])
    about = {"stage": config.stage, "preset": config.preset, "topology": topology, "image_size": config.image_size}
    kept = _kept(path, about)
    rows = kept["rows"]
    for mesh in grids or meshes(chips):
        for batch in sorted(batches):
            there = [r for r in rows if tuple(r["mesh"]) == tuple(mesh) and r["batch"] == batch]
            if not there:
                asked = config.copy_and_resolve_references()
                for axis, size in zip(sharding.AXES, mesh, strict=True):
                    asked.mesh[axis] = size
                asked.batch = batch * chips
                there = [{"mesh": list(mesh), "batch": batch} | dict(ask(asked))]
                rows += there
                _keep(path, kept)
                say(f"  {'x'.join(map(str, mesh))}, {batch} rows a chip: {'fits' if there[0]['fits'] else 'too much'}")
            if not there[0]["fits"]:
                break
    return rows


def bounds(row: Mapping[str, Any], topology: str, price: float) -> dict[str, float]:
    """Of a row that fits, at `price` dollars an hour and chip: seconds of a step at least, of what ("compute",
    "exchange"), rows a second at most, dollars for a million rows at least."""
    kind, grid = parse_topology(topology)
    chip, chips = CHIPS[kind], math.prod(grid)
    compute = row["flops"] / (chip.tflops * 1e12)
    exchange = sum(x["bytes"] for x in row["collectives"].values()) / (chip.link_gb * 1e9)
    memory = row["accessed"] / (chip.hbm_gb * 1e9)
    seconds = max(compute, exchange)
    rate = row["batch"] * chips / seconds
    dollars = price * chips / 3600 / rate * 1e6
    return dict(compute=compute, exchange=exchange, memory=memory, seconds=seconds, rate=rate, dollars=dollars)


def table(rows: Sequence[Mapping[str, Any]], topology: str, price: float = 0.0) -> str:
    """The rows in Markdown, and the best mesh in a sentence; price: dollars an hour and chip, 0 for the assumed one."""
    kind, grid = parse_topology(topology)
    price = price or CHIPS[kind].price
    lines = [
        "| mesh: data x fsdp x tensor | rows a chip | GiB a chip | TFLOP a chip | sent by a chip, MiB | compute ms | "
        "exchange ms | memory ms, worst | rows/s at most | $ per million rows at least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    best: tuple[float, Mapping[str, Any], dict[str, float]] | None = None
    for row in rows:
        cells = ["x".join(map(str, row["mesh"])), row["batch"]]
        total = f"{row['total'] / GIB:.2f}" if "total" in row else "?"
        if row["fits"]:
            b = bounds(row, topology, price)
            moved = [f"{k} {int(x['count'])}: {x['bytes'] / 2**20:.0f}" for k, x in sorted(row["collectives"].items())]
            cells += [total, f"{row['flops'] / 1e12:.3g}", "; ".join(moved)]
            cells += [f"{1e3 * b[k]:.3g}" for k in ("compute", "exchange", "memory")]
            cells += [f"{b['rate']:.4g}", f"{b['dollars']:.3g}"]
            best = min(best, (b["dollars"], row, b), key=lambda x: x[0]) if best else (b["dollars"], row, b)
        else:
            cells += [f"{total}: too much", *[""] * 7]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    said = f"at ${price:g} an hour and chip"
    if best is None:
        return "\n".join([*lines, "", f"Nothing fits {topology}."])
    _, row, b = best
    by = "its products" if b["compute"] >= b["exchange"] else "what its chips exchange"
    mesh = ", ".join(f"{a}={n}" for a, n in zip(sharding.AXES, row["mesh"], strict=True))
    lines += ["", f"Best on {topology}, {said}: {mesh}, {row['batch']} rows a chip; bound by {by}."]
    return "\n".join(lines)
