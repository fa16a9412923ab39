"""What a run root's data were: RUN/data.json, compared by whoever goes on there.

Half of a data set deleted between stop and resume would go unnoticed otherwise: its name is the same. A moved folder,
on the other hand, has another name and holds the same.
"""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from medm2g_jax.data.contents import Contents, changes
from medm2g_jax.errors import UserError
from medm2g_jax.train.owner import on_first

NAME = "data.json"


def read(root: epath.Path) -> dict[str, Any] | None:
    """The record of a run root, as `Contents.plain` made it; None where there is none.

    Raises:
      UserError: it cannot be read.
    """
    path = root / NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        found["fingerprint"], found["records"], found["parts"], found["subjects"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); delete it, and these data count as the run's"
        ) from error
    return found


def hold(root: epath.Path, source: str, now: Contents, accept: str, say: Callable[[str], Any] = print) -> None:
    """Compare the data with those that the stages of `root` were trained on, and record them.

    Where nothing has been trained yet, other data simply take their place (and tokenizers of the old ones go).

    Args:
      source: the data spec, for the record.
      accept: the fingerprint of data that may differ from those recorded.

    Raises:
      UserError: they differ; says what, and what to type to go on with them.
    """
    on_first(lambda: _hold(root, source, now, accept, say))


def _hold(root: epath.Path, source: str, now: Contents, accept: str, say: Callable[[str], Any]) -> None:
    before = read(root)
    if before is not None and before["fingerprint"] != now.fingerprint:
        if _begun(root) and accept != now.fingerprint:
            raise UserError(differ(root, before, now, accept))
        if _begun(root):
            say(f"other data than {root} was begun with, accepted: {changes(before, now)}")
        else:
            done = root / "tokenizers" / "done"
            if done.exists() and done.read_text().startswith("trained"):
                (root / "tokenizers").rmtree()
    if before is None or (before["fingerprint"], before["source"]) != (now.fingerprint, source):
        root.mkdir(parents=True, exist_ok=True)
        part = root / f"{NAME}.part"
        part.write_text(json.dumps({"source": source, **now.plain()}, indent=1))
        part.replace(root / NAME)


def differ(root: epath.Path, before: dict[str, Any], now: Contents, accept: str = "") -> str:
    """The line that says how the data differ from those of a run root, and what to type."""
    asked = f" (found {accept!r})" if accept else ""
    return (
        f"{root} was begun with other data: {changes(before, now)}; give those back, start afresh with "
        f"--workdir=ANOTHER_FOLDER, or go on with these by --config.data.accept={now.fingerprint}{asked}"
    )


def _begun(root: epath.Path) -> bool:
    """Has any stage of the run root learnt from its data?"""
    for folder in root.iterdir():
        if (folder / "model.json").exists():
            return True
        saves = folder / "checkpoints"
        if saves.is_dir() and any(path.name.isdigit() for path in saves.iterdir()):
            return True
    return False
