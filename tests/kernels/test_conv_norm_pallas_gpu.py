"""The Mosaic GPU backends of the convolution and of the gated norm: for real with `-m gpu`; on a CPU that they lower.

Both kernels are elementwise but for a sum over channels, and the interpreter of Mosaic GPU knows no loads with a
layout: what they compute is only seen on a GPU.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels.causal_conv1d import pallas_gpu as conv
from pallas_kernels.gated_rms_norm import pallas_gpu as norm
from tests.kernels import causal_conv1d_suite, gated_rms_norm_suite
from tests.kernels.test_ssd_pallas_gpu import export


@pytest.mark.gpu
class TestConvPallasGPU(causal_conv1d_suite.CausalConv1DSuite):
    implementation = "pallas_gpu"

    @pytest.mark.parametrize("channels", [128, 256, 512, 640, 5376])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_channels_that_threads_share_evenly(self, channels, dtype):
        self.check(causal_conv1d_suite.problem(b=1, l=70, c=channels, dtype=dtype), dtype=dtype)

    def test_more_blocks_than_one_for_a_row(self):
        assert conv._tokens(8, 2048, 21) > 32
        self.check(causal_conv1d_suite.problem(b=8, l=1000, c=2048, w=3))

    def test_runs_the_kernel(self):
        arrays = {"x": struct((1, 64, 256), "bfloat16"), "weight": struct((256, 4), "float32")}
        assert "causal_conv1d" in jax.jit(lambda arrays: pk.causal_conv1d(**arrays)).lower(arrays).as_text()


@pytest.mark.gpu
class TestNormPallasGPU(gated_rms_norm_suite.GatedRMSNormSuite):
    implementation = "pallas_gpu"

    @pytest.mark.parametrize("group_size", [None, 512])
    @pytest.mark.parametrize("norm_before_gate", [False, True])
    def test_many_rows(self, group_size, norm_before_gate):
        """More than one row for each block, and a last block that has fewer."""
        arrays = gated_rms_norm_suite.problem(2500, 1024, dtype="bfloat16")
        self.check(arrays, dtype="bfloat16", group_size=group_size, norm_before_gate=norm_before_gate)

    def test_bit_identical_on_repetition(self):
        arrays = gated_rms_norm_suite.problem(3000, 256)
        function = functools.partial(self.norm, eps=1e-5)
        first, second = (gated_rms_norm_suite.outputs_and_gradients(function, arrays) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            for name in a:
                assert (a[name] == b[name]).all(), name

    def test_runs_the_kernel(self):
        arrays = {name: struct((64, 256), "bfloat16") for name in "xz"} | {"weight": struct((256,), "float32")}
        assert "gated_rms_norm" in jax.jit(lambda arrays: pk.gated_rms_norm(**arrays, eps=1e-5)).lower(arrays).as_text()


# On a machine without a GPU.


def struct(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def with_gradients(function):
    """(outputs, gradients of their sum) of a function of a dict of arrays."""

    def total(arrays):
        outputs = function(arrays)
        return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(outputs)), outputs

    return jax.grad(total, has_aux=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "b, l, c, w, everything", [(8, 2048, 5376, 4, False), (2, 37, 300, 3, True), (1, 5, 128, 1, True)]
)
def test_convolution_lowers_for_cuda(b, l, c, w, everything, dtype):  # noqa: E741, the axis letter
    arrays = {"x": struct((b, l, c), dtype), "weight": struct((c, w), "float32")}
    options = {"activation": "silu", "return_final_state": everything, "implementation": "pallas_gpu"}
    if everything:
        arrays |= {"bias": struct((c,), "float32"), "initial_state": struct((b, w - 1, c), dtype)}
        options["segment_ids"] = jnp.zeros((b, l), jnp.int32)
    text = export(with_gradients(lambda arrays: pk.causal_conv1d(**arrays, **options)), arrays)
    assert "causal_conv1d_gradient" in text
    assert "causal_conv1d_" in text.replace("causal_conv1d_gradient", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape, group_size, norm_before_gate",
    [((8, 2048, 5120), None, False), ((3, 5, 300), 100, True), ((7,), None, False)],
)
def test_norm_lowers_for_cuda(shape, group_size, norm_before_gate, dtype):
    arrays = {"x": struct(shape, dtype), "z": struct(shape, dtype), "weight": struct(shape[-1:], "float32")}
    options = {"eps": 1e-5, "group_size": group_size, "norm_before_gate": norm_before_gate}
    text = export(with_gradients(lambda a: pk.gated_rms_norm(**a, **options, implementation="pallas_gpu")), arrays)
    assert "gated_rms_norm_gradient" in text


def test_what_the_kernels_refuse():
    x, weight = struct((1, 9, 64)), struct((64, 5), "float32")
    assert conv.why_not_causal_conv1d(x, weight) == "the convolution has 5 taps; the kernel takes up to 4"
    weight = struct((64, 4), "int32")
    assert "an argument is int32" in conv.why_not_causal_conv1d(x, weight)
    x, weight = struct((2, 10240)), struct((10240,), "float32")
    assert norm.why_not_gated_rms_norm(x, x, weight) == (
        "a group has 10240 channels; the kernel keeps at most 8192 in registers"
    )
    assert norm.why_not_gated_rms_norm(x, x, weight, group_size=5120) is None
    assert "an argument is float64" in norm.why_not_gated_rms_norm(x, x, in_float64(weight))


def in_float64(a):
    with jax.enable_x64(True):
        return jax.ShapeDtypeStruct(a.shape, jnp.float64)


@pytest.mark.parametrize("batch, length, blocks", [(1, 1, 1), (8, 2048, 21), (1, 131072, 10), (64, 3, 42)])
def test_blocks_are_many_but_not_too_small(batch, length, blocks):
    tokens = conv._tokens(batch, length, blocks)
    assert tokens in (32, 64, 128, 256)
    if tokens < 256 and batch * blocks * -(-length // (2 * tokens)) >= conv.BLOCKS:
        raise AssertionError("twice as many tokens would still fill the device")
