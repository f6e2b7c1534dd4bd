"""The oracle itself against the recurrence written out in NumPy, float64, loops and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import on_device
from tests.kernels.ssd_suite import problem


def recurrence(x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids, dt_limit):
    batch, length, heads, _ = x.shape
    per_group = heads // B.shape[2]
    y, final = np.zeros_like(x), initial_state.copy()
    for b in range(batch):
        for h in range(heads):
            state, current = initial_state[b, h].copy(), None
            for t in range(length):
                if segment_ids[b, t] < 0:
                    continue
                if current is not None and segment_ids[b, t] != current:
                    state = np.zeros_like(state)
                current = segment_ids[b, t]
                step = min(max(np.log1p(np.exp(dt[b, t, h] + dt_bias[h])), dt_limit[0]), dt_limit[1])
                state = np.exp(step * A[h]) * state + step * np.outer(x[b, t, h], B[b, t, h // per_group])
                value = state @ C[b, t, h // per_group] + D[h] * x[b, t, h]
                y[b, t, h] = value * z[b, t, h] / (1 + np.exp(-z[b, t, h]))
            final[b, h] = state
    return y, final


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("D", ["h", "h p"])
def test_against_numpy(groups, D):
    arrays = {name: a.astype(np.float64) for name, a in problem(l=21, p=3, n=5, g=groups, D=D).items()}
    ids = np.stack([np.zeros(21, np.int32), np.repeat([-1, 4, -2, 4, 0, 9, -1], 3)]).astype(np.int32)
    options = {"segment_ids": ids, "dt_limit": (0.03, 0.3)}
    with jax.enable_x64(True):
        actual = pk.ssd(
            **on_device(arrays | options), dt_softplus=True, return_final_state=True, implementation="reference"
        )
        assert actual[0].dtype == actual[1].dtype == jnp.float64
        for a, e in zip(actual, recurrence(**arrays, **options), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def test_gradient_against_finite_differences():
    """The suites take their gradients from JAX's derivative of this recurrence; here it is, once, from differences."""
    arrays = {name: a.astype(np.float64) for name, a in problem(b=1, l=6, h=2, p=2, n=2, g=1).items()}
    rng = np.random.default_rng(1)
    directions = {name: rng.normal(size=a.shape) for name, a in arrays.items()}
    ids = jnp.array([[0, 0, 1, -1, 1, 1]], jnp.int32)

    @jax.jit
    def loss(arrays):
        options = {"segment_ids": ids, "dt_softplus": True, "return_final_state": True, "implementation": "reference"}
        y, state = pk.ssd(**arrays, **options)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    with jax.enable_x64(True):
        gradient = jax.grad(loss)(on_device(arrays))
        for name, direction in directions.items():
            step = 1e-6 * direction
            above = loss(on_device(arrays | {name: arrays[name] + step}))
            below = loss(on_device(arrays | {name: arrays[name] - step}))
            actual = np.sum(gradient[name] * direction)
            np.testing.assert_allclose(actual, (above - below) / 2e-6, rtol=1e-6, atol=1e-8, err_msg=name)
