"""The body of the phantom: subjects drawn from (seed, index), and their anatomy as one analytic function of space.

`tissues` gives the fractions of every tissue at any points, soft at the edges; `phantom.py` makes images of them.
Space is in cm: x to the patient's left, y to the back, z to the head, 0 in the middle of the chest.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from medm2g_jax.data.phantom.report import KINDS, LEVELS, SIZES, Findings

# Tissue: HU, PD, T1 ms, T2 ms at 1.5 T.
TISSUES = {
    "air": (-1000.0, 0.0, 1.0, 1.0),
    "fat": (-100.0, 0.90, 260.0, 85.0),
    "soft": (40.0, 0.75, 870.0, 47.0),
    "lung": (-800.0, 0.15, 1100.0, 35.0),
    "blood": (45.0, 0.85, 1400.0, 180.0),
    "bone": (700.0, 0.12, 350.0, 5.0),
    "mass": (45.0, 0.85, 1200.0, 110.0),
    "fluid": (10.0, 1.00, 2500.0, 400.0),
}
TABLE = np.array(list(TISSUES.values()), np.float32)


# --- a subject ------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """float32 scalars (lengths in cm), and the relative jitter of each tissue's PD, T1, T2."""

    kind: np.ndarray  # index in KINDS
    side: np.ndarray  # +1 left, -1 right
    size: np.ndarray  # index in SIZES
    level: np.ndarray  # index in LEVELS
    cardiomegaly: np.ndarray  # 0 or 1
    slice: np.ndarray  # z of the axial slice
    lesion_x: np.ndarray  # towards the lesion's side
    lesion_y: np.ndarray
    lesion_r: np.ndarray  # radius; of an effusion, its thickness
    squash: np.ndarray
    width: np.ndarray  # half, of the body
    depth: np.ndarray
    fat: np.ndarray  # thickness
    apex: np.ndarray  # z of the top of the lungs
    dome: np.ndarray  # z of the right half of the diaphragm
    heart: np.ndarray  # scale
    heart_x: np.ndarray
    ribs: np.ndarray  # phase
    spine: np.ndarray  # phase
    relaxation: np.ndarray  # (tissue, 3)


def subject(seed: int, index: int) -> Subject:
    """The subject number `index`; the same however many subjects there are."""
    rng = np.random.default_rng([seed, index])
    kind = rng.integers(1, len(KINDS)) if rng.random() < 0.75 else 0
    side, size, level = rng.choice([-1, 1]), rng.integers(2), rng.integers(3)
    big_heart = rng.random() < 0.25
    u = rng.uniform
    # Where the lesion lies free of heart and hilum, at each level.
    x, y = ((6.6, 0.5), (8.6, 0.8), (8.6, 3.2))[level]
    radius = {0: (0.0, 0.0), 1: (1.7, 3.3), 2: (2.8, 4.8), 3: (2.6, 5.2)}[kind][size] * u(0.92, 1.08)
    values = Subject(
        kind,
        side,
        size,
        level,
        big_heart,
        slice=(7.5, 1.2, -4.6)[level] + u(-0.8, 0.8),
        lesion_x=x + u(-0.9, 0.9),
        lesion_y=y + u(-1.4, 1.4),
        lesion_r=radius,
        squash=u(0.85, 1.15),
        width=u(15.4, 17.2),
        depth=u(11.2, 12.6),
        fat=u(1.1, 2.4),
        apex=u(12.4, 13.8),
        dome=u(-8.4, -7.4),
        heart=u(1.36, 1.48) if big_heart else u(0.94, 1.06),
        heart_x=u(-0.4, 0.4),
        ribs=u(0, 1),
        spine=u(0, 1),
        relaxation=1 + np.clip(rng.normal(size=(len(TISSUES), 3)), -2, 2) * (0.08, 0.10, 0.12),
    )
    return Subject(*(np.asarray(v, np.float32) for v in values))


def findings(s: Subject) -> Findings:
    """The exact labels of one subject."""
    if s.kind == 0:
        return Findings(KINDS[0], cardiomegaly=bool(s.cardiomegaly))
    side = "left" if s.side > 0 else "right"
    return Findings(KINDS[int(s.kind)], side, SIZES[int(s.size)], LEVELS[int(s.level)], bool(s.cardiomegaly))


# --- anatomy --------------------------------------------------------------------------------------------------------
# Cheap on purpose: a film takes 160 000 points a subject. Edges are linear ramps of the signed distance in cm, and
# distances to ellipsoids come from squares, (1 - r^2)/2 ~ 1 - r at the edge: no root, no exponential.


def _edge(distance, soft=0.4):
    return jnp.clip(0.5 + distance / (2 * soft), 0, 1)


def _oval(*axes):
    """Pairs (offset, radius) -> signed distance inside the ellipsoid, right at its edge, for the last radius."""
    return 0.5 * (1 - sum(jnp.square(d / r) for d, r in axes)) * axes[-1][1]


def _wave(phase):
    """Triangle wave of period 1: 0 at whole numbers, 0.5 between."""
    return 0.5 - jnp.abs(phase - jnp.floor(phase) - 0.5)


def _chest(x, y, z, width, depth, start, top):
    """Signed distance inside a slightly square cylinder that closes as a dome between z = start and z = top."""
    u, v = jnp.square(x / width), jnp.square(y / depth)
    w = jnp.square(jnp.maximum(z - start, 0) / (top - start))
    return 0.5 * (1 - u - v - w + 0.4 * u * v) * (depth + (width - depth) * u)


def _vessels(s, x, a, y, z, spine_y):
    """(great vessels: distance, smaller vessels of the lungs: fraction, airway: distance)."""
    # Ascending and descending aorta joined by the arch, superior vena cava, pulmonary trunk.
    below_arch = 6.6 - z
    ascending = jnp.minimum(_oval((y + 2.2, 1.5), (x + 1.3, 1.5)), jnp.minimum(below_arch, z + 2))
    descending = jnp.minimum(_oval((y - spine_y + 0.6, 1.2), (x - 2.6, 1.2)), below_arch)
    arch = _oval((x - 1.2 - 0.42 * (y - 1.0), 1.25), (z - 6.9, 1.5), (y - 1.0, 4.2))
    cava = jnp.minimum(_oval((y + 0.8, 0.95), (x + 2.9, 0.95)), z + 1)
    trunk = _oval((z - 2.2, 2.4), (y + 2.8, 1.4), (x - 2.3, 1.6))
    great = functools.reduce(jnp.maximum, (ascending, descending, arch, cava, trunk))
    # The hila, from which vessels fan out in two sheets, and thin out.
    hilum = 0.8 * _edge(_oval((z - 1.8, 2.9), (y - 0.6, 1.9), (a - 4.2, 1.9)), 0.7)
    up = z - 1.8
    reach = jnp.maximum(a - 2.0, 0.5) + jnp.abs(up)
    fan = (_wave(3.0 * up / reach + s.spine) - 0.5) * reach / 3.0 + 0.5
    sheet = 0.6 - jnp.abs(jnp.abs(y - 0.6) - 0.4 * (reach - 2.0))
    twigs = _edge(sheet, 0.5) * _edge(fan, 0.3) * jnp.clip(1.2 - 0.1 * reach, 0, 0.9)
    # The trachea, above, divides into the two main bronchi.
    branch = jnp.clip(4.6 - z, 0, 3.2)
    airway = jnp.minimum(_oval((y - 0.9, 0.95), (a - 0.95 * branch, 0.95)), z - 1.4)
    return great, jnp.maximum(hilum, twigs), airway


def _lesions(s, a, y, z, cage):
    """(mass, opacity, effusion): fractions of the lung on the lesion's side; two of them are 0."""
    lx, ly, lz = a - s.lesion_x, y - s.lesion_y, z - s.slice
    radius = jnp.maximum(s.lesion_r, 0.1)  # a subject without lesion has none
    focal = _oval((lx, radius * s.squash), (ly, radius), (lz, radius))
    # A mass is solid up to its edge, an opacity is patchy and fades out.
    mass = _edge(focal, 0.35)
    patches = _wave(0.31 * lx + 0.22 * lz + 0.1) + _wave(0.29 * ly - 0.24 * lx + 0.4) + _wave(0.33 * lz + 0.2 * ly)
    opacity = jnp.clip(2.2 * focal / radius + 0.1, 0, 1) * jnp.minimum(0.35 + 0.6 * patches, 0.9)
    # An effusion is what lies in the lung but not in the lung shifted forward and inward: a crescent that climbs the
    # back and the side from the diaphragm up to its meniscus, above the slice.
    thick = s.lesion_r * jnp.clip((s.slice + 3.2 - z) / 2.6, 0, 1)
    effusion = _edge(-cage(a + 0.6 * thick, y + 0.8 * thick, z))
    return tuple(fraction * (s.kind == kind) for kind, fraction in enumerate((mass, opacity, effusion), 1))


def _bones(s, a, y, z, inside, cage_y, spine_y):
    """Fractions of bone, one for each layer."""
    # Ribs run down from back to front in the wall outside the pleura; in front, they end in cartilage.
    shell = jnp.minimum(0.6 - jnp.abs(inside + 0.7), jnp.minimum(z + 15, a - 1.5 + 0.35 * y))
    ribs = _edge(shell) * _edge(3.0 * (_wave((z - 0.6 * y + 0.25 * a) / 3.0 + s.ribs) - 0.29), 0.25)
    # Vertebrae alternate with discs; an arch around the canal, and processes to the sides and the back.
    step = _wave(z / 2.5 + s.spine)
    bony = _edge(2.5 * (step - 0.1))
    vertebra = _oval((y - spine_y, 1.7), (a, 2.0))
    vertebra = bony * (0.4 * _edge(vertebra) + 0.4 * _edge(0.5 - jnp.abs(vertebra - 0.2)))  # spongy, with a hard rim
    arch = 0.9 * bony * _edge(0.45 - jnp.abs(0.38 * (_canal(a, y, spine_y) - 1.7)), 0.3)
    process = jnp.minimum(0.45 - jnp.abs(y - spine_y - 2.4), 3.3 - a)
    process = jnp.maximum(process, jnp.minimum(0.4 - a, 1.0 - jnp.abs(y - spine_y - 4.4)))
    process = 0.6 * _edge(process, 0.3) * _edge(2.5 * (step - 0.25))
    sternum = jnp.minimum(jnp.minimum(0.6 - jnp.abs(y + cage_y + 0.3), 1.7 - a), jnp.minimum(10 - z, z + 6))
    scapula = jnp.minimum(0.5 - jnp.abs(y - cage_y + 0.35 * (a - 6.5)), jnp.minimum(a - 6.5, 12.5 - a))
    scapula = jnp.minimum(scapula, jnp.minimum(0.8 * (z - 3.5) - 0.5 * jnp.abs(a - 10.5), 13 - z))
    along = a - 1.5
    clavicle = 0.7 - 0.7 * (jnp.square(z - 10.9 - 0.22 * along) + jnp.square(y + cage_y - 0.4 * along))
    clavicle = jnp.minimum(clavicle, jnp.minimum(along, 12 - along))
    humerus = _oval((z - 12.5, 2.4), (y, 2.3), (a - 15.6, 2.3))
    flat = 0.8 * _edge(jnp.maximum(scapula, clavicle), 0.35)
    return ribs, vertebra, arch, process, 0.35 * _edge(sternum, 0.35), flat, 0.6 * _edge(humerus)


def _canal(a, y, spine_y):
    return jnp.square(y - spine_y - 2.5) + jnp.square(a)


def tissues(s: Subject, x: ArrayLike, y: ArrayLike, z: ArrayLike) -> dict[str, Array]:
    """Fractions of every tissue at points (x, y, z) in cm; they sum to 1."""
    a = jnp.abs(x)
    cage_x, cage_y = s.width - s.fat - 1.4, s.depth - s.fat - 1.3
    spine_y = cage_y - 2.3
    cage = functools.partial(_chest, width=cage_x, depth=cage_y, start=-3.0, top=s.apex)
    inside = cage(a, y, z)

    # Lungs: the cage without the mediastinum, above the diaphragm, which is lower on the left.
    dome = s.dome - 1.3 * (x > 0) - 4.5 * (jnp.square((a - 6.5) / 6.5) + jnp.square(y / cage_y))
    above = z - dome
    lung = _edge(jnp.minimum(jnp.minimum(inside, a - (1.6 + 0.09 * (y + 7))), 0.8 * above))
    mediastinum = _edge(jnp.minimum(inside, above)) * _edge(3.2 - a, 0.8)
    bubble = jnp.minimum(_oval((z - s.dome + 4.2, 1.5), (y + 1, 3.0), (x - 6.5, 2.6)), inside)  # air in the stomach

    # The heart leans to the left, front and down: its long axis turns by 35 degrees, its centre shifts with z.
    c, n = 0.82, 0.57
    hx, hy, hz = x - (1.7 + s.heart_x - 0.25 * (z + 3.6)), y - (2.0 * s.heart - 4.2), z + 3.6
    heart = _oval((hz, 2.6 + 2.7 * s.heart), (c * hy + n * hx, 1.7 + 2.6 * s.heart), (c * hx - n * hy, 5.9 * s.heart))
    heart = jnp.minimum(heart, inside)

    # The wall: skin and fat around muscle; shoulders and neck.
    body = _chest(a, y, z, s.width, s.depth, 5.0, 17.0)
    arm = _oval((z - 13.2 + 0.2 * (a - 13), 4.2), (a - 13, 9.0), (y - 1, 5.5))
    neck = jnp.minimum(_oval((y - 1, 6.5), (a, 6.0)), z - 8.6)
    skin = jnp.maximum(body, jnp.maximum(arm, neck))

    great, small, airway = _vessels(s, x, a, y, z, spine_y)
    mass, opacity, effusion = (lung * (x * s.side > 0) * part for part in _lesions(s, a, y, z, cage))
    layers = (  # from the top: each hides what is below it
        (_edge(airway, 0.3), "air"),
        *((bone, "bone") for bone in _bones(s, a, y, z, inside, cage_y, spine_y)),
        (_edge(_oval((y - spine_y, 1.7), (a, 2.0))), "soft"),  # discs and marrow
        (_edge(1.2 - _canal(a, y, spine_y), 0.5), "fluid"),
        (_edge(heart - 1.2, 0.3), "blood"),  # in its muscle
        (_edge(heart), "soft"),
        (_edge(great, 0.35), "blood"),
        (mass, "mass"),
        (opacity, "fluid"),
        (effusion, "fluid"),
        (lung * small, "blood"),
        (lung * jnp.clip(0.004 * (y + 2), 0, 0.05), "blood"),  # blood sinks to the back of the lung
        (lung, "lung"),
        (_edge(bubble), "air"),
        (0.75 * mediastinum, "fat"),
        (_edge(skin - s.fat), "soft"),
        (_edge(skin, 0.3), "fat"),
    )
    out = dict.fromkeys(TISSUES, jnp.zeros(()))
    rest = jnp.ones(())
    for fraction, tissue in layers:
        out[tissue] += rest * fraction
        rest *= 1 - fraction
    return out | {"air": out["air"] + rest}


def hounsfield(fractions: dict[str, Array]) -> Array:
    """HU of a mixture of tissues."""
    return sum(fraction * TISSUES[tissue][0] for tissue, fraction in fractions.items())
