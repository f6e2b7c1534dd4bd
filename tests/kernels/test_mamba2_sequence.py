"""A whole mixer between its projections: against the oracles of its parts, forward and gradient, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.mamba2_sequence import pallas_gpu
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
from tests.kernels.ssd_suite import without
from tests.kernels.test_ssd_pallas_gpu import export


def problem(b=2, l=70, h=4, p=16, n=16, g=2, w=4, *, dtype="float32", D="h", seed=0) -> Arrays:  # noqa: E741
    """Every array argument with a gradient; zxbcdt and the convolution state in `dtype`, the others float32."""
    rng = np.random.default_rng(seed)
    inner, channels = h * p, h * p + 2 * g * n

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "zxbcdt": normal(b, l, inner + channels + h),
        "conv_weight": normal(channels, w),
        "A": -rng.uniform(0.5, 4, h).astype(np.float32),
        "conv_bias": normal(channels),
        "D": normal(h) if D == "h" else normal(h, p),
        "dt_bias": rng.uniform(-4, -1, h).astype(np.float32),
        "norm_weight": 1 + 0.1 * normal(inner),
        "conv_state": normal(b, w - 1, channels),
        "ssm_state": normal(b, h, p, n),
    }
    return {name: a.astype(jnp.dtype(dtype)) if name in ("conv_state", "zxbcdt") else a for name, a in arrays.items()}


SEGMENTS = np.stack(
    [np.repeat([-1, 5, 2, -3, 5, -1], [3, 30, 11, 6, 15, 5]), np.repeat([0, 1, 2, 0, 7, 8], [64, 1, 1, 1, 2, 1])]
).astype(np.int32)


class Mamba2SequenceSuite:
    implementation: str
    bounds = BOUNDS

    def sequence(self, **options):
        return jitted(pk.mamba2_sequence, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        """y, both states and all gradients against the recurrence in float64."""
        options = {"return_states": True} | on_device(options)
        actual = outputs_and_gradients(functools.partial(self.sequence, **options), arrays)
        truth = functools.partial(pk.mamba2_sequence, implementation="reference", **options)
        expected = outputs_and_gradients(truth, arrays, "float64")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, self.bounds[dtype])

    @pytest.mark.parametrize("length", [1, 3, 64, 70])
    def test_lengths(self, length):
        self.check(problem(l=length), groups=2)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("norm_before_gate", [False, True])
    def test_dtypes(self, dtype, norm_before_gate):
        arrays = problem(b=1, h=2, p=64, n=64, g=1, dtype=dtype, D="h p")
        y, conv, ssm = self.sequence(**arrays, return_states=True)
        assert (y.dtype, conv.dtype, ssm.dtype) == (dtype, dtype, "float32")
        self.check(arrays, dtype=dtype, norm_before_gate=norm_before_gate)

    @pytest.mark.parametrize(
        "omitted", [("conv_state", "ssm_state"), ("conv_bias", "D", "dt_bias"), ("conv_state", "D")]
    )
    def test_without_optional_arguments(self, omitted):
        self.check(without(problem(), *omitted), groups=2)

    def test_segments(self):
        self.check(problem(), groups=2, segment_ids=SEGMENTS)

    def test_without_states(self):
        self.check(without(problem(), "conv_state", "ssm_state"), groups=2, return_states=False, dt_limit=(0.05, 0.3))

    def test_pieces_and_steps_equal_the_whole(self):
        arrays = problem(b=1, l=9, g=1)
        y, conv, ssm = self.sequence(**arrays, return_states=True)
        rest = without(arrays, "zxbcdt", "conv_state", "ssm_state")
        first, *states = self.sequence(**arrays | {"zxbcdt": arrays["zxbcdt"][:, :5]}, return_states=True)
        pieces = [np.asarray(first)]
        for t in range(5, 9):
            y_t, *states = jitted(
                pk.mamba2_step, conv_state=states[0], ssm_state=states[1], zxbcdt=arrays["zxbcdt"][:, t], **rest
            )
            pieces.append(np.asarray(y_t)[:, None])
        actual = named((np.concatenate(pieces, axis=1), *states), "y", "conv_state", "ssm_state")
        assert_close(actual, named((y, conv, ssm), "y", "conv_state", "ssm_state"), self.bounds["float32"])


class TestXLA(Mamba2SequenceSuite):
    implementation = "xla"

    def test_without_a_norm(self):
        self.check(without(problem(), "norm_weight"), groups=2)


@pytest.mark.gpu
class TestPallasGPU(Mamba2SequenceSuite):
    """float32 problems are handed to the kernels in bfloat16; what they may be off, XLA in the same dtype tells."""

    implementation = "pallas_gpu"

    def check(self, arrays, *, dtype="float32", **options):
        dtype = "bfloat16" if dtype == "float32" else dtype
        # A group must have a multiple of 128 channels, and so must B and C together.
        if arrays["zxbcdt"].shape[-1] < 600:
            groups = options.get("groups", 1)
            batch, length, _ = arrays["zxbcdt"].shape
            wide = problem(batch, length, h=4, p=64, n=64 // groups, g=groups)
            arrays = {name: a for name, a in wide.items() if name in arrays}
        arrays = {n: a.astype(dtype) if n in ("zxbcdt", "conv_state") else a for n, a in arrays.items()}
        options = {"return_states": True} | on_device(options)

        def results(implementation, exact_dtype=None):
            function = functools.partial(pk.mamba2_sequence, implementation=implementation, **options)
            outputs, gradients = outputs_and_gradients(function, arrays, exact_dtype)
            return outputs | gradients

        ours, xla, exact = results("pallas_gpu"), results("xla"), results("reference", "float64")
        # Between its kernels numbers are rounded that XLA, which fuses, may keep. The gradients of A and dt_bias are a
        # few numbers here, sums in which such roundings nearly cancel.
        few = {f"gradient of {name}" for name in ("A", "dt_bias")}
        assert_as_exact(ours, xla, {name: a for name, a in exact.items() if name not in few}, dtype, units=0.5)
        assert_as_exact(ours, xla, {name: a for name, a in exact.items() if name in few}, dtype, units=2)

    @pytest.mark.parametrize(
        "shape", [(2, 300, 4, 64, 128, 1, 4), (1, 200, 8, 64, 64, 2, 3), (1, 70, 2, 128, 64, 1, 2)]
    )
    def test_shapes(self, shape):
        self.check(problem(*shape, dtype="bfloat16"), dtype="bfloat16", groups=shape[5])

    def test_pieces_and_steps_equal_the_whole(self):
        pytest.skip("the sizes of this case are too small for the kernels")

    def test_runs_the_kernels(self):
        arrays = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in large().items()}
        text = jax.jit(lambda arrays: pk.mamba2_sequence(**arrays)).lower(arrays).as_text()
        assert "ssd_walk" in text and "gated_rms_norm" in text


# On a machine without a GPU.


def large(dtype="bfloat16", **sizes) -> Arrays:
    arrays = problem(**{"b": 1, "l": 100, "h": 4, "p": 64, "n": 64, "g": 1} | sizes, dtype=dtype)
    return {name: jnp.asarray(a) for name, a in arrays.items()}


@pytest.mark.parametrize("everything", [False, True])
def test_lowers_for_cuda_without_copies(everything):
    arrays = large() if everything else without(large(), "conv_state", "ssm_state", "D")
    options = {"segment_ids": jnp.zeros((1, 100), jnp.int32)} if everything else {}

    def loss(arrays):
        outputs = pk.mamba2_sequence(**arrays, **options, return_states=everything, implementation="pallas_gpu")
        return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(outputs))

    text = export(jax.value_and_grad(loss), arrays)
    for kernel in ("ssd_walk", "ssd_gradients", "causal_conv1d_gradient", "gated_rms_norm_gradient"):
        assert kernel in text
    if not everything:  # no part of z or x, nor a whole gradient, is cut out or put together
        inner, projected = 256, arrays["zxbcdt"].shape[-1]
        moves = [line for line in text.splitlines() if "stablehlo.slice" in line or "stablehlo.concatenate" in line]
        assert not any(
            f"x{inner}xbf16>" in m.split("->")[-1] or f"x{projected}xbf16>" in m.split("->")[-1] for m in moves
        )


def test_without_its_kernels_each_part_chooses_its_own(monkeypatch):
    arrays = large("float32")
    assert "mamba2_sequence" in pk.OPS
    explained = pk.explain("mamba2_sequence", **arrays)
    assert explained.chosen == "xla" and "the default device is a cpu" in explained.reasons["pallas_gpu"]
    seen = []
    for op in ("ssd", "causal_conv1d", "gated_rms_norm"):
        run = type(pk.OPS[op])._run
    monkeypatch.setattr(
        type(pk.OPS["ssd"]), "_run", lambda op, i, *a, **k: (seen.append((op.name, i)), run(op, i, *a, **k))[1]
    )
    jax.eval_shape(lambda arrays: pk.mamba2_sequence(**arrays), arrays)
    assert seen == [("causal_conv1d", None), ("ssd", None), ("gated_rms_norm", None)]
    seen.clear()
    jax.eval_shape(lambda arrays: pk.mamba2_sequence(**arrays, implementation=("pallas_gpu", "reference")), arrays)
    assert [name for name, _ in seen] == ["causal_conv1d", "ssd", "gated_rms_norm"]  # x is float32


@pytest.mark.parametrize(
    "sizes, omitted, reason",
    [
        ({}, ("norm_weight",), "there is no norm_weight; the kernel normalises"),
        ({"dtype": "float32"}, (), "x is float32; the kernel multiplies bfloat16 or float16"),
        ({"n": 256}, (), "the state size is 256; the kernel of the gradient takes up to 128"),
        ({"w": 1}, (), "the convolution has one tap"),
        ({"w": 5}, (), "the convolution has 5 taps"),
        ({"h": 3}, (), "a group has 192 channels; the kernel takes multiples of 128"),
        ({"n": 32}, (), "B and C have 64 channels; the kernel takes multiples of 128"),
    ],
)
def test_what_the_kernels_refuse(sizes, omitted, reason):
    assert pallas_gpu.why_not_mamba2_sequence(**without(large(**sizes), *omitted)).startswith(reason)


def test_wrong_arguments(unchecked):
    sequence, arrays = unchecked(pk.mamba2_sequence), problem(g=1)
    with pytest.raises(
        ValueError, match=r"zxbcdt: got 164 channels, of which 96 for conv_weight and 4 heads, expected"
    ):
        sequence(**arrays, groups=3)
    with pytest.raises(
        ValueError, match=r"ssm_state: got shape \(2, 4, 16, 8\), expected \[b h p n\] = \(2, 4, 16, 16\)"
    ):
        sequence(**arrays | {"ssm_state": arrays["ssm_state"][..., :8]})
    with pytest.raises(ValueError, match=r"norm_weight: got shape \(63,\)"):
        sequence(**arrays | {"norm_weight": arrays["norm_weight"][1:]})


def test_reference_is_its_parts_one_after_the_other():
    """Written out once more, in float64."""
    arrays = problem(b=1, l=7, g=1)
    z, x, B, C, dt = np.split(arrays["zxbcdt"], np.cumsum([64, 64, 16, 16]), axis=-1)
    convolved, _ = exactly(
        pk.causal_conv1d,
        x=np.concatenate([x, B, C], axis=-1),
        weight=arrays["conv_weight"],
        bias=arrays["conv_bias"],
        initial_state=arrays["conv_state"],
        activation="silu",
        return_final_state=True,
    )
    x, B, C = np.split(convolved, [64, 80], axis=-1)
    y, state = exactly(
        pk.ssd,
        x=x.reshape(1, 7, 4, 16),
        dt=dt,
        B=B[:, :, None],
        C=C[:, :, None],
        dt_softplus=True,
        initial_state=arrays["ssm_state"],
        return_final_state=True,
        **{name: arrays[name] for name in ("A", "D", "dt_bias")},
    )
    (y,) = exactly(pk.gated_rms_norm, x=y.reshape(1, 7, 64), z=z, weight=arrays["norm_weight"], eps=1e-5)
    actual = exactly(pk.mamba2_sequence, **arrays, return_states=True)
    np.testing.assert_allclose(actual[0], y, rtol=1e-9)
    np.testing.assert_allclose(actual[2], state, rtol=1e-9)
