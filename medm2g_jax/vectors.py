"""The file of vectors that `medm2g embed` writes and `medm2g retrieve` reads.

    vectors.npz      names, streams (n,) str; vectors (n d) float32; fingerprint, a str
    vectors.parquet  columns names, streams, vectors; the fingerprint in its metadata (extra `parquet`)
"""

import dataclasses
import zipfile
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from medm2g_jax.data.write import probe, unwritable
from medm2g_jax.errors import UserError

SUFFIXES = (".npz", ".parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """Where values stand in one model's aligned space.

    Attributes:
      names, streams: of each row.
      values: unit vectors.
      fingerprint: of the model (`Model.fingerprint`): vectors of two models cannot be compared.
    """

    names: tuple[str, ...]
    streams: tuple[str, ...]
    values: Float[np.ndarray, "n d"]
    fingerprint: str

    def of(self, stream: str | None) -> "Vectors":
        """The rows of a stream, or of all those of a modality; all of them where None is named.

        Raises:
          UserError: there is none; names those there are.
        """
        rows = [i for i, s in enumerate(self.streams) if stream is None or f"{s}:".startswith(f"{stream}:")]
        if not rows:
            there = ", ".join(dict.fromkeys(self.streams)) or "nothing"
            raise UserError(f"--stream {stream}: no vector of it; expected one of {there}")
        names, streams = (tuple(column[i] for i in rows) for column in (self.names, self.streams))
        return Vectors(names, streams, self.values[rows], self.fingerprint)


def check_out(out: str) -> None:
    """Can vectors be written there? Before minutes of making them.

    Raises:
      UserError: no; names what is there, or what to type.
    """
    path = epath.Path(out)
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        _parquet()
    if path.exists():
        raise UserError(f"--out {out}: is there already; delete it, or name another")
    probe(path.parent, "--out")


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'medm2g-jax[parquet]', or name a .npz") from error
    return pyarrow


def write(out: str, vectors: Vectors) -> None:
    """Raises:
    UserError: it cannot be written.
    """
    path = epath.Path(out)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            (_write_parquet if path.suffix == ".parquet" else _write_npz)(file, vectors)
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _write_npz(file: Any, vectors: Vectors) -> None:
    words = {name: np.asarray(getattr(vectors, name), np.str_) for name in ("names", "streams", "fingerprint")}
    np.savez_compressed(file, vectors=vectors.values, **words)


def _write_parquet(file: Any, vectors: Vectors) -> None:
    arrow = _parquet()
    flat = arrow.array(vectors.values.reshape(-1))
    lists = arrow.FixedSizeListArray.from_arrays(flat, vectors.values.shape[1])
    table = arrow.table(dict(names=vectors.names, streams=vectors.streams, vectors=lists))
    table = table.replace_schema_metadata({"fingerprint": vectors.fingerprint})
    arrow.parquet.write_table(table, file)


def read(name: str) -> Vectors:
    """The vectors that `write` wrote.

    Raises:
      UserError: missing, damaged, or none of ours.
    """
    path = epath.Path(name)
    try:
        with path.open("rb") as file:
            found = _read_parquet(file) if path.suffix == ".parquet" else _read_npz(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{name}: no vectors can be read of it ({why}); make them with medm2g embed") from error
    if found.values.shape != (len(found.names), found.values.shape[-1]) or len(found.streams) != len(found.names):
        raise UserError(f"{name}: {len(found.names)} names, vectors of shape {found.values.shape}; embed again")
    return found


def _read_npz(file: Any) -> Vectors:
    with np.load(file, allow_pickle=False) as held:
        names, streams = (tuple(map(str, held[column])) for column in ("names", "streams"))
        return Vectors(names, streams, np.asarray(held["vectors"], np.float32), str(held["fingerprint"]))


def _read_parquet(file: Any) -> Vectors:
    table = _parquet().parquet.read_table(file)
    names, streams = (tuple(table[column].to_pylist()) for column in ("names", "streams"))
    values = np.asarray(table["vectors"].to_pylist(), np.float32)
    return Vectors(names, streams, values, table.schema.metadata[b"fingerprint"].decode())
