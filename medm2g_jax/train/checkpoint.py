"""Checkpoints of a run and the result of a stage; the only file that knows orbax.

    checkpoints/STEP/state          orbax: every array of the state under one flat name ("ema/ct/unet/conv_in/kernel")
    checkpoints/STEP/meta/metadata  step, metric, shapes, dtypes and fingerprints; sealed with a CRC
    model/, model.json              a stage's result: it exists if and only if model.json does, which is written last

Orbax restores a flipped bit without a word. So each step keeps one fingerprint a leaf, the sum of (2i + 1) times the
bits of element i modulo 2^32, compared after every restore. An odd weight loses no bit of any element (an even one
shifts the high bits out), and a sum modulo 2^32 does not depend on the mesh that computes it. A damaged or unfinished
step is passed over for the newest intact one; another network than the one saved is an error, never passed over.

Every path may be remote (gs://). All processes call every function here; only process 0 writes plain files.
"""

import contextlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from medm2g_jax.arrays import Params
from medm2g_jax.errors import UserError
from medm2g_jax.train.disk import cause

_ORBAX = os.path.dirname(ocp.__file__) + os.sep
FORMAT = 2  # of model.json
_UNFINISHED = "unfinished"
_ASIDE = ".replaced"  # the copy of a step that a forced save is about to replace

_Abstract = dict[str, jax.ShapeDtypeStruct]


def quiet_orbax() -> None:
    """For entry points: say what orbax has to say once, in our words.

    Orbax logs warnings of no consequence, and errors that it raises as well. When one array fails, it drops the reads
    and writes of the others half done, on each of which Python writes up to a page, now or later.
    """
    if _not_of_orbax in logging.getLogger("absl").filters:
        return
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_orbax_s_tasks)
    # By no name: reads and writes nest, each in coroutines of its own, and nothing else here has any.
    warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited", category=RuntimeWarning)
    report = sys.unraisablehook

    def report_unless_orbax(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        if str(unraisable.exc_value) != "Event loop is closed" and not (code and code.co_filename.startswith(_ORBAX)):
            report(unraisable)

    sys.unraisablehook = report_unless_orbax


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(_ORBAX)


def _not_of_orbax_s_tasks(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.walk_tb(error.__traceback__) if error is not None else ()
    through = any(frame.f_code.co_filename.startswith(_ORBAX) for frame, _ in frames)
    return not through and not re.search("orbax|tensorstore|OCDBT", record.getMessage())


@jax.jit
def fingerprint(x: Array) -> UInt32[Array, ""]:
    """Sum over i of (2i + 1) times the bits of element i (row-major), modulo 2^32, for elements of at most 32 bits."""
    if x.dtype != bool:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):  # a reshape to one axis would gather an array sharded on its last
        index += np.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        stride *= x.shape[axis]
    return jnp.sum((2 * index + 1) * x.astype(jnp.uint32), dtype=jnp.uint32)


@jax.jit
def _fingerprints(leaves):
    return [fingerprint(x) for x in leaves]


def fingerprints(tree: Any) -> dict[str, int]:
    """The fingerprint of every leaf by its name: keys and indices of the path to it, joined with "/".

    Of whole arrays in this host's memory without a compiler, which would take seconds for each new tree. Of others
    by one executable for the whole tree, nothing else in flight: several with an all-reduce each deadlock on virtual
    CPU devices.
    """
    flat = _flatten(tree)
    leaves = jax.block_until_ready(list(flat.values()))
    here = all(x.is_fully_addressable and [d.platform for d in x.devices()] == ["cpu"] for x in leaves)
    found = map(_fingerprint_here, leaves) if here else jax.device_get(_fingerprints(leaves))
    return dict(zip(flat, map(int, found), strict=True))


def _fingerprint_here(x: Array) -> np.uint32:
    bits = np.ascontiguousarray(x).reshape(-1)
    bits = bits.view(f"u{bits.itemsize}").astype(np.uint32)
    return np.sum((2 * np.arange(bits.size, dtype=np.uint32) + np.uint32(1)) * bits, dtype=np.uint32)


class Checkpoints:
    """The checkpoints of one run in `folder`: asynchronous, the newest `keep` and the best by metric (lower is better).

    Older ones go when the save after them is known to have been written: at the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        if keep < 1:
            raise UserError(f"config.keep: expected at least 1, found {keep}")
        self.folder = _absolute(folder)
        self._keep = keep
        # Folders before `save` returns: one that cannot be made in the background leaves orbax's writers waiting for it
        # for five minutes, and the process with them.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(async_options=at_once),
                state=_arrays_handler(),
                meta=ocp.JsonCheckpointHandler(),
            ),
            async_options=at_once,
        )
        self._writing: tuple[int, dict] | None = None
        self._broken = False  # a save has failed, and said so
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
        _barrier("checkpoints opened")
        self._records: dict[int, dict] = {}  # finished and, as far as is known, intact
        self._damaged: dict[int, str] = {}  # why not
        for step in (int(path.name) for path in self.folder.iterdir() if path.name.isdigit()):
            record, why = _attempt(lambda step=step: _read_record(self.folder / str(step)))
            if why:
                self._damaged[step] = why
            else:
                self._records[step] = record

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metric: float | int | None = None,
        meta: Any = None,
        force: bool = False,
    ) -> None:
        """Start to write `state`, a dict of pytrees of arrays; the arrays may be donated as soon as this returns.

        A step that is there already is left alone; with `force` it is replaced, once the new copy is complete.

        Args:
          metric: what `best` compares; NaN is never best, nor is None (which keeps the metric of a replaced step).
          meta: anything small that JSON holds; `restore` returns it.

        Raises:
          UserError: this save could not begin, or the one before it failed.
        """
        self.wait()
        path = self.folder / str(step)
        if step in self._records:
            if not force:
                return
            metric = self._records[step]["metric"] if metric is None else metric
            if jax.process_index() == 0:
                path.rename(self.folder / f"{step}{_ASIDE}")
        flat = _flatten(state)
        metric = None if metric is None else float(metric)
        sealed = _sealed({"step": step, "metric": metric, "meta": meta, **_describe(flat, _by_item(state))})
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), meta=ocp.args.JsonSave(sealed))
        try:
            self._saver.save(path, args=arguments, force=True)
        except OSError as error:
            raise self._failed(step, error) from error
        self._writing, self._broken = (step, sealed["record"]), False

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
          UserError: it failed.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        step, record = writing
        try:
            self._saver.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises a full disk as ValueError
            raise self._failed(step, error) from error
        self._records[step] = record
        self._damaged.pop(step, None)
        self._prune()

    def close(self) -> None:
        """Wait for the save in flight and let go of the folder.

        Raises:
          UserError: the save failed, unless this is called while another error is on its way: the first one counts.
        """
        under_way = sys.exc_info()[1] is not None
        try:
            self.wait()
        except UserError:
            if not under_way:
                raise
        finally:
            try:
                self._saver.close()
            except (OSError, ValueError, RuntimeError) as error:  # the rest of what has failed before
                if not (under_way or self._broken):
                    raise UserError(f"{self.folder}: {_reason(error)}; {cause(self.folder, error)}") from error

    def best(self) -> int | None:
        """The finished step of lowest metric, the later of equals; None where no step has one."""
        self.wait()
        return next(iter(self._ranked()), None)

    def restore(self, abstract_state: Mapping[str, Any]) -> tuple[dict[str, Any], int, Any] | None:
        """(state, step, meta) of the newest intact step; None where no save was ever finished.

        Args:
          abstract_state: as given to `save`, with a jax.ShapeDtypeStruct, sharding included, for every array.

        Raises:
          UserError: the checkpoint is of another network, or there are checkpoints and all are damaged.
        """
        self.wait()
        found, passed = self._first_intact(sorted(self._records | self._damaged, reverse=True), abstract_state)
        if found is not None:
            step, state = found
            return state, step, self._records[step]["meta"]
        damaged = [f"step {step} is {why}" for step, why in passed.items() if why != _UNFINISHED]
        if damaged:  # to begin again without a word would throw a long run away
            raise UserError(f"{self.folder}: {_some(damaged)}, no step is intact; delete the folder to begin again")
        return None

    def restore_item(self, step: int | str, name: str, abstract: Any) -> Any:
        """One entry of the state, of one step or of the "best" one (the next best intact; the newest without metrics).

        Raises:
          UserError: it is damaged or not there, or the entry is of another network.
        """
        self.wait()
        steps = (self._ranked() or sorted(self._records, reverse=True)) if step == "best" else [int(step)]
        found, passed = self._first_intact(steps, {name: abstract}, item=name)
        if found is not None:
            return found[1][name]
        if not passed:
            raise UserError(f"{self.folder}: there is no checkpoint; run the command that trains this stage")
        why = "; ".join(f"step {step} is {why}" for step, why in passed.items())
        raise UserError(f"{self.folder}: {why}; delete {', '.join(map(str, passed))} there and run the command again")

    def _ranked(self) -> list[int]:
        metrics = {step: record["metric"] for step, record in self._records.items()}
        known = {step: m for step, m in metrics.items() if m is not None and not np.isnan(m)}
        return sorted(known, key=lambda step: (known[step], -step))

    def _first_intact(
        self, steps: Iterable[int], abstract: Mapping[str, Any], item: str | None = None
    ) -> tuple[tuple[int, dict[str, Any]] | None, dict[int, str]]:
        """(step, state) of the first intact step, and what is wrong with those passed over."""
        flat, structure = _flatten(abstract), jax.tree.structure(dict(abstract))
        found, passed = None, {}
        for step in steps:
            why = self._damaged.get(step, _UNFINISHED)
            if step in self._records:
                record, path = self._records[step], self.folder / str(step) / "state"
                _compare(path, {n: v for n, v in _specs(record).items() if item in (None, n.partition("/")[0])}, flat)
                values, why = _attempt(lambda path=path: _read_arrays(path, flat))
                if not why:
                    state = jax.tree.unflatten(structure, values.values())
                    why = _difference(_by_item(state), record["fingerprints"])
                if not why:
                    found = step, state
                    break
                del self._records[step]
                self._damaged[step] = why
            passed[step] = why
        if jax.process_index() == 0:
            used = f"step {found[0]} is used instead" if found else "there is no other"
            for step, why in passed.items():
                print(f"warning: checkpoint {self.folder / str(step)} is {why}; {used}", flush=True)
        return found, passed

    def _failed(self, step: int, error: Exception) -> UserError:
        why, self._broken = cause(self.folder, error), True
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # where even that is not allowed, the first error is the one to tell
                self._tidy()  # a full disk should not stay full of what could not be finished
        kept = f"the last good checkpoint, step {max(self._records)}, is kept" if self._records else "none is kept yet"
        return UserError(
            f"{self.folder}: saving step {step} failed: {_reason(error)}; {kept}; {why}, and run the same command"
        )

    def _tidy(self) -> None:
        _drop_unfinished(self.folder)
        for path in list(self.folder.iterdir()):
            if path.name.endswith(_ASIDE):
                final = self.folder / path.name.removesuffix(_ASIDE)
                if _finished(final):
                    path.rmtree()
                else:
                    final.rmtree(missing_ok=True)
                    path.rename(final)

    def _prune(self) -> None:
        kept = {*sorted(self._records)[-self._keep :], *self._ranked()[:1]}
        self._records = {step: self._records[step] for step in kept}
        self._damaged.clear()
        if jax.process_index() == 0:
            self._tidy()
            for path in self.folder.iterdir():
                if path.name.isdigit() and int(path.name) not in kept:
                    # Without its record a folder is no checkpoint, wherever a kill may stop the rest.
                    _record_file(path).unlink(missing_ok=True)
                    path.rmtree()


def save_model(folder: epath.PathLike, params: Params, meta: Mapping[str, Any]) -> None:
    """Write a stage's result: the arrays to `folder`/model, then `folder`/model.json, last and in one piece.

    `meta` gets "format", "shapes", "dtypes" and "fingerprints" of every name.

    Raises:
      UserError: it could not be written; then there is no model.json.
    """
    folder = _absolute(folder)
    path = folder / "model.json"
    kept = {"format": FORMAT, "storage": "orbax", **_describe(params, fingerprints(params))}
    text = json.dumps({**meta, **kept}, indent=1)
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # an older result ends here
            _drop_unfinished(folder)
        _barrier("result begun")
        with ocp.Checkpointer(_arrays_handler()) as saver:
            saver.save(folder / "model", args=ocp.args.PyTreeSave(dict(params)), force=True)
        if jax.process_index() == 0:
            _write_at_once(path, text)
        _barrier("result written")
    except (OSError, ValueError) as error:  # tensorstore raises a full disk as ValueError
        why = cause(folder, error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                _drop_unfinished(folder)
        raise UserError(
            f"{folder / 'model'}: writing the result failed: {_reason(error)}; {why}, and run the same command"
        ) from error


def load_model(
    folder: epath.PathLike,
    names: Callable[[str], bool] | None = None,
    shardings: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
    dtype: Any = None,
) -> Params:
    """A stage's result, or the part of it that `names` chooses; nothing else is read.

    Args:
      shardings: of a name and its abstract value; default: all on this process's first device.
      dtype: cast floating-point arrays to this, after their fingerprints are compared.

    Raises:
      UserError: there is no result, `names` chooses nothing of it, or what it chooses is damaged.
    """
    folder = _absolute(folder)
    meta = read_meta(folder)
    if meta is None:
        raise UserError(f"{folder / 'model.json'}: not found; the stage that writes it has not finished")
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {}
    for name in filter(names, meta["shapes"]) if names else meta["shapes"]:
        value = jax.ShapeDtypeStruct(tuple(meta["shapes"][name]), jnp.dtype(meta["dtypes"][name]))
        abstract[name] = value.update(sharding=shardings(name, value) if shardings else local)
    if not abstract:
        raise UserError(f"{folder / 'model'}: holds none of the names asked for; it has {_some(meta['shapes'])}")
    params, why = _attempt(lambda: _read_arrays(folder / "model", abstract))
    why = why or _difference(fingerprints(params), meta["fingerprints"])
    if why:
        raise UserError(f"{folder / 'model'} is {why}; delete {folder} and run the command that trained it again")
    if dtype is not None:
        for name, value in params.items():  # one by one: the whole is never there twice
            if jnp.issubdtype(value.dtype, jnp.floating):
                params[name] = value.astype(dtype)
    return params


def read_meta(folder: epath.PathLike) -> dict[str, Any] | None:
    """What model.json says of a stage's result; None where there is no result.

    Raises:
      UserError: model.json cannot be read, or is of another format.
    """
    path = epath.Path(folder) / "model.json"
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text())
        found, _ = meta["format"], (meta["shapes"], meta["dtypes"], meta["fingerprints"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {_reason(error)}; delete {folder} and run the command that trained it again"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"{path}: format {found}, this version reads format {FORMAT}; train it again, or install the version that "
            "wrote it"
        )
    return meta


def _absolute(folder: epath.PathLike) -> epath.Path:
    """Orbax takes no relative paths."""
    path = epath.Path(folder)
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_compression=False)  # trained floats shrink by 7 %, at twice the time


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(dict(tree) if isinstance(tree, Mapping) else tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same name once their paths are joined with '/'")
    return flat


def _by_item(state: Mapping[str, Any]) -> dict[str, int]:
    # Item by item: parameters and their EMA have equal shapes, hence one executable.
    prints = {item: fingerprints(tree) for item, tree in state.items()}
    return {f"{item}/{name}" if name else item: v for item in prints for name, v in prints[item].items()}


def _describe(flat: Mapping[str, Any], prints: Mapping[str, int]) -> dict[str, Mapping[str, Any]]:
    return {
        "shapes": {name: list(x.shape) for name, x in flat.items()},
        "dtypes": {name: str(x.dtype) for name, x in flat.items()},
        "fingerprints": prints,
    }


def _specs(described: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{described['dtypes'][name]}{shape}" for name, shape in described["shapes"].items()}


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _compare(path: epath.Path, saved: Mapping[str, str], flat: _Abstract) -> None:
    asked = _specs(_describe(flat, {}))
    different = [n for n in sorted(saved.keys() | asked.keys()) if saved.get(n) != asked.get(n)]
    if different:
        lines = [f"{n}: {saved.get(n, 'absent')} saved, {asked.get(n, 'absent')} expected" for n in different]
        raise UserError(
            f"{path} holds another network than this config makes ({_some(lines)}); "
            f"go back to the config that it was trained with, or give a fresh --workdir"
        )


def _difference(found: Mapping[str, int], saved: Mapping[str, int]) -> str:
    wrong = [name for name in found if found[name] != saved.get(name)]
    return f"damaged: the fingerprint of {_some(wrong)} differs" if wrong else ""


def _read_arrays(path: epath.Path, abstract: _Abstract) -> dict[str, Array]:
    arguments = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    # The handler, not a Checkpointer: that one has barriers, at which the others would wait for a process that failed.
    values = _arrays_handler().restore(path, args=arguments)
    missing = [name for name in abstract if not isinstance(values.get(name), jax.Array)]
    if missing:
        raise ValueError(f"no data of {_some(missing)}")
    return {name: values[name] for name in abstract}


def _record_file(path: epath.Path) -> epath.Path:
    return path / "meta" / "metadata"


def _finished(path: epath.Path) -> bool:
    return path.exists() and ocp.utils.is_checkpoint_finalized(path) and _record_file(path).exists()


def _drop_unfinished(folder: epath.Path) -> None:
    for path in list(folder.iterdir()):
        if ocp.utils.TMP_DIR_SUFFIX in path.name:
            with contextlib.suppress(OSError):  # a thread of a save that failed may still write there: next time
                path.rmtree()


def _read_record(path: epath.Path) -> dict[str, Any] | None:
    if not _finished(path):
        return None
    sealed = json.loads(_record_file(path).read_text())
    if sealed["crc32"] != _sealed(sealed["record"])["crc32"]:
        raise ValueError(f"the CRC of {_record_file(path)} differs")
    return sealed["record"]


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(record))  # tuples become lists and keys strings before the CRC, as in the file
    return {"record": plain, "crc32": zlib.crc32(json.dumps(plain, sort_keys=True).encode())}


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what `read` returns, "") or (None, what is wrong); one verdict for all processes."""
    value, why = None, ""
    try:
        value = read()
        why = _UNFINISHED if value is None else ""
    except (RuntimeError, MemoryError):
        raise  # out of memory, on a device or here, is no damage
    except Exception as error:  # orbax raises a bare Exception where a chunk cannot be read
        why = f"damaged: {_reason(error)}"
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(why))).any():
        value, why = None, why or "damaged: another host cannot read it"
    return value, why


def _reason(error: BaseException) -> str:
    if type(error) is Exception and error.__cause__ is not None:  # orbax's wrapper holds a page of settings
        error = error.__cause__
    text = re.split(r"\n| \[(?:tensorstore_spec|os_error_code|source)", str(error).strip())[0]
    return f"{type(error).__name__}: {text if len(text) < 200 else '...' + text[-200:]}"  # the cause comes last


def _write_at_once(path: epath.Path, text: str) -> None:
    part = path.parent / f"{path.name}.part"
    part.write_text(text)
    part.replace(path)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
