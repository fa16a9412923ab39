"""The rows of an evaluation: each is written as soon as it is measured, so that one that was stopped goes on there.

    row = Rows(dict(task=..., model=..., ...), DIR / "TASK.json")
    figures = row("T2 -> CT by the mean image", lambda: measured(...))

A rerun takes up the rows that are in the file and measures the others. It does so only where all that decides a row is
the same (`about`: the model, the task's config, the data, the seed, this version); else it is refused in words.
"""

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, difference, from_json, line, number, to_json

Row = Callable[[str, Callable[[], Sequence[Figure]]], list[Figure]]


def fingerprint(value: Any) -> str:
    """Sixteen digits of any plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def figures_in(told: Mapping[str, Any]) -> list[Figure]:
    """All figures of what `Rows.write` has written, or `medm2g evaluate` before there were rows."""
    return [figure for one in (told["rows"] if "rows" in told else [told]) for figure in from_json(one["figures"])]


class Rows:
    """Measures rows and keeps them.

    Args:
      about: what decides a row, by name; plain values.
      file: where finished rows are kept; None: they are not.
      command: what was typed, for whoever reads the file.

    Raises:
      UserError: the file holds rows of something else, or nothing that this version has written.
    """

    def __init__(self, about: Mapping[str, Any], file: epath.Path | None = None, command: str = ""):
        self.about, self.command = dict(about), command
        self.finished: list[dict[str, Any]] = []
        self._file = file
        self._before = {} if file is None or not file.exists() else {one["row"]: one for one in _held(file, self.about)}
        if self._before:
            print(f"{file}: taken up are the {len(self._before)} rows that are there", flush=True)

    def __call__(self, name: str, measure: Callable[[], Sequence[Figure]]) -> list[Figure]:
        """The row's figures, printed: measured now, or taken up."""
        if one := self._before.get(name):
            figures = from_json(one["figures"])
        else:
            began = time.time()
            figures = list(measure())
            one = dict(row=name, seconds=round(time.time() - began, 1), figures=to_json(figures))
        self.finished.append(one)
        print("\n".join(f"  {line(figure)}" for figure in figures), flush=True)
        if name not in self._before and self._file is not None:
            later = [row for name, row in self._before.items() if row not in self.finished]
            self.write(self._file, [*self.finished, *later])
        return figures

    @property
    def figures(self) -> list[Figure]:
        """Of all rows so far."""
        return figures_in(dict(rows=self.finished))

    @property
    def seconds(self) -> float:
        """What the rows took, whenever they were measured."""
        return round(sum(one["seconds"] for one in self.finished), 1)

    def record(self) -> dict[str, Any]:
        """All but the rows: what they are of, what was typed, when, and how long they took."""
        date = datetime.date.today().isoformat()
        return dict(self.about, command=self.command, date=date, seconds=self.seconds)

    def write(self, file: epath.Path, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        """As JSON; whole, or not at all."""
        told = json.dumps(self.record() | dict(rows=self.finished if rows is None else rows), indent=1)
        part = file.parent / f".{file.name}.part"
        part.write_text(told)
        part.replace(file)


ALIKE = ("task", "data", "contents", "seed", "records")  # what has to be the same for two evaluations to be compared


class Against:
    """Another evaluation, as its TASK.json tells it, for this one to be compared with.

    Raises:
      UserError: the file cannot be read, or is of other test records.
    """

    def __init__(self, file: str, about: Mapping[str, Any]):
        try:
            told = json.loads(epath.Path(file).read_text())
            unlike = [
                f"{name} {told[name]!r} there, {about[name]!r} here" for name in ALIKE if told[name] != about[name]
            ]
            self._of = {(f.task, f.metric): f for f in figures_in(told)}
        except OSError as error:
            raise UserError(f"--against {file}: {error.strerror}; expected the TASK.json of an evaluation") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--against {file} is no TASK.json that `medm2g evaluate` of this version wrote") from None
        if unlike:
            raise UserError(f"--against {file}: not of the same test records, measured alike: {'; '.join(unlike)}")
        self._file, self._model = file, told["model"]

    def lines(self, figures: Sequence[Figure]) -> list[str]:
        """By how much each figure is more than its like there.

        Raises:
          UserError: two are of different protocols; names both.
        """
        pairs = [(f, self._of[f.task, f.metric]) for f in figures if (f.task, f.metric) in self._of]
        said = [
            f"{a.task}: {a.metric} {number(a.value)} - {number(b.value)} = {difference(a, b):+.4g}" for a, b in pairs
        ]
        return [f"beside {self._file}, model {self._model}, by {len(said)} figures, not paired:", *said]


def _held(file: epath.Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows in a file, where they are of the same."""
    mend = f"name another --out, or delete {file} to measure anew"
    try:
        told = json.loads(file.read_text())
        held = {name: told[name] for name in about}
        rows = [one for one in told["rows"] if from_json(one["figures"]) is not None and one["row"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} holds no rows that this version could take up; {mend}") from None
    if unlike := [name for name in about if held[name] != about[name]]:
        differs = "; ".join(f"{name} {held[name]!r}, now {about[name]!r}" for name in unlike)
        raise UserError(f"{file} holds {len(rows)} rows of another evaluation: {differs}; {mend}")
    return rows
