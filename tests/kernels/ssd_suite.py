"""Every case a backend of `ssd` has to pass. A backend inherits the suite and names itself:

    class TestXLA(SSDSuite):
        implementation = "xla"

The truth is the token recurrence in float64 (`reference`), which `test_ssd_reference.py` proves against plain NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.specs import SSDSpec
from tests.kernels.compare import (
    BOUNDS,
    Arrays,
    assert_as_exact,
    assert_close,
    exactly,
    jitted,
    named,
    on_device,
    outputs_and_gradients,
)

INF = float("inf")


def problem(b=2, l=37, h=4, p=8, n=8, g=2, *, dtype="float32", D="h", seed=0) -> Arrays:  # noqa: E741, axis letters
    """Every array argument of `ssd` that has a gradient; x, dt, B, C and z in `dtype`, the others float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h),
        "A": -rng.uniform(0.5, 4, h).astype(np.float32),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h) if D == "h" else normal(h, p),
        "z": normal(b, l, h, p),
        "dt_bias": rng.uniform(-4, -1, h).astype(np.float32),
        "initial_state": normal(b, h, p, n),
    }
    low = jnp.dtype(dtype)
    return {name: a.astype(low) if name in ("x", "dt", "B", "C", "z") else a for name, a in arrays.items()}


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: a for name, a in arrays.items() if name not in names}


class SSDSuite:
    implementation: str
    bounds = BOUNDS

    def ssd(self, **options):
        return jitted(pk.ssd, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", bound=None, **options):
        """Output, final state and all gradients against the recurrence in float64."""
        options = {"dt_softplus": True, "return_final_state": True} | on_device(options)
        actual = outputs_and_gradients(functools.partial(self.ssd, **options), arrays)
        truth = functools.partial(pk.ssd, implementation="reference", **options)
        expected = outputs_and_gradients(truth, arrays, "float64")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, bound or self.bounds[dtype])

    @pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 119, 300, 729, 2048])
    def test_lengths(self, length):
        self.check(problem(l=length))

    @pytest.mark.parametrize("groups", [1, 2, 8, 16])
    def test_groups(self, groups):
        self.check(problem(h=16, g=groups, l=50))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("D", ["h", "h p"])
    def test_dtypes(self, dtype, D):
        arrays = problem(l=100, dtype=dtype, D=D)
        y, state = jax.eval_shape(functools.partial(self.ssd, return_final_state=True), **arrays)
        assert y.dtype == dtype and state.dtype == jnp.float32
        self.check(arrays, dtype=dtype)

    @pytest.mark.parametrize("omitted", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "initial_state")])
    def test_without_optional_arguments(self, omitted):
        self.check(without(problem(l=70), *omitted))

    def test_without_softplus_or_final_state(self):
        arrays = without(problem(l=70), "dt_bias")
        arrays["dt"] = np.abs(arrays["dt"])
        self.check(arrays, dt_softplus=False, return_final_state=False)

    @pytest.mark.parametrize("head_dim, state_size", [(64, 16), (32, 64), (128, 128), (64, 256), (5, 3)])
    def test_widths(self, head_dim, state_size):
        self.check(problem(b=1, l=80, h=2, g=1, p=head_dim, n=state_size))

    # vLLM, test_mamba_ssm_ssd.py, test_mamba_chunk_scan_single_example; a cover of its product of parameters.
    @pytest.mark.parametrize("length, chunk_size", [(119, 17), (128, 32)])
    @pytest.mark.parametrize(
        "heads, width, dtype",
        [(3, 5, "float32"), (4, 8, "bfloat16"), (11, 19, "float16"), (16, 32, "float32"), (32, 128, "bfloat16")],
    )
    def test_vllm_single_examples(self, heads, width, dtype, length, chunk_size):
        arrays = without(problem(b=1, l=length, h=heads, p=width, n=width, g=1, dtype=dtype), "z", "initial_state")
        options = {"dt_softplus": True, "return_final_state": True}
        actual = self.ssd(**arrays, chunk_size=chunk_size, **options)
        expected = exactly(pk.ssd, **arrays, **options)
        assert_close(named(actual, "y", "state"), named(expected, "y", "state"), self.bounds[dtype])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_strong_decay(self, dtype):
        """exp(sum of dt A) underflows within a few tokens; a decay split into exp(s_i) exp(-s_j) would overflow."""
        arrays = without(problem(l=130, dtype=dtype), "dt_bias")
        arrays["A"] = np.full_like(arrays["A"], -16)
        arrays["dt"] = np.random.default_rng(1).uniform(0, 10, arrays["dt"].shape).astype(arrays["dt"].dtype)
        arrays["dt"][:, ::3] = 0.001  # some tokens that see their neighbours
        # Sums of dt A reach thousands here, where neighbouring float32 numbers lie 2e-4 apart: so wrong are the decays.
        self.check(arrays, dtype=dtype, dt_softplus=False, bound=max(2e-3, self.bounds[dtype]))

    def test_no_decay(self):
        arrays = without(problem(l=130), "dt_bias")
        arrays["A"] = np.full_like(arrays["A"], -1e-6)
        self.check(arrays)

    def test_dt_limit(self):
        self.check(problem(l=70), dt_limit=(0.05, 0.2))

    def test_dt_limit_edges(self):
        """Outside the limits the gradient is exactly zero; on them it is that of the step size itself."""
        arrays = without(problem(l=5), "dt_bias", "z")
        low, high = 0.125, 0.5
        arrays["dt"][:] = np.array([0.12, low, 0.3, high, 0.51], np.float32)[None, :, None]
        self.check(arrays, dt_softplus=False, dt_limit=(low, high))
        _, gradients = outputs_and_gradients(
            functools.partial(self.ssd, dt_limit=(low, high), return_final_state=True), arrays
        )
        gradient = gradients["gradient of dt"]
        assert (gradient[:, [0, 4]] == 0).all() and (gradient[:, 1:4] != 0).all()

    @pytest.mark.parametrize("chunk_size", [1, 16, 64, 100, 1000])
    def test_chunk_size_changes_rounding_only(self, chunk_size):
        arrays = problem(l=150)
        options = {"dt_softplus": True, "return_final_state": True}
        expected = outputs_and_gradients(functools.partial(self.ssd, **options), arrays)
        actual = outputs_and_gradients(functools.partial(self.ssd, chunk_size=chunk_size, **options), arrays)
        for a, e in zip(actual, expected, strict=True):
            # Both sides round, and the gradient of A is a difference of sums over a chunk.
            assert_close(a, e, 4 * self.bounds["float32"])

    def test_bit_identical_on_repetition(self):
        arrays = problem(l=150, dtype="bfloat16")
        function = functools.partial(self.ssd, dt_softplus=True, return_final_state=True)
        first, second = (outputs_and_gradients(function, arrays) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])

    @pytest.mark.parametrize("cuts", [(1,), (63,), (64, 65), (40, 80, 100)])
    def test_pieces_equal_the_whole(self, cuts):
        arrays = problem(l=130)
        state = arrays["initial_state"]
        options = {"dt_softplus": True, "return_final_state": True}
        y, final = self.ssd(**arrays, **options)
        pieces = []
        for start, end in zip((0, *cuts), (*cuts, 130), strict=True):
            piece = {name: a[:, start:end] if name in ("x", "dt", "B", "C", "z") else a for name, a in arrays.items()}
            y_piece, state = self.ssd(**piece | {"initial_state": state}, **options)
            pieces.append(y_piece)
        actual = named((np.concatenate(pieces, axis=1), state), "y", "state")
        assert_close(actual, named((y, final), "y", "state"), self.bounds["float32"])

    def test_gradient_through_pieces(self):
        """The gradient of the first piece reaches it through the state that the second one starts from."""

        def whole(**arrays):
            return self.ssd(**arrays, dt_softplus=True)

        def halves(initial_state, **arrays):
            first, second = (
                {k: a[:, s] if a.ndim > 2 else a for k, a in arrays.items()} for s in (slice(40), slice(40, None))
            )
            y_1, state = self.ssd(**first, initial_state=initial_state, dt_softplus=True, return_final_state=True)
            return jnp.concatenate([y_1, self.ssd(**second, initial_state=state, dt_softplus=True)], axis=1)

        arrays = problem(l=70)
        for a, e in zip(outputs_and_gradients(halves, arrays), outputs_and_gradients(whole, arrays), strict=True):
            assert_close(a, e, self.bounds["float32"])

    def test_rows_have_their_own_initial_state(self):
        arrays = problem(b=3, l=40)
        y, state = self.ssd(**arrays, return_final_state=True)
        for row in range(3):
            alone = {name: a[row : row + 1] if a.ndim > 2 else a for name, a in arrays.items()}
            expected = named(self.ssd(**alone, return_final_state=True), "y", "state")
            actual = named((y[row : row + 1], state[row : row + 1]), "y", "state")
            assert_close(actual, expected, self.bounds["float32"])

    # Segments.

    def test_segments(self):
        """Resets inside a chunk, on its edge, padding in front, between and behind, and an id that comes back."""
        ids = np.stack(
            [
                np.repeat([-1, 5, 2, -3, 5, -1], [3, 40, 21, 6, 50, 11]),
                np.repeat([0, 1, 2, 0, 7, 8], [64, 1, 1, 30, 2, 33]),
            ]
        ).astype(np.int32)
        self.check(problem(l=131), segment_ids=ids)

    # state-spaces/mamba, tests/ops/triton/test_ssd.py: packed sequences of 1 to 199 tokens; fewer, and of y as well.
    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_state_spaces_varlen(self, groups):
        rng = np.random.default_rng(0)
        ids = np.repeat(np.arange(8, dtype=np.int32), rng.integers(1, 200, 8))[None]
        arrays = problem(b=1, l=ids.size, h=8, p=16, n=32, g=groups)
        arrays = without(arrays, "D", "z", "dt_bias", "initial_state")
        arrays |= {"A": -0.1 * rng.uniform(size=8).astype(np.float32), "dt": arrays["dt"] - 4}
        options = {"segment_ids": ids, "dt_softplus": True, "return_final_state": True}
        expected = exactly(pk.ssd, **arrays, **options)
        assert_close(
            named(self.ssd(**arrays, **options), "y", "state"), named(expected, "y", "state"), self.bounds["float32"]
        )

    def test_padding_in_the_middle_of_a_sequence_is_skipped(self):
        arrays = problem(b=1, l=60)
        ids = np.full((1, 60), 3, np.int32)
        ids[:, 20:33] = -1
        kept = ids[0] >= 0
        squeezed = {name: a[:, kept] if name in ("x", "dt", "B", "C", "z") else a for name, a in arrays.items()}
        y, state = self.ssd(**arrays, segment_ids=ids, dt_softplus=True, return_final_state=True)
        expected = self.ssd(**squeezed, dt_softplus=True, return_final_state=True)
        assert (np.asarray(y)[:, ~kept] == 0).all()
        actual = named((y[:, kept], state), "y", "state")
        assert_close(actual, named(expected, "y", "state"), self.bounds["float32"])

    def test_only_padding(self):
        arrays = problem(b=1, l=20)
        y, state = self.ssd(**arrays, segment_ids=np.full((1, 20), -1, np.int32), return_final_state=True)
        assert (np.asarray(y) == 0).all()
        np.testing.assert_array_equal(state, arrays["initial_state"])

    def test_nothing_leaks_out_of_padding(self):
        """What stands in padding, even infinities, changes neither results nor gradients of the other arguments."""
        arrays = without(problem(b=1, l=40), "z")
        ids = np.repeat([-1, 4, -1, 5, -1], [5, 10, 5, 12, 8])[None].astype(np.int32)
        changed = {name: a.copy() for name, a in arrays.items()}
        for name in ("x", "dt", "B", "C"):
            changed[name][:, ids[0] < 0] = 1e4
        function = functools.partial(self.ssd, segment_ids=ids, dt_softplus=True, return_final_state=True)
        for a, b in zip(outputs_and_gradients(function, changed), outputs_and_gradients(function, arrays), strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)

    @settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])  # to shrink is to compile
    @given(
        runs=st.lists(st.tuples(st.integers(1, 25), st.integers(-1, 2)), min_size=1, max_size=5),
        chunk_size=st.sampled_from([None, 1, 7, 16]),
    )
    def test_packed_row_equals_separate_sequences(self, runs, chunk_size):
        ids = np.concatenate([np.full(length, i, np.int32) for length, i in runs])
        arrays = problem(b=1, l=len(ids), h=2, p=4, n=4, g=1)
        y, state = self.ssd(
            **arrays, segment_ids=ids[None], dt_softplus=True, return_final_state=True, chunk_size=chunk_size
        )
        real = np.flatnonzero(ids >= 0)
        sequences = np.split(real, np.flatnonzero(np.diff(ids[real])) + 1) if len(real) else []
        expected_y = np.zeros(y.shape)
        expected_state = arrays["initial_state"]
        for number, tokens in enumerate(sequences):
            alone = {k: a[:, tokens] if k in ("x", "dt", "B", "C", "z") else a for k, a in arrays.items()}
            if number:
                alone["initial_state"] = np.zeros_like(alone["initial_state"])
            outputs = exactly(pk.ssd, **alone, dt_softplus=True, return_final_state=True)
            expected_y[:, tokens], expected_state = outputs
        expected = named((expected_y, expected_state), "y", "state")
        assert_close(named((y, state), "y", "state"), expected, self.bounds["float32"])


class KernelSSDSuite(SSDSuite):
    """For the hand-written kernels, which the chunked path in XLA measures."""

    dtypes = ("float32", "bfloat16", "float16")  # of x, B and C, that the kernel multiplies in

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_as_exact_as_xla(self, dtype):
        """The error of each output and each gradient is at most 1.5 times that of the chunked path in the same dtype."""
        if dtype not in self.dtypes:
            pytest.skip(f"{self.implementation} does not multiply in {dtype}")
        arrays = problem(b=1, l=300, h=4, g=2, p=64, n=64, dtype=dtype)
        options = {"dt_softplus": True, "return_final_state": True}

        def results(implementation, exact_dtype=None):
            function = functools.partial(pk.ssd, implementation=implementation, **options)
            outputs, gradients = outputs_and_gradients(function, arrays, exact_dtype)
            return outputs | gradients

        assert_as_exact(results(self.implementation), results("xla"), results("reference", "float64"), dtype)

    def check_more_than_2_to_the_31_elements(self):
        """Both ends of a row whose x does not fit 32 bits, forward and gradient, equal those of a row cut out there."""
        length, piece, shown = 8208 * 64, 4096, 1024  # what is further away than piece - shown is forgotten
        spec = SSDSpec(b=1, l=length, h=64, p=64, n=64)
        assert spec.shapes()["x"].size > 2**31
        keys = jax.random.split(jax.random.key(0), 4)
        x, dy, B, C = (
            jnp.tile(jax.random.normal(key, (1, 8208, *spec.shapes()[name].shape[2:]), jnp.bfloat16), (1, 64, 1, 1))
            for key, name in zip(keys, ("x", "x", "B", "C"), strict=True)
        )
        A = jnp.full(64, -1.0)

        @jax.jit
        def y_and_dx(x, dy, B, C):
            dt = jnp.full(x.shape[:3], 0.05)
            y, pullback = jax.vjp(lambda x: pk.ssd(x, dt, A, B, C, implementation=self.implementation), x)
            return y, *pullback(dy)

        whole = y_and_dx(x, dy, B, C)
        for start, at in ((0, slice(None, shown)), (length - piece, slice(piece - shown, None))):
            alone = y_and_dx(*(a[:, start : start + piece] for a in (x, dy, B, C)))
            actual, expected = tuple(a[:, start : start + piece][:, at] for a in whole), tuple(a[:, at] for a in alone)
            assert_close(named(actual, "y", "dx"), named(expected, "y", "dx"), BOUNDS["bfloat16"])
