"""Where randomness comes from: one key a step or sample, folded with names and with the global row.

Everything random is a function of (seed, step, global row, stream), whatever the number of hosts and devices.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medm2g_jax.arrays import Latent


def salt(name: str) -> int:
    """A stable number for a name, to fold into a key."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def row_keys(key: Array, rows: int) -> Array:
    """One key a global row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def row_normal(keys: Array, shape: tuple[int, ...], salt: int) -> Latent:
    """Standard normals (b, *shape) float32: row by row, from each row's key and a salt that says what they are for."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, salt), shape, jnp.float32))(keys)


def row_uniform(keys: Array, name: str) -> Float[Array, "b"]:
    """Uniform numbers in [0, 1), likewise; the name says what they are for."""
    return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, salt(name))))(keys)


def draw_keys(seed: int, numbers: Sequence[int], draws: int) -> Array:
    """A key a draw, those of one sample in a row; the first is that of a single draw, as `row_keys` has it."""
    own = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers))
    more = jax.vmap(lambda key: row_keys(jax.random.fold_in(key, salt("draw")), draws - 1))(own)
    return jnp.concatenate([own[:, None], more], axis=1).reshape(-1)
