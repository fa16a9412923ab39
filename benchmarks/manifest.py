"""How long a manifest of N rows takes to open, and how much memory, before the first image is read.

    python -m benchmarks.manifest [--rows 2000000] [--loose 200000] [--keep FOLDER]

Rows are as `medm2g prepare` writes them: half hold a CT and an MRI of one slice with units, ranges, spacing and
orientation, half an X-ray and a report of some 450 characters; 40 and 2 rows a subject. Their images are in shards (of
1000 records each; one file under many names, as nothing of it is read but the count), and, with --loose, in files of
their own, 1000 a folder (the same way). A process of its own measures:

    open       `Manifest(folder)`: reading and checking every line, and that every image is there
    index      what each of two stages may train on (text and X-ray; CT with an MRI prompt), as `pipeline.batches` asks
    contents   the fingerprints that runs keep
    peak       of memory, resident, after all three

All of `open` is Python's own work: a Python built without optimizations (pyenv's default) takes a fifth longer.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

A_SHARD = 1000  # records, or files in a folder
GOAL = 30.0, 4.0  # seconds of open and index, and GB, of 2,000,000 rows in shards
_WORDS = (
    "lungs are clear without focal consolidation pleural effusion or pneumothorax cardiac silhouette is normal in size "
    "mild degenerative changes of the thoracic spine right left lower lobe opacity unchanged since prior"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--loose", type=int, default=0, help="also measure so many rows with files of their own")
    parser.add_argument("--keep", help="folder for the made-up data, used again if there; default: a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name, rows, packed in (("packed", options.rows, True), ("loose", options.loose, False)):
            if rows:
                folder = Path(options.keep or temporary) / f"{name}-{rows}"
                if not (folder / "manifest.jsonl").exists():
                    write(folder, rows, packed)
                print(name, json.dumps(run(folder)), flush=True)
    print(f"goal: {GOAL[0]:g} s of open and index and {GOAL[1]:g} GB of 2,000,000 packed rows")


def run(folder: Path) -> dict[str, float]:
    """What a process of its own measures of a folder."""
    line = [sys.executable, "-m", "benchmarks.manifest", "--child", str(folder)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str) -> dict[str, float]:
    """Seconds of each part, and the peak of this process's memory in GB."""
    from medm2g_jax.data.contents import contents
    from medm2g_jax.data.manifest import Manifest
    from medm2g_jax.data.pipeline import Rows, matching

    base = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    source = Manifest(folder, 64)
    opened = time.perf_counter()
    indices = [
        matching(source, rows, "train")
        for rows in (Rows(require=("text", "xray")), Rows(require=("ct",), prompts=("mri",)))
    ]
    indexed, used = time.perf_counter(), time.process_time()
    peak = _peak()
    contents(source)
    size = (Path(folder) / "manifest.jsonl").stat().st_size
    return {
        "rows": len(source.records),
        "indexed": sum(map(len, indices)),
        "open s": round(opened - start, 2),
        "index s": round(indexed - opened, 2),
        "CPU s of both": round(used - cpu, 2),  # on a busy machine the rest was waiting
        "contents s": round(time.perf_counter() - indexed, 2),
        "peak GB": round(peak, 2),
        "peak GB with contents": round(_peak(), 2),
        "GB of imports": round(base, 2),
        "MB/s": round(size / 1e6 / (opened - start), 1),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(folder: Path, rows: int, packed: bool) -> None:
    """A manifest folder of so many rows."""
    draw, images = random.Random(0), 0
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.part", "w") as file:
        for number in range(rows):
            slices = number % 2 == 0
            subject = _hash(f"s{number // 80 if slices else number // 4} {slices}")
            row = {
                "id": _hash(str(number)),
                "subject": subject,
                "split": "test" if subject < "0" * 16 + "1" else ("val" if subject[0] == "1" else "train"),
            }
            names = [_name(images + i, packed) for i in range(1 + slices)]
            images += len(names)
            row["images"] = dict(zip(("ct", "mri_t2") if slices else ("xray",), names, strict=True))
            if slices:
                top = int(subject[:3], 16) + 500  # a volume has one range
                row |= dict(scale={"ct": [1, -1024]}, span={"mri_t2": [0, top]}, registered=True)
                row |= dict(spacing=dict.fromkeys(row["images"], [0.9765625, 0.9765625]))
                row |= dict(orientation=dict.fromkeys(row["images"], "PL"), info={"slice": number // 2 % 40})
            else:
                text = " ".join(draw.choices(_WORDS, k=70))
                row |= dict(text=f"findings : {text}", text_origin="report")
            file.write(json.dumps(row | {"license": "CC BY 4.0"}) + "\n")
    _files(folder, images, packed)
    os.replace(folder / "manifest.part", folder / "manifest.jsonl")


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _name(number: int, packed: bool) -> str:
    group, own = divmod(number, A_SHARD)
    return f"shards/train-{group:05d}.array_record#{own}" if packed else f"images/{group:05d}/{own:06d}.png"


def _files(folder: Path, images: int, packed: bool) -> None:
    from PIL import Image

    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "PNG")
    first = folder / "one"
    if packed:
        from medm2g_jax.data.shards import Writer

        with Writer(folder, "one") as writer:
            names = [writer.add(content.getvalue()) for _ in range(A_SHARD)]
        first = folder / names[0].partition("#")[0]
    else:
        first.write_bytes(content.getvalue())
    for number in range(0, images, A_SHARD if packed else 1):
        path = folder / _name(number, packed).partition("#")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 10_000 == 0 and number:  # file systems have a greatest number of names
            copy = folder / f"one.{number}"
            copy.write_bytes(first.read_bytes())
            first = copy
        path.unlink(missing_ok=True)
        os.link(first, path)


if __name__ == "__main__":
    main()
