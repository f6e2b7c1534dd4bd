"""What segment ids mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.segments import number_segments


@pytest.mark.parametrize(
    "ids, index",
    [
        ([3, 3, 3], [0, 0, 0]),
        ([0, 0, 5, 5, 0], [0, 0, 1, 1, 2]),
        ([-1, -1, 7, 7, 8], [0, 0, 0, 0, 1]),
        ([7, -1, 7, -2, 8, -1], [0, 0, 0, 0, 1, 1]),
        ([-1, -1], [0, 0]),
        ([4], [0]),
    ],
)
def test_number_segments(ids, index):
    segments = number_segments(jnp.array([ids], jnp.int32))
    assert segments.index.tolist() == [index]
    assert segments.real.tolist() == [(np.array(ids) >= 0).tolist()]
