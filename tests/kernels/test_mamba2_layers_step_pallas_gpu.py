"""The Mosaic GPU backend of `mamba2_layers_step`: for real with `-m gpu`; on a CPU its plan, and that it lowers."""

import dataclasses
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.hopper import PROCESSORS
from pallas_kernels.mamba2_layers_step import pallas_gpu
from pallas_kernels.mamba2_layers_step.pallas_gpu import make_plan, why_not_one_launch
from pallas_kernels.mamba2_layers_step.split import COLUMNS, ROWS, Split
from pallas_kernels.ssd.pallas_gpu import step as ssd_step
from pallas_kernels.ssd.pallas_gpu import tiles
from tests.kernels import warpgroup_emulation
from tests.kernels.compare import BOUNDS, assert_as_exact, assert_close, exactly, jitted, named
from tests.kernels.mamba2_layers_step_suite import OUTPUTS, Mamba2LayersStepSuite, problem, quantized
from tests.kernels.ssd_step_suite import assert_nothing_is_copied, assert_overwritten
from tests.kernels.ssd_suite import without

QUANTIZED = {"layers": 2, "d": 128, "h": 16, "p": 64, "n": 64, "g": 2, "dtype": "bfloat16"}
SMALL = {"d": 128, "h": 8, "p": 64, "n": 64, "g": 2, "dtype": "bfloat16"}


@pytest.mark.gpu
class TestOneLaunch(Mamba2LayersStepSuite):
    implementation = "pallas_gpu"
    dtype = "bfloat16"
    sizes = SMALL
    shapes = (
        (1, 1, 256, 8, 64, 128, 1, 4),
        (5, 3, 640, 24, 64, 64, 2, 2),
        (3, 16, 768, 24, 64, 128, 1, 4),
        (2, 7, 128, 8, 128, 128, 1, 3),
        (2, 5, 1024, 64, 32, 64, 4, 4),
    )

    def check(self, arrays, **options):
        assert why_not_one_launch(**abstract(arrays), **options) is None
        super().check(arrays, **options)

    def test_donated_states_are_overwritten(self):
        arrays = {name: jnp.asarray(a) for name, a in self.arrays().items()}
        assert_overwritten(self.step, arrays, "conv_state", "ssm_state")
        assert_nothing_is_copied(self.step, arrays, "conv_state", "ssm_state")

    def test_quantized_projections(self):
        self.check(quantized(problem(**QUANTIZED)))

    def test_a_real_model(self):
        for b in (1, 8):
            arrays = self.arrays(layers=4, b=b, d=2560, h=80, p=64, n=128, g=1)
            self.check(arrays)
            self.check(quantized(arrays))


@pytest.mark.gpu
class TestLayerByLayer(Mamba2LayersStepSuite):
    """What one launch does not take."""

    implementation = "pallas_gpu"
    sizes = SMALL | {"dtype": "float32"}
    shapes = ((2, 3, 24, 4, 64, 64, 2, 4),)

    def test_many_rows(self):
        Mamba2LayersStepSuite.check(self, self.arrays(b=20))


@pytest.mark.gpu
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA of JAX 0.10 copies each layer's weights")
def test_weights_are_read_where_they_lie():
    """With the flag of docs/generation.md cuBLAS reads a layer's projections out of their stacks."""
    arrays = abstract(problem(layers=5, b=32, d=1024, h=32, p=64, n=128, g=1, dtype="bfloat16"))
    step = jax.jit(
        lambda arrays: pk.mamba2_layers_step(**arrays, implementation="pallas_gpu"),
        compiler_options={"xla_gpu_triton_gemm_any": False},
    )
    program = step.lower(arrays).compile().as_text()
    for name in ("in_proj", "out_proj"):
        _, rows, columns = arrays[name].shape
        reads = re.findall(rf"= bf16\[1,{rows},{columns}\]\S* ([\w-]+)\(", program)
        assert set(reads) == {"dynamic-slice"}, reads  # within the product; a copy would be a fusion


def abstract(arrays):
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


# Who is refused, and why.


@pytest.mark.parametrize(
    "arrays, reason",
    [
        (problem(**SMALL | {"dtype": "float32"}), "the convolution state is float32; one launch takes bfloat16"),
        (
            problem(**SMALL) | {"out_proj": problem(**SMALL | {"dtype": "float32"})["out_proj"]},
            "out_proj is float32; one launch takes both projections in bfloat16, or both in int8",
        ),
        (without(quantized(problem(**SMALL)), "in_proj_scale"), "in_proj is int8 without a scale"),
        (quantized(problem(**SMALL)), "the input projection is 1288 wide; one launch takes multiples of 16"),
        (problem(**SMALL, b=17), "17 rows; one launch takes up to 16"),
        (without(problem(**SMALL), "norm_weight"), "one launch takes a norm after the gate"),
        (problem(**SMALL) | {"norm_before_gate": True}, "one launch takes a norm after the gate"),
        (problem(**SMALL | {"n": 256}), "the state size is 256; one launch takes 64 and 128"),
        (problem(**SMALL | {"d": 192}), "the residual is 192; one launch takes multiples of 128"),
        (problem(**SMALL | {"h": 3, "g": 1}), "the inner width is 192; one launch takes multiples of 128"),
        (problem(**SMALL | {"h": 16, "p": 16, "g": 8}), "a group has 32 channels; one launch takes multiples of 64"),
        (problem(**SMALL | {"h": 4, "g": 1}), "the input projection is 644 wide; one launch takes multiples of 8"),
    ],
)
def test_not_in_one_launch(arrays, reason):
    options = {name: a for name, a in arrays.items() if isinstance(a, bool)}
    assert why_not_one_launch(**abstract({n: a for n, a in arrays.items() if n not in options}), **options).startswith(
        reason
    )


def test_a_device_with_too_few_processors(monkeypatch):
    """Blocks that wait for each other must run at once."""
    device = types.SimpleNamespace(platform="gpu", core_count=114)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert why_not_one_launch(**abstract(problem(**SMALL))) == "the device has 114 processors; one launch needs 132"


def test_too_wide_for_shared_memory():
    """Each block prepares the rows of x that its tiles read."""
    arrays = abstract(problem(**SMALL))
    wide = {
        "residual": (2, 16384),
        "in_norm_weight": (2, 16384),
        "in_proj": (2, 16384, 66816),
        "out_proj": (2, 32768, 16384),
    }
    wide |= {"conv_weight": (2, 32768 + 1024, 4), "ssm_state": (2, 2, 256, 128, 128)}
    arrays |= {name: jax.ShapeDtypeStruct(shape, arrays[name].dtype) for name, shape in wide.items()}
    assert why_not_one_launch(**arrays).startswith("shared memory holds")


def test_refuses_what_the_step_of_a_layer_refuses():
    explanation = pk.explain(
        "mamba2_layers_step", **abstract(problem(**SMALL | {"n": 96})), implementation=("pallas_gpu", "xla")
    )
    assert explanation.chosen == "xla"
    assert explanation.reasons["pallas_gpu"] == "the state size is 96; the kernel takes multiples of 64"


# The plan.


@pytest.mark.parametrize("rows, columns", [(2560, 10576), (5120, 2560), (64, 128), (128, 130), (640, 200), (8192, 128)])
@pytest.mark.parametrize("blocks", [1, 7, PROCESSORS])
def test_every_tile_has_one_block(rows, columns, blocks):
    split = Split.of(rows, columns, blocks)
    assert split.tall * ROWS >= rows and split.wide * COLUMNS >= columns
    owners = [block for block in range(blocks) for _ in range(split.first(block), split.first(block + 1))]
    assert owners == [split.share(tile) for tile in range(split.tiles)]
    counts = np.bincount(owners, minlength=blocks)
    assert counts.max() - counts[: split.shares].min() <= 1 and not counts[split.shares :].any()
    assert split.most_rows == min(split.tall, counts.max())
    for column in range(split.wide):
        here = owners[column * split.tall : (column + 1) * split.tall]
        assert split.parts(column) == (here[0], len(set(here))) and len(set(here)) <= split.most_parts


def test_split_of_numbers_and_of_traced_numbers():
    split = Split.of(2560, 10576, PROCESSORS)
    for block in (0, 1, 77, 131, 132):
        assert int(jax.jit(split.first)(block)) == split.first(block)
    for tile in (0, 39, 40, split.tiles - 1):
        assert int(jax.jit(split.share)(tile)) == split.share(tile)


@pytest.mark.parametrize("batch", [1, 8, 16])
@pytest.mark.parametrize("width, heads", [(768, 24), (1024, 32), (1536, 48), (2048, 64), (2560, 80)])
def test_the_named_models_fit(batch, width, heads):
    arrays = abstract(problem(layers=1, b=batch, d=width, h=heads, p=64, n=128, g=1, dtype="bfloat16"))
    assert why_not_one_launch(**arrays) is None
    plan = make_plan(*(arrays[name] for name in ("residual", "ssm_state", "conv_weight", "in_proj")))
    assert plan.stages >= 4 and plan.sizes.head_dim % plan.tile.rows == 0


# The body itself, on a CPU.


@pytest.fixture
def emulated(monkeypatch):
    """One launch with so many blocks, warpgroup by warpgroup in NumPy."""

    def step(blocks, **arguments):
        def launch(plan, body, inputs, state, passed_on, shared):
            state = {name: np.array(a) for name, a in state.items()}
            between = [np.full(a.shape, np.nan, a.dtype) for a in passed_on.values()]
            refs = [*map(np.array, inputs.values()), *state.values(), *between]
            modules = (pallas_gpu, ssd_step, tiles)
            warpgroup_emulation.run(
                monkeypatch, modules, body, refs, shared, blocks=plan.blocks, warpgroups=pallas_gpu.COMPUTING + 1
            )
            return state

        monkeypatch.setattr(pallas_gpu, "make_plan", lambda *args: dataclasses.replace(make_plan(*args), blocks=blocks))
        monkeypatch.setattr(pallas_gpu, "_launch", launch)
        return pallas_gpu._one_launch(**arguments)

    return step


@pytest.mark.parametrize(
    "blocks, sizes, options",
    [
        (1, {"layers": 2, "b": 1}, {}),
        (3, {"layers": 3, "b": 3}, {"in_norm_eps": 2.0, "norm_eps": 3.0}),
        (5, {"layers": 1, "b": 11, "n": 128, "g": 1, "D": "h p"}, {"dt_limit": (0.05, 0.2)}),
        (11, {"layers": 2, "b": 2}, {}),  # more blocks than out_proj has tiles
    ],
)
def test_body(emulated, blocks, sizes, options):
    arrays = problem(**SMALL | sizes)
    actual = named(emulated(blocks, **arrays, **options), *OUTPUTS)
    exact = named(exactly(pk.mamba2_layers_step, **arrays, **options), *OUTPUTS)
    loop = named(jitted(pk.mamba2_layers_step, implementation="xla", **arrays, **options), *OUTPUTS)
    assert_as_exact(actual, loop, exact, "bfloat16")


@pytest.mark.parametrize("blocks", [1, 4])
def test_body_with_quantized_projections(emulated, blocks):
    arrays = quantized(problem(**QUANTIZED))
    exact = named(exactly(pk.mamba2_layers_step, **arrays), *OUTPUTS)
    loop = named(jitted(pk.mamba2_layers_step, implementation="xla", **arrays), *OUTPUTS)
    assert_as_exact(named(emulated(blocks, **arrays), *OUTPUTS), loop, exact, "bfloat16")


def test_body_without_optional_arguments(emulated):
    arrays = without(problem(**SMALL), "conv_bias", "D", "dt_bias")
    actual = named(emulated(2, **arrays), *OUTPUTS)
    assert_close(actual, named(exactly(pk.mamba2_layers_step, **arrays), *OUTPUTS), BOUNDS["bfloat16"])


def test_body_keeps_the_states_of_rows_that_are_not_active(emulated):
    arrays = problem(**SMALL | {"b": 3})
    arrays["residual"][1] = np.nan
    active = np.array([True, False, True])
    residual, *states = emulated(2, **arrays, active=jnp.asarray(active))
    expected, *expected_states = jitted(pk.mamba2_layers_step, **arrays, active=active)
    assert_close(named(residual[active], "a"), named(expected[active], "a"), BOUNDS["bfloat16"])
    for name, a, e in zip(OUTPUTS[1:], states, expected_states, strict=True):
        np.testing.assert_array_equal(a[:, 1], arrays[name][:, 1])
        assert_close(named(a[:, active], name), named(e[:, active], name), BOUNDS["bfloat16"])


# Lowering on a machine without a GPU.


def export(arrays) -> str:
    unstable = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    step = jax.jit(lambda arrays: pk.mamba2_layers_step(**arrays, implementation="pallas_gpu"))
    return jax.export.export(step, platforms=["cuda"], disabled_checks=unstable)(abstract(arrays)).mlir_module()


CASES = {
    "one row": problem(b=1, **SMALL),
    "rows": problem(**SMALL | {"b": 16, "n": 128, "g": 1, "D": "h p"}),
    "little": without(problem(**SMALL), "conv_bias", "D", "dt_bias"),
    "quantized": quantized(problem(**QUANTIZED)),
    "masked": problem(**SMALL) | {"active": np.array([True, False])},
}


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name):
    """One launch, which changes the states where they are."""
    text = export(CASES[name])
    assert "mamba2_layers_step" in text and text.count("@mosaic_gpu") == 1
    assert text.count("output_operand_alias<") >= 2


def test_many_rows_go_layer_by_layer():
    """Two launches in a loop over more layers than become straight code."""
    text = export(problem(**SMALL, b=17, layers=5))
    assert "mamba2_step_scan" in text and "mamba2_step_norm" in text and text.count("@mosaic_gpu") == 2
