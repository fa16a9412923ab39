"""A model over a whole data set: what records lack is made of what they have, and written as data for the trainer.

    medm2g generate --model RUN --data manifest:DIR --make missing --out OUT
    medm2g generate --model RUN --data manifest:DIR --given mri:t2 --make ct --split test --out OUT

    OUT/manifest.jsonl    a row a record: what it had, by the names of its files, and what was made, which "synthetic"
                          names; `--config.data.source=manifest:OUT` trains on it
    OUT/images/...        what was made, 8-bit over the modality's window
    OUT/sheet.png         the first of it, and what it was made of where that may be shown
    OUT/provenance.json   the model, how it was asked, through which pairs, and what there is to know of it

Record number i's noise is a function of (seed, i, stream). A run that was stopped goes on where it was: rows are in
manifest.jsonl.part until all are there.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax.data import formats
from medm2g_jax.data.contents import contents
from medm2g_jax.data.manifest_rows import NAME as MANIFEST
from medm2g_jax.data.open import source_of
from medm2g_jax.data.picture import Picture, normalised
from medm2g_jax.data.source import SPLITS, Record, Source, check, entry_of, images_of, key_of, picture_of, stream_of
from medm2g_jax.data.write import NOTE, alone_in, shown
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.pictures import SYNTHETIC, grid
from medm2g_jax.generate import Generated, Request
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, split_stream, stream_word
from medm2g_jax.train.log import duration

MISSING = "missing"
SHEET = 8  # records in the contact sheet
PART, PROVENANCE = f"{MANIFEST}.part", "provenance.json"


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be made of the records of a split.

    Attributes:
      make: streams, or ("missing",): of each record those that others of the source have and it lacks.
      given: streams, or () for all that the model can take of a record.
    """

    make: tuple[str, ...]
    given: tuple[str, ...]
    split: str

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"--split {self.split!r}: expected one of {', '.join(SPLITS)}")
        if MISSING in self.make and len(self.make) > 1:
            raise UserError(f"--make {','.join(self.make)}: {MISSING!r} stands alone: all that a record lacks")
        if not self.make:
            raise UserError(f"--make: name at least one stream, or {MISSING!r}")
        for stream in (*self.given, *(() if self.missing else self.make)):
            split_stream(stream)

    @property
    def missing(self) -> bool:
        return self.make == (MISSING,)


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


def tasks(model: Model, source: Source, order: Order) -> list[Task]:
    """What the order comes to, record by record.

    Raises:
      UserError: nothing; says why.
    """
    there = list(dict.fromkeys(s for record in source.records for s in record.streams))
    wanted = [s for s in there if split_stream(s)[0] in model.modalities] if order.missing else list(order.make)
    out = []
    for i, record in enumerate(source.records):
        if record.split != order.split:
            continue
        taken = (s for s in record.streams if split_stream(s)[0] in model.givable)
        own = order.given or tuple(s for s in taken if order.missing or s not in order.make)
        lacks = tuple(s for s in wanted if not order.missing or _lacks(record, s))
        if own and lacks and set(own) <= set(record.streams):
            out.append(Task(i, own, lacks))
    if not out:
        held = dict.fromkeys(s for r in source.records if r.split == order.split for s in r.streams)
        what = f"holds {' and '.join(order.given) or 'what the model takes'}"
        raise UserError(
            f"data {source.name!r}: no record of split {order.split!r} "
            f"{'lacks what the model makes and has what it takes' if order.missing else what}; these hold "
            f"{', '.join(held) or 'nothing'}, the model takes {', '.join(model.givable)} and makes "
            f"{', '.join(model.modalities)}"
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
    order: Order,
    out: str | Path,
    *,
    seed: int = 0,
    rows: int | None = None,
    say: Callable[[str], Any] = print,
    **options: Any,
) -> Path:
    """Make what is ordered and write it as a manifest folder; returns the manifest. Where what is missing was made, all
    records of the source are in it, with all that they have; else those alone that something was made of, with that.

    Args:
      options: of `Model.generate`.

    Raises:
      UserError: nothing is to be made, or it cannot be; the data are broken; the folder was begun in another way, or
        cannot be written. Nothing is written then, but what was made before.
    """
    todo = tasks(model, source, order)
    asked = {f.name for f in dataclasses.fields(Request)} & set(options)
    for given, make in dict.fromkeys((task.given, task.make) for task in todo):
        model.request(given, make, **{name: options[name] for name in asked})  # what cannot be is said here
    say(f"{model.meta['stage']}: {len(todo)} of {len(source.records)} records, split {order.split}")
    check(source, None, say)
    rows = min(rows or model.defaults["rows"], len(todo))
    provenance = dict(
        note=NOTE,
        data=dict(source=source.name, fingerprint=contents(source).fingerprint),
        licences=model.meta["licences"],
        **dataclasses.asdict(order),
        **model.provenance(seed=seed, **options),
    )
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        with alone_in(epath.Path(folder)):
            return _fill(model, source, order, todo, folder, provenance, seed, rows, say, options)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror or error}") from error


def _fill(
    model: Model,
    source: Source,
    order: Order,
    todo: Sequence[Task],
    folder: Path,
    provenance: dict[str, Any],
    seed: int,
    rows: int,
    say: Callable[[str], Any],
    options: dict[str, Any],
) -> Path:
    """`fill` in a folder that is this run's own."""
    done = _begun(folder, json.loads(json.dumps(provenance)))
    left = [task for task in todo if task.index not in done]
    if done:
        say(f"{len(done)} records are there; {len(left)} are left")
    began, count = time.time(), 0
    pairs: dict[str, str] = {}
    notes: dict[str, None] = {}
    with (folder / PART).open("a", encoding="utf-8") as file:
        for some, values in _batches(model, source, left, rows):
            made = _made(model, some, values, seed, rows, options)
            for i, task in enumerate(some):
                row = _row(folder, source, task, {s: x[i] for s, x in made.samples.items()}, model, order.missing)
                file.write(json.dumps({"index": task.index, "row": row}) + "\n")
            file.flush()
            pairs |= made.pairs
            for note in made.notes:
                if note not in notes:
                    say(f"  {note}")
                notes[note] = None
            count += len(some)
            rate = count / (time.time() - began)
            say(f"{count}/{len(left)} records  {rate:.1f}/s  {duration((len(left) - count) / rate)} left")
    for pair, how in pairs.items():
        say(f"  {pair}: {how}")
    about = provenance | dict(pairs=pairs, notes=list(notes))
    return _finish(folder, source, {task.index for task in todo}, order.missing, about)


def _begun(folder: Path, provenance: dict[str, Any]) -> set[int]:
    """Begin the folder, or go on in it: the records that are done."""
    path = folder / PROVENANCE
    if (folder / MANIFEST).exists():
        raise UserError(f"--out {folder}: holds a manifest.jsonl already; name another --out")
    if not path.exists():
        _write_json(path, provenance)
        return set()
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {type(error).__name__} in reading it; name another --out") from error
    different = [key for key in provenance if key not in before or before[key] != provenance[key]]
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


def _write_json(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1), encoding="utf-8")
    new.replace(path)


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
    """What is given of a record: the file's picture where it has one, so that what is made comes on its grid. A 16-bit
    file counts as those of its stream did in training, else over what its own set needs."""
    value = picture_of(source, index, stream)
    if value is None:
        value = source.read(index, stream, _draw(index))
        value = Picture(value[..., 0], span=(-1, 1)) if isinstance(value, np.ndarray) else value
    else:
        deep = value.span is not None and value.pixels.dtype == np.uint16 and stream in model.meta["ranges"]
        value = dataclasses.replace(value, path="", span=tuple(model.meta["ranges"][stream]) if deep else value.span)
    return model.opened(stream, [value])[0]


def _draw(index: int) -> np.random.Generator:
    """What a source draws of a record (a paraphrase, an unstated contrast) it draws once and for all."""
    return np.random.default_rng([0, index])


def _made(
    model: Model, some: list[Task], values: list[dict[str, Any]], seed: int, rows: int, options: dict[str, Any]
) -> Generated:
    """One batch; a short one is filled up, so that it needs no executable of its own."""
    places = [min(i, len(some) - 1) for i in range(rows if len(some) > 1 else 1)]
    given = {s: [values[i][s] for i in places] for s in some[0].given}
    numbers = [some[i].index for i in places]
    return model.generate(given, some[0].make, seed=seed, numbers=numbers, rows=rows, **options)


def _row(folder: Path, source: Source, task: Task, made: dict[str, Any], model: Model, whole: bool) -> dict[str, Any]:
    record = source.records[task.index]
    row = _own(folder, source, task.index, record.streams if whole else task.given)
    for stream, value in made.items():
        modality = MODALITIES[split_stream(stream)[0]]
        if not modality.is_image:
            row |= dict(text=value, text_origin="synthetic")
        else:
            row["images"][key_of(stream)] = _write(folder, stream, task.index, shown(value, modality))
        row["synthetic"] = [*row.get("synthetic", ()), key_of(stream)]
    near = {(a, b) for a, b in model.meta["pairs"]["registered"]} if "registered" in model.meta["pairs"] else set()
    on_grid = [s for s in made if any((split_stream(g)[0], split_stream(s)[0]) in near for g in task.given)]
    row["registered"] = [key for key in map(key_of, (*record.grid, *on_grid)) if key in row["images"]]
    return row


def _own(folder: Path, source: Source, index: int, streams: Sequence[str]) -> dict[str, Any]:
    """A record as a row of a manifest; images that are in no file of their own are written."""
    record = source.records[index]
    row: dict[str, Any] = dict(id=record.id, subject=record.subject, split=record.split, images={})
    if record.licence:
        row["license"] = record.licence
    for stream in streams:
        entry = entry_of(source, index, stream)
        if entry is not None:
            for field, value in entry.items():
                row.setdefault(field, {})[key_of(stream)] = value
            row["images"][key_of(stream)] = os.path.relpath(Path(entry["images"]).resolve(), folder)
            continue
        value = source.read(index, stream, _draw(index))
        if isinstance(value, str):
            row["text"] = value
        else:
            levels = np.round((value[..., 0] + 1) * 127.5).astype(np.uint8)
            row["images"][key_of(stream)] = _write(folder, stream, index, Picture(levels, (0, 255)), own=True)
    made = [key_of(s) for s in streams if s in record.synthetic]
    row |= dict(synthetic=made) if made else {}
    if any(not MODALITIES[split_stream(s)[0]].is_image and s in record.synthetic for s in streams):
        row["text_origin"] = "synthetic"
    row["registered"] = [key_of(s) for s in record.grid if s in images_of(streams)]
    return row


def _write(folder: Path, stream: str, index: int, picture: Picture, own: bool = False) -> str:
    """Returns the file's name in the folder."""
    name = f"images/{'given-' if own else ''}{stream.replace(':', '-')}/{index:06d}.png"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    window = MODALITIES[split_stream(stream)[0]].window
    notes = {"Window": f"{window[0]} {window[1]}"} | ({} if own else {"Description": NOTE})
    formats.FORMATS[".png"].write(epath.Path(folder / name), picture, notes)
    return name


def _finish(folder: Path, source: Source, made: set[int], whole: bool, about: dict[str, Any]) -> Path:
    """All rows in the source's order, and the contact sheet."""
    done, rows = dict(_rows(folder)), []
    for i, record in enumerate(source.records):
        if i in done:
            rows.append(done[i])
        elif whole:
            rows.append(_own(folder, source, i, record.streams))
    part = folder / f"{MANIFEST}.new"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _sheet(folder, source, {i: done[i] for i in sorted(made)[:SHEET]})
    _write_json(folder / PROVENANCE, about)
    part.replace(folder / MANIFEST)
    (folder / PART).unlink()
    return folder / MANIFEST


def _sheet(folder: Path, source: Source, rows: Mapping[int, dict[str, Any]]) -> None:
    """The first records: what was given above what was made; of data that are not open what was made alone."""
    lines = []
    for made in (False, True):
        for key in sorted({key for row in rows.values() for key in row["images"]}) if made or source.open else ():
            stream, tiles = stream_of(key), []
            modality = MODALITIES[split_stream(stream)[0]]
            for index, row in rows.items():
                tile = None
                if key in row["images"] and (key in row["synthetic"]) == made:
                    picture = None if made else picture_of(source, index, stream)  # its file alone may not say its unit
                    picture = picture or formats.read(folder / row["images"][key], 2**31, modality)
                    tile = normalised(picture, modality)[..., None]
                tiles.append(tile)
            if any(tile is not None for tile in tiles):
                lines.append((f"{stream_word(stream)}{', made' if made else ''}", tiles))
    if lines:
        grid(epath.Path(folder / "sheet.png"), lines, title=SYNTHETIC)
