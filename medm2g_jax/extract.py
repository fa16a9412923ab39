"""Medical visual invariant (section 3.3, Eq. 4): two views of an image, their cross-correlation driven to identity.

    L_VR = 1/d { sum_i (1 - C_ii)^2 + lambda_1 sum_{i != j} C_ij^2 },   C = Z1~^T Z2~

with Z~ normalised along the batch to zero mean and standard deviation 1/sqrt(N) (Barlow twins, Zbontar et al. 2021).
In print Eq. 4 lacks i != j and calls the number of features D', its name for the data set.

Views are drawn on device and never flip left and right: a mirrored chest is another patient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.align import HIGHEST
from medm2g_jax.arrays import Image
from medm2g_jax.keys import row_keys


def invariant_loss(z1: Float[Array, "b d"], z2: Float[Array, "b d"], lambda_1: float = 0.0051) -> Float[Array, ""]:
    """Eq. 4 for the projected embeddings of two views; statistics over the (global) batch, biased variance."""

    def standardise(z: Array) -> Array:
        z = z.astype(jnp.float32)
        z = z - z.mean(0)
        return z * jax.lax.rsqrt(jnp.mean(z**2, 0) + 1e-5)

    n, d = z1.shape
    c = jnp.matmul(standardise(z1).T, standardise(z2), precision=HIGHEST) / n
    diagonal = jnp.diagonal(c)
    return (jnp.sum((1 - diagonal) ** 2) + lambda_1 * (jnp.sum(c**2) - jnp.sum(diagonal**2))) / d


def view(key: Array, x: Image, crop: float = 0.6) -> Image:
    """A random view of each image, in [-1, 1]: `crop` to 1 of its area resized back, small rotation, contrast,
    brightness, gamma, light noise; no flip."""
    return jax.vmap(_view, (0, 0, None))(row_keys(key, x.shape[0]), x, crop)


def _view(key: Array, x: Float[Array, "h w 1"], crop: float) -> Float[Array, "h w 1"]:
    k = jax.random.split(key, 7)
    h, w, _ = x.shape
    side = jnp.sqrt(jax.random.uniform(k[0], minval=crop, maxval=1.0))
    angle = jax.random.uniform(k[1], minval=-1.0, maxval=1.0) * jnp.pi / 18
    shift = jax.random.uniform(k[2], (2,), minval=-1.0, maxval=1.0) * (1 - side)
    # One bilinear look-up does crop, shift and rotation; outside the image is the window's minimum.
    gy, gx = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
    sy = side * (jnp.cos(angle) * gy - jnp.sin(angle) * gx) + shift[0]
    sx = side * (jnp.sin(angle) * gy + jnp.cos(angle) * gx) + shift[1]
    at = [(sy + 1) * (h - 1) / 2, (sx + 1) * (w - 1) / 2]
    y = jax.scipy.ndimage.map_coordinates(x[..., 0], at, order=1, mode="constant", cval=-1.0)
    y = jnp.clip((y + 1) / 2, 0.0, 1.0)
    y = y ** jnp.exp(jax.random.uniform(k[3], minval=-0.35, maxval=0.35))
    y = y * jax.random.uniform(k[4], minval=0.8, maxval=1.2) + jax.random.uniform(k[5], minval=-0.1, maxval=0.1)
    y = y + 0.02 * jax.random.normal(k[6], y.shape)
    return jnp.clip(2 * y - 1, -1.0, 1.0)[..., None]
