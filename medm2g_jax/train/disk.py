"""Why something could not be written, in words that say what to mend: the cause there is, not always the disk.

A file system is full when its bytes are, or when its inodes are (many small files), or by a quota while both are free;
or it is not full at all, but read-only, or not ours. The operating system says "No space left on device" for the first
three, and libraries pass it on as text.
"""

import contextlib
import errno
import os
from collections.abc import Iterator

from etils import epath

from medm2g_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MENDS = {
    errno.EDQUOT: "the quota on this file system is used up: delete files, or ask for more",
    errno.EROFS: "the file system is mounted read-only: mount it for writing, or give another --workdir",
    errno.EACCES: "this user may not write there: change the owner or the mode, or give another --workdir",
    errno.EPERM: "this user may not write there: change the owner or the mode, or give another --workdir",
    errno.EFBIG: "files may not be as large there: raise the limit (ulimit -f), or give another --workdir",
    errno.EIO: "the device does not take it: look into the system's log",
    errno.ENOENT: "the folder has been removed meanwhile: nothing else may clean up in a run root",
    errno.ESTALE: "the file server has let go of the folder: mount it again",
}
FEW = 256  # inodes: a save needs about twenty, and other programs take some as well


def number_of(error: BaseException) -> int | None:
    """The operating system's number of an error, from its text where a library hands that on alone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        text = str(seen)
        found = next((n for n in (*_FULL, *_MENDS) if os.strerror(n) in text), None)
        if found is not None:
            return found
        seen = seen.__cause__ or seen.__context__
    return None


def cause(folder: epath.PathLike, error: BaseException) -> str:
    """Why `folder` could not be written and what mends it; ask before anything there is tidied up."""
    number = number_of(error)
    return _of_space(os.fspath(folder)) if number == errno.ENOSPC else _MENDS.get(number, "mend it")


def _of_space(folder: str) -> str:
    if "://" in folder:
        return "there is no space left: make room"
    there = os.path.abspath(folder)
    while not os.path.exists(there):  # it may be what could not be made
        there = os.path.dirname(there)
    found = os.statvfs(there)
    room, inodes = found.f_bavail * found.f_frsize, found.f_favail
    amount = f"{room / 1e9:.3g} GB" if room >= 1e9 else f"{room / 1e6:.3g} MB"
    free = f"{amount} and {inodes} inodes free"
    if found.f_files and inodes < FEW and room > 2**20:
        return f"the file system has too few inodes left ({free}): delete files, however small they are"
    if room < 2**30:
        return f"the file system has too little space left ({free}): make room"
    return f"the file system takes no more, though it says {free}: a quota, or too little left for this: make room"


@contextlib.contextmanager
def worded(root: epath.PathLike) -> Iterator[None]:
    """Turn what the operating system says of writing into a run root (a log, a picture, a config) into one line.

    Raises:
      UserError: for an OSError about a file under `root`, or about no named file.
    """
    try:
        yield
    except OSError as error:
        named = "" if error.filename is None else os.path.abspath(os.fspath(error.filename))
        inside = not named or named.startswith(os.path.abspath(os.fspath(root)))
        if error.errno not in (*_FULL, *_MENDS) or error.errno == errno.ENOENT or not inside:
            raise
        raise UserError(
            f"{named or root}: {error.strerror}; {cause(root, error)}; then run the same command, it goes on from the "
            "last good checkpoint"
        ) from error
