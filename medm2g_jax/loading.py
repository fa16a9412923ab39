"""From a run's folder to a model that generates: `load`, and values in and out of it in their own units."""

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.config import check_sampling, weights_folder
from medm2g_jax.convert import weights
from medm2g_jax.convert.converted import exists as converted_exists
from medm2g_jax.convert.files import open_tensors
from medm2g_jax.data import formats, images
from medm2g_jax.data.picture import Picture, network_input
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import activation_dtype, jit, use_compilation_cache
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated, Request, build_sampler, with_bridges
from medm2g_jax.keys import row_keys
from medm2g_jax.modality import MODALITIES, adopt, split_stream
from medm2g_jax.model import MedM2G, build, init_group
from medm2g_jax.train import checkpoint
from medm2g_jax.train.results import group_fingerprint, tuples


def newest_result(root: epath.Path) -> epath.Path:
    """The folder of the finished stage of a run root that makes most: with the most rounds behind it, or else the most
    flows, the newest of those.

    Raises:
      UserError: nothing there can generate; says the command that makes something that does.
    """
    done = []
    for folder in root.iterdir() if root.is_dir() else ():
        meta = checkpoint.read_meta(folder) if folder.is_dir() else None
        if meta is not None and makes(meta):
            done.append((len(meta["rounds"]), len(makes(meta)), meta["finished"], folder))
    if not done:
        raise UserError(
            f"{root}: no finished round or flow in it; train one with "
            f"python -m medm2g_jax.main --config=configs/text_ct.py:tiny --workdir={root}"
        )
    return max(done, key=lambda d: d[:3])[3]


def makes(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The modalities that a result can generate: those whose UNet it comprises; of a round those that it guides."""
    part = "guide" if meta["rounds"] else "flow"
    return tuple(m for m in meta["modalities"] if f"{m}/{part}" in meta["from"] and f"{m}/flow" in meta["from"])


def locate(path: str) -> epath.Path:
    """The folder that `load` reads: `path` where a result or an exported model is in it, else its newest result."""
    root = epath.Path(path)
    return root if checkpoint.read_meta(root) is not None else newest_result(root)


def load(path: str, modalities: Sequence[str] | None = None, dtype: str = "float32") -> "Model":
    """A trained model.

    Args:
      path: a run root (its newest finished round, or single flow where there is none), one stage's folder in it, or an
        exported folder.
      modalities: make only these, which leaves the other UNets unread; all by default. Anything may be given all the
        same.
      dtype: in which parameters are stored: "float32", or "bfloat16" for half the memory. Activations have it too, on
        CPU, which has no bfloat16 arithmetic, float32.

    Raises:
      UserError: nothing finished there, or a stage it stands on has been trained again since.
    """
    root = locate(path)
    meta = checkpoint.read_meta(root)
    if not makes(meta):
        raise UserError(f"{root}: {meta['stage']} generates nothing; name the folder of a round or flow, or a run root")
    adopt(meta["modalities"], str(root / "model.json"))
    wanted = makes(meta)
    if modalities is not None:
        unknown = [m for m in modalities if m not in wanted]
        if unknown:
            raise UserError(f"modalities: {unknown[0]!r} is not among what {root} makes: {', '.join(wanted)}")
        wanted = tuple(m for m in wanted if m in modalities)
    stored = activation_dtype(dtype)
    shared = meta["shared"]
    model = build(
        tuples(shared["net"]),
        tuple(meta["modalities"]),
        meta["vocab"],
        meta["scales"],
        shared["image_size"],
        jnp.float32 if jax.default_backend() == "cpu" else stored,
        predict=meta["predict"],
        slots=meta["slots"] if "slots" in meta else {},  # results of before have none
        centred=bool(rounds.graph(shared["listing"]).centre),
    )
    # Of what is only given, everything but its UNet: C for prompts, V, f and the autoencoder for guides.
    unread = {m for m in meta["modalities"] if m not in wanted}

    def needed(name: str) -> bool:
        owner, part = name.split("/")[:2]
        return owner not in unread or part not in ("unet", "prompt_in", "null")

    if meta["storage"] not in STORAGES:
        raise UserError(f"{root / 'model.json'}: storage {meta['storage']!r}; this version reads {', '.join(STORAGES)}")
    params, tokenizers = STORAGES[meta["storage"]](root, meta, model, needed, stored)
    texts = Tokenizers.load(tokenizers, shared["net"]["report_words"]) if meta["vocab"] else None
    config = json.loads((root / "config.json").read_text())
    return Model(model, params, texts, meta, config["sample"], wanted)


def _from_run(
    root: epath.Path, meta: Mapping, model: MedM2G, needed: Callable[[str], bool], dtype: Any
) -> tuple[Params, epath.Path]:
    """Parameters of a stage's result: its own, and those of the stages and converted weights that it stands on."""
    use_compilation_cache(root.parent / "xla_cache")
    params: Params = {}
    stages: dict[str, list[str]] = {}
    for group, origin in meta["from"].items():
        if "stage" in origin:
            stages.setdefault(_plain_name(root, origin["stage"]), []).append(group)
    for stage, groups in stages.items():
        folder = root.parent / stage
        found = checkpoint.read_meta(folder)
        if found is None:
            raise UserError(f"{root} stands on {folder}, which is not there (or not finished); copy the whole run root")
        for group in groups:
            origin = meta["from"][group]
            expected = None if "weights" in origin else origin.get("fingerprint")
            if expected is not None and expected != group_fingerprint(found["fingerprints"], group):
                raise UserError(
                    f"{folder}: {group} has been trained again since {root} was; train {meta['stage']} again too "
                    f"(delete {root} and run its command)"
                )
        regex = re.compile(rounds.group_regex(groups))
        names = [n for n in found["shapes"] if regex.match(n) and needed(n)]
        if names:
            params |= checkpoint.load_model(folder, names=set(names).__contains__, dtype=dtype)
    converted = [group for group, origin in meta["from"].items() if "weights" in origin]
    return params | _converted(root, meta, model, needed, converted, dtype), root.parent / "tokenizers"


def _from_export(
    root: epath.Path, meta: Mapping, model: MedM2G, needed: Callable[[str], bool], dtype: Any
) -> tuple[Params, epath.Path]:
    """Parameters of a model that `medm2g convert export --as safetensors` wrote, compared with its CRCs."""
    path = Path(root) / "weights.safetensors"
    params: Params = {}
    tensors = open_tensors(path)
    if set(tensors) != set(meta["crc32"]):
        raise UserError(f"{path}: model.json names other tensors; export the model again")
    for name, tensor in tensors.items():
        if needed(name):
            value = tensor.read()
            if zlib.crc32(value.tobytes()) != meta["crc32"][name]:
                raise UserError(f"{path} is damaged: the CRC of {name} differs; export or download the model again")
            params[name] = jnp.asarray(value, dtype)
    return params, root / "tokenizers"


STORAGES = {"orbax": _from_run, "safetensors": _from_export}  # as model.json names them


def _plain_name(root: epath.Path, stage: str) -> str:
    if not stage.isidentifier():
        raise UserError(f"{root / 'model.json'}: names a stage {stage!r}, which is no name; not a file to trust")
    return stage


def _converted(
    root: epath.Path, meta: Mapping, model: MedM2G, needed: Callable[[str], bool], groups: Sequence[str], dtype: Any
) -> Params:
    """The groups of a model that no stage trained, from the converted weights that its run was started with, where they
    were then or where MEDM2G_SD_WEIGHTS says that they are now."""
    if not groups:
        return {}
    net = tuples(meta["shared"]["net"])
    places = dict.fromkeys(p for p in (meta["shared"]["weights"], weights_folder()) if p)
    shapes = jax.eval_shape(lambda key: init_group(model, key, groups), jax.random.key(0))
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: Params = {}
    for group in groups:
        origin = meta["from"][group]
        regex = re.compile(rounds.group_regex((group,)))
        mine = {n: x.shape for n, x in shapes.items() if regex.match(n)}
        mine = {n: s for n, s in mine.items() if n not in origin.get("fresh", ())}
        if not any(map(needed, mine)):
            continue
        there = [place for place in places if converted_exists(place, origin["weights"])]
        for place in there:  # the folder may have moved, and another may stand where it was: contents tell
            found, now = weights.load(place, group, mine, net, lambda name, shape: local, dtype)
            if now["fingerprint"] == origin["fingerprint"]:
                params |= {name: value for name, value in found.items() if needed(name)}
                break
        else:
            part = origin["weights"]
            looked = " and ".join(f"{place}/{part}" for place in there or places) or f"no folder of {part}"
            why = "was converted again, from other files, since" if there else "is not there any more, as when"
            raise UserError(
                f"{looked} {why} {root} was trained; say where the weights are that it stands on, as in "
                f"MEDM2G_SD_WEIGHTS=FOLDER, or train {meta['stage']} again"
            )
    return params


LARGE = 2**30  # bytes of parameters from which memory counts for more than the last bit of speed


class Model:
    """What `load` returns: recipe, parameters and tokenizers; from values in their own units to values in their own
    units.

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
        self._samplers: dict[Request, Callable] = {}
        self._decoders: dict[str, Callable] = {}

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
                    raise UserError(
                        f"{stream!r} cannot be {verb}: this model takes {', '.join(able) or 'nothing'} there"
                    )
        unknown = set(options) - {f.name for f in dataclasses.fields(Request)}
        if unknown:
            raise UserError(f"unknown option {sorted(unknown)[0]!r} of a generation")
        trained = self.meta["pairs"]
        kinds = [k for k in ("prompt", "guide", "registered") if k in trained]
        pairs = {f"{k}_pairs": tuple(tuple(p) for p in trained[k]) for k in kinds}
        defaults = {k: self.defaults[k] for k in ("steps", "sampler", "spacing", "guide")}
        return Request(tuple(given), tuple(make), **(defaults | pairs | options))

    def sample(self, request: Request, given: Mapping[str, Any], keys: Array, guidance: float, eta: float) -> dict:
        """Latents of the wanted streams (and bridges), from values as networks read them (`generate.build_sampler`)."""
        if request not in self._samplers:
            self._samplers[request] = jit(build_sampler(self.model, request), save_memory=self._large)
        empty = self.ids([""]) if self.tokenizers else {}
        return self._samplers[request](self.params, given, empty, keys, jnp.float32(guidance), jnp.float32(eta))

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Texts as networks read them."""
        rows = [self.tokenizers.encode(text, self.lengths) for text in texts]
        return {name: np.stack([row[name] for row in rows]) for name in self.lengths}

    def decode(self, stream: str, z: Array) -> Any:
        """Latents -> list of str, or float32 images (n h w 1) in [-1, 1]."""
        modality = self.model.flows[split_stream(stream)[0]].modality
        if modality.kind not in self._decoders:
            self._decoders[modality.kind] = jit(lambda p, z, m=modality.name: self.model.decode(p, m, z))
        value = np.asarray(self._decoders[modality.kind](self.params, z))
        return value if modality.is_image else [self.tokenizers.decode(ids) for ids in value]

    def generate(
        self,
        given: Mapping[str, Any],
        make: Sequence[str],
        *,
        count: int | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Generated:
        """Make the wanted streams from the given ones.

        Args:
          given: stream -> one value or a list of them (a batch): a str, a path to an image, or a float array (h w) in
            the modality's unit (HU for CT). Empty: made from noise alone.
          make: streams, "ct" or "mri:t2". Images come on the grid of those given, where these have one shape.
          count: samples; default one for each given value. A single given value is repeated.
          steps, eta, guidance: of the sampler; None for the run's own.
          seed: sample i's noise is a function of (seed, i, stream).
          **options: `sampler`, `guide`, `prompts`, `guides`, `register` of `generate.Request`.

        Raises:
          UserError: unknown streams or options, numbers out of range, batches of different lengths, unreadable
            images.
        """
        check_sampling("{}", count=count, steps=steps, eta=eta, guidance=guidance, seed=seed)
        if steps is not None:
            options["steps"] = steps
        request = self.request(tuple(given), tuple(make), **options)  # what cannot be asked for is said before a read
        values = {s: self.opened(s, v if isinstance(v, (list, tuple)) else [v]) for s, v in given.items()}
        lengths = {len(v) for v in values.values()} - {1}
        if len(lengths) > 1:
            raise UserError(f"given values differ in number: { {s: len(v) for s, v in values.items()} }")
        n = count or (lengths.pop() if lengths else 1)
        batch = {}
        for stream, items in values.items():
            if len(items) not in (1, n):
                raise UserError(f"{stream}: {len(items)} values given for {n} samples")
            batch[stream] = self.model_input(stream, items * (n if len(items) == 1 else 1))
        apart = self._apart(request, values)
        if apart:
            request = dataclasses.replace(request, register="made")
        keys = row_keys(jax.random.key(seed), n)
        scale = self.defaults["guidance"] if guidance is None else guidance
        latents = self.sample(request, batch, keys, scale, self.defaults["eta"] if eta is None else eta)
        grid = self._grid(values)
        samples = {s: self.in_units(s, self.decode(s, latents[s]), grid) for s in request.make}
        groups = request.groups()
        independent = groups if len(groups) > 1 else ()
        kept = {s: np.asarray(latents[s]) for s in request.make}
        notes = self._notes(values, independent, apart)
        return Generated(samples, request.pairs(), seed, independent, notes, kept)

    def _apart(self, request: Request, given: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
        """The given streams that could stand on a wanted one's input channels and cannot share a grid: their images
        differ in size; () where all may."""
        if request.register != "trained":
            return ()
        near = [s for s in given if any(request.registered(s, target) for target in with_bridges(request))]
        rows = max((len(given[s]) for s in near), default=0)
        shapes = [{given[s][i if len(given[s]) > 1 else 0].pixels.shape for s in near} for i in range(rows)]
        return tuple(near) if any(len(some) > 1 for some in shapes) else ()

    def _notes(
        self, given: Mapping[str, Sequence[Any]], independent: Sequence[Sequence[str]], apart: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """What a user has to know of a generation."""
        read = {name: n for name, n in self.lengths.items() if name in ("clip", "bert")}  # of given texts
        texts = [x for items in given.values() for x in items if isinstance(x, str)]
        notes = self.tokenizers.report_on(texts, read) if texts else []
        notes += filter(None, (self._ranged(stream, x) for stream, items in given.items() for x in items))
        if independent:
            groups = " | ".join(" + ".join(group) for group in independent)
            notes.append(
                f'independent of each other, since no trained pair links them: {groups} (guides "all" links them '
                "through the aligned space)"
            )
        if apart:
            notes.append(
                f"{' and '.join(apart)} differ in size, so they share no grid: they guide by their contexts alone, not "
                "pixel by pixel; resample them to one grid"
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
            picture = formats.read(item, self.meta["shared"]["data"]["most_pixels"])
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
