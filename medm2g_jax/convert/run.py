"""The verb `medm2g convert`: which source goes where, and what is said afterwards."""

from pathlib import Path

from medm2g_jax.convert import clip, converted, export, optimus, stable_diffusion
from medm2g_jax.errors import UserError


def convert(
    source: str,
    path: str | None,
    to: str,
    *,
    weights: str = "",
    context: str = "image",
    bert: str | None = None,
    gpt2: str | None = None,
    format: str | None = None,
    flow: str | None = None,
) -> None:
    """Convert and print a summary. Arguments: see `medm2g convert --help`.

    Raises:
      UserError: anything wrong with the files or the arguments; nothing is written then.
    """
    if path is None:
        raise UserError(f"medm2g convert {source} needs --from PATH, the file or folder to read")
    if not Path(path).exists():
        raise UserError(f"--from {path}: no such file or folder")
    if source == "export" and format is None:
        raise UserError(f"medm2g convert export needs --as, one of {', '.join(export.FORMATS)}")
    made = {
        "sd15": lambda: stable_diffusion.convert(Path(path), Path(to), weights),
        "clip": lambda: clip.convert(Path(path), Path(to)),
        "vd": lambda: optimus.convert_vd(Path(path), Path(to), context),
        "optimus": lambda: optimus.convert_optimus(Path(path), Path(to), bert, gpt2),
        "bert-gpt2": lambda: optimus.convert_bert_gpt2(Path(path), Path(to), gpt2),
        "export": lambda: export.export(Path(path), Path(to), format, flow),
    }[source]()
    print(made)
    if "OpenRAIL" in made.licence:
        print(f"\n{converted.RESTRICTIONS}\n")
