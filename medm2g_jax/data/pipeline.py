"""Batches for every stage (section 3.5's rounds and what comes before them), on grain.

A *source* is a sequence of records (one study of one subject each) and a way to read one stream of one record. `Rows`
says what one training row of a stage holds. Batch number s is a pure function of (seed, s, global row): row r of the
run is record number r of an endless row of shuffled epochs (`data.draw`; a mixture's parts may have weights), and
whatever is random in it (contrast, paraphrase) comes from `default_rng([seed, r])`. Host k of n reads rows
[kB/n, (k+1)B/n) of every global batch of B. Nothing is replayed on restart and no iterator state is saved. What a stage
cannot use is filtered out of the index before, never in the pipeline.

A batch:

    {"ct": (b size size 1) float32 in [-1, 1], ...,             an image modality that is required
     "text": {"clip": (b n), "bert": (b m), "gpt2": (b k)} int32 ids,
     "ct": {"latent": (b h w c) float16,                         under `Rows.latents`, the posterior's mean, and, under
            "pixels": (b size size 1)}                           `Rows.pixels` alone, the image beside it
     "image": (b size size 1)                                    under `Rows.merge`: one stream of any of several
     "about": {"stream": {modality: (b,) int32},                 which stream, for modalities that have several
               "prompt": {modality: as above}, "present": {modality: (b,) bool},
               "record": (b,) int32                              `Rows.identify`: which record
               "has": {modality: (b,) bool},                     `Rows.contrasts`: required modalities that are there,
               "partner": {modality: (b,) bool},                 does the partner guide it, and which other contrasts
               "others": {modality: {"x": (b k size size 1), "stream": (b k), "has": (b k)}},
               "beside": {modality: (b k) bool},                 `Rows.beside`: which of its partner's others guide it
               "earlier": {partner: as above},                   `Rows.earlier`: partners of before, which stream of
               "earlier_stream": {partner: (b,) int32},          them, and which rows are guided by them
               "practises": {modality: {partner: (b,) bool}},
               "grid": {modality: {"partner": (b,), "others", "beside": (b k), "earlier": {partner: (b,)}} bool}}}
                                                                 which of these guide it and lie on the drawn target's
                                                                 grid: `Rows.registered`, and partners of before
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from medm2g_jax.data.draw import at_random, in_turn
from medm2g_jax.data.kspace import undersampled
from medm2g_jax.data.latents import Latents
from medm2g_jax.data.source import Record, Source
from medm2g_jax.data.text import Tokenizers, common
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, centre

Batch = dict[str, Any]
ENDLESS = 2**62  # rows
BARE = 0.2  # share of rows whose contrast is not stated, of records where it could be


@dataclass(frozen=True)
class Rows:
    """What one training row of a stage holds, in modalities.

    Attributes:
      require: a record must have them all; one stream of each is drawn.
      any_of: a record must have one of them; the row draws one of its streams of these modalities, all equally
        likely, and puts it under `merge` (the image autoencoder trains on every stream of its kind).
      prompts: a record must have at least one of them; all it has are given. One that is required too means another
        contrast of it, never the drawn one: Eq. 2's prompt y must not be x itself.
      merge: the key of `any_of`.
      unprompted: share of rows from records without any of `prompts`, where there are such; all rows where there are no
        others. 0: they are not drawn.
      contrasts: required modalities that are guided by their own other contrasts too: by a random non-empty subset of
        what the record has besides the target, the partner among it. A record may then lack the rest of `require`.
        Never the target's own stream; never a contrast beside a target whose contrast is not stated. Its partner is
        guided by it and by any of the same contrasts beside it (`beside`).
      others: so many other contrasts at most.
      registered: required modalities of whose sources rows say whether they lie on the target's grid.
      earlier: required modalities, and partners that each had before: a share `rehearse` of the rows comes from records
        that have one of these modalities and some of its earlier partners, all of which the row then gives; the rest of
        `require` counts as absent.
      accelerate: (modality, factor, lines that are kept) of images as from a faster acquisition (`kspace`).
      identify: rows say which record they are of.
      latents: modalities whose images come encoded (`data.latents`) where the autoencoder reads them: required, earlier
        and other ones, not prompts.
      pixels: modalities whose required and earlier images C reads as well.
      only: streams; of a modality with some among these a row is of no others.
      made: the stream that every row has of its modality; "": any. A record must hold it.
    """

    require: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    merge: str = ""
    unprompted: float = 0.0
    contrasts: tuple[str, ...] = ()
    others: int = 0
    registered: tuple[str, ...] = ()
    earlier: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rehearse: float = 0.0
    accelerate: tuple[str, int, str] | None = None
    identify: bool = False
    latents: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    made: str = ""

    @property
    def only_contrasts(self) -> bool:
        """Is the one modality of a row guided by nothing but its own other contrasts?"""
        return bool(self.contrasts) and self.require == self.contrasts

    @property
    def beside(self) -> dict[str, str]:
        """Required modality -> its partner, of those whose partner has other contrasts, which may guide it too."""
        return {m: p for m in self.require for p in self.require if m != p and p in self.contrasts}

    @property
    def partners(self) -> tuple[str, ...]:
        """All of `earlier`'s partners."""
        return tuple(dict.fromkeys(p for _, partners in self.earlier for p in partners))


def _admitted(record: Record, rows: Rows) -> Record:
    """The record with the streams that a row may be of (`Rows.only`)."""
    narrowed = {stream.partition(":")[0] for stream in rows.only}
    kept = (s for s in record.streams if s in rows.only or s.partition(":")[0] not in narrowed)
    return replace(record, streams=tuple(kept)) if rows.only else record


def _streams(record: Record, modality: str) -> list[str]:
    return [stream for stream in record.streams if stream.partition(":")[0] == modality]


def _stated(record: Record, modality: str) -> list[str]:
    return [stream for stream in _streams(record, modality) if stream != modality]


def _can_prompt(record: Record, rows: Rows, modality: str) -> bool:
    # A picture whose contrast is not stated may be the very picture that it would prompt: it counts on neither side.
    return len(_stated(record, modality)) > 1 if modality in rows.require else bool(_streams(record, modality))


def _fits(record: Record, rows: Rows) -> bool:
    """Can the record make a row, prompts aside?"""
    several = any(len(_stated(record, m)) > 1 for m in rows.contrasts)
    whole = all(_streams(record, m) for m in rows.require)
    # Of a single modality guided by itself the other contrasts are all there is to be guided by.
    return (
        (several or (whole and not rows.only_contrasts))
        and (not rows.any_of or any(_streams(record, m) for m in rows.any_of))
        and (not rows.made or rows.made in record.streams)
    )


def fitting(source: Source, rows: Rows, split: str) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Indices of the records of `split` that hold what `rows` asks for: with a prompt, and, where `rows.unprompted`
    admits them, without. Where no prompt is asked for, all are of the first kind."""
    unknown = {*rows.require, *rows.any_of, *rows.prompts} - set(MODALITIES)
    if unknown or bool(rows.any_of) != bool(rows.merge) or not (rows.require or rows.any_of):
        raise ValueError(f"bad {rows}: modalities must be registered, and any_of and merge go together")
    index = _holding(source, rows, split, lambda r: _fits(r, rows))
    if not rows.prompts:
        return np.asarray(index, int), np.asarray([], int)
    prompted = lambda r: _fits(r, rows) and any(_can_prompt(r, rows, m) for m in rows.prompts)  # noqa: E731
    told = _holding(source, rows, split, prompted)
    without = np.setdiff1d(index, told, assume_unique=True) if rows.unprompted else []
    return np.asarray(told, int), np.asarray(without, int)


def _holding(source: Source, rows: Rows, split: str, good: Callable[[Record], bool]) -> list[int]:
    """Indices of the records of `split` that are good, which their streams alone decide: millions of records hold a few
    sets of streams, and each set is looked at once."""
    known: dict[tuple[str, ...], bool] = {}
    index = []
    for i, record in enumerate(source.records):
        if record.split == split:
            if (has := known.get(record.streams)) is None:
                has = known[record.streams] = bool(good(_admitted(record, rows)))
            if has:
                index.append(i)
    return index


def practising(source: Source, rows: Rows, split: str) -> dict[str, Int[np.ndarray, "n"]]:
    """{modality: indices of the records of `split` with which it practises} (`Rows.earlier`); those that have some."""
    found = {}
    for modality, partners in rows.earlier if rows.rehearse else ():

        def good(record: Record, modality: str = modality, partners: tuple[str, ...] = partners) -> bool:
            return bool(_streams(record, modality)) and any(_streams(record, p) for p in partners)

        index = _holding(source, rows, split, good)
        found |= {modality: np.asarray(index, int)} if index else {}
    return found


def used(source: Source, rows: Rows, splits: Sequence[str]) -> Int[np.ndarray, "n"]:
    """Indices of all records that a row may be of, in order."""
    found = [(*fitting(source, rows, s), *practising(source, rows, s).values()) for s in splits]
    return np.unique(np.concatenate([index for some in found for index in some]))


def matching(source: Source, rows: Rows, split: str) -> Int[np.ndarray, "n"]:
    """Indices of the records of `split` that hold what `rows` asks for: those with a prompt, or all where none has one
    and `rows.unprompted` admits that.

    Raises:
      UserError: there is none; says what the stage needs and how many records have which stream.
    """
    told, untold = fitting(source, rows, split)
    index = told if len(told) else untold
    if not len(index):
        of_split = [record for record in source.records if record.split == split]
        held = Counter(stream for record in of_split for stream in record.streams)
        raise UserError(
            f"data {source.name!r}: no record of split {split!r} holds, together, {needs(rows)}; its "
            f"{len(of_split)} records hold {', '.join(f'{s} {n}' for s, n in sorted(held.items())) or 'nothing'}"
        )
    return index


def needs(rows: Rows) -> str:
    """What a record must hold, in words."""
    words = [] if rows.only_contrasts else [*rows.require]
    words += [rows.made] if rows.made else []
    if rows.any_of:
        words.append("any of " + ", ".join(rows.any_of))
    if rows.prompts and not rows.unprompted:
        other = [f"another {m} with its contrast stated" if m in rows.require else m for m in rows.prompts]
        words.append("any of " + ", ".join(other))
    contrasts = " or ".join(f"two contrasts of {m}" for m in rows.contrasts)
    return " or, without it, ".join(filter(None, (" and ".join(words), contrasts)))


def _draw(streams: list[str], rng: np.random.Generator) -> str:
    stated = [stream for stream in streams if ":" in stream]
    if stated and len(stated) < len(streams) and rng.random() < BARE:
        return streams[0].partition(":")[0]
    return str(rng.choice(stated)) if stated else streams[0]


class _Reader:
    """Reads one row of one record; a pure function of (record index, rng)."""

    def __init__(
        self,
        source: Source,
        rows: Rows,
        size: int,
        tokenizers: Tokenizers | None,
        lengths: Mapping | None,
        latents: Latents | None = None,
    ):
        self.source, self.rows, self.latents = source, rows, latents
        if rows.latents and latents is None:
            raise ValueError(f"{rows} has latents, and there are none")
        used = {*rows.require, *rows.any_of, *rows.prompts, *rows.partners}
        self.encode: Callable[[str], dict] | None = None
        if not all(MODALITIES[m].is_image for m in used):
            if tokenizers is None or lengths is None:
                raise ValueError(f"{rows} has texts: tokenizers and lengths are needed")
            self.encode = functools.partial(tokenizers.encode, lengths=lengths)
        self.blank = np.zeros((size, size, 1), np.float32)

    def _value(self, index: int, stream: str, rng: np.random.Generator) -> Any:
        value = self.source.read(index, stream, rng)
        if isinstance(value, str):
            return self.encode(value)
        if self.rows.accelerate and self.rows.accelerate[0] == stream.partition(":")[0]:
            return undersampled(value, *self.rows.accelerate[1:], rng)
        return value

    def _encoded(
        self, index: int, modality: str, stream: str, rng: np.random.Generator, pixels: tuple[str, ...] = ()
    ) -> Any:
        """A value that the autoencoder reads: its latent where there is one, which draws nothing from `rng` either.

        stream: "" where the record has no such modality. pixels: the modalities whose pixels are to stand beside it.
        """
        if modality in self.rows.latents:
            out = {"latent": self.latents(index, stream) if stream else self.latents.blank}
            if modality not in pixels:
                return out
            return out | {"pixels": self._value(index, stream, rng) if stream else self._nothing(modality)}
        return self._value(index, stream, rng) if stream else self._nothing(modality)

    def _target(self, record: Record, modality: str, rng: np.random.Generator) -> str:
        rows = self.rows
        if rows.made in record.streams and rows.made.partition(":")[0] == modality:
            return rows.made
        others = [m for m in rows.prompts if m != modality and _can_prompt(record, rows, m)]
        if modality in rows.prompts and not others and _can_prompt(record, rows, modality):
            return _draw(_stated(record, modality), rng)  # the only prompt is another contrast: state both
        partner = rows.require != (modality,) and all(_streams(record, m) for m in rows.require)
        if modality in rows.contrasts and not partner:
            return _draw(_stated(record, modality), rng)  # other contrasts alone guide it
        return _draw(_streams(record, modality), rng)

    def __call__(self, index: int, rng: np.random.Generator, practises: str = "") -> Batch:
        """practises: the modality of `Rows.earlier` that the row is for; "" for an ordinary one."""
        record, row, about = _admitted(self.source.records[index], self.rows), {}, {}
        if self.rows.identify:
            about["record"] = np.int32(index)
        there = {m: bool(_streams(record, m)) and practises in ("", m) for m in self.rows.require}
        if self.rows.contrasts or self.rows.earlier:
            about["has"] = {m: np.bool_(has) for m, has in there.items()}
        drawn = {modality: self._target(record, modality, rng) for modality, has in there.items() if has}
        for modality in self.rows.require:
            if modality not in drawn:
                row[modality] = self._encoded(index, modality, "", rng, self.rows.pixels)
                if len(MODALITIES[modality].streams) > 1:
                    about.setdefault("stream", {})[modality] = np.int32(0)
        for modality, stream in drawn.items():
            row[modality] = self._encoded(index, modality, stream, rng, self.rows.pixels)
            if len(streams := MODALITIES[modality].streams) > 1:
                about.setdefault("stream", {})[modality] = np.int32(streams.index(stream))
        if self.rows.merge:
            streams = [stream for modality in self.rows.any_of for stream in _streams(record, modality)]
            row[self.rows.merge] = self._value(index, str(rng.choice(streams)), rng)
        for modality in self.rows.prompts:
            streams = _streams(record, modality)
            if modality in drawn:  # another contrast; none beside a target that does not state its own
                target = drawn[modality]
                streams = [s for s in _stated(record, modality) if s != target] if target != modality else []
            if streams:
                value = self._value(index, _draw(streams, rng), rng)
            else:
                value = self._nothing(modality)
            about.setdefault("prompt", {})[modality] = value
            about.setdefault("present", {})[modality] = np.bool_(bool(streams))
        guides = {}
        for modality in self.rows.contrasts:
            partner, others = guides[modality] = self._guides(record, modality, drawn, rng)
            about.setdefault("partner", {})[modality] = np.bool_(partner)
            about.setdefault("others", {})[modality] = self._others(index, modality, others, rng)
        for partner in self.rows.partners:
            streams = _streams(record, partner) if practises else []
            stream = _draw(streams, rng) if streams else ""
            value = self._encoded(index, partner, stream, rng, self.rows.pixels)
            about.setdefault("earlier", {})[partner] = value
            place = MODALITIES[partner].streams.index(stream or partner)
            about.setdefault("earlier_stream", {})[partner] = np.int32(place)
            for modality, partners in self.rows.earlier:
                has = about.setdefault("practises", {}).setdefault(modality, {})
                if partner in partners:
                    has[partner] = np.bool_(bool(streams) and modality == practises)
                    if MODALITIES[modality].shares_grid(MODALITIES[partner]):
                        near = has[partner] and record.registered(drawn[modality], stream)
                        on = about.setdefault("grid", {}).setdefault(modality, {}).setdefault("earlier", {})
                        on[partner] = np.bool_(near)
        beside = {}
        for modality, partner in self.rows.beside.items():
            others = guides[partner][1] if {modality, partner} <= set(drawn) else []
            count = rng.integers(len(others) + 1)
            beside[modality] = [others[i] for i in np.sort(rng.permutation(len(others))[:count])]
            flags = [s in beside[modality] for s in others]
            about.setdefault("beside", {})[modality] = self._places(flags)
        for modality in self.rows.registered:
            partner, others = guides[modality] if modality in guides else (len(self.rows.require) > 1, [])
            on = about.setdefault("grid", {}).setdefault(modality, {})
            on |= self._grid(record, modality, drawn, partner, others)
            if modality in beside:
                all_of = guides[self.rows.beside[modality]][1]
                near = [s in beside[modality] and record.registered(drawn[modality], s) for s in all_of]
                on["beside"] = self._places(near)
        return row | ({"about": about} if about else {})

    def _nothing(self, modality: str) -> Any:
        """Stands where a record has no such modality."""
        return self.blank if MODALITIES[modality].is_image else self.encode("")

    def _guides(
        self, record: Record, modality: str, drawn: Mapping[str, str], rng: np.random.Generator
    ) -> tuple[bool, list[str]]:
        """Which guides the row's target of a modality has: the partner or not, and other contrasts; not none of all."""
        target = drawn.get(modality, modality)
        pool = [s for s in _stated(record, modality) if s != target] if target != modality else []
        partner = all(m in drawn for m in self.rows.require if m != modality) and len(self.rows.require) > 1
        choices = [*pool, *([""] if partner else [])]
        count = rng.integers(1, len(choices) + 1) if choices else 0
        chosen = [choices[i] for i in rng.permutation(len(choices))[:count]]
        others = [s for s in chosen if s][: self.rows.others]
        return "" in chosen, others

    def _grid(self, record: Record, modality: str, drawn: Mapping[str, str], partner: bool, others: list[str]) -> Batch:
        """Which of the sources that guide the row's target of a modality lie on its grid."""
        out = {}
        if len(self.rows.require) > 1:
            beside = all(record.registered(*pair) for pair in itertools.combinations(drawn.values(), 2))
            out["partner"] = np.bool_(partner and len(drawn) > 1 and beside)
        if modality in self.rows.contrasts:
            near = [modality in drawn and record.registered(drawn[modality], s) for s in others]
            out["others"] = self._places(near)
        return out

    def _places(self, flags: Sequence[bool]) -> np.ndarray:
        """A flag a place of `Rows.others`, of which the first are taken."""
        return np.asarray([*flags, *[False] * (self.rows.others - len(flags))], bool)

    def _others(self, index: int, modality: str, streams: list[str], rng: np.random.Generator) -> Batch:
        """Other contrasts of a modality, `Rows.others` places."""
        empty = self.rows.others - len(streams)
        places = MODALITIES[modality].streams
        values = [self._encoded(index, modality, s, rng) for s in (*streams, *[""] * empty)]
        return {
            "x": {"latent": np.stack([v["latent"] for v in values])}
            if modality in self.rows.latents
            else np.stack(values),
            "stream": np.asarray([places.index(s) for s in streams] + [0] * empty, np.int32),
            "has": np.arange(self.rows.others) < len(streams),
        }


def batches(
    source: Source,
    rows: Rows,
    split: str,
    batch_size: int,
    seed: int,
    *,
    size: int,
    tokenizers: Tokenizers | None = None,
    lengths: Mapping[str, int] | None = None,
    latents: Latents | None = None,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless batches from number `start` on, this host's rows of each; `close()` ends the reading threads.

    Args:
      batch_size: rows of the global batch.
      size: side of the images.
      tokenizers, lengths: needed where rows have texts; `lengths` names the number of ids of each tokenizer.
      latents: needed where rows have some.
      process: (this host, number of hosts).

    Raises:
      UserError: no record fits, or the batch does not divide by the hosts.
    """
    host, hosts = process
    if batch_size % hosts:
        below = batch_size // hosts * hosts
        fits = f"{below} or {below + hosts}" if below else f"{hosts}"
        raise UserError(f"batch size {batch_size} does not divide by {hosts} hosts; {fits} does")
    index = matching(source, rows, split)
    told, untold = fitting(source, rows, split)
    untold = untold if len(told) else untold[:0]
    before = practising(source, rows, split)
    read = _Reader(source, rows, size, tokenizers, lengths, latents)

    record = in_turn(source, index, seed)
    any_untold = at_random(source, untold) if len(untold) else None
    any_before = {modality: at_random(source, some) for modality, some in before.items()}

    def read_row(row: int) -> Batch:
        if any_untold:
            rng = np.random.default_rng([seed, row, 2])
            if rng.random() < rows.unprompted:
                return read(any_untold(rng), rng)
        if any_before:
            rng = np.random.default_rng([seed, row, 3])
            if rng.random() < rows.rehearse:
                modality = str(rng.choice([*any_before]))
                return read(any_before[modality](rng), rng, modality)
        return read(record(row), np.random.default_rng([seed, row]))

    blocks = grain.MapDataset.range(ENDLESS).map(read_row).batch(batch_size // hosts)
    mine = blocks[start * hosts + host :: hosts]
    return iter(mine.to_iter_dataset(reading()))


def reading() -> grain.ReadOptions:
    """One batch a thread; the same number waits, which bounds the memory."""
    threads = min(8, os.cpu_count() or 1)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)


def fixed(
    source: Source,
    rows: Rows,
    split: str,
    count: int,
    seed: int,
    *,
    size: int,
    tokenizers: Tokenizers | None = None,
    lengths: Mapping[str, int] | None = None,
    latents: Latents | None = None,
    practise: bool = False,
) -> Batch:
    """One evaluation batch of `count` rows, always the same; fewer where fewer records fit: none comes twice.

    A smaller count is the beginning of a larger one.

    Args:
      practise: a share `rows.rehearse` of them are practice (`Rows.earlier`), evenly among the others.

    Raises:
      UserError: no record fits.
    """
    rng = np.random.default_rng(seed)
    plain = iter(rng.permutation(matching(source, rows, split)).tolist())
    before = practising(source, rows, split) if practise else {}
    turns = itertools.cycle([(m, iter(rng.permutation(some).tolist())) for m, some in before.items()])
    share = rows.rehearse if before else 0.0
    chosen: list[tuple[int, str]] = []
    for row in range(count):
        modality, some = next(turns) if int((row + 1) * share) > int(row * share) else ("", plain)
        index = next(some, None)
        if index is None:
            break
        chosen.append((index, modality))
    read = _Reader(source, rows, size, tokenizers, lengths, latents)
    data = grain.MapDataset.source(chosen).map_with_index(
        lambda row, one: read(one[0], np.random.default_rng([seed, row]), one[1])
    )
    return data.batch(len(chosen))[0]


def of_streams(
    source: Source,
    streams: Sequence[str],
    split: str,
    count: int,
    seed: int,
    *,
    tokenizers: Tokenizers | None = None,
    lengths: Mapping[str, int] | None = None,
) -> Batch:
    """{stream: a batch's value} of `count` records of `split` that hold all these streams, always the same; fewer where
    there are fewer, {} where there is none."""
    out: Batch = {}
    for stream, values in read_streams(source, streams, split, count, seed).items():
        rows = [tokenizers.encode(v, lengths) if isinstance(v, str) else {"": v} for v in values]
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        out[stream] = columns if isinstance(values[0], str) else columns[""]
    return out


def read_streams(source: Source, streams: Sequence[str], split: str, count: int, seed: int) -> dict[str, list]:
    """What `of_streams` makes a batch of: the same records' values as the source reads them, texts as texts."""
    chosen = records_with(source, streams, split, count, seed)
    read = lambda i, stream: source.read(int(i), stream, np.random.default_rng([seed, int(i)]))  # noqa: E731
    return {stream: [read(i, stream) for i in chosen] for stream in streams if len(chosen)}


def records_with(source: Source, streams: Sequence[str], split: str, count: int, seed: int) -> Int[np.ndarray, "n"]:
    """The numbers of the records that `read_streams` reads, in its order."""
    index = [i for i, r in enumerate(source.records) if r.split == split and set(streams) <= set(r.streams)]
    return np.random.default_rng(seed).permutation(index)[:count].astype(int)


def share_a_grid(source: Source, streams: Sequence[str], split: str) -> bool:
    """Do these streams (a modality stands for all of its own) lie on one grid in every record of `split` that holds
    them all?"""
    held = []
    for record in source.records:
        own = [[s for s in record.streams if f"{s}:".startswith(f"{asked}:")] for asked in streams]
        if record.split == split and all(own):
            held.append(set(record.grid).issuperset(s for some in own for s in some))
    return bool(held) and all(held)


def registers(source: Source, a: str, b: str) -> bool:
    """Does any training record say that images of these modalities share a grid? a = b: two of its contrasts."""
    for record in source.records:
        own, other = ([s for s in record.grid if s.partition(":")[0] == m] for m in (a, b))
        if record.split == "train" and own and other and (a != b or len(own) > 1):
            return True
    return False


def texts(source: Source, split: str, seed: int) -> list[str]:
    """One text of each record of `split` that has one: what the tokenizers train on. Of a source that is not open
    without the words of few subjects (`text.common`): vocabularies are read by whoever gets the model.

    Raises:
      UserError: there is none.
    """
    name = centre().name
    index = [int(i) for i in matching(source, Rows(require=(name,)), split)]
    found = [str(source.read(i, name, np.random.default_rng([seed, i]))) for i in index]
    return found if source.open else common(found, [source.records[i].subject for i in index])
