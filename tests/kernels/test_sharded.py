"""Kernels split over a mesh of eight devices against the same on one, and against the recurrence in float64."""

import functools
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import sharded
from pallas_kernels.specs import SSDSpec
from tests.kernels import causal_conv1d_suite, gated_rms_norm_suite, mamba2_step_suite, ssd_suite, visual_scan_suite
from tests.kernels.compare import BOUNDS, assert_close, outputs_and_gradients
from tests.kernels.ssd_step_suite import one_token
from tests.kernels.ssd_suite import problem, without

IDS = np.random.default_rng(0).integers(-1, 2, (8, 10)).repeat(5, axis=1)[:, :47].astype(np.int32)
ROUNDING = 2e-6
"""Sums over devices are taken in another order; gradients of A and dt_bias are sums of large terms of both signs."""


def mesh_of(**sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod([*sizes.values()]))]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def split(data: int, tensor: int):
    """The batch over `data`, which is two mesh axes, and the heads over `tensor`."""
    sizes = {"replica": min(data, 2), "data": data // min(data, 2), "tensor": tensor}
    return pk.use_mesh(mesh_of(**sizes), batch=("replica", "data"), heads="tensor")


def check(function, arrays, data: int, tensor: int):
    """Outputs and all gradients on a mesh are those of one device."""
    with split(data, tensor):
        actual = outputs_and_gradients(function, arrays)
    for a, e in zip(actual, outputs_and_gradients(function, arrays), strict=True):
        assert_close(a, e, ROUNDING)
    return actual


@pytest.mark.parametrize(
    "data, tensor, groups, D, omitted",
    [
        (8, 1, 2, "h", ()),
        (4, 2, 1, "h p", ()),
        (2, 4, 8, "h", ("D", "z", "dt_bias", "initial_state")),
        (1, 8, 1, "h", ("z",)),
    ],
)
def test_ssd(data, tensor, groups, D, omitted):
    arrays = without(problem(b=8, l=47, h=8, g=groups, p=4, n=4, D=D), *omitted)
    options = {"dt_softplus": True}
    if "z" not in omitted:
        options |= {"return_final_state": True, "segment_ids": jnp.asarray(IDS)}
    actual = check(functools.partial(pk.ssd, **options), arrays, data, tensor)
    if omitted:
        return  # the same on one device: tests of the backend compare that with the truth
    truth = functools.partial(pk.ssd, **options, implementation="reference")
    for a, e in zip(actual, outputs_and_gradients(truth, arrays, "float64"), strict=True):
        assert_close(a, e, BOUNDS["float32"])


def of_a_stack(arrays):
    return arrays | {name: np.stack([arrays[name], arrays[name] + 1]) for name in ("conv_state", "ssm_state")}


CONV = causal_conv1d_suite.problem(b=8, l=47, c=8)
GATED = gated_rms_norm_suite.problem(4, 3, 16)
SCAN = functools.partial(visual_scan_suite.problem, grid=(2, 3), k=2, b=4, n=2)


@pytest.mark.parametrize(
    "op, arrays, options, data, tensor",
    [
        ("ssd_step", one_token(problem(b=4, l=1, h=4, g=1)), {"dt_softplus": True}, 4, 2),
        ("causal_conv1d", CONV, {"return_final_state": True, "segment_ids": jnp.asarray(IDS)}, 4, 2),
        ("gated_rms_norm", GATED, {"eps": 1e-3, "group_size": 4}, 2, 4),
        ("gated_rms_norm", GATED, {"eps": 1e-3}, 2, 4),  # the norm spans the devices
        ("gated_rms_norm", gated_rms_norm_suite.problem(2, 4, 3, 16), {"eps": 1e-3, "group_size": 8}, 4, 2),
        ("visual_scan", SCAN(g=1), {"merge": "mean"}, 2, 4),
        ("visual_scan", without(SCAN(g=2, D="h p"), "conv_weight", "conv_bias"), {"merge": None}, 4, 2),
        ("mamba2_step", of_a_stack(mamba2_step_suite.problem(b=8)), {"layer": jnp.asarray(1)}, 8, 1),
        ("mamba2_step", mamba2_step_suite.problem(b=4, g=1), {}, 2, 4),  # part by part
    ],
)
def test_op(op, arrays, options, data, tensor):
    if op == "visual_scan":
        options = options | {"grid": (2, 3), "directions": pk.DIRECTIONS[1:3], "dt_softplus": True}
    check(functools.partial(getattr(pk, op), **options), arrays, data, tensor)


def test_the_step_of_split_heads_runs_a_kernel():
    arrays = {name: jnp.asarray(a) for name, a in mamba2_step_suite.problem(b=4, g=1).items()}
    with split(2, 4):
        assert "shard_map" in str(jax.make_jaxpr(lambda arrays: pk.mamba2_step(**arrays))(arrays))


def test_compiled_for_nobody():
    """Without jax.jit around it, and differentiated so."""
    arrays = {name: jnp.asarray(a) for name, a in problem(b=2, l=3).items()}
    loss = jax.grad(lambda x: jnp.sum(pk.ssd(**arrays | {"x": x}) ** 2))
    expected = loss(arrays["x"])
    with split(2, 2):
        np.testing.assert_allclose(loss(arrays["x"]), expected, rtol=1e-5, atol=1e-4)


# What is moved between devices.


def collectives(text: str) -> set[str]:
    return set(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))


def test_nothing_but_sums_of_gradients_is_moved():
    mesh = mesh_of(data=4, tensor=2)
    specs = {"x": P("data", None, "tensor"), "dt": P("data", None, "tensor"), "A": P("tensor")}
    specs |= {name: P("data") for name in ("B", "C")}
    arrays = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, a in without(problem(b=4, h=4, g=1), "D", "z", "dt_bias", "initial_state").items()
    }

    def loss(arrays):
        with pk.use_mesh(mesh, batch="data", heads="tensor"):
            return jnp.sum(pk.ssd(**arrays))

    forward = jax.jit(lambda arrays: jax.vjp(loss, arrays)[0]).lower(arrays).compile().as_text()
    assert collectives(forward) == {"all-reduce"}  # of the loss
    gradient = jax.jit(jax.grad(loss)).lower(arrays).compile()
    assert collectives(gradient.as_text()) == {"all-reduce"}
    assert gradient.output_shardings["x"].is_equivalent_to(arrays["x"].sharding, 4)


def test_what_lies_between_is_kept_split():
    mesh, a = mesh_of(data=4, tensor=2), jnp.ones((4, 6))
    with pk.use_mesh(mesh, batch="data", heads="tensor"):
        for axes, spec in {"b d": P("data"), "l h": P(None, "tensor"), "k d": P()}.items():
            kept = jax.jit(lambda a, axes=axes: pk.keep_split(a, axes))(a)
            assert kept.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert pk.keep_split(a, "b d") is a


# Who runs.


def test_some_sequences_stay_whole_where_others_are_split():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8)), jnp.float32)
    norm = functools.partial(pk.gated_rms_norm, x, x, jnp.ones(8), eps=1e-5)
    with pk.use_mesh(mesh_of(data=2, sequence=2), batch="data", sequence="sequence"):
        with pytest.raises(ValueError, match="got 7 tokens, expected a multiple of 2"):
            norm()
        with pk.whole_sequences():
            assert sharded.current().over("l") == () and sharded.current().over("b") == ("data",)
            np.testing.assert_allclose(norm(), pk.gated_rms_norm(x, x, jnp.ones(8), eps=1e-5), atol=1e-6)
        assert sharded.current().over("l") == ("sequence",)
    with pk.whole_sequences():
        assert sharded.current() is None


def test_hand_written_kernels_are_chosen_for_a_part_only(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some GPU")
    mesh = mesh_of(data=4, tensor=2)
    shapes = SSDSpec(b=4, l=64, h=4).shapes()
    seen = []

    def part(x, dt, A, B, C):
        seen.append((x.shape, pk.explain("ssd", x, dt, A, B, C).chosen))
        return x

    specs = (P("data"), P("data"), P(), P("data"), P("data"))
    whole = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    partly = functools.partial(whole, axis_names={"data"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: [device, device])
        explanation = pk.explain("ssd", **shapes)
        assert explanation.chosen == "xla" and "use_mesh" in explanation.reasons["pallas_gpu"]
        with pk.use_mesh(mesh, batch="data", heads="tensor"):
            assert pk.explain("ssd", **shapes).chosen == "pallas_gpu"
            assert pk.explain("ssd").chosen == "xla"
            assert pk.explain("ssd", **shapes | {"C": shapes["C"].update(dtype=jnp.float32)}).chosen == "xla"
        for shard_map in (whole, partly):
            jax.eval_shape(shard_map(part), *shapes.values())
    assert seen == [((1, 64, 4, 64), "pallas_gpu"), ((1, 64, 4, 64), "xla")]


@pytest.mark.parametrize("sequence, part", [(1, "2x2048x8x64"), (2, "4x1024x8x64")])
def test_kernels_lower_for_cuda_with_the_shapes_of_a_part(sequence, part):
    unstable = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    mesh = mesh_of(data=4 // sequence, tensor=2, sequence=sequence)

    def loss(arrays):
        with pk.use_mesh(mesh, batch="data", heads="tensor", sequence="sequence"):
            return jnp.sum(pk.ssd(**arrays, implementation="pallas_gpu").astype(jnp.float32))

    shapes = SSDSpec(b=8, l=2048, h=16).shapes()
    export = jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=["cuda"], disabled_checks=unstable)
    exported = export(shapes)
    text = exported.mlir_module()
    assert "ssd_walk" in text and exported.nr_devices == 8
    calls = [line for line in text.splitlines() if "call @mosaic_gpu" in line]
    assert sum(f"tensor<{part}xbf16>" in call for call in calls) == 4  # states, walk, boundaries, gradients
    assert not any("x16x64xbf16" in call for call in calls)


def test_kernels_that_the_mesh_cuts_are_refused():
    """Even where they are named: XLA would gather their arguments on every device."""
    x = jax.ShapeDtypeStruct((8, 64, 512), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((512,), jnp.float32)
    for group_size, chosen in {None: "xla", 256: "pallas_gpu"}.items():
        norm = functools.partial(pk.gated_rms_norm, eps=1e-5, group_size=group_size)
        with split(4, 2):
            options = {"implementation": ("pallas_gpu", "xla"), "group_size": group_size}
            assert pk.explain("gated_rms_norm", x, x, weight, **options).chosen == chosen
            if chosen == "xla":
                with pytest.raises(ExceptionGroup) as error:
                    jax.eval_shape(functools.partial(norm, implementation="pallas_gpu"), x, x, weight)
                assert "the mesh cuts what the kernel takes in one piece" in str(error.value.exceptions[0])


def test_parts_are_not_split_again():
    """Neither in a backend that calls other kernels, nor in a shard_map of the caller's own."""
    mesh = mesh_of(data=2)
    arrays = {name: jnp.asarray(a) for name, a in without(problem(l=9), "initial_state", "D", "z", "dt_bias").items()}

    def part(x, dt, A, B, C):
        assert sharded.current() is None and sharded.on_one_device()
        return pk.ssd(x, dt, A, B, C)

    specs = (P("data"), P("data"), P(), P("data"), P("data"))
    with pk.use_mesh(mesh, batch="data"):
        assert sharded.current() is not None and not sharded.on_one_device()
        own = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False))
        y = own(*arrays.values())
        with pk.use_mesh(None):
            assert sharded.current() is None
            expected = pk.ssd(**arrays)
    assert sharded.current() is None
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    "op, arrays, message",
    [
        ("ssd", problem(b=6, h=4), r"got 6 rows, expected a multiple of 4, the size of batch=\('replica', 'data'\)"),
        ("ssd", problem(b=4, h=3, g=1), r"got 3 heads, expected a multiple of 2, the size of heads=\('tensor',\)"),
        ("ssd", problem(b=4, h=6, g=3), r"got 3 groups, expected 1 or a multiple of 2"),
        ("causal_conv1d", causal_conv1d_suite.problem(b=4, c=7), r"got 7 channels, expected a multiple of 2"),
        (
            "gated_rms_norm",
            gated_rms_norm_suite.problem(4, 1, 1, 3, 4) | {"eps": 1e-5, "group_size": 2},
            r"got x of shape \(4, 1, 1, 3, 4\), expected \[b c\] or \[b l c\] or \[k b l c\]",
        ),
    ],
)
def test_what_does_not_divide(op, arrays, message):
    with split(4, 2), pytest.raises(ValueError, match=message):
        getattr(pk, op)(**ssd_suite.on_device(arrays))


@pytest.mark.parametrize(
    "axes", [{"batch": "rows"}, {"batch": "data", "heads": "data"}, {"sequence": ("data", "data")}]
)
def test_wrong_mesh_axes(axes):
    message = r"expected different ones of the mesh axes \('data',\)"
    with pytest.raises(ValueError, match=message), pk.use_mesh(mesh_of(data=8), **axes):
        pass
    assert sharded.current() is None


def test_explicit_meshes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    message = "got mesh axes of types .*Explicit.*, expected AxisType.Auto"
    with pytest.raises(ValueError, match=message), pk.use_mesh(mesh, batch="data"):
        pass


def test_the_block_ends_with_an_error():
    with pytest.raises(KeyError), pk.use_mesh(mesh_of(data=8), batch="data"):
        raise KeyError
    assert sharded.current() is None
