"""Tensors of a published file or folder, read one at a time, and the folder that a conversion writes.

Whatever the format, a source is {key: Tensor}: shapes and dtypes are known at once, values are read when asked for, so
that a conversion never holds more than its largest tensor. safetensors are parsed here, header first and strictly, and
need no torch; pickles go through torch's weights-only loader, which builds tensors and refuses everything else.

A folder is written beside its final place and renamed when it is complete: what is there loads, or nothing is.
"""

import json
import math
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from medm2g_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; more is no header
PICKLES = (".bin", ".ckpt", ".pth", ".pt")
FORMAT = 1  # of convert.json

# Checkpoints that PyTorch Lightning wrote name the callbacks of their training run as classes. Nothing of them is
# wanted: each name gets a class of our own that does nothing.
LIGHTNING = tuple(
    f"{package}.callbacks.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
    for name in (
        "model_checkpoint.ModelCheckpoint",
        "early_stopping.EarlyStopping",
        "lr_monitor.LearningRateMonitor",
        "timer.Timer",
    )
) + tuple(f"main.{name}" for name in ("SetupCallback", "ImageLogger", "CUDACallback"))


# What torch's wrappers (torch.compile, DataParallel and its kin, FSDP, checkpointing) write into the keys of a network.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Where the tensors of a pickle stand, when they do not stand at its top: Lightning and CompVis, DeepSpeed, many others.
NESTS = ("state_dict", "module", "model", "model_state_dict")


class Inert:
    """Stands for a class that a checkpoint names and nobody needs."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `read` gives its values, anew at each call."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    file: Path
    offset: int | None = None  # of its bytes in the file, where they can be mapped

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- reading --------------------------------------------------------------------------------------------------------


def open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, of a pickle, or of the shards that an .index.json names.

    Raises:
      UserError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if re.search(r"\.index(\.\w+)?\.json$", path.name):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise UserError(f"{path}: expected .safetensors, {', '.join(PICKLES)} or .safetensors.index.json")


def open_published(path: Path, *anchors: str) -> dict[str, Tensor]:
    """`open_tensors` under the keys that the network itself has: without what wrappers wrote into them, and without
    what stands in front of the first of `anchors` that is there, as in `model.` of a training program.

    Args:
      anchors: keys that a network of this kind always has.

    Raises:
      UserError: as `open_tensors`, or two tensors would have one key.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in open_tensors(path).items():
        plain = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if plain in out:
            raise UserError(f"{path}: {plain} stands there twice, once in a wrapper ({key}); save the weights once")
        out[plain] = tensor
    for anchor in anchors:
        fronts = [key[: -len(anchor)] for key in out if key == anchor or key.endswith(f".{anchor}")]
        if len(fronts) > 1:
            raise UserError(f"{path}: {len(fronts)} networks, behind {some(map(repr, fronts))}; save one alone")
        if fronts:
            kept = {key.removeprefix(fronts[0]): tensor for key, tensor in out.items()}
            if len(kept) < len(out):
                raise UserError(f"{path}: keys with and without {fronts[0]!r} in front; save the weights once")
            return kept
    return out


def weights_in(folder: Path, *stems: str) -> Path | None:
    """The weight file of a diffusers or transformers folder: safetensors before pickles, whole before half precision.

    Args:
      stems: names without ending, as in "diffusion_pytorch_model" or "model", "pytorch_model".
    """
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in stems:
                for index in ("", ".index.json"):
                    # Shards' index of a variant: model.safetensors.index.fp16.json.
                    tail = f".{suffix}.index{variant}.json" if index else f"{variant}.{suffix}"
                    if (folder / f"{stem}{tail}").is_file():
                        return folder / f"{stem}{tail}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file is missing, or no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def inside(folder: Path, name: str) -> Path:
    """folder/name, for a name that a file gives.

    Raises:
      UserError: the name would leave the folder.
    """
    parts = {PurePosixPath(name), PureWindowsPath(name)}
    if not name or any(p.is_absolute() or ".." in p.parts or getattr(p, "drive", "") for p in parts):
        raise UserError(f"{folder}: a file in it names {name!r}, which leaves the folder; not a file to trust")
    return folder / name


def _open_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: expected a weight_map from keys to file names")
    out: dict[str, Tensor] = {}
    shards = {name: inside(index.parent, name) for name in dict.fromkeys(weight_map.values())}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise UserError(f"{index}: shard {some(missing)} of {len(shards)} is not there; bring the missing files")
    for name, path in shards.items():
        tensors = open_tensors(path)
        wanted = {key for key, shard in weight_map.items() if shard == name}
        if wanted != set(tensors):
            raise UserError(f"{path}: {index.name} names other keys: {some(sorted(wanted ^ set(tensors)))}")
        out |= tensors
    return out


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    header, start = _header(path)
    size, out, spans = path.stat().st_size - start, {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers_ = (*shape, begin, end)
            good = all(type(n) is int and n >= 0 for n in numbers_) and begin <= end
        except (TypeError, KeyError, ValueError):
            good = False
        if not good:
            raise UserError(f"{path}: damaged header: {key!r} has {str(entry)[:100]}; download the file again")
        if code not in DTYPES:
            raise UserError(f"{path}: {key} is of dtype {code}; known are {', '.join(DTYPES)}")
        if math.prod(shape) * DTYPES[code].itemsize != end - begin:
            raise UserError(f"{path}: damaged header: {key} {code}{list(shape)} does not take {end - begin} bytes")
        spans.append((begin, end))
        out[key] = _slice(path, start + begin, shape, DTYPES[code])
    spans.sort()
    whole = all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False)) and (not spans or spans[0][0] == 0)
    end = max((e for _, e in spans), default=0)
    if end > size:
        raise UserError(
            f"{path}: truncated: its header promises {start + end} bytes, found {start + size}; download it again"
        )
    if not whole or end != size:
        raise UserError(f"{path}: damaged: its tensors do not fill the {size} bytes of data; download it again")
    return out


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if len(first) < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise UserError(
                f"{path}: not a safetensors file, or damaged: its first 8 bytes give a header of {length} bytes in a "
                f"file of {size}; download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except ValueError as error:
        raise UserError(f"{path}: damaged header: {error}; download the file again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged header: expected a JSON object; download the file again")
    return header, 8 + length


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _slice(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def read() -> np.ndarray:
        # Not mapped: pages of the source would count as ours.
        values = np.fromfile(path, dtype, math.prod(shape), offset=offset)
        return values.reshape(shape)

    return Tensor(shape, dtype, read, path, offset)


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading this format needs torch (pip install 'medm2g-jax[convert]'); .safetensors need nothing"
        ) from error
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in LIGHTNING]):
            # mmap: values stay in the file until they are read; files of torch before 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|class|type|function) ([\w.]+)", str(error))
        what = f"it asks for {name[1]}" if name else str(error).splitlines()[0][:200]
        raise UserError(
            f"{path}: refused: {what}. A pickle can run any program, so only tensors are read from it; use the "
            ".safetensors file of the same model, or one that torch.save(model.state_dict(), FILE) writes"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a torch file, or damaged ({str(error).splitlines()[0][:200]})") from error
    state = loaded
    while isinstance(state, dict) and (inner := [n for n in NESTS if isinstance(state.get(n), dict)]):
        state = state[inner[0]]
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        inside = f" with {some(map(repr, loaded))}" if isinstance(loaded, dict) else ""
        raise UserError(
            f"{path}: expected a dict of tensors, found {type(loaded).__name__}{inside}; expected them at its top or "
            f"under {', '.join(NESTS)}: save them with torch.save(model.state_dict(), FILE)"
        )
    return {key: _of_torch(path, key, v) for key, v in state.items() if isinstance(v, torch.Tensor)}


def _of_torch(path: Path, key: str, value: Any) -> Tensor:
    import torch

    half = value.dtype == torch.bfloat16  # numpy has none
    name = str(value.dtype).removeprefix("torch.")
    dtype = DTYPES["BF16"] if half else next((d for d in CODES if d.name == name), None)
    if dtype is None:
        raise UserError(f"{path}: {key} is of dtype {name}; known are {', '.join(d.name for d in CODES)}")

    def read() -> np.ndarray:
        array = value.detach().contiguous()
        return array.view(torch.int16).numpy().view(dtype) if half else array.numpy()

    return Tensor(tuple(value.shape), dtype, read, path)


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A tensor to write: `make` gives its values when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def write_safetensors(path: Path, outputs: Mapping[str, Output], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write tensors in the order given, one at a time in memory. Returns the CRC-32 of each one's bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, prints = 0, {}
    for name, out in outputs.items():
        size = math.prod(out.shape) * out.dtype.itemsize
        header[name] = {"dtype": CODES[out.dtype], "shape": list(out.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, out in outputs.items():
            values = out.make()
            if values.shape != out.shape or values.dtype != out.dtype:
                raise ValueError(f"{name}: {values.dtype}{values.shape} where {out.dtype}{out.shape} was announced")
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            prints[name] = zlib.crc32(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return prints


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `path` when the block ends well; else nothing of it is left.

    Raises:
      UserError: `path` exists, or it cannot be written there.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; delete it to convert again, or choose another --to")
    part = path.parent / f".{path.name}.partial"
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a conversion that was killed
        part.mkdir(parents=True)
        yield part
        part.rename(path)
    except OSError as error:
        raise UserError(f"{path}: writing failed: {error}; make room, or choose another --to") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def some(names: Iterable[str], count: int = 6) -> str:
    """A few of the names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")
