"""What readers and writers of volumes share: bytes counted before they are taken, and errors that name the file."""

import contextlib
import gzip
import io
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jaxtyping import Num

from medm2g_jax.data.volume import Volume
from medm2g_jax.errors import UserError

# What decoders raise for damaged files: a byte that differs ends anywhere in them.
DAMAGED = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
CHUNK = 2**22  # bytes, or values, at a time
_HU = (np.iinfo(np.int16).min, np.iinfo(np.int16).max)


@contextlib.contextmanager
def opened(path: epath.PathLike, unpack: bool = True) -> Iterator[io.IOBase]:
    """A file to be read; through gzip where its content is that, whatever its name says, unless told not to.

    Raises:
      UserError: it is missing, or cannot be opened.
    """
    try:
        path = epath.Path(path)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe, a file to epath, would be waited for
            raise UserError(f"{str(path)!a}: cannot be read (no regular file)")
        file = path.open("rb")
        packed = unpack and file.read(2) == b"\x1f\x8b"
        file.seek(0)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise unreadable(path, error) from error
    with file:
        yield gzip.GzipFile(fileobj=file) if packed else file


def taken(path: epath.PathLike, most: int) -> bytes:
    """All bytes of a file as they are, counted before they are read.

    Raises:
      UserError: it is missing, cannot be read, or is of more than `most` bytes.
    """
    with opened(path, unpack=False) as file:
        try:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            content = b"" if size > most else file.read(size)
        except OSError as error:
            raise unreadable(path, error) from error
    if size > most:
        raise UserError(f"{path}: {size} bytes, more than the {most} that an image which is read here has at most")
    return content


def unreadable(path: epath.PathLike, error: Exception) -> UserError:
    """What is said of a file that does not open."""
    why = getattr(error, "strerror", None) or type(error).__name__
    return UserError(f"{str(path)!a}: cannot be read ({why})")


@contextlib.contextmanager
def whole(name: str, what: str, *more: type[Exception]) -> Iterator[None]:
    """Whatever a library raises of a damaged file becomes one line; without its own words, which may quote a patient's
    data.

    Args:
      more: errors of the library's own.

    Raises:
      UserError: instead of any of DAMAGED and of `more`.
    """
    try:
        yield
    except (*DAMAGED, *more) as error:
        raise UserError(f"{name}: not a whole {what} file ({type(error).__name__} in reading it)") from error


def check_count(name: str, shape: tuple[int, ...], most: int, what: str = "voxels") -> None:
    """Hold a shape, from a header, to what may be read.

    Raises:
      UserError: it has no voxels, or more than `most`.
    """
    said = " x ".join(map(str, shape))
    if not shape or min(shape) < 1:
        raise UserError(f"{name}: {said or 'no'} {what}; expected lengths from 1")
    if np.prod(shape, dtype=object) > most:
        raise UserError(
            f"{name}: {said} {what}, more than the {most} that are read; make it smaller, or, if it is what it says, "
            "raise --config.data.most_pixels"
        )


def skip(file: io.IOBase, count: int) -> None:
    """Pass over bytes of a stream that cannot seek."""
    while count > 0:
        if not (some := file.read(min(count, CHUNK))):
            raise EOFError
        count -= len(some)


def values_of(
    name: str, file: io.IOBase, count: int, dtype: np.dtype, scale: tuple[float, float] = (1.0, 0.0)
) -> Num[np.ndarray, "n"]:
    """`count` values from where a stream stands, times and plus `scale`; never more bytes than these.

    Whole numbers stay whole where the scale is of whole numbers and they fit 32 bits; all else is float32.

    Raises:
      UserError: the stream ends before them.
    """
    slope, inter = scale
    kept = dtype.newbyteorder("=") if dtype.kind in "iu" and dtype.itemsize <= 4 else None
    if kept and scale != (1.0, 0.0):
        bounds = sorted(x * slope + inter for x in (np.iinfo(kept).min, np.iinfo(kept).max))
        limits = ((t, np.iinfo(t)) for t in (np.int16, np.uint16, np.int32))
        fits = (t for t, limit in limits if limit.min <= bounds[0] and bounds[1] <= limit.max)
        kept = next(fits, None) if slope == int(slope) and inter == int(inter) else None
    out, at = None, 0
    while at < count:
        content = file.read(min(CHUNK, count - at) * dtype.itemsize)
        some = np.frombuffer(content, dtype, len(content) // dtype.itemsize)
        if not len(some):
            raise UserError(f"{name}: ends after {at} of {count} values")
        if out is None:  # only now: a header without its values has no memory
            out = np.empty(count, kept or np.float32)
        scaled = some if scale == (1.0, 0.0) else some.astype(np.float64) * slope + inter
        out[at : at + len(some)] = scaled
        at += len(some)
    return out


def storable(volume: Volume, values: Num[np.ndarray, "..."] | None = None) -> Num[np.ndarray, "..."]:
    """Values (None: all of the volume's) as files hold them: HU as int16, whole numbers of up to 32 bits as they are,
    the rest as float32."""
    values = volume.values if values is None else values
    if volume.unit == "HU":
        return np.clip(np.round(values), *_HU).astype(np.int16)
    keep = values.dtype.kind in "iu" and values.dtype.itemsize <= 4
    return values if keep else values.astype(np.float32)


def levels(values: Num[np.ndarray, "*shape"]) -> tuple[Num[np.ndarray, "*shape"], tuple[float, float]]:
    """Values as 16 bits: (uint16 levels, the slope and intercept that give the values back, to half a 65535th of their
    range)."""
    low, high = float(values.min()), float(values.max())
    slope = (high - low) / 65535 or 1.0
    return np.round((values.astype(np.float64) - low) / slope).astype(np.uint16), (slope, low)


def written(path: epath.PathLike, write: Callable[[epath.Path], None]) -> None:
    """Give `write` a name beside `path`, with its suffixes, and put what it leaves there in its place."""
    path = epath.Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part-{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
