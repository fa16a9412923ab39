"""From a run's folder to a model that generates: `load`, and values in and out of it in their own units."""

import functools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.config import check_sampling, weights_folder
from medm2g_jax.convert import weights
from medm2g_jax.convert.converted import exists as converted_exists
from medm2g_jax.convert.files import open_tensors
from medm2g_jax.data import images
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.device import activation_dtype, use_compilation_cache
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated, Generator, Request, with_bridges
from medm2g_jax.keys import row_keys
from medm2g_jax.modality import MODALITIES, split_stream
from medm2g_jax.model import MedM2G, build, init_group
from medm2g_jax.train import checkpoint
from medm2g_jax.train.results import group_fingerprint, tuples


def newest_round(root: epath.Path) -> epath.Path:
    """The folder of the finished round of a run root with the most rounds behind it, the newest of those.

    Raises:
      UserError: there is none; says what is there, or the command that makes one.
    """
    done = []
    for folder in root.iterdir() if root.is_dir() else ():
        meta = checkpoint.read_meta(folder) if folder.is_dir() else None
        if meta is not None and meta["stage"] in meta["rounds"]:
            done.append((len(meta["rounds"]), meta["finished"], folder))
    if not done:
        raise UserError(
            f"{root}: no finished round in it; train one with "
            f"python -m medm2g_jax.main --config=configs/text_ct.py:tiny --workdir={root}"
        )
    return max(done, key=lambda d: d[:2])[2]


def locate(path: str) -> epath.Path:
    """The folder that `load` reads: `path` where a result or an exported model is in it, else its newest round."""
    root = epath.Path(path)
    return root if checkpoint.read_meta(root) is not None else newest_round(root)


def load(path: str, modalities: Sequence[str] | None = None, dtype: str = "float32") -> "Model":
    """A trained model.

    Args:
      path: a run root (its newest finished round), one round's folder in it, or an exported folder.
      modalities: read only these flows; all by default.
      dtype: in which parameters are stored: "float32", or "bfloat16" for half the memory. Activations have it too, on
        CPU, which has no bfloat16 arithmetic, float32.

    Raises:
      UserError: nothing finished there, or a stage it stands on has been trained again since.
    """
    root = locate(path)
    meta = checkpoint.read_meta(root)
    if meta["stage"] not in meta["rounds"]:
        raise UserError(f"{root}: {meta['stage']} is not a round; generation needs the folder of a round or a run root")
    exported = "crc32" in meta
    if not exported:
        use_compilation_cache(root.parent / "xla_cache")
    net = tuples(meta["shared"]["net"])
    trained = [m for m in meta["modalities"] if f"{m}/guide" in meta["from"]]
    wanted = trained if modalities is None else [m for m in trained if m in modalities]
    stored = activation_dtype(dtype)
    active = jnp.float32 if jax.default_backend() == "cpu" else stored
    recipe = functools.partial(
        build, net, vocab=meta["vocab"], scales=meta["scales"], image_size=meta["shared"]["image_size"], dtype=active
    )
    model = recipe(wanted)
    kinds = {f"{MODALITIES[m].kind}/vae" for m in wanted}
    groups: dict[str, list[str]] = {}
    converted: list[str] = []
    chosen: list[str] = []
    for group, origin in meta["from"].items():
        # Every prompt encoder stays: any modality may be given, and the centre's makes the null prompt.
        if group.split("/")[0] in wanted or group in kinds or group.endswith("/clip"):
            if exported:
                chosen.append(group)
            elif "weights" in origin:
                converted.append(group)
            if "stage" in origin and not exported:
                groups.setdefault(_plain_name(root, origin["stage"]), []).append(group)
    params: dict[str, Any] = {}
    for stage, some in groups.items():
        folder = root.parent / stage
        found = checkpoint.read_meta(folder)
        if found is None:
            raise UserError(f"{root} stands on {folder}, which is not there (or not finished); copy the whole run root")
        for group in some:
            origin = meta["from"][group]
            expected = None if "weights" in origin else origin.get("fingerprint")
            if expected is not None and expected != group_fingerprint(found["fingerprints"], group):
                raise UserError(
                    f"{folder}: {group} has been trained again since {root} was; train {meta['stage']} again too "
                    f"(delete {root} and run its command)"
                )
        regex = re.compile(rounds.group_regex(some))
        params |= checkpoint.load_model(folder, names=lambda n, regex=regex: regex.match(n) is not None, dtype=stored)
    # Prompt encoders of flows that were not asked for as well: the recipe of all of them knows their shapes.
    params |= _converted(root, meta, recipe(tuple(meta["modalities"])), net, converted, stored)
    params |= {name: jnp.asarray(value, stored) for name, value in _exported(root, meta, chosen).items()}
    tokenizers = Tokenizers.load((root if exported else root.parent) / "tokenizers", net["report_words"])
    generator = Generator(model, params, tokenizers, meta["lengths"])
    config = json.loads((root / "config.json").read_text())
    return Model(generator, meta, config["sample"])


def _plain_name(root: epath.Path, stage: str) -> str:
    if not stage.isidentifier():
        raise UserError(f"{root / 'model.json'}: names a stage {stage!r}, which is no name; not a file to trust")
    return stage


def _exported(root: epath.Path, meta: Mapping, groups: Sequence[str]) -> Params:
    """Groups of a model that `medm2g convert export --as safetensors` wrote, compared with the CRCs in model.json."""
    if not groups:
        return {}
    path = Path(root) / "weights.safetensors"
    regex, params = re.compile(rounds.group_regex(groups)), {}
    tensors = open_tensors(path)
    if set(tensors) != set(meta["crc32"]):
        raise UserError(f"{path}: model.json names other tensors; export the model again")
    for name, tensor in tensors.items():
        if regex.match(name):
            value = tensor.read()
            if zlib.crc32(value.tobytes()) != meta["crc32"][name]:
                raise UserError(f"{path} is damaged: the CRC of {name} differs; export or download the model again")
            params[name] = value
    return params


def _converted(root: epath.Path, meta: Mapping, model: MedM2G, net: Mapping, groups: Sequence[str], dtype) -> Params:
    """The groups of a model that no stage trained, from the converted weights that its run was started with,
    where they were then or where MEDM2G_SD_WEIGHTS says that they are now."""
    if not groups:
        return {}
    places = dict.fromkeys(p for p in (meta["shared"]["weights"], weights_folder()) if p)
    shapes = jax.eval_shape(lambda key: init_group(model, key, groups), jax.random.key(0))
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: Params = {}
    for group in groups:
        origin = meta["from"][group]
        regex = re.compile(rounds.group_regex((group,)))
        mine = {n: x.shape for n, x in shapes.items() if regex.match(n)}
        mine = {n: s for n, s in mine.items() if n not in origin.get("fresh", ())}
        there = [place for place in places if converted_exists(place, origin["weights"])]
        for place in there:  # the folder may have moved, and another may stand where it was: contents tell
            found, now = weights.load(place, group, mine, net, lambda name, shape: local, dtype)
            if now["fingerprint"] == origin["fingerprint"]:
                params |= found
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


class Model:
    """What `load` returns: `generate` from values in their own units to values in their own units."""

    def __init__(self, generator: Generator, meta: Mapping, sample: Mapping):
        self.generator, self.meta, self.defaults = generator, meta, dict(sample)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.generator.model.flows)

    @property
    def size(self) -> int:
        """Pixels a side of what it generates."""
        return self.meta["shared"]["image_size"]

    def request(self, given: Sequence[str], make: Sequence[str], **options: Any) -> Request:
        """The request of these streams, with this model's trained pairs and its config's sampling defaults."""
        for stream in (*given, *make):
            if split_stream(stream)[0] not in self.modalities:
                raise UserError(f"{stream!r}: this model has the flows {', '.join(self.modalities)}")
        pairs = {f"{k}_pairs": tuple(tuple(p) for p in self.meta["pairs"][k]) for k in ("prompt", "guide")}
        defaults = {k: self.defaults[k] for k in ("steps", "sampler", "guide")}
        return Request(tuple(given), tuple(make), **(defaults | pairs | options))

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
          **options: `sampler`, `guide`, `prompts`, `guides` of `generate.Request`.

        Raises:
          UserError: unknown streams or options, numbers out of range, batches of different lengths, unreadable
            images.
        """
        check_sampling("{}", count=count, steps=steps, eta=eta, guidance=guidance, seed=seed)
        values = {s: list(v) if isinstance(v, (list, tuple)) else [v] for s, v in given.items()}
        lengths = {len(v) for v in values.values()} - {1}
        if len(lengths) > 1:
            raise UserError(f"given values differ in number: { {s: len(v) for s, v in values.items()} }")
        n = count or (lengths.pop() if lengths else 1)
        batch = {}
        for stream, items in values.items():
            if len(items) not in (1, n):
                raise UserError(f"{stream}: {len(items)} values given for {n} samples")
            batch[stream] = self.model_input(stream, items * (n if len(items) == 1 else 1))
        if steps is not None:
            options["steps"] = steps
        request = self.request(tuple(values), tuple(make), **options)
        keys = row_keys(jax.random.key(seed), n)
        scale = self.defaults["guidance"] if guidance is None else guidance
        latents = self.generator.sample(request, batch, keys, scale, self.defaults["eta"] if eta is None else eta)
        grid = self._grid(values)
        samples = {s: self.in_units(s, self.generator.decode(s, latents[s]), grid) for s in request.make}
        return Generated(samples, _pairs(request), seed)

    def model_input(self, stream: str, items: Sequence[Any]) -> Any:
        """Values of a stream -> what the networks read: ids, or float32 (n size size 1) in [-1, 1]."""
        modality = MODALITIES[split_stream(stream)[0]]
        if modality.kind == "text":
            for item in items:
                if not isinstance(item, str):
                    raise UserError(f"{stream}: expected a str, found {type(item).__name__}")
            return self.generator.ids(items)
        return np.stack([self._image(stream, modality.window, item) for item in items])[..., None]

    def _image(self, stream: str, window: tuple[float, float], item: Any) -> np.ndarray:
        if isinstance(item, (str, Path)):
            return images.square(images.read(item), self.size)
        x = np.asarray(item, np.float32)
        if x.ndim != 2:
            raise UserError(f"{stream}: expected an image (h w), found an array of shape {x.shape}")
        low, high = window
        return images.square(np.clip(2 * (x - low) / (high - low) - 1, -1, 1), self.size)

    def _grid(self, given: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
        """(height, width) of the given images where all have the same: what is made of them comes on their grid."""
        pictures = [x for s, items in given.items() if MODALITIES[split_stream(s)[0]].kind == "image" for x in items]
        shapes = {images.read(x).shape if isinstance(x, (str, Path)) else np.shape(x) for x in pictures}
        return shapes.pop() if len(shapes) == 1 else (self.size, self.size)

    def in_units(self, stream: str, value: Any, grid: tuple[int, int] | None = None) -> Any:
        """[-1, 1] -> the modality's unit, (n h w), on `grid` as `images.undo` brings it there; texts as they are."""
        modality = MODALITIES[split_stream(stream)[0]]
        if modality.kind == "text":
            return value
        low, high = modality.window
        pixels = np.asarray(value, np.float32)[..., 0]
        pixels = np.stack([images.undo(x, grid or x.shape) for x in pixels])
        return (pixels + 1) / 2 * (high - low) + low


def _pairs(request: Request) -> dict[str, str]:
    """Which contexts were used: {"text -> ct": "prompt tokens, guide tokens", ...}."""
    out = {}
    make = with_bridges(request)
    for target in make:
        for source in (*request.given, *make):
            if source == target:
                continue
            how = []
            if source in request.given and request.prompts == "given":
                trained = (split_stream(source)[0], split_stream(target)[0]) in request.prompt_pairs
                how.append(f"prompt {'tokens' if trained else 'pooled'}")
            guided = request.guided(source, target)
            if guided:
                how.append(f"guide {guided}")
            if how:
                out[f"{source} -> {target}"] = ", ".join(how)
    return out
