"""What a data set holds, in a few fingerprints that cost no decoded image: to tell, a week later, whether it is that.

A place is not its contents: a folder may move, and what is in it may change under the same name. Fingerprints are of
what training rows depend on, in their order: ids, subjects, splits, streams, and what the records hold (texts; names
and sizes of files). They are one-way: no name and no text can be read from them.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ml_collections import ConfigDict

from medm2g_jax.data.open import source_of
from medm2g_jax.data.source import SPLITS, Source, texts_of


@dataclass(frozen=True)
class Contents:
    """How much a data set holds, and fingerprints: of each thing in `parts`, and of all of them."""

    records: dict[str, int]  # by split
    subjects: int
    streams: dict[str, int]  # records that hold each
    parts: dict[str, str]
    fingerprint: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def identity(source: Source) -> Callable[[], Iterable[str]] | None:
    """The source's own account of what its records hold, `source.identity`; None where it has none."""
    return getattr(source, "identity", None)


def contents(source: Source) -> Contents:
    """What a source holds; texts are read, images are not."""
    records = source.records
    own = identity(source)
    parts = {
        "ids": _print(r.id for r in records),
        "subjects": _print(r.subject for r in records),
        "splits": _print(r.split for r in records),
        "streams": _print(" ".join(r.streams) for r in records),
        "texts and files": _print(texts_of(source) if own is None else own()),
    }
    counts = Counter(r.split for r in records)
    streams = Counter(stream for r in records for stream in r.streams)
    return Contents(
        {split: counts[split] for split in SPLITS},
        len({r.subject for r in records}),
        dict(sorted(streams.items())),
        parts,
        _print(parts.values()),
    )


def contents_of(config: ConfigDict) -> Contents:
    """What the data hold that a config names."""
    fields = {f: getattr(config, f) for f in ("image_size", "seed", "listing")}
    return _opened(json.dumps(fields | {"data": json.loads(config.data.to_json_best_effort())}))


@functools.lru_cache(maxsize=4)
def _opened(shared: str) -> Contents:
    return contents(source_of(json.loads(shared)))


def changes(before: dict[str, Any], now: Contents) -> str:
    """What differs between `Contents.plain()` of then and what there is now, in numbers and in kinds."""
    kinds = [name for name, value in now.parts.items() if before["parts"][name] != value]
    counts = ", ".join(f"{s} {before['records'][s]} -> {n} records" for s, n in now.records.items())
    return f"{counts}; {before['subjects']} -> {now.subjects} subjects; other {', '.join(kinds)}"


def _print(words: Iterable[str]) -> str:
    digest, waiting = hashlib.sha256(), []
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        waiting += len(data).to_bytes(8, "little"), data
        if len(waiting) > 2000:  # a call a word would take longer than the words
            digest.update(b"".join(waiting))
            waiting.clear()
    digest.update(b"".join(waiting))
    return digest.hexdigest()[:16]
