"""The gated norm backends, and their oracle against NumPy."""

import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import exactly
from tests.kernels.gated_rms_norm_suite import GatedRMSNormSuite, problem


class TestXLA(GatedRMSNormSuite):
    implementation = "xla"


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 3, 12])
def test_reference_against_numpy(norm_before_gate, group_size):
    arrays = {name: a.astype(np.float64) for name, a in problem(4, 12).items()}
    x, z, weight = arrays.values()
    size = group_size or 12
    expected = np.zeros_like(x)
    for row in range(4):
        gate = z[row] / (1 + np.exp(-z[row]))
        for start in range(0, 12, size):
            part = slice(start, start + size)
            value = x[row, part] if norm_before_gate else x[row, part] * gate[part]
            value = value / np.sqrt(np.mean(value**2) + 1e-3) * weight[part]
            expected[row, part] = value * gate[part] if norm_before_gate else value
    options = {"eps": 1e-3, "group_size": group_size, "norm_before_gate": norm_before_gate}
    np.testing.assert_allclose(exactly(pk.gated_rms_norm, **arrays, **options)[0], expected, rtol=1e-12)


def test_wrong_arguments(unchecked):
    norm, arrays = unchecked(pk.gated_rms_norm), problem(2, 12)
    with pytest.raises(ValueError, match=r"z: got shape \(2, 11\), expected \[... c\] = \(2, 12\)"):
        norm(**arrays | {"z": arrays["z"][:, 1:]}, eps=1e-5)
    with pytest.raises(ValueError, match=r"weight: got shape \(11,\)"):
        norm(**arrays | {"weight": arrays["weight"][1:]}, eps=1e-5)
    with pytest.raises(ValueError, match="channels: got 12, expected a multiple of group_size = 5"):
        norm(**arrays, eps=1e-5, group_size=5)
