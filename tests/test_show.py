"""Pieces of what a stage ends with; whole pictures are drawn in the tests of runs."""

import numpy as np

from medm2g_jax.evaluate import show


def test_pairs_without_text_are_all_told_apart():
    """A batch begins with `about`, which is no row of anything."""
    image = np.zeros((5, 4, 4, 1), np.float32)
    batch = {"about": {"stream": {"mri": np.zeros(5, np.int32)}}, "ct": image, "mri": image}
    np.testing.assert_array_equal(show._classes(batch, None), np.arange(5))
