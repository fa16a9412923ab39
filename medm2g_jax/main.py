"""Training entry: flags, distributed start-up, the plan, then training; nothing else.

python -m medm2g_jax.main --config=configs/text_ct.py:tiny [--config.FIELD=VALUE ...] [--workdir=DIR]
"""

import os
import sys

from absl import app, flags
from ml_collections import config_flags

from medm2g_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, with words after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run root, one folder a stage in it; default runs/<data>-<preset>.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", None, "Start jax.distributed; default: where a launcher asks for it.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides look like --config.{argv[1].lstrip('-')}=VALUE")
    if _CONFIG.value is None:
        raise UserError("say what to train: --config=configs/text_ct.py (python -m medm2g_jax.main --help lists flags)")
    import jax

    if _DISTRIBUTED.value or (_DISTRIBUTED.value is None and os.environ.get("JAX_COORDINATOR_ADDRESS")):
        jax.distributed.initialize()
    from medm2g_jax.train import run

    run.run(_CONFIG.value, _WORKDIR.value)


def console() -> None:
    """`app.run(main)`, with errors a user can mend as one line."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with ml_collections' complaints about config fields turned into one line."""
    import difflib

    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        config = next((a for a in argv if a.startswith("--config=")), "--config=...")
        wrong = next(
            (a[len("--config.") :].split("=")[0] for a in argv if a.startswith("--config.") and _unknown(a)), ""
        )
        near = difflib.get_close_matches(wrong, _fields(), n=1, cutoff=0.0)
        hint = f"; did you mean --config.{near[0]}?" if near else ""
        raise UserError(f"{config}: no field config.{wrong or error}{hint}") from None


def _fields(config=None, prefix: str = "") -> list[str]:
    from ml_collections import ConfigDict

    config = _CONFIG.value if config is None else config
    out = []
    for key, value in (config or {}).items():
        out.append(prefix + key)
        if isinstance(value, ConfigDict):
            out += _fields(value, f"{prefix}{key}.")
    return out


def _unknown(argument: str) -> bool:
    return argument[len("--config.") :].split("=")[0] not in _fields()


if __name__ == "__main__":
    console()
