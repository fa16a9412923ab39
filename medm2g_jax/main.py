"""Training entry: flags, distributed start-up, the plan, then training; nothing else.

python -m medm2g_jax.main --config=configs/text_ct.py:tiny [--config.FIELD=VALUE ...] [--workdir=DIR]

A config is a file, or the name of one that the package brings: --config=text_ct:tiny.
"""

import difflib
import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from medm2g_jax.config import absolute
from medm2g_jax.errors import UserError
from medm2g_jax.limits import check

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file, or the name of one in configs/; words after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run root, one folder a stage in it; default runs/<data>-<preset>.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", None, "Start jax.distributed; default: where a launcher asks for it.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides look like --config.{argv[1].lstrip('-')}=VALUE")
    if _CONFIG.value is None:
        raise UserError("say what to train: --config=configs/text_ct.py (python -m medm2g_jax.main --help lists flags)")
    _CONFIG.value.weights = absolute(_CONFIG.value.weights)
    check(_CONFIG.value)
    if _DISTRIBUTED.value or (_DISTRIBUTED.value is None and os.environ.get("JAX_COORDINATOR_ADDRESS")):
        _join(processes(os.environ))
    from medm2g_jax import run
    from medm2g_jax.device import keep_memory
    from medm2g_jax.train import loop
    from medm2g_jax.train.log import quiet

    quiet()
    keep_memory()
    try:
        run.run(_CONFIG.value, _WORKDIR.value, arguments=sys.argv[1:])
    except loop.Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(128 + signal.SIGTERM)


def console() -> None:
    """`app.run(main)`, with errors a user can mend as one line."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave_within(5, 2)
        sys.exit(2)


def processes(environment: Mapping[str, str]) -> dict[str, int]:
    """Number and rank of this process for jax.distributed.initialize, from JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    jax reads the address itself; number and rank it knows from launchers alone (Slurm, Open MPI, Cloud TPU). {}: ask
    these.

    Raises:
      UserError: one without the other, or not numbers that fit; an address without a port.
    """
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if address and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS: expected HOST:PORT of process 0, found {address!r}")
    given = {name: environment[name] for name in names if name in environment}
    for name, value in given.items():
        if not re.fullmatch(r"[0-9]{1,9}", value.strip()):
            raise UserError(f"{name}: expected a whole number, found {value!r}; set it, or unset {' and '.join(names)}")
    if len(given) == 1:
        missing = next(name for name in names if name not in given)
        raise UserError(f"{next(iter(given))} is set and {missing} is not; set both, or neither under a launcher")
    if not given:
        return {}
    count, rank = (int(given[name]) for name in names)
    if count < 1 or rank >= count:
        raise UserError(
            f"JAX_PROCESS_ID: expected 0 to JAX_NUM_PROCESSES - 1, found {rank} of JAX_NUM_PROCESSES={count}"
        )
    return {"num_processes": count, "process_id": rank}


def _join(told: dict[str, int]) -> None:
    import jax

    try:
        jax.distributed.initialize(**told)
    except ValueError as error:  # what is neither given nor known from a launcher
        asked = "--distributed" if _DISTRIBUTED.value else "JAX_COORDINATOR_ADDRESS"
        raise UserError(
            f"{asked} asks for several processes, and no launcher that jax knows says which this one is: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; on one machine leave these and "
            "--distributed out"
        ) from error


def _leave_within(seconds: float, status: int) -> None:
    """End this process, whatever threads of libraries still wait for (a save that failed: minutes)."""

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


def read_config(arguments: list[str]) -> ConfigDict:
    """The config that the trainer makes of these arguments: --config=FILE:WORDS, --config.FIELD=VALUE.

    Raises:
      UserError: no such file, word or field, or a value of another type.
    """
    config = parse(arguments)
    config.weights = absolute(config.weights)
    check(config)
    return config


def parse(arguments: list[str]) -> ConfigDict:
    """What a config file makes of these arguments, whatever it is of.

    Raises:
      UserError: as `read_config`.
    """
    values, argv = flags.FlagValues(), ["medm2g", *_with_files(arguments)]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True, sys_argv=argv)
    _check(argv)
    try:
        values(argv)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from error
    return values.config


def config_file(argument: str) -> str:
    """FILE:WORDS with a FILE that is there: as it was typed, with .py, in configs/ here, or in the package's own.

    So `configs/text_ct.py:tiny` works where the package is installed and no configs/ is near, as `text_ct:tiny` does.

    Raises:
      UserError: there is none; names the package's.
    """
    path, colon, words = argument.partition(":")
    named = path if path.endswith(".py") else f"{path}.py"
    name = os.path.basename(named)
    places = [named]
    if path and os.path.dirname(path) in ("", "configs"):
        places += [os.path.join("configs", name), str(_configs() / name)]
    found = next((p for p in places if os.path.isfile(p)), None)
    if found is None:
        own = sorted(p.stem for p in _configs().glob("*.py") if p.stem != "__init__")
        raise UserError(
            f"no config file {path or repr(path)}; expected a path, as in --config=configs/text_ct.py:tiny, or one of "
            f"the package's own by its name, as in --config=text_ct:tiny: {', '.join(own)}"
        )
    return found + colon + words


def _configs() -> Path:
    """configs/ as a part of the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with what config_flags says of a config in tracebacks turned into one line."""
    argv = _with_files(argv)
    _check(argv)
    return app.parse_flags_with_usage(argv)


def _with_files(argv: Sequence[str]) -> list[str]:
    """The arguments with --config as one word, and its file where it is."""
    out: list[str] = []
    rest = iter(argv)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            value = value if equals else next(rest, "")
            out.append(f"--config={config_file(value)}")
        else:
            out.append(argument)
    return out


def _check(argv: Sequence[str]) -> None:
    given = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    path, _, words = given.partition(":")
    known = _fields(runpy.run_path(path)["get_config"](words)) if given else []
    for argument in argv:
        field = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and known and field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            raise UserError(f"--config={given}: no field config.{field}; did you mean --config.{near}?")


def _fields(config: ConfigDict, prefix: str = "") -> list[str]:
    out = []
    for key, value in config.items():
        out += [prefix + key, *(_fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else ())]
    return out


if __name__ == "__main__":
    console()
