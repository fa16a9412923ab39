"""Features of images by networks that others have published, so that FID and its kin can be compared.

    medm2g convert inception --from weights-inception-2015-12-05-6726825d.pth --to W
    MEDM2G_SD_WEIGHTS=W medm2g evaluate --model RUN --config=configs/tasks.py:images      FID @inception, beside @ours

A new one is a file here, with its network and its `pixels`, and a row of EXTRACTORS. Networks take what `pixels` makes
of images in [-1, 1] and say (maps (b h w c) from early to late, features (b d)).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from medm2g_jax.config import weights_folder
from medm2g_jax.convert import converted
from medm2g_jax.convert.files import open_published, read_json, weights_in
from medm2g_jax.convert.rules import match, parameters
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.extractors import densenet, dino, inception, layers, resnet
from medm2g_jax.modality import Modality

BATCH = 16


@dataclass(frozen=True)
class Extractor:
    """A published network.

    Attributes:
      file, source: what is asked for, and who publishes it.
      network, pixels, size: its module, what it takes, and the side and channels of that; of `dino` the file says them.
      ignore: keys of the file that no feature needs.
      projections: it was trained on projections (True), on what are none (False), on photographs (None: reads all).
    """

    title: str
    file: str
    source: str
    network: Callable[..., nn.Module]
    pixels: Callable[..., jax.Array]
    size: tuple[int, int] = (0, 0)
    ignore: str = ""
    projections: bool | None = None

    def reads(self, modality: Modality) -> bool:
        return self.projections in (None, modality.projection)


EXTRACTORS = {
    "inception": Extractor(
        "Inception v3, 2015-12-05",
        "weights-inception-2015-12-05-6726825d.pth",
        "github.com/toshas/torch-fidelity, release v0.2.0",
        inception.Inception,
        inception.pixels,
        (inception.SIZE, 3),
        r"^fc\.|^AuxLogits\.",
    ),
    "xrv": Extractor(
        "DenseNet-121 of torchxrayvision, densenet121-res224-all",
        "torchxrayvision.models.DenseNet(weights='densenet121-res224-all').state_dict(), by torch.save (what is "
        "published is a pickled program, which is never run here)",
        "github.com/mlmed/torchxrayvision",
        densenet.DenseNet,
        densenet.pixels,
        (densenet.SIZE, 1),
        r"^classifier\.|^op_threshs$",
        True,
    ),
    "radimagenet": Extractor(
        "ResNet-50 of RadImageNet",
        "the state_dict of torch.hub.load('Warvito/radimagenet-models', 'radimagenet_resnet50'), by torch.save",
        "github.com/Warvito/radimagenet-models",
        resnet.ResNet,
        resnet.pixels,
        (resnet.SIZE, 3),
        "",
        False,
    ),
    "rad_dino": Extractor(
        "RAD-DINO, ViT-B/14",
        "its folder, with model.safetensors, config.json and preprocessor_config.json",
        "huggingface.co/microsoft/rad-dino",
        dino.Dino,
        dino.pixels,
        ignore=r"^embeddings\.mask_token$",
        projections=True,
    ),
}


def convert(name: str, source: Path, to: Path) -> converted.Summary:
    """A published file (of rad_dino its folder) -> to/NAME.

    Raises:
      UserError: another network's file, or one that is not whole; nothing is written then.
    """
    own = EXTRACTORS[name]
    file = weights_in(source, "model", "pytorch_model") if source.is_dir() else source
    if file is None:
        raise UserError(f"{source}: expected {own.file}")
    found = open_published(file)
    ignore = "|".join(filter(None, (layers.UNREAD, own.ignore)))
    if name == "rad_dino":
        net = _dino(source, {key: tensor.shape for key, tensor in found.items()})
        made = dino.Dino(**{k: net[k] for k in dino.SIZES})
        expected = parameters(made, name, jnp.zeros((1, net["side"], net["side"], 3)))
        table = dino.rules(net["layers"], name)
    else:
        net, (side, channels) = {}, own.size
        expected = parameters(own.network(), name, jnp.zeros((1, side, side, channels)))
        table = layers.rules(expected)
    steps = match(table, found, expected, str(file), ignore, hint=f"Expected {own.title}: {own.file}")
    meta = dict(source=own.title, licence=converted.LICENCES[name], net=net)
    return converted.write(to, name, steps, meta)


def _dino(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Its sizes, and how its images are normalised."""
    try:
        sizes = dino.sizes(dict(shapes))
    except (KeyError, ValueError):
        what = EXTRACTORS["rad_dino"].file
        raise UserError(f"{folder}: no DINOv2 in transformers' layout; expected {what}") from None
    config = read_json(folder / "config.json")
    heads = config.get("num_attention_heads")
    if config.get("use_swiglu_ffn") or heads != max(1, sizes["width"] // dino.HEAD):
        raise UserError(f"{folder}: {heads} heads, SwiGLU {config.get('use_swiglu_ffn')}; expected ViT-B/14's layers")
    said = read_json(folder / "preprocessor_config.json")
    try:
        normal = {name: [float(v) for v in said[f"image_{name}"]] for name in ("mean", "std")}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'preprocessor_config.json'}: expected image_mean and image_std") from None
    return sizes | normal


class Loaded(NamedTuple):
    """Functions of images (n h w 1) in [-1, 1]: maps (n h w c), from early to late, and features (n d)."""

    maps: Callable[[np.ndarray], list[np.ndarray]]
    features: Callable[[np.ndarray], np.ndarray]


def there(modality: Modality) -> list[str]:
    """The networks that read such images whose converted weights lie where MEDM2G_SD_WEIGHTS says."""
    folder = weights_folder()
    return [n for n, own in EXTRACTORS.items() if folder and own.reads(modality) and converted.exists(folder, n)]


@functools.cache
def load(name: str, weights: str = "") -> Loaded:
    """A published network, with the weights that `medm2g convert NAME --to` wrote into the folder `weights`; "": the
    one that MEDM2G_SD_WEIGHTS names.

    Raises:
      UserError: they are not there; says which file, from where, under which licence, and the command.
    """
    own, folder = EXTRACTORS[name], weights or weights_folder()
    if not folder or not converted.exists(folder, name):
        where = f"{folder}/{name} is not there" if folder else "MEDM2G_SD_WEIGHTS names no folder of converted weights"
        raise UserError(
            f"{where}: {own.title}, from {own.source} (licence: {converted.LICENCES[name]}). Bring {own.file}, then\n"
            f"  {converted.COMMANDS[name].format(folder or 'W')}" + ("" if folder else "; export MEDM2G_SD_WEIGHTS=W")
        )
    there = converted.read(folder, name)
    flat = {key.removeprefix(f"{name}/"): jnp.asarray(t.read(), jnp.float32) for key, t in there.tensors.items()}
    params, net = {"params": unflatten_dict(flat, sep="/")}, there.meta["net"]
    network = own.network(**{k: net[k] for k in dino.SIZES}) if net else own.network()
    pixels = functools.partial(own.pixels, net=net) if net else own.pixels

    def in_batches(part: int) -> Callable[[np.ndarray], Any]:
        run = jax.jit(lambda params, x: network.apply(params, pixels(x))[part])

        def read(images: np.ndarray) -> Any:
            out = []
            for at in range(0, len(images), BATCH):
                some = images[at : at + BATCH]
                filled = np.concatenate([some, np.repeat(some[-1:], BATCH - len(some), 0)])  # one executable
                out.append([np.asarray(x)[: len(some)] for x in jax.tree.leaves(run(params, filled))])
            return [np.concatenate(each) for each in zip(*out, strict=True)]

        return read

    maps, features = in_batches(0), in_batches(1)
    return Loaded(maps, lambda images: features(images)[0])
