"""Samples a second that reach a training step, from prepared 16-bit PNG at 512 px, beside plain loops and torch.

    python -m benchmarks.pipeline [--images 2000] [--rounds 5] [--keep FOLDER]

Made-up slices of 512 x 512 (smooth shapes and a scanner's noise, 12 bits in 16, which PNG packs like real ones) are
read from the page cache, decoded, brought to HU, windowed, and stacked 32 at a time as float32:

    ours        `pipeline.batches`, images decoded each time
    packed      the same, from shards
    remembered  the same, from the memory that holds a set after its first epoch (`manifest.MEMORY`)
    PIL, NumPy  a loop in one thread
    torch       a DataLoader with two worker processes, reading as that loop does

One after the other, in one process, `rounds` times; medians [least, most]. A loader's first batches do not count: what
it had ready when they were asked for is no rate. Then:

    fed         a step that takes 200 ms and no CPU, as on an accelerator, asks for 32: how long it waits
    a sample    where the time of one goes, in one thread
    memory      resident size over an epoch and a half of a set four times larger than what may be kept
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

SIDE, BATCH, STEP = 512, 32, 0.2
WINDOW = -1000.0, 400.0  # HU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6, help="of 32, timed in a round")
    parser.add_argument("--keep", help="folder for the made-up data, used again if there; default: a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(memory(Path(options.child))))
        return
    print(f"{options.images} images, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (others' work included)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary) / f"px512-{options.images}"
        if not (folder / "packed" / "manifest.jsonl").exists():
            write(folder, options.images)
        rates(folder, options)
        fed(folder)
        parts(folder)
        line = [sys.executable, "-m", "benchmarks.pipeline", "--child", str(folder / "loose")]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        print("memory    ", done.stdout.splitlines()[-1])


# --- data -------------------------------------------------------------------------------------------------------------


def write(folder: Path, count: int) -> None:
    """The same slices as files and in shards."""
    from medm2g_jax.data.shards import Writer

    rows: dict[str, list[str]] = {"loose": [], "packed": []}
    with Writer(folder / "packed", "train") as writer:
        for number in range(count):
            name = f"images/{number:06d}.png"
            path = folder / "loose" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(texture(number)).save(path)
            for kind, image in (("loose", name), ("packed", writer.add(path.read_bytes()))):
                row = dict(id=str(number), subject=str(number), split="train", images={"ct": image})
                rows[kind].append(json.dumps(row | dict(scale={"ct": [1, -1024]}, license="CC0")))
    for kind, lines in rows.items():
        (folder / kind / "manifest.jsonl").write_text("\n".join(lines))


def texture(number: int) -> np.ndarray:
    """A slice: (512 512) uint16, HU + 1024."""
    draw = np.random.default_rng(number)
    size = (SIDE, SIDE)
    smooth = sum(
        np.asarray(
            Image.fromarray(draw.normal(0, sd, (n, n)).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        )
        for n, sd in ((6, 300), (24, 80), (96, 30))
    )
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    inside = (x / 0.85) ** 2 + (y / 0.65) ** 2 < 1
    values = np.where(inside, smooth + 40, -1000) + draw.normal(0, 12, size)
    return np.clip(values + 1024, 0, 4095).astype(np.uint16)


def plain(path: str) -> np.ndarray:
    """One image as whoever has no pipeline reads it."""
    with Image.open(path) as file:
        values = np.asarray(file).astype(np.float32) - 1024
    low, high = WINDOW
    return (np.clip((values - low) / (high - low), 0, 1) * 2 - 1)[..., None]


class Files:
    """What torch's loader takes."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return 100_000  # its workers would end with an epoch

    def __getitem__(self, index: int) -> np.ndarray:
        return plain(self.paths[index % len(self.paths)])


# --- measuring --------------------------------------------------------------------------------------------------------


def ours(folder: Path, keep: int, seed: int = 0) -> tuple[Iterator[Any], Any]:
    """Our batches; keep: bytes that may be remembered."""
    from medm2g_jax.data import manifest
    from medm2g_jax.data.pipeline import Rows, batches

    manifest.MEMORY = keep
    source = manifest.Manifest(folder, SIDE)
    return batches(source, Rows(any_of=("ct",), merge="image"), "train", BATCH, seed, size=SIDE), source


def rates(folder: Path, options: argparse.Namespace) -> None:
    paths = sorted(map(str, (folder / "loose/images").iterdir()))
    for path in paths:  # all read from the page cache, ours and theirs
        Path(path).read_bytes()
    warm, source = ours(folder / "loose", 2**31)
    for index in range(min(len(paths), 4 * options.batches * BATCH)):
        source.read(index, "ct", np.random.default_rng(0))
    contenders: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: ours(folder / "loose", 0)[0],
        "packed": lambda: ours(folder / "packed", 0)[0],
        "PIL, NumPy": lambda: loop(paths),
        "torch": lambda: torch_loader(paths),
    }
    if len(paths) <= 4 * options.batches * BATCH:
        contenders["remembered"] = lambda: warm
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, make in contenders.items():
            batches = make()
            for _ in range(2):
                next(batches)
            start = time.perf_counter()
            for _ in range(options.batches):
                next(batches)
            found[name].append(options.batches * BATCH / (time.perf_counter() - start))
            if name != "remembered":
                getattr(batches, "close", lambda: None)()
            time.sleep(1)  # threads finish what they had begun
    for name, values in found.items():
        print(f"{name:10s} {median(values):7.1f} samples/s [{min(values):.1f}, {max(values):.1f}]", flush=True)


def loop(paths: list[str]) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    while True:
        yield np.stack([plain(paths[i]) for i in draw.integers(0, len(paths), BATCH)])


def torch_loader(paths: list[str]) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    # Processes that begin afresh: forks of one that has threads may wait for each other for ever.
    yield from DataLoader(Files(paths), BATCH, shuffle=True, num_workers=2, multiprocessing_context="forkserver")


def fed(folder: Path, steps: int = 25) -> None:
    """How long a step of an accelerator waits for its batch."""
    batches, _ = ours(folder / "loose", 0)
    with closing(batches):
        next(batches)
        waited = []
        for _ in range(steps):
            time.sleep(STEP)
            start = time.perf_counter()
            next(batches)
            waited.append(time.perf_counter() - start)
    late = sum(w > 0.01 for w in waited)
    share = sum(waited) / (sum(waited) + steps * STEP)
    print(
        f"fed        a step of {STEP * 1000:.0f} ms at batch {BATCH} ({BATCH / STEP:.0f} samples/s) waits "
        f"{median(waited) * 1000:.0f} ms (median), {late} of {steps} over 10 ms, {share:.0%} of the time"
    )


def parts(folder: Path, count: int = 40) -> None:
    """Where one sample's time goes."""
    import zlib

    from medm2g_jax.data.formats import raster
    from medm2g_jax.data.picture import MOST_PIXELS, network_input
    from medm2g_jax.data.said import Said
    from medm2g_jax.modality import MODALITIES

    files = sorted((folder / "loose/images").iterdir())[:count]
    contents = [file.read_bytes() for file in files]
    pictures = [raster.decode(content, "", MOST_PIXELS) for content in contents]
    said = Said(scale=(1.0, -1024.0))
    in_unit = [said.of(picture, MODALITIES["ct"]) for picture in pictures]
    inputs = [network_input(picture, MODALITIES["ct"], SIDE) for picture in in_unit]
    steps: dict[str, Callable[[int], Any]] = {
        "read": lambda i: files[i].read_bytes(),
        "CRC": lambda i: zlib.crc32(contents[i]),
        "PNG": lambda i: raster.decode(contents[i], "", MOST_PIXELS),
        "HU": lambda i: said.of(pictures[i], MODALITIES["ct"]),
        "window, square": lambda i: network_input(in_unit[i], MODALITIES["ct"], SIDE),
        "stack": lambda i: np.stack(inputs[:BATCH]) if i % BATCH == 0 else None,
    }
    told = []
    for name, step in steps.items():
        start = time.perf_counter()
        for i in range(len(files)):
            step(i)
        told.append(f"{name} {(time.perf_counter() - start) / len(files) * 1000:.2f}")
    size = sum(map(len, contents)) / len(contents) / 1e3
    print(f"a sample   ms in one thread: {', '.join(told)} (PNG holds the CRC); {size:.0f} kB a file")


def memory(folder: Path) -> dict[str, Any]:
    """Resident MB at each quarter of an epoch and a half, where a quarter of the set may be kept."""
    source = ours(folder, 0)[1]
    count = len(source.records)
    keep = count * SIDE * SIDE * 2 // 4
    batches, source = ours(folder, keep)
    sizes = []
    with closing(batches):
        for step in range(max(6, count * 3 // 2 // BATCH)):
            next(batches)
            if step % max(1, count // 4 // BATCH) == 0:
                sizes.append(round(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6))
    kept = sum(code.nbytes for code in source._memory.values())
    return {"set MB decoded": round(count * SIDE * SIDE * 2 / 1e6), "may keep MB": round(keep / 1e6)} | {
        "keeps MB": round(kept / 1e6),
        "resident MB": sizes,
    }


if __name__ == "__main__":
    main()
