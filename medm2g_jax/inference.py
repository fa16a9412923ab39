"""What a user holds of a trained model: values in their own units in, values in their own units out."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medm2g_jax.arrays import Params
from medm2g_jax.data import formats, images
from medm2g_jax.data.picture import Picture, network_input
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import jit
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated, Request, blank_state, build_sampler, table_of, tell_flows, with_bridges
from medm2g_jax.keys import draw_keys
from medm2g_jax.limits import check_sampling
from medm2g_jax.modality import MODALITIES, split_stream
from medm2g_jax.model import MedM2G

Tell = Callable[[int, int], Any]  # (made so far, in all)
PARTS = 10  # of a batch's steps, between which whoever watches hears how far it is
LARGE = 2**30  # bytes of parameters from which memory counts for more than the last bit of speed


class Model:
    """What `load` returns: recipe, parameters and tokenizers.

    Attributes:
      modalities: what may be made.
      params: flat, of everything that is needed to make them from whatever is given.
      tokenizers: None for a model without text.
    """

    def __init__(
        self,
        model: MedM2G,
        params: Params,
        tokenizers: Tokenizers | None,
        meta: Mapping,
        sample: Mapping,
        modalities: Sequence[str] | None = None,
    ):
        self.model, self.params, self.tokenizers, self.meta = model, params, tokenizers, meta
        self.defaults = dict(sample)
        self.modalities = tuple(model.flows if modalities is None else modalities)
        self.lengths = dict(meta["lengths"])
        self._large = sum(p.nbytes for p in params.values()) > LARGE
        self._samplers: dict[Request, tuple[Callable, Callable]] = {}  # what flows are told, and what moves them
        self._decoders: dict[tuple[str, int], Callable] = {}
        self._encoders: dict[tuple[str, str], Callable] = {}

    @property
    def givable(self) -> tuple[str, ...]:
        """What may be given: modalities whose prompt encoder C is there."""
        return tuple(m for m in self.model.flows if any(n.startswith(f"{m}/clip/") for n in self.params))

    @property
    def size(self) -> int:
        """Pixels a side of what it generates."""
        return self.meta["shared"]["image_size"]

    def request(self, given: Sequence[str], make: Sequence[str], **options: Any) -> Request:
        """The request of these streams, with this model's trained pairs and its config's sampling defaults."""
        for streams, able, verb in ((given, self.givable, "given"), (make, self.modalities, "made")):
            for stream in streams:
                if split_stream(stream)[0] not in able:
                    own = "takes" if verb == "given" else "makes"
                    raise UserError(
                        f"{stream!r} cannot be {verb}: this model {own} {', '.join(able) or 'nothing'} there"
                    )
        unknown = set(options) - {f.name for f in dataclasses.fields(Request)}
        if unknown:
            raise UserError(f"unknown option {sorted(unknown)[0]!r} of a generation")
        trained = self.meta["pairs"]
        kinds = [k for k in ("prompt", "guide", "registered") if k in trained]
        pairs = {f"{k}_pairs": tuple(tuple(p) for p in trained[k]) for k in kinds}
        defaults = {k: self.defaults[k] for k in ("steps", "sampler", "spacing", "guide")}
        return Request(tuple(given), tuple(make), **(defaults | pairs | options))

    @property
    def fingerprint(self) -> str:
        """Which parameters these are, in eight digits: of all that model.json says of them."""
        told = [self.meta[name] for name in ("fingerprints", "from", "crc32", "predict") if name in self.meta]
        return f"{zlib.crc32(json.dumps(told, sort_keys=True).encode()):08x}"

    def provenance(self, **asked: Any) -> dict[str, Any]:
        """What it takes to make a sample again: the model, and how it was asked, its own defaults filled in."""
        own = {name: self.defaults[name] for name in ("steps", "sampler", "spacing", "eta", "guidance", "guide")}
        said = {name: value for name, value in asked.items() if value is not None}
        trained = dict(rounds=self.meta["rounds"], trained_pairs=self.meta["pairs"])
        return dict(stage=self.meta["stage"], fingerprint=self.fingerprint, **trained, **(own | said))

    def sample(
        self,
        request: Request,
        given: Mapping[str, Any],
        keys: Array,
        guidance: float | tuple[float, float],
        eta: float,
        rows: int | None = None,
        tell: Tell | None = None,
        watch: Tell | None = None,
    ) -> dict[str, Float[np.ndarray, "n ..."]]:
        """Latents of the wanted streams, from values as networks read them (`generate.build_sampler`).

        Args:
          guidance: where `request.apart`, of prompts and of guides.
          rows: made at a time, as one batch; None for all. A sample does not depend on its batch.
          tell: is called after each of these batches.
          watch: is called within a batch, with (steps made so far, steps in all); what it raises ends the sampling.
        """
        program, table = request.program(), table_of(self.model, request)
        if program not in self._samplers:
            told = jit(lambda *x: tell_flows(self.model, program, *x), save_memory=self._large)
            self._samplers[program] = told, jit(build_sampler(self.model, program), save_memory=self._large)
        tell_, move = self._samplers[program]
        empty = self.ids([""]) if self.tokenizers else {}
        scales = jnp.asarray(guidance, jnp.float32), jnp.float32(eta)
        part = request.steps if watch is None else max(1, request.steps // PARTS)

        def some(given, keys):
            state, told = blank_state(self.model, request, len(keys)), tell_(self.params, given, empty, keys)
            for begin in range(0, request.steps, part):
                end = min(begin + part, request.steps)
                at = np.int32(begin), np.int32(end)
                state = move(self.params, told, keys, *scales, table, state, *at)
                if watch is not None:
                    jax.block_until_ready(state)
                    watch(end, request.steps)
            return {s: state.z[s] for s in request.make}

        return _in_passes(some, rows or len(keys), given, keys, tell=tell)

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Texts as networks read them."""
        rows = [self.tokenizers.encode(text, self.lengths) for text in texts]
        return {name: np.stack([row[name] for row in rows]) for name in self.lengths}

    def decode(self, stream: str, z: Array | np.ndarray, rows: int | None = None, beams: int = 1) -> Any:
        """Latents (n ...) -> list of str, or float32 images (n h w 1) in [-1, 1]; `in_units` brings these into the
        modality's unit.

        Args:
          rows: decoded at a time, None for all.
          beams: hypotheses that the search for the likeliest text keeps; 1 takes the likeliest token each time.
        """
        modality = self.model.flows[split_stream(stream)[0]].modality
        known = modality.kind, beams
        if known not in self._decoders:
            self._decoders[known] = jit(lambda p, z, m=modality.name: self.model.decode(p, m, z, beams))
        value = _in_passes(lambda z: self._decoders[known](self.params, z), rows or len(z), z)
        return value if modality.is_image else [self.tokenizers.decode(ids) for ids in value]

    def encode(self, stream: str, items: Sequence[Any]) -> Float[np.ndarray, "n ..."]:
        """The latents z_0 of values as `generate` takes them: unit variance over the training data.

        Raises:
          UserError: a value that is none of these.
        """
        name = split_stream(stream)[0]
        encode = self._jitted("latent", name, lambda p, x: self.model.encode(p, name, x))
        return _in_passes(lambda x: encode(self.params, x), self.defaults["rows"], self.model_input(stream, items))

    def embed(self, stream: str, items: Sequence[Any]) -> Float[np.ndarray, "n d"]:
        """Where values as `generate` takes them stand in the aligned space (3.2): unit vectors, pooled by C.

        Raises:
          UserError: a value that is none of these, or of a modality whose C this model does not have.
        """
        if split_stream(stream)[0] not in self.givable:
            raise UserError(f"{stream!r}: this model has no prompt encoder of it; it has {', '.join(self.givable)}")
        return self.embedded(stream, self.model_input(stream, items))

    def embedded(self, stream: str, x: Any) -> Float[np.ndarray, "n d"]:
        """`embed` of values as networks read them (`model_input`)."""
        name = split_stream(stream)[0]

        def unit(p: Params, x: Any) -> Array:
            pooled = self.model.flows[name].prompt(p, x).pooled
            return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

        embed = self._jitted("embedding", name, unit)
        return _in_passes(lambda x: embed(self.params, x), self.defaults["rows"], x)

    def _jitted(self, what: str, name: str, f: Callable) -> Callable:
        return self._encoders.setdefault((what, name), jit(f))

    def generate(
        self,
        given: Mapping[str, Any],
        make: Sequence[str],
        *,
        count: int | None = None,
        draws: int = 1,
        best_of: int | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        guide_guidance: float | None = None,
        beams: int = 1,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        rows: int | None = None,
        tell: Tell | None = None,
        watch: Tell | None = None,
        **options: Any,
    ) -> Generated:
        """Make the wanted streams from the given ones.

        Args:
          given: stream -> one value or a list of them (a batch): a str, a path to an image, a `Picture` (a slice of
            `formats.pictures`), or a float array (h w) in the modality's unit (HU for CT). Empty: made from noise
            alone.
          make: streams, "ct" or "mri:t2". Images come on the grid of those given, where these have one shape.
          count: samples; default one for each given value. A single given value is repeated.
          draws: of each of these; they follow each other in the result, the first of them is what one draw gives.
          best_of: of so many draws keep the one that agrees best, in the aligned space, with what is given; None: see
            `usual_best_of`.
          steps, eta, guidance: of the sampler; None for the run's own.
          guide_guidance: a scale of their own for the guides; `guidance` is then that of the prompts. One network pass
            in two more.
          beams: of texts, see `decode`.
          seed: the noise of sample i, draw j is a function of (seed, i, j, stream).
          numbers: which i each sample has; None for 0, 1, 2 ... Those of one number have one noise, as the slices of a
            volume do (`volumes`).
          rows: made at a time; None for the run's own `sample.rows`. A sample does not depend on it.
          tell: is called after each of these passes, before decoding, with (samples made so far, samples in all); what
            it raises ends the generation.
          watch: is called within a pass, with (steps made so far, steps in all); what it raises ends the generation.
          **options: `sampler`, `spacing`, `guide`, `prompts`, `guides`, `register` of `generate.Request`.

        Raises:
          UserError: unknown streams or options, numbers out of range, batches of different lengths, unreadable
            images.
        """
        asked = dict(count=count, draws=draws, best_of=best_of, steps=steps, eta=eta, guidance=guidance, seed=seed)
        check_sampling("{}", **asked, guide_guidance=guide_guidance, rows=rows, beams=beams)
        if steps is not None:
            options["steps"] = steps
        apart = guide_guidance is not None
        # What cannot be asked for is said before a file is read.
        request = self.request(tuple(given), tuple(make), **options, apart=apart)
        if best_of is None:
            best_of = self.usual_best_of(request.given, request.make, draws, request.prompts)
        self._check_best_of(request, best_of, draws)
        values = {s: self.opened(s, v if isinstance(v, (list, tuple)) else [v]) for s, v in given.items()}
        lengths = {len(v) for v in values.values()} - {1}
        if len(lengths) > 1:
            raise UserError(f"given values differ in number: { {s: len(v) for s, v in values.items()} }")
        n = count or (lengths.pop() if lengths else 1)
        if numbers is not None and len(numbers) != n:
            raise UserError(f"numbers: expected one of each of the {n} samples, found {len(numbers)}")
        batch = {}
        for stream, items in values.items():
            if len(items) not in (1, n):
                raise UserError(f"{stream}: {len(items)} values given for {n} samples")
            batch[stream] = self.model_input(stream, items * (n if len(items) == 1 else 1))
        off_grid = self._off_grid(request, values)
        if off_grid:
            request = dataclasses.replace(request, register="made")
        scale = self.defaults["guidance"] if guidance is None else guidance
        scales = (scale, guide_guidance) if apart else scale
        each, rows = max(draws, best_of), rows or self.defaults["rows"]
        repeated = jax.tree.map(lambda x: np.repeat(x, each, axis=0), batch)
        keys = draw_keys(seed, range(n) if numbers is None else numbers, each)
        eta = self.defaults["eta"] if eta is None else eta
        latents = self.sample(request, repeated, keys, scales, eta, rows, tell, watch)
        if broken := [s for s, z in latents.items() if not np.isfinite(z).all()]:
            raise UserError(f"{broken[0]}: no finite sample came of guidance {scale}; ask for less")
        made = {s: self.decode(s, latents[s], rows, beams) for s in request.make}
        agreement = kept = None
        if best_of > 1:
            kept, agreement = self.ranked(batch, made)
            latents, made = of_best(latents, kept), of_best(made, kept)
        grid, groups = self._grid(values), request.groups()
        independent = groups if len(groups) > 1 else ()
        return Generated(
            {s: self.in_units(s, x, grid) for s, x in made.items()},
            request.pairs(),
            seed,
            independent,
            self._notes(values, independent, off_grid, best_of),
            draws=draws,
            best_of=best_of,
            agreement=agreement,
            kept=kept,
            latents=latents,
        )

    def usual_best_of(self, given: Sequence[str], make: Sequence[str], draws: int = 1, prompts: str = "given") -> int:
        """Of how many draws the best is kept where nobody says: of reports that are all that is made, and are told by
        prompts of what is given, `sample.best_of_text`; else one."""
        made = [split_stream(s)[0] for s in make]
        if not given or draws > 1 or prompts != "given" or any(MODALITIES[m].is_image for m in made):
            return 1
        return self.defaults.get("best_of_text", 1) if set(made) <= set(self.givable) else 1

    def _check_best_of(self, request: Request, best_of: int, draws: int) -> None:
        if best_of == 1:
            return
        if draws > 1:
            raise UserError(f"best_of={best_of} keeps one of several draws, and draws={draws} keeps all: ask for one")
        unknown = [s for s in request.make if split_stream(s)[0] not in self.givable]
        if not request.given or unknown:
            raise UserError(
                f"best_of={best_of} ranks samples by how well they agree with what is given, in the aligned space; "
                + (f"this model has no prompt encoder of {unknown[0]!r}" if unknown else "nothing is given")
            )

    def ranked(self, given: Mapping[str, Any], made: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(which draw of each sample agrees best with what it was made from, how well it does): by the mean cosine, in
        the aligned space, of all made with all given.

        Args:
          given: stream -> n values as the networks read them.
          made: stream -> k draws of each, which follow each other: images (n*k h w 1) in [-1, 1], or list of str.
        """
        own = [self.embedded(s, x) for s, x in given.items()]
        out = []
        for stream, x in made.items():
            drawn = self.embedded(stream, x if isinstance(x, np.ndarray) else self.ids(x))
            out += [np.einsum("nd,nkd->nk", one, drawn.reshape(len(one), -1, one.shape[-1])) for one in own]
        agreement = np.mean(out, axis=0)
        return agreement.argmax(axis=1), agreement.max(axis=1)

    def _off_grid(self, request: Request, given: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
        """The given streams that could stand on a wanted one's input channels and cannot share a grid: their images
        differ in size; () where all may."""
        if request.register != "trained":
            return ()
        near = [s for s in given if any(request.registered(s, target) for target in with_bridges(request))]
        rows = max((len(given[s]) for s in near), default=0)
        shapes = [{given[s][i if len(given[s]) > 1 else 0].pixels.shape for s in near} for i in range(rows)]
        return tuple(near) if any(len(some) > 1 for some in shapes) else ()

    def _notes(
        self,
        given: Mapping[str, Sequence[Any]],
        independent: Sequence[Sequence[str]],
        off_grid: Sequence[str],
        best_of: int,
    ) -> tuple[str, ...]:
        """What a user has to know of a generation."""
        read = {name: n for name, n in self.lengths.items() if name in ("clip", "bert")}  # of given texts
        texts = [x for items in given.values() for x in items if isinstance(x, str)]
        notes = self.tokenizers.report_on(texts, read) if texts else []
        notes += filter(None, (self._ranged(stream, x) for stream, items in given.items() for x in items))
        pictures = [x for items in given.values() for x in items if isinstance(x, Picture)]
        notes += dict.fromkeys(f"{x.path or 'an image'}: {note}" for x in pictures for note in x.notes)
        if best_of > 1:
            notes.append(f"each the best of {best_of} draws: the one that agrees most with what is given")
        if independent:
            groups = " | ".join(" + ".join(group) for group in independent)
            notes.append(
                f'independent of each other, since no trained pair links them: {groups} (guides "all" links them '
                "through the aligned space)"
            )
        if off_grid:
            notes.append(
                f"{' and '.join(off_grid)} differ in size, so they share no grid: they guide by their contexts alone, "
                "not pixel by pixel; resample them to one grid"
            )
        return tuple(notes)

    def _ranged(self, stream: str, item: Any) -> str:
        """What a 16-bit file counts over, in words; "" for anything else."""
        if not isinstance(item, Picture) or not item.path or item.span is None or item.pixels.dtype != np.uint16:
            return ""
        known = stream in self.meta["ranges"]
        why = "as in training" if known else "all its bits: training met no 16-bit image of this stream"
        low, high = item.span
        return f"{item.path}: counts from -1 to +1 over {low:g} to {high:g} ({why})"

    def opened(self, stream: str, items: Sequence[Any]) -> list[Any]:
        """Values of a stream, images as pictures: each file is read here and nowhere else.

        Raises:
          UserError: a value that is none of what `generate` takes, or a file that cannot be read.
        """
        modality = MODALITIES[split_stream(stream)[0]]
        if not modality.is_image:
            for item in items:
                if not isinstance(item, str):
                    raise UserError(f"{stream}: expected a str, found {type(item).__name__}")
            return list(items)
        return [self._picture(stream, item) for item in items]

    def model_input(self, stream: str, items: Sequence[Any]) -> Any:
        """Values of a stream -> what the networks read: ids, or float32 (n size size 1) in [-1, 1]."""
        modality, values = MODALITIES[split_stream(stream)[0]], self.opened(stream, items)
        if not modality.is_image:
            return self.ids(values)
        return np.stack([network_input(picture, modality, self.size) for picture in values])

    def _picture(self, stream: str, item: Any) -> Picture:
        if isinstance(item, Picture):
            return item
        if isinstance(item, (str, Path)):
            modality = MODALITIES[split_stream(stream)[0]]
            picture = formats.read(item, self.meta["shared"]["data"]["most_pixels"], modality)
            if picture.span is None or picture.pixels.dtype != np.uint16:
                return picture
            # A 16-bit file counts as those of its stream did in training, else over all its bits: one image alone
            # does not tell its range. `_ranged` says so.
            known = self.meta["ranges"]
            return dataclasses.replace(picture, span=tuple(known[stream] if stream in known else picture.span))
        try:
            pixels = np.asarray(item, np.float32)
        except (TypeError, ValueError):
            raise UserError(f"{stream}: expected an image (h w) or its path, found {type(item).__name__}") from None
        if pixels.ndim != 2:
            raise UserError(f"{stream}: expected an image (h w), found an array of shape {pixels.shape}")
        return Picture(pixels, span=None)

    def _grid(self, given: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
        """(height, width) of the given images where all have the same: what is made of them comes on their grid."""
        shapes = {x.pixels.shape for items in given.values() for x in items if isinstance(x, Picture)}
        return shapes.pop() if len(shapes) == 1 else (self.size, self.size)

    def in_units(self, stream: str, value: Any, grid: tuple[int, int] | None = None) -> Any:
        """[-1, 1] -> the modality's unit, (n h w), on `grid` as `images.undo` brings it there; texts as they are."""
        modality = MODALITIES[split_stream(stream)[0]]
        if not modality.is_image:
            return value
        pixels = np.asarray(value, np.float32)[..., 0]
        return modality.in_unit(np.stack([images.undo(x, grid or x.shape) for x in pixels]))


def _in_passes(f: Callable, rows: int, *trees: Any, tell: Tell | None = None) -> Any:
    """f over the rows of trees of arrays, so many at a time and the last pass filled up: one executable does it all.
    Trees of NumPy arrays."""
    total = len(jax.tree.leaves(trees)[0])
    size, parts = min(rows, total), []
    for start in range(0, total, size):
        chosen = np.minimum(np.arange(start, start + size), total - 1)
        some = trees if size == total else jax.tree.map(lambda x, chosen=chosen: x[chosen], trees)
        parts.append(jax.tree.map(np.asarray, f(*some)))
        if tell is not None:
            tell(min(start + size, total), total)
    return jax.tree.map(lambda *x: np.concatenate(x)[:total] if len(x) > 1 else x[0], *parts)


def of_best(drawn: Mapping[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """Of k draws of each sample, which follow each other, the one that was kept. drawn: stream -> array, or list."""
    out = {}
    for stream, x in drawn.items():
        at = kept + len(x) // len(kept) * np.arange(len(kept))
        out[stream] = x[at] if isinstance(x, np.ndarray) else [x[i] for i in at]
    return out
