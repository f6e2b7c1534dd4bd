"""The Mosaic GPU backend of `ssd_step` and `mamba2_step`: for real with `-m gpu`; on a CPU that the kernels lower."""

import functools
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.ssd.pallas_gpu.step import LARGEST, choose_tile
from tests.kernels import mamba2_step_suite
from tests.kernels.mamba2_step_suite import Mamba2StepSuite
from tests.kernels.ssd_step_suite import SSDStepSuite, one_token
from tests.kernels.ssd_suite import problem, without


@pytest.mark.gpu
class TestSSDStep(SSDStepSuite):
    implementation = "pallas_gpu"
    sizes = {"p": 32, "n": 32}  # noqa: RUF012
    copies_nothing = True

    def test_many_blocks(self):
        for h in (80, 5):  # tall tiles and low ones
            self.check(self.arrays(b=8, h=h, p=64, n=128, g=1, dtype="bfloat16"), dtype="bfloat16", dt_softplus=True)


@pytest.mark.gpu
class TestMamba2Step(Mamba2StepSuite):
    implementation = "pallas_gpu"
    sizes = {"h": 4, "p": 64, "n": 64, "g": 2}  # noqa: RUF012
    copies_nothing = True

    def test_many_blocks(self):
        for h, g in ((80, 1), (24, 3)):
            self.check(self.arrays(b=8, h=h, p=64, n=128, g=g, dtype="bfloat16"), dtype="bfloat16")


# Who is refused, and why.


def abstract(arrays):
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def step_arrays(**sizes):
    return one_token(problem(l=1, **{"p": 64, "n": 128, "dtype": "bfloat16"} | sizes))


def mixer_arrays(**sizes):
    return mamba2_step_suite.problem(**{"p": 64, "n": 128, "dtype": "bfloat16"} | sizes)


STEP, MIXER = step_arrays(), mixer_arrays()


@pytest.mark.parametrize(
    "op, arrays, reason",
    [
        ("ssd_step", step_arrays(n=24), "the state size is 24; the kernel takes multiples of 16 up to 256"),
        ("ssd_step", step_arrays(n=512), "the state size is 512; the kernel takes multiples of 16 up to 256"),
        ("ssd_step", step_arrays(p=24), "heads are 24 wide; for a state size of 128 the kernel takes multiples of 16"),
        (
            "ssd_step",
            step_arrays(p=16, n=48),
            "heads are 16 wide; for a state size of 48 the kernel takes multiples of 32",
        ),
        ("ssd_step", STEP | {"state": STEP["state"].astype("float16")}, "the state is float16; the kernel keeps it in"),
        (
            "ssd_step",
            STEP | {"x": STEP["x"].astype("float64")},
            "an argument is float64; the kernel takes float32, bfloat16",
        ),
        ("mamba2_step", mixer_arrays(n=96), "the state size is 96; the kernel takes multiples of 64"),
        ("mamba2_step", mixer_arrays(h=6, p=16, g=3), "a group has 32 channels; the kernel takes multiples of 128"),
        ("mamba2_step", mixer_arrays(w=1), "the convolution has one tap; the kernel takes two or more"),
        ("mamba2_step", mixer_arrays(p=24), "heads are 24 wide"),
        (
            "mamba2_step",
            MIXER | {"conv_state": MIXER["conv_state"].astype("float32")},
            "the convolution state is float32, zxbcdt bfloat16; the kernel takes one dtype",
        ),
    ],
)
def test_refuses(op, arrays, reason):
    arrays = abstract(arrays)
    explanation = pk.explain(op, **arrays, implementation=("pallas_gpu", "xla"))
    assert explanation.chosen == "xla"
    assert explanation.reasons["pallas_gpu"].startswith(reason)


# Who is chosen where both run.


@pytest.mark.gpu
@pytest.mark.parametrize("op, arrays", [("ssd_step", STEP), ("mamba2_step", MIXER)])
def test_chosen_without_being_named(op, arrays):
    assert "@mosaic_gpu" in jax.jit(getattr(pk, op)).lower(**abstract(arrays)).as_text()


@pytest.fixture
def hopper(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def of_batch(arrays, batch):
    """2.7B layers."""
    return {
        name: jax.ShapeDtypeStruct((*a.shape[:-k], batch, *a.shape[1 - k :]), a.dtype)
        if (k := BATCH_AXIS.get(name))
        else a
        for name, a in abstract(arrays).items()
    }


BATCH_AXIS = {"state": 4, "x": 3, "dt": 2, "B": 3, "C": 3, "z": 3, "conv_state": 3, "ssm_state": 4, "zxbcdt": 2}


@pytest.mark.parametrize("op", ["ssd_step", "mamba2_step", "stacked"])
@pytest.mark.parametrize("batch", [1, 256])
def test_chosen_on_its_device(hopper, op, batch):
    step, mixer = step_arrays(b=1, h=80, g=1), mixer_arrays(b=1, h=80, g=1)
    arrays = {"ssd_step": step, "mamba2_step": mixer, "stacked": stacked(mixer)}[op]
    assert pk.explain(op.replace("stacked", "mamba2_step"), **of_batch(arrays, batch)).chosen == "pallas_gpu"


# The plan, and lowering on a machine without a GPU.


@pytest.mark.parametrize("head_dim, n", [(64, 128), (16, 32), (32, 16), (128, 256), (96, 48), (48, 96)])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_tiles_cover_a_head(batch, head_dim, n):
    tile = choose_tile(batch, 80, head_dim, n)
    assert head_dim % tile.rows == 0 and tile.rows * n <= LARGEST


def test_small_batches_are_cut_into_low_tiles():
    assert choose_tile(1, 80, 64, 128).rows < choose_tile(64, 80, 64, 128).rows


def export(function, arrays) -> str:
    unstable = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unstable)(abstract(arrays))
    return exported.mlir_module()


STEPS = {
    "decode": step_arrays(b=64, h=80, g=1),
    "one row": step_arrays(b=1, h=80, g=1),
    "small": step_arrays(p=16, n=32, g=4, D="h p", dtype="float16"),
    "narrow state": step_arrays(p=64, n=16),
    "wide": step_arrays(p=128, n=256, dtype="float32"),
    "little": without(step_arrays(), "D", "z", "dt_bias"),
}


@pytest.mark.parametrize("name", STEPS)
def test_ssd_step_lowers_for_cuda(name):
    """One launch, whose state is its own output."""
    text = export(lambda arrays: pk.ssd_step(**arrays, implementation="pallas_gpu"), STEPS[name])
    assert "ssd_step" in text and text.count("@mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 1


MIXERS = {
    "decode": mixer_arrays(b=64, h=80, g=1),
    "one row": mixer_arrays(b=1, h=80, g=1),
    "groups": mixer_arrays(h=24, g=3, w=2, D="h p", dtype="float16"),
    "wide": mixer_arrays(p=128, n=256, dtype="float32"),
    "little": without(mixer_arrays(n=64), "conv_bias", "D", "dt_bias", "norm_weight"),
}


def stacked(arrays, layers=3):
    """The same with the states of several layers."""
    states = {name: arrays[name] for name in ("conv_state", "ssm_state")}
    stacks = {name: np.broadcast_to(a, (layers, *a.shape)) for name, a in states.items()}
    return arrays | stacks | {"layer": np.asarray(1, np.int32)}


MIXERS["stacked"] = stacked(mixer_arrays())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_mamba2_step_lowers_for_cuda(name, masked):
    """Two launches, each with one of the states as its own output."""
    arrays = MIXERS[name] | ({"active": np.array([True] * len(MIXERS[name]["zxbcdt"]))} if masked else {})
    text = export(lambda arrays: pk.mamba2_step(**arrays, implementation="pallas_gpu"), arrays)
    assert "mamba2_step_scan" in text and "mamba2_step_norm" in text and text.count("@mosaic_gpu") == 2
    assert text.count("output_operand_alias<") == 2


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_low_precision_state_lowers_for_cuda(state_dtype):
    step = STEP | {"state": STEP["state"].astype(state_dtype)}
    mixer = MIXER | {"ssm_state": MIXER["ssm_state"].astype(state_dtype)}
    assert "ssd_step" in export(lambda arrays: pk.ssd_step(**arrays, implementation="pallas_gpu"), step)
    assert "mamba2_step_scan" in export(lambda arrays: pk.mamba2_step(**arrays, implementation="pallas_gpu"), mixer)


@pytest.mark.parametrize("op", ["ssd_step", "mamba2_step"])
def test_gradient_lowers_for_cuda(op):
    function = functools.partial(getattr(pk, op), implementation="pallas_gpu")

    def loss(arrays):
        return sum(jnp.sum(a.astype(jnp.float32)) for a in function(**arrays))

    assert f"{op}" in export(jax.value_and_grad(loss), STEP if op == "ssd_step" else MIXER)


@pytest.mark.parametrize("suite, op", [(TestSSDStep, "ssd_step"), (TestMamba2Step, "mamba2_step")])
def test_the_suites_ask_for_sizes_that_the_kernel_takes(suite, op):
    """Otherwise they would fail on a GPU only."""
    sizes = [suite.sizes, *(dict(zip("bhpngw", shape, strict=False)) for shape in suite.shapes)]
    for size in sizes:
        arrays = suite().arrays(**size)
        assert pk.explain(op, **abstract(arrays), implementation="pallas_gpu").chosen == "pallas_gpu"
