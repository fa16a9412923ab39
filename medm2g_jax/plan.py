"""`medm2g plan`: which stages a config stands on, and whether its train step fits a TPU slice that is not here.

libtpu holds the TPU compiler and runs on any Linux machine. The real train step is lowered against shapes placed on
the chips of a named slice, and compiled: no weight and no datum is ever made. Since jax hangs on plain machines where
libtpu is installed, it has an environment of its own (`make plan-env`), in which this file runs as a child that reads
what to compile from its standard input and prints what the compiler says.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from medm2g_jax import program, run
from medm2g_jax.config import stage_graph, stage_own_fields
from medm2g_jax.data.open import source_of
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import activation_dtype
from medm2g_jax.errors import UserError
from medm2g_jax.nn import attention
from medm2g_jax.train import latents, loop, results, sharding
from medm2g_jax.train.abstract import abstract_stage

ROOT = Path(__file__).parents[1]
GIB = 2**30
NOTABLE = 2**12  # elements of a weight whose copies count


@dataclasses.dataclass(frozen=True)
class Chip:
    """Vendor figures of one chip, and how many dimensions its slices have."""

    hbm: int  # GiB
    tflops: float  # bfloat16, peak
    dims: int
    hbm_gb: float  # GB/s between a chip and its memory
    link_gb: float  # GB/s that a chip sends to others, over all its links
    price: float  # dollars an hour: an assumption, about what a single one cost on demand in the US; --price says yours
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)  # for the topology


# v4's two cores are one device of 32 GiB, as on its TPU VMs.
CHIPS = {
    "v4": Chip(32, 275.0, 3, 1228.0, 300.0, 3.22, {"chip_config_name": "megacore"}),
    "v5e": Chip(16, 197.0, 2, 819.0, 200.0, 1.20),
    "v5p": Chip(95, 459.0, 3, 2765.0, 600.0, 4.20),
    "v6e": Chip(32, 918.0, 2, 1640.0, 448.0, 2.70),
}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """ "v5e:2x4" -> ("v5e", (2, 4)).

    Raises:
      UserError: not a kind of chip and its grid; names those there are.
    """
    kind, _, grid = name.partition(":")
    dims = CHIPS[kind].dims if kind in CHIPS else 0
    if not dims or not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * dims), grid):
        example = {2: "2x4", 3: "2x2x4"}
        known = ", ".join(f"{k}:{example[c.dims]}" for k, c in CHIPS.items())
        raise UserError(f"unknown topology {name!r}: expected a chip and its grid, as in {known}")
    return kind, tuple(int(n) for n in grid.split("x"))


# --- the stages -----------------------------------------------------------------------------------------------------


def commands(config: ConfigDict, path: str, overrides: Sequence[str], root: str) -> list[tuple[str, str, list[str]]]:
    """(stage, "done" | "resume" | "train", arguments of medm2g_jax.main) of every stage of the config's plan, in order.

    What the arguments say of all stages goes to each; config.stages.NAME.FIELD becomes NAME's own config.FIELD, and the
    last stage's own fields (steps, batch, lr ...) stay with it. What NAME predicts is told to all that stand on it.

    Args:
      path: what --config= was.
      overrides: the --config.FIELD=VALUE arguments.
    """
    with config.unlocked():
        config.upstream = "train"  # else a missing stage is an error here
    own, graph = stage_own_fields(config), stage_graph(config)
    out = []
    for name, what in loop.plan_stages(config, epath.Path(root)):
        last = name == config.stage
        arguments = [f"--config={path if last else results.config_words(config, name)}", f"--workdir={root}"]
        for override in overrides:
            field, _, rest = override.removeprefix("--config.").partition(".")
            field = field.partition("=")[0]
            if field == "stages":
                stage, _, inner = rest.partition(".")
                told = inner.startswith(f"{results.PREDICT}=") and stage in graph.plan(name)
                arguments += [f"--config.{inner}"] if stage == name else [override] if told else []
            elif field != "upstream" and (last or field not in own):
                arguments.append(override)
        out.append((name, what, [*arguments, "--config.upstream=require"]))
    return out


def vocabularies(config: ConfigDict, root: epath.Path) -> tuple[dict[str, int], str]:
    """Sizes of the three vocabularies, and where they are from: the run root's tokenizers, else what config allows."""
    if (root / "tokenizers" / "done").exists():
        return dict(Tokenizers.load(root / "tokenizers").sizes), f"of {root / 'tokenizers'}"
    return dict.fromkeys(("clip", "bert", "gpt2"), config.net.vocabulary), "the most config.net.vocabulary allows"


# --- the child, beside libtpu ---------------------------------------------------------------------------------------


def compile_step(
    config: ConfigDict, vocab: Mapping[str, int], topology: str, absent: Sequence[str] = (), cached: Sequence[str] = ()
) -> dict[str, Any]:
    """What the TPU compiler says of the train step on a slice: bytes and FLOPs of one chip; what its chips exchange
    ("collectives", see `program.traffic`); the largest array; of how many frozen bfloat16 weights float32 copies were
    looked for ("narrow") and which have one ("wide"); scores of all places of a latent with each other ("squares").
    """
    from jax.experimental import topologies

    kind, grid = parse_topology(topology)
    options: dict[str, Any] = dict(CHIPS[kind].options)
    chips = int(np.prod(grid))
    if chips <= 4:  # one host; by default a host has 2 x 2 chips
        options["chips_per_host_bounds"] = [*grid, 1, 1][:3]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology}: {str(error).splitlines()[0]}") from error
    mesh = sharding.make_mesh(config.mesh, devices)
    began = time.time()
    setup, arguments = abstract_stage(config, vocab, mesh, absent=absent, cached=cached)
    # Frozen parameters that this step does not read (decoders) are in memory all the same: keep_unused counts them.
    step = jax.jit(setup.train_step, out_shardings=(setup.layout, None), donate_argnums=0, keep_unused=True)
    with attention.traced_for("tpu"):
        traced = step.trace(*arguments)
    lowered, (_, repeated) = traced.lower(), program.products(traced.jaxpr.jaxpr)
    out = {"device": devices[0].device_kind, "trace": time.time() - began}
    out["frozen"] = sum(x.size for x in arguments[1].values())
    out["trained"] = sum(x.size for x in arguments[0].trainable.values())
    began = time.time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return out | _too_much(str(error)) | {"fits": False, "compile": time.time() - began}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) - 2 * sizes["aliased"]  # a donated argument and its result are one buffer
    fits = total <= CHIPS[kind].hbm * GIB
    text = compiled.as_text()
    shapes = lambda x: {x.shape, x.sharding.shard_shape(x.shape)}  # noqa: E731
    narrow = {k: shapes(x) for k, x in arguments[1].items() if x.size >= NOTABLE and x.dtype == jnp.bfloat16}
    trained = set().union(*map(shapes, arguments[0].trainable.values()))
    looked = program.wide_copies(text, narrow, trained)
    out["collectives"] = program.traffic(program.collectives(text))
    out["largest"] = program.largest(text)
    out["narrow"], out["wide"] = len(looked), [name for name, wide in looked.items() if wide]
    places = [s[0] * s[1] for f in setup.model.flows.values() if len(s := f.family.latent_shape) == 3]
    many = [n for n in set(places) if n * n >= attention.MANY]
    out["squares"] = [scores for n in many for scores in program.square_scores(text, n)]
    out["accessed"] = cost.get("bytes accessed", 0.0)
    flops = cost["flops"] + repeated / chips  # of loops the compiler counts one turn
    return out | sizes | {"fits": fits, "total": total, "flops": flops, "compile": time.time() - began}


def _too_much(message: str) -> dict[str, float]:
    """{"total": bytes asked for, "room": bytes there are} in the compiler's refusal, where it names them."""
    forms = (r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", r"\(([\d.]+)([KMGT])\) exceeds.*?\(([\d.]+)([KMGT])\)")
    found = next(filter(None, (re.search(form, message) for form in forms)), None)
    if found is None:
        return {}
    total, room = (float(found[i]) * 2 ** (10 * (1 + "KMGT".index(found[i + 1]))) for i in (1, 3))
    return {"total": total, "room": room}


def child() -> None:
    """Standard input to the last line of standard output, JSON; a mistake of the user's is one line and status 2."""
    try:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"no libtpu in the environment of {sys.executable}; `make plan-env` makes one that has it")
        asked = json.load(sys.stdin)
        asked["config"] = ConfigDict(results.tuples(asked["config"]))
        answer = compile_step(**asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(answer))


# --- the parent -----------------------------------------------------------------------------------------------------


def check(config: ConfigDict, topology: str, python: Path) -> None:
    """What can be known before the compiler starts.

    Raises:
      UserError: an unknown topology, a mesh or a batch that does not divide over its chips, no environment with libtpu.
    """
    _, grid = parse_topology(topology)
    sizes = sharding.mesh_sizes(config.mesh, int(np.prod(grid)))
    sharding.check_batch(config.batch, jax.sharding.AbstractMesh(tuple(sizes), sharding.AXES))
    if not python.exists():
        raise UserError(
            f"no TPU compiler: {python} is not there. `make plan-env` installs libtpu into .venv-tpu; or name the "
            "Python of an environment that has it by --libtpu-python=PATH or MEDM2G_LIBTPU_PYTHON"
        )


def ask(
    config: ConfigDict,
    vocab: Mapping[str, int],
    topology: str,
    python: Path,
    absent: Sequence[str] = (),
    cached: Sequence[str] = (),
) -> dict[str, Any]:
    """`compile_step` in the child."""
    # libtpu looks for the machine's own TPUs, and for other users of them, unless it is told not to.
    env = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    plain = json.loads(config.to_json_best_effort())
    more = {"absent": list(absent), "cached": list(cached)}
    question = json.dumps({"config": plain, "vocab": vocab, "topology": topology, **more})
    line = [str(python), "-c", "from medm2g_jax import plan; plan.child()"]
    done = subprocess.run(line, input=question, env=env, text=True, capture_output=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    errors = [text.removeprefix("error: ") for text in done.stderr.splitlines() if text.startswith("error: ")]
    if done.returncode == 2 and errors:
        raise UserError(errors[-1])
    sys.stderr.write(done.stderr)
    raise UserError(f"the TPU compiler ended with status {done.returncode}; what it said is above")


def report(config: ConfigDict, topology: str, answer: Mapping[str, Any]) -> str:
    """The answer in words."""
    kind, grid = parse_topology(topology)
    chip, chips = CHIPS[kind], int(np.prod(grid))
    names = ("arguments", "outputs", "aliased", "temporaries", "code", "total")
    size = {k: _bytes(answer[k]) for k in names if k in answer}
    verdict = "fits" if answer["fits"] else "DOES NOT FIT"
    lines = []
    if "arguments" in answer:
        lines.append(
            f"memory a chip   arguments {size['arguments']}, outputs {size['outputs']} ({size['aliased']} of it in the "
            f"arguments' place), temporaries {size['temporaries']}, program {size['code']}"
        )
    room = _bytes(answer.get("room", chip.hbm * GIB))
    lines.append(f"total a chip    {size.get('total', 'more than there is')} of {room}: {verdict}")
    if not answer["fits"]:
        lines.append(
            "                less: a larger slice, a smaller --config.batch (with --config.accumulate), "
            "--config.mesh.fsdp, --config.remat=True"
        )
    if "flops" in answer:
        flops = answer["flops"] * config.accumulate
        lines += [
            f"FLOPs a step    {_si(flops)}FLOP a chip, {_si(flops * chips)}FLOP on {chips}",
            f"compute floor   {flops / chip.tflops / 1e9:.3g} ms a step at {chip.tflops:g} TFLOP/s a chip (vendor's "
            "bfloat16 peak)",
        ]
    if "collectives" in answer:
        moved = [f"{int(x['count'])} {kind} {_bytes(x['bytes'])}" for kind, x in sorted(answer["collectives"].items())]
        lines.append(f"exchanged       {', '.join(moved) or 'nothing'}: sent by a chip in a micro-step")
        lines.append(f"largest array   {_bytes(answer['largest'][0])}, {answer['largest'][1]}")
    rows = config.batch * config.accumulate
    lines.append(f"global batch    {rows} rows a step, {rows / chips:g} a chip")
    lines.append(
        f"parameters      {answer['trained'] / 1e6:.4g} M trained, {answer['frozen'] / 1e6:.4g} M frozen; traced in "
        f"{answer['trace']:.0f} s, compiled in {answer['compile']:.0f} s"
    )
    return "\n".join(lines)


def _bytes(n: float | int) -> str:
    return f"{n / GIB:.3g} GiB" if n >= GIB else f"{n / 2**20:.3g} MiB"


def _si(x: float | int) -> str:
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= size:
            return f"{x / size:.3g} {name}"
    return f"{x:.3g} "


def compiler(python: str = "") -> Path:
    """The Python of the environment that has libtpu: as told, else the one that `make plan-env` makes."""
    return Path(python or os.environ.get("MEDM2G_LIBTPU_PYTHON") or ROOT / ".venv-tpu" / "bin" / "python")


def show(config: ConfigDict, workdir: str, topology: str = "", python: str = "") -> None:
    """Print the stages and what there is of them; with a topology, what the TPU compiler says of config.stage."""
    root = epath.Path(workdir)
    todo = loop.plan_stages(config, root)
    try:
        source = source_of(config)
    except UserError as error:
        source = None
        print(f"the data cannot be read, so records are not counted: {error}")
    print(run.described(config, root, todo, source))
    if not topology:
        return
    where = compiler(python)
    check(config, topology, where)
    graph = results.graph_of(config, root)
    cached = () if source is None else latents.chosen(config, root, graph, source)
    vocab, whose = vocabularies(config, root)
    sizes = sharding.mesh_sizes(config.mesh, int(np.prod(parse_topology(topology)[1])))
    mesh = ", ".join(f"{a}={n}" for a, n in zip(sharding.AXES, sizes, strict=True))
    dtype = jnp.dtype(activation_dtype(config.dtype, "tpu")).name
    print(
        f"train step of {config.stage} on {topology}: mesh {mesh}; activations and frozen parameters {dtype}; remat "
        f"{config.remat}; vocabularies {', '.join(f'{k} {n}' for k, n in vocab.items())} ({whose})"
        + (f"; latents of {', '.join(cached)} are read, not made" if cached else "")
    )
    print("asking the TPU compiler: a minute for tiny, ten and more for sd15", flush=True)
    print(report(config, topology, ask(config, vocab, topology, where, graph.absent, cached)))
