"""A model over a whole data set: what records lack is made of what they have, and written as data for the trainer.

    medm2g generate --model RUN --data manifest:DIR --make missing --out OUT
    medm2g generate --model RUN --data manifest:DIR --given mri:t2 --make ct --split test --out OUT

    OUT/manifest.jsonl    a row a record: what it had, by the names of its files, and what was made, which "synthetic"
                          names; `--config.data.source=manifest:OUT` trains on it
    OUT/images/...        what was made, 8-bit over the modality's window
    OUT/sheet.png         the first of it, beside what it was made of
    OUT/provenance.json   the model, and how it was asked

Record number i's noise is a function of (seed, i, stream). A run that was stopped goes on where it was: rows are in
manifest.jsonl.part until all are there.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax.data import formats
from medm2g_jax.data.contents import contents
from medm2g_jax.data.open import source_of
from medm2g_jax.data.picture import Picture, normalised
from medm2g_jax.data.source import Record, Source, file_of, images_of
from medm2g_jax.data.write import NOTE, shown
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.pictures import SYNTHETIC, grid
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream, stream_word
from medm2g_jax.train.log import duration

MISSING = "missing"
SHEET = 8  # records in the contact sheet
PART, PROVENANCE = "manifest.jsonl.part", "provenance.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is made of one record: number of the record, streams."""

    index: int
    given: tuple[str, ...]
    make: tuple[str, ...]


def data_of(model: Model, spec: str) -> Source:
    """The source that `spec` names, read as the model's own data were.

    Raises:
      UserError: no such data.
    """
    shared = {**model.meta["shared"]}
    shared["data"] = {**shared["data"], "source": spec}
    return source_of(shared)


def tasks(model: Model, source: Source, given: Sequence[str], make: Sequence[str], split: str) -> list[Task]:
    """What is to be made of the records of `split`: of `given`, or of all that the model can take of a record, the
    streams `make`; where that is ("missing",), those that other records of the source have and this one lacks.

    Raises:
      UserError: nothing is to be made; says why.
    """
    there = list(dict.fromkeys(s for record in source.records for s in record.streams))
    missing = tuple(make) == (MISSING,)
    wanted = [s for s in there if split_stream(s)[0] in model.modalities] if missing else list(make)
    out = []
    for i, record in enumerate(source.records):
        if record.split != split:
            continue
        own = tuple(given) or tuple(
            s for s in record.streams if split_stream(s)[0] in model.givable and s not in (() if missing else make)
        )
        lacks = tuple(s for s in wanted if _lacks(record, s)) if missing else tuple(make)
        if own and lacks and set(own) <= set(record.streams):
            out.append(Task(i, own, lacks))
    if not out:
        held = ", ".join(there) or "nothing"
        what = "lacks what the model makes" if missing else f"holds {' and '.join(given) or 'what the model takes'}"
        raise UserError(
            f"data {source.name!r}: no record of split {split!r} {what}; its records hold {held}, the model takes "
            f"{', '.join(model.givable)} and makes {', '.join(model.modalities)}"
        )
    return out


def _lacks(record: Record, stream: str) -> bool:
    """An image whose contrast is not stated may be any of its modality's."""
    modality = split_stream(stream)[0]
    own = {s for s in record.streams if split_stream(s)[0] == modality}
    return stream not in own and modality not in own and (":" in stream or not own)


def fill(
    model: Model,
    source: Source,
    todo: Sequence[Task],
    out: str | Path,
    *,
    whole: bool,
    seed: int = 0,
    rows: int | None = None,
    say: Callable[[str], Any] = print,
    **options: Any,
) -> Path:
    """Make `todo` and write it as a manifest folder; returns the manifest.

    Args:
      whole: all records of the source are written with all that they have; else those of `todo` alone, with what they
        were made of.
      options: of `Model.generate`.

    Raises:
      UserError: the folder was begun by another model or in another way, or cannot be written.
    """
    folder, rows = Path(out), rows or model.defaults["rows"]
    provenance = dict(
        note=NOTE,
        data=dict(source=source.name, fingerprint=contents(source).fingerprint),
        licences=model.meta["licences"],
        whole=whole,
        tasks=len(todo),
        **model.provenance(seed=seed, **options),
    )
    done = _begun(folder, json.loads(json.dumps(provenance)))
    left = [task for task in todo if task.index not in done]
    if done:
        say(f"{len(done)} records are there; {len(left)} are left")
    began = time.time()
    with (folder / PART).open("a", encoding="utf-8") as file:
        count = 0
        for some, values in _batches(model, source, left, rows):
            made = _made(model, some, values, seed, rows, options)
            for i, task in enumerate(some):
                row = _row(folder, source, task, {s: x[i] for s, x in made.samples.items()}, model, whole)
                file.write(json.dumps({"index": task.index, "row": row}) + "\n")
            file.flush()
            count += len(some)
            rate = count / (time.time() - began)
            say(f"{count}/{len(left)} records  {rate:.1f}/s  {duration((len(left) - count) / rate)} left")
    return _finish(folder, source, {task.index for task in todo}, whole)


def _begun(folder: Path, provenance: dict[str, Any]) -> set[int]:
    """Begin the folder, or go on in it: the records that are done."""
    path = folder / PROVENANCE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "manifest.jsonl").exists():
            raise UserError(f"--out {folder}: holds a manifest.jsonl already; name another --out")
        if not path.exists():
            path.write_text(json.dumps(provenance, indent=1), encoding="utf-8")
            return set()
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in provenance if before.get(key) != provenance[key]]
        if different:
            key = different[0]
            raise UserError(
                f"--out {folder} was begun with {key} {before.get(key)!r}, this command has {provenance[key]!r}; give "
                "it back, or name another --out"
            )
        rows = list(_rows(folder))  # without one that was cut off, to which the next would be joined
        new = folder / f"{PART}.new"
        new.write_text("".join(json.dumps({"index": i, "row": row}) + "\n" for i, row in rows), encoding="utf-8")
        new.replace(folder / PART)
        return {index for index, _ in rows}
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror or error}") from error


def _rows(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows that are done; one that was cut off is not."""
    path = folder / PART
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        yield found["index"], found["row"]


def _batches(
    model: Model, source: Source, todo: Sequence[Task], rows: int
) -> Iterator[tuple[list[Task], list[dict[str, Any]]]]:
    """Tasks that one executable serves, and what is given of each: the same streams, images of one shape."""
    waiting: dict[tuple, tuple[list[Task], list[dict[str, Any]]]] = {}
    for task in todo:
        values = {s: _value(model, source, task.index, s) for s in task.given}
        shapes = tuple(x.pixels.shape for x in values.values() if isinstance(x, Picture))
        key = task.given, task.make, shapes
        some, told = waiting.setdefault(key, ([], []))
        some.append(task)
        told.append(values)
        if len(some) == rows:
            yield waiting.pop(key)
    yield from waiting.values()


def _value(model: Model, source: Source, index: int, stream: str) -> Any:
    """What is given of a record: the file's picture where it has one, so that what is made comes on its grid."""
    value = file_of(source, index, stream) or source.read(index, stream, np.random.default_rng([0, index]))
    if isinstance(value, np.ndarray):
        value = Picture(value[..., 0], span=(-1, 1))
    return model.opened(stream, [value])[0]


def _made(model: Model, some: list[Task], values: list[dict[str, Any]], seed: int, rows: int, options: dict) -> Any:
    """One batch; a short one is filled up, so that it needs no executable of its own."""
    places = [min(i, len(some) - 1) for i in range(rows if len(some) > 1 else 1)]
    given = {s: [values[i][s] for i in places] for s in some[0].given}
    numbers = [some[i].index for i in places]
    return model.generate(given, some[0].make, seed=seed, numbers=numbers, rows=rows, **options)


def _row(folder: Path, source: Source, task: Task, made: dict[str, Any], model: Model, whole: bool) -> dict[str, Any]:
    record = source.records[task.index]
    row = _own(folder, source, task.index, record.streams if whole else task.given)
    for stream, value in made.items():
        key, modality = stream.replace(":", "_"), MODALITIES[split_stream(stream)[0]]
        if not modality.is_image:
            row |= dict(text=value, text_origin="synthetic")
        else:
            row["images"][key] = _write(folder, stream, task.index, shown(value, modality))
        row.setdefault("synthetic", []).append(key)
    near = {(a, b) for a, b in model.meta["pairs"]["registered"]} if "registered" in model.meta["pairs"] else set()
    on_grid = [s for s in made if any((split_stream(g)[0], split_stream(s)[0]) in near for g in task.given)]
    row["registered"] = [s.replace(":", "_") for s in (*record.grid, *on_grid) if s.replace(":", "_") in row["images"]]
    return row


def _own(folder: Path, source: Source, index: int, streams: Sequence[str]) -> dict[str, Any]:
    """A record as a row of a manifest; images that are in no file of their own are written."""
    record = source.records[index]
    row: dict[str, Any] = dict(id=record.id, subject=record.subject, split=record.split, images={})
    if record.licence:
        row["license"] = record.licence
    for stream in streams:
        path = file_of(source, index, stream)
        if path is not None:
            row["images"][stream.replace(":", "_")] = os.path.relpath(path, folder)
            continue
        value = source.read(index, stream, np.random.default_rng([0, index]))
        if isinstance(value, str):
            row["text"] = value
        else:
            levels = np.round((value[..., 0] + 1) * 127.5).astype(np.uint8)
            row["images"][stream.replace(":", "_")] = _write(folder, stream, index, Picture(levels, (0, 255)), own=True)
    row["registered"] = [s.replace(":", "_") for s in record.grid if s in images_of(streams)]
    return row


def _write(folder: Path, stream: str, index: int, picture: Picture, own: bool = False) -> str:
    """Returns the file's name in the folder."""
    name = f"images/{'given-' if own else ''}{stream.replace(':', '-')}/{index:06d}.png"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    window = MODALITIES[split_stream(stream)[0]].window
    notes = {"Window": f"{window[0]} {window[1]}"} | ({} if own else {"Description": NOTE})
    formats.FORMATS[".png"].write(epath.Path(folder / name), picture, notes)
    return name


def _finish(folder: Path, source: Source, made: set[int], whole: bool) -> Path:
    """All rows in the source's order, and the contact sheet."""
    done, rows = dict(_rows(folder)), []
    for i, record in enumerate(source.records):
        if i in done:
            rows.append(done[i])
        elif whole:
            rows.append(_own(folder, source, i, record.streams))
    part = folder / "manifest.jsonl.new"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _sheet(folder, [done[i] for i in sorted(made)[:SHEET]])
    part.replace(folder / "manifest.jsonl")
    (folder / PART).unlink()
    return folder / "manifest.jsonl"


def _sheet(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The first records: what was given above what was made."""
    if not any(row["images"] for row in rows):
        return
    keys = sorted({key for row in rows for key in row["images"]}, key=lambda k: (k in rows[0].get("synthetic", ()), k))
    lines = []
    for key in keys:
        stream = key.replace("_", ":", 1)
        tiles = []
        for row in rows:
            if key in row["images"]:
                picture = formats.read(folder / row["images"][key], 2**31)
                tiles.append(normalised(picture, MODALITIES[split_stream(stream)[0]])[..., None])
            else:
                tiles.append(None)
        made = any(key in row.get("synthetic", ()) for row in rows)
        lines.append((f"{stream_word(stream)}{', made' if made else ''}", tiles))
    grid(epath.Path(folder / "sheet.png"), lines, title=SYNTHETIC)
