"""Every case a backend of `ssd_step` has to pass; used like `ssd_suite`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, Arrays, assert_close, exactly, jitted, named, outputs_and_gradients
from tests.kernels.ssd_suite import problem, without

# state-spaces/mamba, tests/ops/triton/test_selective_state_update.py: relative and absolute.
PUBLIC_TOLERANCES = {"float32": (3e-4, 1e-3), "float16": (5e-3, 3e-2), "bfloat16": (1e-2, 1e-1)}


def one_token(arrays: Arrays) -> Arrays:
    """The arguments of `ssd_step` from those of an `ssd` over one token."""
    renamed = {"state" if name == "initial_state" else name: a for name, a in arrays.items()}
    return {name: a[:, 0] if name in ("x", "dt", "B", "C", "z") else a for name, a in renamed.items()}


class SSDStepSuite:
    implementation: str
    bounds = BOUNDS
    sizes: dict[str, int] = {}  # noqa: RUF012, of cases about something else
    shapes = ((1, 1, 32, 16, 1), (3, 6, 32, 64, 3), (2, 5, 64, 128, 1), (1, 2, 128, 256, 2))
    """b, h, p, n, g"""
    copies_nothing = False
    """XLA makes one copy of a small state where it reads the old one twice."""

    def step(self, **options):
        return jitted(pk.ssd_step, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        """y and next state against the recurrence in float64."""
        y, state = self.step(**arrays, **options)
        assert y.dtype == dtype and state.dtype == arrays["state"].dtype
        expected = named(exactly(pk.ssd_step, **arrays, **options), "y", "state")
        assert_close(named((y, state), "y", "state"), expected, self.bounds[dtype])
        return (y, state), expected

    def arrays(self, **sizes) -> Arrays:
        return one_token(problem(l=1, **self.sizes | sizes))

    def test_shapes(self):
        for b, h, p, n, g in self.shapes:
            self.check(self.arrays(b=b, h=h, p=p, n=n, g=g), dt_softplus=True)

    # state-spaces/mamba, test_selective_state_update_with_heads: batch 2, heads of 64 that share A and dt; a cover of
    # its product of parameters, and its tolerances.
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("width, state_size, groups", [(2048, 16, 1), (2048, 32, 2), (4096, 64, 4), (2112, 64, 1)])
    @pytest.mark.parametrize("gated", [False, True])
    def test_public_cases(self, width, state_size, groups, dtype, gated):
        arrays = self.arrays(h=width // 64, p=64, n=state_size, g=groups, dtype=dtype)
        actual, expected = self.check(arrays if gated else without(arrays, "z"), dtype=dtype, dt_softplus=True)
        relative, absolute = PUBLIC_TOLERANCES[dtype]
        for a, e in zip(actual, expected.values(), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=relative, atol=absolute)

    @pytest.mark.parametrize("omitted", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
    def test_without_optional_arguments(self, omitted):
        self.check(without(self.arrays(D="h p"), *omitted), dt_softplus=True)

    def test_step_sizes_are_clipped_also_without_softplus(self):
        arrays = self.arrays()
        self.check(arrays, dt_limit=(0.05, 0.2))
        self.check(arrays, dt_softplus=True, dt_limit=(0.05, 0.2))

    @pytest.mark.parametrize("dt", [-60.0, -15.0, -9.0, -1.0, 0.0, 3.0, 30.0])
    def test_softplus_is_exact_where_it_is_small(self, dt):
        arrays = without(self.arrays(), "dt_bias", "D", "z")
        arrays |= {"dt": np.full_like(arrays["dt"], dt), "state": np.zeros_like(arrays["state"])}
        self.check(arrays, dt_softplus=True)

    def test_low_precision_state(self):
        """The state is rounded when it is stored; y is made of what it was before."""
        arrays = self.arrays()
        arrays["state"] = arrays["state"].astype(jnp.bfloat16)
        y, state = self.step(**arrays, dt_softplus=True)
        exact_y, exact_state = named(exactly(pk.ssd_step, **arrays, dt_softplus=True), "y", "state").values()
        assert state.dtype == jnp.bfloat16
        assert_close(named(y, "y"), {"y": exact_y}, self.bounds["float32"])
        assert_close(named(state, "state"), {"state": exact_state}, 2**-8)  # half a unit in the last place

    def test_gradient(self):
        arrays = self.arrays(D="h p")
        options = {"dt_softplus": True, "dt_limit": (0.05, 0.2)}
        actual = outputs_and_gradients(functools.partial(self.step, **options), arrays)
        truth = functools.partial(pk.ssd_step, implementation="reference", **options)
        for a, e in zip(actual, outputs_and_gradients(truth, arrays, "float64"), strict=True):
            assert_close(a, e, self.bounds["float32"])

    def test_steps_equal_the_scan(self):
        arrays = problem(l=33, D="h p", **self.sizes)
        options = {"dt_softplus": True, "dt_limit": (0.01, 0.3)}
        shared = options | {name: arrays[name] for name in ("A", "D", "dt_bias")}

        def token(state, inputs):
            x, dt, B, C, z = inputs
            y, state = self.step(state=state, x=x, dt=dt, B=B, C=C, z=z, **shared)
            return state, y

        by_token = tuple(jnp.moveaxis(jnp.asarray(arrays[name]), 1, 0) for name in ("x", "dt", "B", "C", "z"))
        state, y = jax.lax.scan(token, jnp.asarray(arrays["initial_state"]), by_token)
        expected = exactly(pk.ssd, **arrays, **options, return_final_state=True)
        actual = (np.moveaxis(np.asarray(y), 0, 1), state)
        assert_close(named(actual, "y", "state"), named(expected, "y", "state"), self.bounds["float32"])

    def test_bit_identical_on_repetition(self):
        arrays = self.arrays(dtype="bfloat16")
        first, second = (self.step(**arrays, dt_softplus=True) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_donated_state_is_overwritten(self):
        arrays = {name: jnp.asarray(a) for name, a in self.arrays().items()}
        assert_overwritten(functools.partial(self.step, dt_softplus=True), arrays, "state")
        if self.copies_nothing:
            assert_nothing_is_copied(functools.partial(self.step, dt_softplus=True), arrays, "state")


def assert_overwritten(step, arrays: Arrays, *states: str) -> None:
    """The states among the arguments, donated, lend their memory to the next states, the last outputs of `step`."""
    memory = _compiled(_donating(step, states), arrays, states).memory_analysis()
    assert memory.alias_size_in_bytes == sum(arrays[name].nbytes for name in states)


def assert_nothing_is_copied(step, arrays: Arrays, *states: str) -> None:
    """The compiled program holds no copy of a state: for one token, and in a loop over tokens."""
    once = _donating(step, states)

    def often(donated, rest):
        def token(i, carry):
            y, donated = carry
            new, donated = once(donated, rest)
            return y + new, donated

        y, _ = jax.eval_shape(once, donated, rest)
        return jax.lax.fori_loop(0, 3, token, (jnp.zeros(y.shape, y.dtype), donated))

    for function in (once, often):
        program = _compiled(function, arrays, states).as_text()
        for name in states:
            shape = f"[{','.join(map(str, arrays[name].shape))}]"
            copies = [line.strip() for line in program.splitlines() if " copy(" in line and shape in line]
            assert not copies, copies


def _donating(step, states):
    def once(donated, rest):
        y, *donated = step(**donated, **rest)
        return y, dict(zip(states, donated, strict=True))

    return once


def _compiled(function, arrays: Arrays, states):
    donated = {name: arrays[name] for name in states}
    rest = {name: a for name, a in arrays.items() if name not in states}
    return jax.jit(function, donate_argnums=0).lower(donated, rest).compile()
