"""The built-in phantom: paired text, CT, MRI and X-ray of subjects that never lived (section 3.5's pairs, to order).

A subject is a few numbers drawn from (seed, index), and its anatomy is a function of space (`body`). Every
image is the physics of its modality on these same tissues:

    CT     axial slice at the lesion's level: HU, noise, texture
    MRI    the same slice: spin echo S = PD exp(-TE/T2) (1 - exp(-TR/T1)), FLAIR with an inversion, Rician noise
    X-ray  frontal: line integral of mu = mu_water (1 + HU/1000) along y, photon noise, -log (Beer-Lambert)

Images follow the radiological convention: the patient's left is on the right of the image, the front of an axial
slice is up. Nothing here is ever mirrored. Reports and labels: `report`.
"""

import functools
import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key

from medm2g_jax.data.phantom.body import TABLE, TISSUES, Subject, findings, hounsfield, subject, tissues
from medm2g_jax.data.phantom.report import KINDS, Findings, parse, write
from medm2g_jax.data.source import Record
from medm2g_jax.device import host_device
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

# Contrast: TR, TE, TI in ms (TI 0: no inversion), and the signal (a.u., PD of water = 1) shown as +1; 0 is -1.
CONTRASTS = {
    "mri:t1": (500.0, 12.0, 0.0, 0.75),
    "mri:t2": (3500.0, 90.0, 0.0, 0.70),
    "mri:pd": (3500.0, 14.0, 0.0, 0.90),
    "mri:flair": (9000.0, 110.0, 2500.0, 0.40),
    "mri:t1ce": (500.0, 12.0, 0.0, 0.75),
}
T1_ENHANCED = 300.0  # ms, of a mass that has taken up contrast agent
CT_NOISE = 15.0  # HU
MU_WATER = 0.19  # 1/cm, at 70 keV
XRAY_WINDOW = (1.2, 4.6)  # line integrals of mu that are relative attenuation 0 and 1
PHOTONS = 3e4  # a pixel, unattenuated
GRAINS = (40, 40)  # of texture, across the slice
HALF_AXIAL, HALF_FILM, FILM_CENTRE = 18.5, 17.5, 1.0  # cm: half the field of view, z in the middle of the film
HALF_DEPTH, DEPTH_STEPS = 13.0, 42  # cm; the beam is sampled every 0.6 cm, as fine as a 64 px pixel


# --- physics --------------------------------------------------------------------------------------------------------


def line_integral(hu: Callable, half_depth: float, steps: int) -> Array:
    """Integral of mu = mu_water (1 + HU/1000) along y, midpoint rule. `hu(y)` -> HU of the whole film at depth y.

    One depth after the other: the film stays in the cache, and the volume is never in memory.
    """
    step = 2 * half_depth / steps

    def add(i, total):
        return total + MU_WATER * step * (1 + hu((i + 0.5) * step - half_depth) / 1000)

    return jax.lax.fori_loop(0, steps, add, jnp.zeros(jax.eval_shape(hu, 0.0).shape))


def spin_echo(pd: ArrayLike, t1: ArrayLike, t2: ArrayLike, tr: ArrayLike, te: ArrayLike, ti: ArrayLike) -> Array:
    """Signal, with its sign, of a spin echo an inversion and TI later. TI 0 is a plain spin echo: the inversion then
    does nothing but turn the sign."""
    return pd * jnp.exp(-te / t2) * (1 - 2 * jnp.exp(-ti / t1) + jnp.exp(-tr / t1))


def _normals(key, *shapes):
    """Standard normals of these shapes, drawn flat and at once: each draw, and each axis of one, costs compile time."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = jax.random.normal(key, (sum(sizes),))
    return [part.reshape(shape) for part, shape in zip(jnp.split(flat, np.cumsum(sizes)[:-1]), shapes, strict=True)]


def _texture(grains, size):
    """Smooth noise of unit variance with grains of about 1 cm, whatever the size of the pixels."""
    return 1.22 * jax.image.resize(grains, (size, size), "cubic")


def _grid(half, size):
    return ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32) * half


def _axial(s, size):
    g = _grid(HALF_AXIAL, size)
    return tissues(s, g[None, :], g[:, None], s.slice)


def ct(s: Subject, key: Key[Array, ""], size: int) -> Float[Array, "h w 1"]:
    """Axial slice, (size size 1) in [-1, 1] of the window in HU."""
    fractions = _axial(s, size)
    noise, grains = _normals(key, (size, size), GRAINS)
    # Vessels and bronchi below a pixel make lungs mottled; the rest of the body is smooth.
    texture = _texture(grains, size) * (6 + 30 * fractions["lung"])
    hu = hounsfield(fractions) + texture + CT_NOISE * noise
    return MODALITIES["ct"].normalise(hu)[..., None]


def xray(s: Subject, key: Key[Array, ""], size: int) -> Float[Array, "h w 1"]:
    """Frontal film, (size size 1) in [-1, 1] of XRAY_WINDOW: bone and soft tissue bright, lungs dark."""
    g = _grid(HALF_FILM, size)
    path = line_integral(
        lambda y: hounsfield(tissues(s, g[None, :], y, FILM_CENTRE - g[:, None])), HALF_DEPTH, DEPTH_STEPS
    )
    counts = PHOTONS * jnp.exp(-path)
    counts += jnp.sqrt(counts) * _normals(key, counts.shape)[0]  # Poisson, at counts as large as these
    clear, dense = XRAY_WINDOW
    attenuation = (-jnp.log(jnp.maximum(counts, 1) / PHOTONS) - clear) / (dense - clear)
    return MODALITIES["xray"].normalise(attenuation)[..., None]


def mri(s: Subject, key: Key[Array, ""], size: int) -> Float[Array, "h w c"]:
    """The axial slice in every stated contrast, (size size contrasts) in [-1, 1] of each contrast's window.

    A pixel's signal is the sum of what its tissues give. Jitter, bias and texture are the subject's own: without
    them a table of grey values would turn one contrast into another, or into CT.
    """
    tr, te, ti, top = np.array(list(CONTRASTS.values()), np.float32).T
    pd, t1, t2 = (TABLE[:, i + 1, None] * s.relaxation[:, i, None] for i in range(3))  # (tissue 1)
    takes_up = np.array(list(TISSUES))[:, None] == "mass"
    enhanced = np.array(list(CONTRASTS)) == "mri:t1ce"
    t1 = jnp.where(takes_up & enhanced, T1_ENHANCED * s.relaxation[:, 1, None], t1)  # (tissue contrast)
    table = spin_echo(pd, t1, t2, tr, te, ti) / top
    signal = sum(f * of_tissue[:, None, None] for f, of_tissue in zip(_axial(s, size).values(), table, strict=True))
    noise, grains, weights = _normals(key, (2, len(CONTRASTS), size, size), GRAINS, (4,))
    g = _grid(1.0, size)
    x, y = g[None, :], g[:, None]
    bias = weights[0] * x + weights[1] * y + weights[2] * x * y + weights[3] * (x * x - y * y)
    gain = (1 + 0.2 * bias / jnp.abs(weights).sum()) * (1 + 0.05 * _texture(grains, size))
    magnitude = jnp.hypot(signal * gain + 0.015 * noise[0], 0.015 * noise[1])  # Rician
    return jnp.moveaxis(MODALITIES["mri"].normalise(magnitude), 0, -1)


def lesion(s: Subject, size: int) -> Float[Array, "h w"]:
    """How much of each pixel of the axial slice is visible lesion, 0 to 1: the tissue that is another without it."""
    with_it, without = _axial(s, size), _axial(s._replace(kind=jnp.zeros_like(s.kind)), size)
    return sum(jnp.abs(with_it[name] - without[name]) for name in with_it) / 2


_lesion = jax.jit(lesion, static_argnames="size")
MASK = 0.3  # of a pixel: an opacity is patchy and fades out

RENDERERS = {"ct": ct, "xray": xray, "mri": mri}


@functools.partial(jax.jit, static_argnames=("modality", "size"))
def _render(modality: str, subjects: Subject, seed, indices, size: int):
    """(n size size channels) float16. Noise belongs to (seed, index, modality), not to the batch."""

    def one(s, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), list(RENDERERS).index(modality))
        return RENDERERS[modality](s, key, size)

    return jax.vmap(one)(subjects, indices).astype(jnp.float16)


# --- the source -----------------------------------------------------------------------------------------------------

CHUNK = 64  # subjects rendered at a time, fewer where images are large
MEMORY = 2 << 30  # bytes of rendered images to keep


class Phantom:
    """A source (`pipeline.Source`) of subjects that are rendered when they are first read, and then kept.

    Subjects 0 .. train-1 are for training, then validation, then test. In training and validation subject i belongs
    to pairs[i % len(pairs)] and shows nothing else, so that pairs the paper does not have are never seen; a test
    subject shows every stream.
    """

    name = "phantom"
    open = True
    labeller = staticmethod(parse)

    def __init__(
        self,
        size: int,
        seed: int,
        train: int = 6000,
        val: int = 256,
        test: int = 1000,
        pairs: Sequence[tuple[str, ...]] = (("text", "xray"), ("text", "ct"), ("ct", "mri")),
    ):
        known = ("text", *RENDERERS)
        unknown = [m for pair in pairs for m in pair if m not in known]
        if unknown or not pairs:
            raise UserError(f"the phantom has {', '.join(known)}; found {', '.join(unknown) or 'no pair'} in its pairs")
        self._args = (size, seed, train, val, test, tuple(pairs))
        self.size, self.seed = size, seed
        streams = [tuple(s for m in pair for s in MODALITIES[m].streams) for pair in pairs]
        axial = {s for m in RENDERERS if not MODALITIES[m].projection for s in MODALITIES[m].streams}
        everything = tuple(s for m in known for s in MODALITIES[m].streams)
        splits = ["train"] * train + ["val"] * val + ["test"] * test
        self.records = [
            Record(
                id=f"phantom-{i:06d}",
                subject=f"phantom-{i:06d}",
                split=split,
                streams=held,
                licence="synthetic, Apache-2.0",
                grid=tuple(s for s in held if s in axial),  # one slice of one body
            )
            for i, split in enumerate(splits)
            for held in (everything if split == "test" else streams[i % len(pairs)],)
        ]
        # A chunk holds neighbours among those that show the modality: nothing is rendered that nobody may read.
        self._rows = {m: [i for i, r in enumerate(self.records) if m in r.streams] for m in RENDERERS}
        self._place = {m: {index: k for k, index in enumerate(rows)} for m, rows in self._rows.items()}
        self._chunk = max(1, min(CHUNK, CHUNK * 128**2 // size**2))
        # Each modality keeps the same share of what it has: rows come in random order, and a cache that is a little too
        # small renders nearly all of it again.
        widths = {m: len(CONTRASTS) if MODALITIES[m].contrasts else 1 for m in RENDERERS}
        whole = sum(len(rows) * size**2 * 2 * widths[m] for m, rows in self._rows.items())
        share = min(1.0, MEMORY / max(1, whole))
        self._kept = {
            m: functools.lru_cache(maxsize=max(1, int(share * -(-len(rows) // self._chunk))))(
                functools.partial(self._rendered, m)
            )
            for m, rows in self._rows.items()
        }
        # Drawing a subject anew for every report of it took two thirds of a report's time.
        self._found = functools.lru_cache(maxsize=2**17)(lambda index: findings(subject(seed, index)))
        self._lock = threading.Lock()  # threads that want the same chunk wait for it instead of rendering it too

    def __reduce__(self):
        return Phantom, self._args  # a worker process renders for itself

    def identity(self) -> list[str]:
        """What its records hold: a function of these numbers."""
        return [repr(self._args)]

    @property
    def steady(self) -> tuple[str, ...]:
        """See `source.steady`: of an image whose contrast is not stated `rng` draws it."""
        return tuple(s for m in RENDERERS for s in MODALITIES[m].streams if ":" in s or not MODALITIES[m].contrasts)

    def labels(self, index: int) -> Findings:
        """What there is to find in subject `index`."""
        return self._found(index)

    def present(self, index: int) -> dict[str, bool]:
        """See `source.present`."""
        found = self.labels(index)
        return {kind: found.kind == kind for kind in KINDS[1:]} | {"cardiomegaly": bool(found.cardiomegaly)}

    def masks(self, index: int, stream: str) -> Bool[np.ndarray, "h w 1"]:
        """See `source.masks`: of axial slices alone.

        Raises:
          UserError: of a projection, in which a lesion has no edge.
        """
        if MODALITIES[stream.partition(":")[0]].projection:
            raise UserError(f"the phantom has masks of lesions in axial slices, not in {stream}")
        with jax.default_device(host_device()):
            return np.asarray(_lesion(subject(self.seed, index), self.size) > MASK)[..., None]

    def read(self, index: int, stream: str, rng: np.random.Generator) -> np.ndarray | str:
        """A report in words drawn by `rng`, or an image float32 (size size 1) in [-1, 1]."""
        if stream not in self.records[index].streams:
            raise ValueError(f"{self.records[index].id} has no stream {stream!r}, only {self.records[index].streams}")
        if stream == "text":
            return write(self.labels(index), rng)
        modality, _, contrast = stream.partition(":")
        channel = 0
        if MODALITIES[modality].contrasts:  # unstated: any
            channel = list(CONTRASTS).index(stream) if contrast else rng.integers(len(CONTRASTS))
        chunk, row = divmod(self._place[modality][index], self._chunk)
        with self._lock:
            images = self._kept[modality](chunk)
        return images[row, :, :, channel, None].astype(np.float32)

    def images(self, indices: Sequence[int] | np.ndarray, stream: str) -> Float[np.ndarray, "n h w 1"]:
        """Images of several subjects, for evaluation; an unstated contrast is drawn once and for all."""
        return np.stack([self.read(int(i), stream, np.random.default_rng([self.seed, int(i)])) for i in indices])

    def _rendered(self, modality: str, chunk: int) -> np.ndarray:
        rows = self._rows[modality][chunk * self._chunk : (chunk + 1) * self._chunk]
        rows += rows[-1:] * (self._chunk - len(rows))  # one shape, one executable
        subjects = Subject(*map(np.stack, zip(*(subject(self.seed, i) for i in rows), strict=True)))
        with jax.default_device(host_device()):  # out of an accelerator's way, and the same pictures everywhere
            return np.asarray(_render(modality, subjects, self.seed, np.asarray(rows, np.uint32), self.size))
