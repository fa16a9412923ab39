"""`medm2g prepare`: a data set as it was downloaded made into a manifest folder that the trainer reads.

OUT/manifest.jsonl      rows as `data.manifest` has them, images beside it as PNG of 8 or 16 bits (or shards, `pack`)
OUT/rejected.jsonl      what was left out and why, one line each
OUT/splits/train.txt    ids of the cases of each split
OUT/statistics.json     counts, sizes, values, after which filter how many were left
OUT/preview.png         a look at it
OUT/README.md           the data card: licence, access, counts, how it was made
OUT/.prepare/           what makes a run go on where it stopped, and the salt that ids are hashed with

A set whose licence is not open keeps its people's ids to itself: they are hashed with a salt of this folder, which only
its owner may enter (mode 0700), and no text, id or file name of it is printed. Run again, the same command does what is
left to do and writes the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from etils import epath

from medm2g_jax.data import shards
from medm2g_jax.data.case import OUTSIDE, Adapter, Case, Left, Root
from medm2g_jax.data.check import parse_ranges
from medm2g_jax.data.clean import CLEANINGS
from medm2g_jax.data.cut import Cutting, Outcome, cut
from medm2g_jax.data.manifest_rows import NAME as MANIFEST
from medm2g_jax.data.registration import HOW
from medm2g_jax.data.source import SPLITS, stream_of
from medm2g_jax.data.volume import PLANES, PRESETS
from medm2g_jax.data.write import probe, unwritable
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate import card
from medm2g_jax.train.log import duration

EVERY = 5.0  # seconds between two lines of progress
_WAITING = 4  # cases a process that are handed out ahead
_QUIET = (signal.SIGINT, signal.SIG_DFL)  # what Ctrl-C does to a process: it ends, without a traceback


@dataclasses.dataclass(frozen=True)
class Order:
    """What a user asks for beside the set itself; None for the set's own default (`Adapter`).

    Attributes:
      size, plane, first, last, every, share, square, register, clean: see `data.cut.Cutting`.
      range: of files whose values are in no unit, as `data.check.parse_ranges` takes it: "ct=0:255".
      split: shares of subjects for train, val and test where the set has no official split.
      seed: of that split.
      limit: cases that are taken, of the beginning; None for all.
      keep_ids: also of a set that is not open.
      pack: bytes of a shard (`data.shards`); 0 for a file an image.
      workers: processes; None for one a core.
    """

    size: int = 512
    plane: str = "axial"
    first: int = 0
    last: int | None = None
    every: int | None = None
    share: float | None = None
    square: float | None = None
    register: str | None = None
    clean: str | None = None
    preset: str | None = None
    range: str = ""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0
    limit: int | None = None
    keep_ids: bool = False
    pack: int = 0
    workers: int | None = None

    def check(self) -> None:
        """Raises UserError where a value is none that it can have; names it as it is typed."""
        for name, low in (("size", 16), ("every", 1), ("limit", 1), ("workers", 1), ("first", 0), ("pack", 0)):
            if (value := getattr(self, name)) is not None and value < low:
                raise UserError(f"--{name} {value}: expected at least {low}")
        known = {"plane": PLANES, "register": HOW, "clean": CLEANINGS, "preset": PRESETS}
        for name, values in known.items():
            if (value := getattr(self, name)) is not None and value not in values:
                raise UserError(f"--{name} {value}: expected one of {', '.join(values)}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise UserError(f"--share {self.share}: expected a part, from 0 to 1")
        if self.square is not None and not 0 <= self.square < 1000:
            raise UserError(f"--square {self.square}: expected millimetres, or 0 for the image's own")
        if len(self.split) != 3 or min(self.split) < 0 or not self.split[0] or abs(sum(self.split) - 1) > 1e-6:
            found = ",".join(map(str, self.split))
            raise UserError(f"--split {found}: expected three parts that sum to 1, as in 0.8,0.1,0.1")


def prepare(
    adapter: Adapter,
    root: str | Path,
    out: str | Path,
    order: Order = Order(),
    patterns: Mapping[str, str] | None = None,
    say: Callable[[str], Any] = print,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Prepare a set; returns the manifest.

    Args:
      patterns: of sets that a user describes: stream -> where its files are.
      options: of the set's own, see `Adapter.options`.

    Raises:
      UserError: the set is not as its adapter expects, `out` was begun with other settings or cannot be written, or
        nothing is left after all filters. What one file is wrong with is in rejected.jsonl, never raised.
    """
    order.check()
    source, out = Root(root, patterns, adapter.chosen(options or {})), Path(out).expanduser()
    here, there = (Path(os.path.realpath(path)) for path in (out, source.path))
    if there.is_relative_to(here):
        raise UserError(f"--out {out}: the downloaded set is in it; name another folder")
    if here.is_relative_to(there):  # where it would be found as a part of the set
        raise UserError(f"--out {out}: is in the downloaded set, {source.path}; name a folder beside that")
    say(f"{adapter.title}\n  licence: {adapter.licence}\n  {adapter.access}")
    folder = _Folder(out, adapter, order, source)
    cases, left = _found(adapter, source, order, say)
    cases, moved = _split(cases, order)
    left += moved
    folder.begin()
    stamps = [folder.stamp(case) for case in cases]
    if folder.finished(stamps):  # images that went into shards are not cut again
        say(f"{folder.out / MANIFEST}: finished by an earlier run, nothing is left to do")
        return folder.out / MANIFEST
    try:
        outcomes = _cut_all(cases, stamps, folder, order, say)
        manifest = _finish(adapter, source, folder, order, cases, left, outcomes, say)
        folder.finish(stamps)
    except OSError as error:  # what is made so far stays; the same command goes on from there
        raise unwritable(out, error) from error
    return manifest


def _found(adapter: Adapter, source: Root, order: Order, say: Callable[[str], Any]) -> tuple[list[Case], list[Left]]:
    cases: dict[str, Case] = {}
    left: list[Left] = []
    began = said = time.monotonic()
    for one in adapter.find(source):
        if (now := time.monotonic()) - said > EVERY:
            said = now
            say(f"{len(cases)} cases found so far, {_whole(left)} left out")
        if isinstance(one, Left):
            left.append(one)
        elif not (one.id.strip() and one.subject.strip()):
            left.append(Left(one.id, "without an id, or nobody's"))
        elif one.id in cases:
            left.append(Left(one.id, "the same id as another case"))
        elif not (one.images or one.text.strip()):
            left.append(Left(one.id, "neither image nor text"))
        else:
            cases[one.id] = one
        if order.limit is not None and len(cases) >= order.limit:
            break
    left += [Left(name, "a folder that may not be read (its rights)") for name in sorted(source.closed)]
    left += [Left(name, OUTSIDE) for name in sorted(source.outside)]
    say(f"{len(cases)} cases found, {_whole(left)} left out, in {time.monotonic() - began:.1f} s")
    if not cases:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(one.reason for one in left).most_common(5))
        raise UserError(
            f"{source.path}: no case of {adapter.name} in it (left out: {why or 'nothing'}; in it: {source.kinds()}); "
            "name the folder of the set as it was unpacked, --root DIR"
        )
    return [cases[name] for name in sorted(cases)], left


def _whole(left: list[Left]) -> int:
    return sum(not one.part for one in left)


def _split(cases: list[Case], order: Order) -> tuple[list[Case], list[Left]]:
    """Cases with their splits, each subject in one: the official one; where there is none, one by the order of hashes
    of seed and subject, which adding a subject hardly changes; where it has no val, that much of train's subjects."""
    rank = {split: n for n, split in enumerate(SPLITS)}
    own: dict[str, str] = {}
    for case in cases:
        if case.split and rank[case.split] > rank.get(own.get(case.subject, ""), -1):
            own[case.subject] = case.split
    left = [
        Left(case.id, f"its subject is in {own[case.subject]} as well")
        for case in cases
        if case.split and case.split != own[case.subject]
    ]
    gone = {one.id for one in left}
    cases = [case for case in cases if case.id not in gone]
    free = sorted({c.subject for c in cases} - own.keys(), key=lambda s: _hash(order.seed, s))
    own |= _declared(free, order.split)
    if "val" not in own.values() and order.split[1] > 0:
        train = sorted((s for s, split in own.items() if split == "train"), key=lambda s: _hash(order.seed, s))
        if len(train) > 1:
            part = order.split[1] / (order.split[0] + order.split[1])
            own |= dict.fromkeys(train[: max(1, round(part * len(train)))], "val")
    return [case._replace(split=own[case.subject]) for case in cases], left


def _declared(subjects: list[str], parts: tuple[float, float, float]) -> dict[str, str]:
    """The first subjects to test, the next to val, the rest to train; one each where there are three or more."""
    wanted = [p > 0 for p in parts]
    count = {s: round(p * len(subjects)) for s, p in zip(SPLITS, parts, strict=True)}
    if len(subjects) >= sum(wanted):
        for split, some in zip(SPLITS, wanted, strict=True):
            count[split] = max(count[split], int(some))
    test, val = count["test"], count["val"]
    names = ["test"] * test + ["val"] * val + ["train"] * len(subjects)
    if subjects and test + val >= len(subjects):  # train comes first
        names = ["train"] + names
    return dict(zip(subjects, names, strict=False))


def _hash(seed: int, subject: str) -> str:
    return hashlib.sha256(f"{seed}/{subject}".encode("utf-8", "surrogatepass")).hexdigest()


class _Folder:
    """The folder that is made: its settings, its salt, and what is done so far. Nothing is written before `begin`."""

    def __init__(self, out: Path, adapter: Adapter, order: Order, source: Root):
        """
        Raises:
          UserError: it cannot be written, was begun with other settings, or holds what was not made here.
        """
        self.out, self.own, self._closed = out, out / ".prepare", not adapter.open
        probe(epath.Path(out), "--out")
        self.journal, self._salt_file = self.own / "journal.jsonl", self.own / "salt"
        hidden = self._closed and not order.keep_ids
        known = self._salt_file.exists()
        salt = (self._salt_file.read_text().strip() if known else secrets.token_hex(16)) if hidden else ""
        ranges = tuple(parse_ranges(order.range).items())
        cutting = {f.name: getattr(order, f.name) for f in dataclasses.fields(Cutting) if hasattr(order, f.name)}
        own = {k: getattr(adapter, k) for k, v in cutting.items() if v is None and hasattr(adapter, k)}
        self.how = Cutting(str(source.path), str(out), **(cutting | own), ranges=ranges, salt=salt)
        self.settings = self._settings(adapter, order, source)
        self._check()

    def _settings(self, adapter: Adapter, order: Order, source: Root) -> dict[str, Any]:
        """What decides the content, as JSON keeps it."""
        asked = dataclasses.asdict(self.how) | {"set": adapter.name, "patterns": source.patterns}
        asked |= {"split": order.split, "seed": order.seed, "limit": order.limit, "pack": order.pack}
        asked |= {f"option {name}": value for name, value in source.options.items()}
        asked["ids"] = "hashed" if self.how.salt else "kept"
        return {k: v for k, v in sorted(json.loads(json.dumps(asked)).items()) if k not in ("salt", "root", "out")}

    def _check(self) -> None:
        file = self.own / "settings.json"
        if not file.exists():
            if self.out.exists() and (strange := sorted(p.name for p in self.out.iterdir() if p != self.own)):
                raise UserError(f"--out {self.out}: holds {strange[0]} and was not made here; name an empty folder")
            return
        before = json.loads(file.read_text())
        for k, v in self.settings.items():
            if before.get(k) != v:
                raise UserError(
                    f"--out {self.out}: was begun with {k} {before.get(k)!r}, now it is {v!r}; name another folder, or "
                    "delete this one"
                )

    def begin(self) -> None:
        """Make it, for its owner alone where the set is not open.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            if self._closed:
                self.out.chmod(0o700)
            if self.how.salt and not self._salt_file.exists():
                self._salt_file.touch(0o600)
                self._salt_file.write_text(self.how.salt)
            (self.own / "settings.json").write_text(json.dumps(self.settings, indent=1))
        except OSError as error:
            raise unwritable(self.out, error) from error

    def done(self) -> dict[str, Outcome]:
        """Cases that are cut already and whose images are there, by their stamp; half a last line, of a run that was
        killed, is passed over and ended, so that what is added stands in lines of its own."""
        found: dict[str, Outcome] = {}
        with self.journal.open("a+") as journal:
            journal.seek(0)
            line = "\n"
            for line in journal:
                try:
                    one = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if all((self.out / name).is_file() for row in one["rows"] for name in _images(row)):
                    found[one["stamp"]] = Outcome(one["rows"], [tuple(r) for r in one["rejected"]], one["registered"])
            if not line.endswith("\n"):
                journal.write("\n")
        return found

    def finished(self, stamps: list[str]) -> bool:
        """Did an earlier run make all of these cases into shards?"""
        file = self.own / "packed"
        return (self.out / MANIFEST).exists() and file.exists() and file.read_text() == _digest(stamps)

    def finish(self, stamps: list[str]) -> None:
        """Remember that all of these are made."""
        if (self.out / "shards").exists():
            (self.own / "packed").write_text(_digest(stamps))

    def stamp(self, case: Case) -> str:
        """What a case is cut from: its fields, and size and time of its files; one-way."""
        digest = hashlib.sha256(repr((case, self.how.salt)).encode("utf-8", "surrogatepass"))
        for name in (*(image.path for image in case.images.values()), *filter(None, [case.mask])):
            path = Path(self.how.root) / name
            try:
                about = path.stat()
                digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
            except OSError:
                digest.update(b"missing")
        return digest.hexdigest()[:32]


def _digest(stamps: list[str]) -> str:
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()


def _images(row: Mapping[str, Any]) -> Iterable[str]:
    return row.get("images", {}).values()


def _cut_all(
    cases: list[Case], stamps: list[str], folder: _Folder, order: Order, say: Callable[[str], Any]
) -> list[Outcome]:
    """The outcomes of all cases, in their order; those of an earlier run are taken from its journal."""
    known = folder.done()
    todo = [(case, stamp) for case, stamp in zip(cases, stamps, strict=True) if stamp not in known]
    if len(todo) < len(cases):
        say(f"{len(cases) - len(todo)} cases were cut by an earlier run; {len(todo)} are left")
    began = said = time.monotonic()
    if todo:
        with folder.journal.open("a") as journal:
            for number, (stamp, outcome) in enumerate(_in_processes(todo, folder.how, order.workers), 1):
                known[stamp] = outcome
                journal.write(json.dumps({"stamp": stamp, **outcome._asdict()}) + "\n")
                journal.flush()
                if (now := time.monotonic()) - said > EVERY:
                    rate = number / (now - began)
                    left = duration((len(todo) - number) / rate)
                    say(f"{number} of {len(todo)} cases  {rate:.3g} cases/s  {left} left")
                    said = now
    return [known[stamp] for stamp in stamps]


def _in_processes(todo: list[tuple[Case, str]], how: Cutting, workers: int | None) -> Iterator[tuple[str, Outcome]]:
    """Outcomes in the order of cases, whatever the number of processes. A case that kills its process (memory) is
    rejected; the others go on in a new pool."""
    count = min(workers or os.cpu_count() or 1, len(todo))
    if count == 1:
        yield from ((stamp, cut(case, how)) for case, stamp in todo)
        return
    waiting, ahead = deque(todo), count * _WAITING
    while waiting:
        running: deque[tuple[Case, str, Future]] = deque()
        with ProcessPoolExecutor(count, get_context("spawn"), signal.signal, _QUIET) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < ahead:
                        case, stamp = waiting[0]
                        running.append((case, stamp, pool.submit(cut, case, how)))
                        waiting.popleft()
                    yield running[0][1], running[0][2].result()
                    running.popleft()
                continue
            except BrokenProcessPool:
                pass
            except BaseException:  # Ctrl-C, a full disk: of what is handed out, no more is begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        # Which of those at work it was nobody knows: each is tried alone, in a process of its own.
        for case, stamp, _ in running:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                try:
                    yield stamp, alone.submit(cut, case, how).result()
                except BrokenProcessPool:
                    yield stamp, Outcome([], [(how.named(case.id), "", "its process died (memory?)")], [])


def _finish(
    adapter: Adapter,
    source: Root,
    folder: _Folder,
    order: Order,
    cases: list[Case],
    left: list[Left],
    outcomes: list[Outcome],
    say: Callable[[str], Any],
) -> Path:
    """Look at the set as a whole, and write what describes it."""
    how, out = folder.how, folder.out
    rejected = [(how.named(one.id), one.part, one.reason) for one in left]
    rejected += [tuple(r) for outcome in outcomes for r in outcome.rejected]
    rows, twice, alike = _unique(row for outcome in outcomes for row in outcome.rows)
    rejected += twice
    if not rows:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(r[2] for r in rejected).most_common(5))
        raise UserError(f"{source.path}: nothing is left of {len(cases)} cases (rejected: {why})")
    for row in rows:
        row.setdefault("license", adapter.licence)
    if order.pack:
        rows = _packed(rows, out, order.pack)
    _write_lines(out / "rejected.jsonl", ({"id": i, "stream": s, "reason": r} for i, s, r in rejected))
    _write_lines(out / MANIFEST, rows)
    (out / "splits").mkdir(exist_ok=True)
    for split in SPLITS:
        names = sorted({how.named(case.id) for case in cases if case.split == split})
        _write(out / "splits" / f"{split}.txt", (f"{name}\n" for name in names))
    moves = [tuple(move) for outcome in outcomes for move in outcome.registered]
    stats = card.statistics(rows, len(cases), _whole(left), [r[1:] for r in rejected], moves, alike)
    _write(out / "statistics.json", [json.dumps(stats, indent=1) + "\n"])
    _write(out / "README.md", [card.markdown(adapter, folder.settings, stats)])
    card.preview(out, out / "preview.png", adapter.open)
    for line in card.lines(stats):
        say(line)
    if how.salt and rejected:
        say("  ids are hashed; --keep-ids, into another folder, says which files these are")
    say(f"{out / MANIFEST}: train with --config.data.source=manifest:{out}; look at {out / 'preview.png'}")
    return out / MANIFEST


def _packed(rows: list[dict[str, Any]], out: Path, most: int) -> list[dict[str, Any]]:
    """The rows with their images in shards, a split after the other; the files they were in are deleted."""
    shutil.rmtree(out / "shards", ignore_errors=True)
    named: dict[str, str] = {}
    for split in SPLITS:
        with shards.Writer(out, split, most) as writer:
            for name in (n for row in rows if row["split"] == split for n in _images(row)):
                named[name] = writer.add((out / name).read_bytes())
    shutil.rmtree(out / "images", ignore_errors=True)
    return [row | {"images": {k: named[n] for k, n in row["images"].items()}} if _images(row) else row for row in rows]


def _unique(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]], int]:
    """(rows without images that another holds already, which those are, how many across splits look alike)."""
    seen: dict[tuple[str, str], str] = {}
    looks: dict[tuple[str, str], set[str]] = {}
    kept, rejected = [], []
    for row in rows:
        row = dict(row)
        prints = row.pop("_prints", {})
        for key, (exact, likeness) in prints.items():
            stream = stream_of(key)
            if (key, exact) in seen:
                rejected.append((row["id"], stream, "the same pixels as another image"))
                row = _without(row, key)
                if not row.get("images"):
                    row = {}  # its text is with the other image
            else:
                seen[key, exact] = row["id"]
                looks.setdefault((key, likeness), set()).add(row["split"])
        if row.get("images") or row.get("text"):
            kept.append(row)
    return kept, rejected, sum(len(splits) > 1 for splits in looks.values())


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    fields = ("images", "scale", "span", "spacing", "orientation")
    cleared = {f: {k: v for k, v in row[f].items() if k != key} for f in fields if f in row}
    if "synthetic" in row:
        cleared["synthetic"] = [k for k in row["synthetic"] if k != key]
    row = {k: v for k, v in (row | cleared).items() if v or k not in (*fields, "synthetic")}
    if len(row.get("images", ())) < 2:
        row.pop("registered", None)
    return row


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    _write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, parts: Iterable[str]) -> None:
    """A text file, whole or not at all. JSON can spell half a character, and no file can hold it."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(parts)
    part.replace(path)
