"""Which images of a stage come as latents, and the making of these: with the stage's own autoencoder, on its mesh, in
its batches. Of several processes each makes every so many-th part (`data.latents`)."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.data import pipeline
from medm2g_jax.data.contents import contents
from medm2g_jax.data.latents import DTYPE, SPLITS, Latents, Store, store
from medm2g_jax.data.source import Record, Source, ranges, steady
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES
from medm2g_jax.model import MedM2G
from medm2g_jax.recipes import rows_of
from medm2g_jax.train import data_record, sharding
from medm2g_jax.train.log import Log, duration
from medm2g_jax.train.owner import on_first
from medm2g_jax.train.setup import Setup

SAY = 5.0  # seconds between two lines that say how far it is


def chosen(config: ConfigDict, root: epath.Path, graph: rounds.Graph, source: Source) -> tuple[str, ...]:
    """The modalities whose images come as latents in config.stage: of those that it encodes, the ones whose every image
    is a function of record and stream.

    config.latents="auto" has them where that pays: the autoencoder works at the images' own resolution, and the stage
    would encode at least as many images as there are. Encoding an image adds 8 % to the UNet's operations in a step of
    `tiny`, behind 8x8 patches, and 380 % at `base` and 256 px (counted from the programs, three forward passes a step).

    Raises:
      UserError: config.latents="on" in a bucket, where they cannot be read row by row.
    """
    if config.latents == "off":
        return ()
    held = {stream for record in source.records for stream in record.streams}
    images = [m for m in graph.modalities if MODALITIES[m].is_image]
    same = [m for m in images if all(steady(source, s) for s in held if s.partition(":")[0] == m)]
    rows = rows_of(config, graph, same)
    remote = "://" in str(root)
    if config.latents == "on" and rows.latents and remote:
        raise UserError(
            f"config.latents='on', but the run root {root} is a bucket, and latents are read from files row by row; "
            "leave it at 'auto' or 'off', or give a --workdir on a disk"
        )
    if config.latents == "on" or not rows.latents:
        return rows.latents
    if config.net.image_vae.patch > 1 or remote:
        return ()
    images = sum(len(_streams(source.records[i], m)) for i in pipeline.used(source, rows, SPLITS) for m in rows.latents)
    encoded = config.steps * config.accumulate * config.batch * len(rows.latents)
    return rows.latents if encoded >= images else ()


def make(
    config: ConfigDict,
    root: epath.Path,
    setup: Setup,
    source: Source,
    lineage: Mapping[str, Mapping[str, Any]],
    frozen: Params,
    mesh: Mesh,
) -> Latents:
    """Make what is missing of the latents that the stage reads. All processes call this.

    Raises:
      UserError: those in the run root are of another autoencoder or of other images.
    """
    rows = setup.recipe.rows
    record = data_record.read(root)
    of_data = contents(source).fingerprint if record is None else record["fingerprint"]
    wanted = pipeline.used(source, rows, SPLITS)
    stores: dict[str, Store] = {}
    encode = {kind: _encoder(setup.model, kind, frozen, mesh) for kind in {MODALITIES[m].kind for m in rows.latents}}
    for m in rows.latents:
        kind = MODALITIES[m].kind
        origin = lineage[f"{kind}/vae"]  # one that nobody has trained is a function of the run root's seed and sizes
        about = {
            "autoencoder": origin["fingerprint"] if "fingerprint" in origin else "fresh",
            "data": of_data,
            "image_size": config.image_size,
            "shape": setup.model.flows[m].family.latent_shape,
        }
        for stream in dict.fromkeys(s for i in wanted for s in _streams(source.records[i], m)):
            one = store(Path(root), source, stream, about | {"range": ranges(source).get(stream)})
            on_first(one.hold)
            _fill(one, stream, wanted, encode[kind], config, source, mesh)
            stores[stream] = one
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("latents")
    return Latents(stores)


def _encoder(model: MedM2G, kind: str, frozen: Params, mesh: Mesh) -> Callable[[Any], jax.Array]:
    own = {name: x for name, x in frozen.items() if name.startswith(f"{kind}/vae/")}
    rows = sharding.batch_sharding(mesh)
    mean = jit(lambda params, x: model.posterior(params, kind, x)[0].astype(DTYPE), out_shardings=rows)
    return lambda x: mean(own, x)


def _streams(record: Record, modality: str) -> list[str]:
    return [s for s in record.streams if s.partition(":")[0] == modality]


def _fill(
    one: Store, stream: str, wanted: np.ndarray, encode: Callable, config: ConfigDict, source: Source, mesh: Mesh
) -> None:
    """Encode what is missing of one stream, part by part."""
    host, hosts = jax.process_index(), jax.process_count()
    size = config.batch // hosts
    began = said = time.monotonic()
    todo = [(p, missing) for p in range(host, one.parts, hosts) if len(missing := one.missing(p, wanted))]
    chunks = [(p, missing[i : i + size]) for p, missing in todo for i in range(0, len(missing), size)]
    # Every process takes part in every call, since all of them hold the autoencoder together.
    calls, images = len(chunks), sum(len(missing) for _, missing in todo)
    if hosts > 1:
        calls, images = int(_of_all(calls).max()), int(_of_all(images).sum())
    log = Log(one.folder, f"latents of {stream}", images, source.open, unit="images")
    blank = np.zeros((size, config.image_size, config.image_size, 1), np.float32)
    read = _reading(one, stream, chunks, source, blank)
    made: list[np.ndarray] = []
    for call in range(calls):
        z = encode(sharding.put_batch(next(read) if call < len(chunks) else blank, mesh))
        mine = np.asarray(multihost_utils.process_allgather(z, tiled=True))[host * size : (host + 1) * size]
        if call < len(chunks):
            number, rows = chunks[call]
            made.append(mine[: len(rows)])
            finite = np.isfinite(made[-1]).all(axis=(1, 2, 3))
            if not finite.all():
                record = source.records[one.record(number, int(rows[np.argmin(finite)]))]
                raise UserError(
                    f"record {record.id!r}, {stream}: its latent is not finite in {np.dtype(DTYPE)}; look at the image "
                    "and at the autoencoder, or train with --config.latents=off"
                )
            if call + 1 == len(chunks) or chunks[call + 1][0] != number:
                one.write(number, dict(todo)[number], np.concatenate(made))
                made = []
        if call == 0 or time.monotonic() - said > SAY:
            log.progress(min(images, (call + 1) * size * hosts), {})
            said = time.monotonic()
    if images:
        log.say(f"  latents of {stream}: {images} images encoded in {duration(time.monotonic() - began)}")


def _reading(
    one: Store, stream: str, chunks: list[tuple[int, np.ndarray]], source: Source, blank: np.ndarray
) -> Iterator[np.ndarray]:
    """The images of each chunk, filled up to a batch."""

    def read(chunk: tuple[int, np.ndarray]) -> np.ndarray:
        number, rows = chunk
        x = blank.copy()
        for i, row in enumerate(rows):
            x[i] = source.read(one.record(number, int(row)), stream, np.random.default_rng(0))  # it draws nothing
        return x

    if not chunks:
        return iter(())
    return iter(grain.MapDataset.source(chunks).map(read).to_iter_dataset(pipeline.reading()))


def _of_all(count: int) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(np.int32(count)))
