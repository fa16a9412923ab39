"""Who owns a run root: one run at a time, since each tidies up what it takes for its own unfinished files.

    RUN/owner.json    host, process and since when; touched every 30 s for as long as the run lives

The file is put there in one step that fails where one is already (a hard link; on buckets by writing and reading back).
A run that was killed leaves it behind. It is taken over where the process is seen to be gone (here: no such process, or
another one under its number) or, of another machine, when nobody has touched the file for three minutes.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from medm2g_jax.data.write import alone_in
from medm2g_jax.errors import UserError
from medm2g_jax.train.disk import worded

NAME = "owner.json"
BEAT, DEAD = 30.0, 180.0  # seconds between signs of life, and without one; file servers hide a change for a minute
_SETTLE = 2.0  # seconds after which a bucket shows all processes the same file
_WORDS = 2048  # bytes of an error that all processes are told


@dataclass(frozen=True)
class Owner:
    """A process that runs in a run root."""

    token: str
    host: str
    place: str  # boot and process namespace: where its number means something
    pid: int
    started: str  # of the process, as the system counts it: numbers are used again
    since: str

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def me() -> Owner:
    pid = os.getpid()
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return Owner(uuid.uuid4().hex, socket.gethostname(), _place(), pid, _started(pid) or "", now)


@contextlib.contextmanager
def owned(root: epath.PathLike, say: Callable[[str], Any] = print) -> Iterator[None]:
    """Own `root` for as long as the block lasts. All processes call this; the first takes it, all learn the outcome.

    Raises:
      UserError: another run has it; says who, and since when.
    """
    root, mine = epath.Path(root), me()

    def begin():
        with worded(root):
            take(root, mine, say)

    on_first(begin)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(root, mine, stop), daemon=True)
    if jax.process_index() == 0:
        beats.start()
    try:
        yield
    finally:
        stop.set()
        if jax.process_index() == 0:
            beats.join()
            with contextlib.suppress(OSError):  # what is left behind is a dead process', and taken over
                release(root, mine)


def on_first(work: Callable[[], None]) -> None:
    """Let process 0 alone do this work; a UserError of it is raised by all.

    Raises:
      UserError: as `work`.
    """
    why = ""
    if jax.process_index() == 0:
        try:
            work()
        except UserError as error:
            why = str(error)
    if jax.process_count() > 1:
        raw = np.zeros(_WORDS, np.uint8)
        data = why.encode()[:_WORDS]
        raw[: len(data)] = np.frombuffer(data, np.uint8)
        told = np.asarray(multihost_utils.broadcast_one_to_all(raw)).astype(np.uint8).tobytes()
        why = told.rstrip(b"\0").decode(errors="ignore")
    if why:
        raise UserError(why)


def take(root: epath.Path, mine: Owner, say: Callable[[str], Any] = print) -> None:
    """Put `mine` into the run root, over what a dead process has left.

    Raises:
      UserError: a live process has it.
    """
    root.mkdir(parents=True, exist_ok=True)
    path, part = root / NAME, root / f"{NAME}.{mine.token}"
    try:
        with alone_in(root):  # between the look at what a dead process left and its end nobody else may look
            part.write_text(json.dumps(asdict(mine)))
            found, age = _read(path, part.stat().mtime)  # by the file server's clock
            if age is not None and _alive(found, age, mine):
                raise UserError(_held(root, found, age, mine))
            if age is not None:
                path.unlink(missing_ok=True)
            if not _put(part, path, mine):
                raise UserError(_held(root, *_read(path, part.stat().mtime), mine))
            if age is not None:
                say(f"{path}: taken over from {found.words if found else 'a run'}, which has ended without a word")
    finally:
        part.unlink(missing_ok=True)


def _held(root: epath.Path, found: Owner | None, age: float | int | None, mine: Owner) -> str:
    who, silent = "another run" if found is None else found.words, max(age or 0, 0)
    sure = found is not None and (found.host, found.place) == (mine.host, mine.place)
    sign = "" if sure else f" (a sign of life {silent:.0f} s ago; it counts as gone after {DEAD:.0f} s without one)"
    return (
        f"{root} belongs to {who}, which is still running{sign}; wait for it or stop it, or give another --workdir "
        f"(if it is surely gone: delete {root / NAME})"
    )


def release(root: epath.Path, mine: Owner) -> None:
    """Give the run root back, where it is still `mine`."""
    found, _ = _read(root / NAME, time.time())
    if found == mine:
        (root / NAME).unlink(missing_ok=True)


def _put(part: epath.Path, path: epath.Path, mine: Owner) -> bool:
    if _is_remote(path):  # no step there that fails where something is: the last writer wins, and all look again
        part.copy(path, overwrite=True)
        time.sleep(_SETTLE)
        return _read(path, time.time())[0] == mine
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(handle, "w") as file:
            file.write(json.dumps(asdict(mine)))
    return True


def _read(path: epath.Path, now: float | int) -> tuple[Owner | None, float | int | None]:
    """(who, seconds since the last sign of life); (None, seconds) of a file cut short, (None, None) where none is."""
    try:
        age = now - path.stat().mtime
        return Owner(**json.loads(path.read_text())), age
    except FileNotFoundError:
        return None, None
    except (ValueError, TypeError):
        return None, age


def _alive(found: Owner | None, age: float | int, mine: Owner) -> bool:
    if found is not None and (found.host, found.place) == (mine.host, mine.place):
        return _started(found.pid) == found.started
    return age < DEAD


def _beat(root: epath.Path, mine: Owner, stop: threading.Event) -> None:
    path = root / NAME
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):  # a full or absent disk is for the run to tell
            if _is_remote(path):
                path.write_text(json.dumps(asdict(mine)))
            else:
                os.utime(path)


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _place() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str | None:
    """When a process of this machine began, None where there is none (or what is left of one)."""
    if os.path.exists("/proc/self/stat"):
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return found or None
