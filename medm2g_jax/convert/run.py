"""The verb `medm2g convert`: which source goes where, and what is said afterwards."""

from pathlib import Path

from medm2g_jax.convert import clip, optimus, prompt_in, stable_diffusion
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
) -> None:
    """Convert and print a summary. Arguments: see `medm2g convert --help`.

    Raises:
      UserError: anything wrong with the files or the arguments; nothing is written then.
    """
    part = "optimus" if source == "bert-gpt2" else "sd15" if source == "prompt_in" else source
    if Path(to).name == part:  # --to W/sd15 is --to W
        to = str(Path(to).parent)
    if source == "prompt_in":
        _fit(Path(to))
        return
    if path is None:
        raise UserError(f"medm2g convert {source} needs --from PATH, the file or folder to read")
    if not Path(path).exists():
        raise UserError(f"--from {path}: no such file or folder")
    made = {
        "sd15": lambda: stable_diffusion.convert(Path(path), Path(to), weights),
        "clip": lambda: clip.convert(Path(path), Path(to)),
        "vd": lambda: optimus.convert_vd(Path(path), Path(to), context),
        "optimus": lambda: optimus.convert_optimus(Path(path), Path(to), bert, gpt2),
        "bert-gpt2": lambda: optimus.convert_bert_gpt2(Path(path), Path(to), gpt2),
    }[source]()
    print(made)
    if source in ("sd15", "clip") and prompt_in.ready(Path(to)):
        _fit(Path(to))


def _fit(to: Path) -> None:
    print("prompt_in: fitting what Stable Diffusion reads to the shared space ...", flush=True)
    found = prompt_in.fit(to)
    print(
        f"prompt_in: residual {found['residual']:.4f} on held-out captions ({found['residual_fitted']:.4f} on those "
        f"fitted), lambda {found['lambda']:g}, condition of the text projection {found['condition']:.3g}; "
        f"{found['surviving']:.3f} of the text-conditioned eps of raw Stable Diffusion survives at step 0"
    )
