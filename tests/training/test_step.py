"""One optimizer step: against AdamW written out, on several meshes, and when numbers go bad."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml_mamba_jax import sharding
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.config import OptimConfig, StageConfig
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.optimizer import make_optimizer, make_schedule
from ml_mamba_jax.training.step import abstract_params, abstract_state, first_state, init_params, make_train_step
from tests import tiny_model
from tests.training.test_losses import make_batch

MODEL = tiny_model.MODEL
CONFIG = OptimConfig(peak_lr=1e-2, warmup=0.2, weight_decay=0.5, clip_norm=0.1)
STEPS = 10
OPTIMIZER = make_optimizer(CONFIG, MODEL, STEPS)


def stage(**changes) -> StageConfig:
    return StageConfig("all", optim=CONFIG, steps=STEPS, **changes)


BATCH = make_batch(8, length=10)
"""26 tokens with the image, which meshes with a sequence axis divide."""


@functools.cache
def initial() -> dict:
    return jax.tree.map(np.asarray, init_params(MODEL, sharding.make_mesh(devices=jax.devices()[:1]), 0))


@functools.cache
def step_of(sizes: tuple[int, ...], micro_batches: int):
    """A mesh, and the step of MODEL on it, compiled once for all tests that take it."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return mesh, make_train_step(MODEL, OPTIMIZER, mesh, stage(micro_batches=micro_batches))


def start(mesh):
    return first_state(OPTIMIZER, jax.device_put(initial(), sharding.param_shardings(MODEL, mesh)), mesh)


def take_steps(sizes: tuple[int, ...], n: int, micro_batches: int = 1):
    mesh, train_step = step_of(sizes, micro_batches)
    state, losses = start(mesh), []
    for _ in range(n):
        state, metrics = train_step(state, {}, jax.device_put(BATCH, sharding.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def test_the_schedule_rises_to_the_peak_and_falls_to_zero():
    schedule = make_schedule(OptimConfig(peak_lr=2.0, warmup=0.1), 100)
    np.testing.assert_allclose([schedule(i) for i in (0, 5, 10, 55, 100)], [0, 1, 2, 1, 0], atol=1e-6)


def test_a_step_is_clipped_adamw_that_spares_one_dimensional_parameters():
    state, _, metrics = take_steps((8, 1, 1), 2)
    spared = {"bias", "scale", "A_log", "D", "dt_bias", "conv_bias", "norm_weight", "attention_scale", "mlp_scale"}

    gradient_of = jax.jit(lambda params: mean_loss_and_gradient(MODEL, params, BATCH)[1])
    flat, tree = jax.tree_util.tree_flatten_with_path(initial())
    decay = [0.0 if path[-1].key in spared else CONFIG.weight_decay for path, _ in flat]
    values = [np.asarray(a, np.float64) for _, a in flat]
    first, second = ([np.zeros_like(a) for a in values] for _ in range(2))
    for step in (1, 2):
        p = jax.tree.unflatten(tree, [jnp.asarray(a, jnp.float32) for a in values])
        gradient = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient_of(p))]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        rate = float(make_schedule(CONFIG, STEPS)(step - 1))
        for i, g in enumerate(gradient):
            g = g * min(1, CONFIG.clip_norm / norm)
            first[i] = CONFIG.b1 * first[i] + (1 - CONFIG.b1) * g
            second[i] = CONFIG.b2 * second[i] + (1 - CONFIG.b2) * g**2
            update = (first[i] / (1 - CONFIG.b1**step)) / (np.sqrt(second[i] / (1 - CONFIG.b2**step)) + CONFIG.eps)
            values[i] = values[i] - rate * (update + decay[i] * values[i])
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    for (path, _), got, want in zip(flat, jax.tree.leaves(state.params), values, strict=True):
        # Where a gradient is almost zero, its sign and so the update of AdamW is rounding: compare the rest.
        close = np.isclose(np.asarray(got), want, rtol=1e-3, atol=2e-4)
        assert close.mean() > 0.99, f"{jax.tree_util.keystr(path)}: {close.mean():.3f}"
    assert int(state.step) == 2


@pytest.mark.parametrize(
    "sizes, micro_batches",
    [
        ((8, 1, 1), 1),
        ((1, 2, 2, 2), 4),
        pytest.param((1, 4, 2), 1, marks=pytest.mark.full),
        pytest.param((2, 1, 1), 4, marks=pytest.mark.full),
    ],
)
def test_eight_devices_take_the_steps_of_one(sizes, micro_batches):
    one = take_steps((1, 1, 1), 4)[1]
    state, many, _ = take_steps(sizes, 4, micro_batches)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert one[-1] < one[0]
    kernel = state.params["language"]["blocks"]["mixer"]["in_proj"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    moments = optax.tree_utils.tree_get(state.optimizer, "mu")["language"]["blocks"]["mixer"]["in_proj"]["kernel"]
    assert moments.sharding == kernel.sharding


def test_the_first_moment_may_be_kept_in_bfloat16():
    """Half of its memory; the parameters stay in float32 and learn as well."""
    language = dataclasses.replace(MODEL.config.language, n_layers=1)
    model = MLMamba(dataclasses.replace(MODEL.config, vision=(), connector=None, language=language))
    mesh, batch = sharding.make_mesh(devices=jax.devices()[:1]), make_batch(8)._replace(images={}, image_mask=None)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(CONFIG, mu_dtype=dtype), model, STEPS)
        state = first_state(optimizer, init_params(model, mesh, 0), mesh)
        step = make_train_step(model, optimizer, mesh, stage(trains=("language",)))
        for _ in range(4):
            state, metrics = step(state, {}, batch)
        losses[dtype] = float(metrics["loss"])
        kinds = [
            {a.dtype for a in jax.tree.leaves(optax.tree_utils.tree_get(state.optimizer, m))} for m in ("mu", "nu")
        ]
        assert kinds == [{jnp.dtype(dtype)}, {jnp.dtype("float32")}]
        assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["bfloat16"] != losses["float32"]


def test_bfloat16_computes_on_parameters_in_float32():
    """Products with weights are in bfloat16; parameters, moments and loss are in float32, and so is what they learn from."""
    language = dataclasses.replace(MODEL.config.language, n_layers=1)
    config = dataclasses.replace(MODEL.config, vision=(), connector=None, language=language)
    mesh, batch = sharding.make_mesh(devices=jax.devices()[:1]), make_batch(8)._replace(images={}, image_mask=None)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = MLMamba(config.replace(dtype=dtype))
        optimizer = make_optimizer(CONFIG, model, STEPS)
        state = first_state(optimizer, init_params(model, mesh, 0), mesh)
        step = make_train_step(model, optimizer, mesh, stage(trains=("language",)))
        products = re.findall(r"dot_general .*: \(tensor<[\dx]*(\w+)>", step.lower(state, {}, batch).as_text())
        assert products.count("bf16") >= (9 if dtype == "bfloat16" else 0)  # of in_proj, out_proj and the head
        losses[dtype] = []
        for _ in range(3):
            state, metrics = step(state, {}, batch)
            losses[dtype].append(float(metrics["loss"]))
        arrays = (state.params, optax.tree_utils.tree_get(state.optimizer, "mu"))
        assert {a.dtype for a in jax.tree.leaves(arrays)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)


def test_weights_are_gathered_and_no_activations():
    """With the parameters split over all devices each mixer gathers its weights; the kernels run where their rows are."""
    language = dataclasses.replace(MODEL.config.language, n_layers=1)
    model = MLMamba(dataclasses.replace(MODEL.config, vision=(), connector=None, language=language))
    mesh, optimizer = sharding.make_mesh(1, 8, 1), make_optimizer(CONFIG, model, STEPS)
    batch = make_batch(8)._replace(images=None, image_mask=None)
    state = abstract_state(optimizer, abstract_params(model, mesh), mesh)
    step = make_train_step(model, optimizer, mesh, stage(trains=("language",))).lower(state, {}, batch)
    text = step.compile().as_text()
    gathered = {
        tuple(map(int, shape.split(","))) for shape in re.findall(r"= \(?f32\[([\d,]+)\]\S* all-gather\(", text)
    }
    mixer = language.mixer
    assert {(mixer.d_model, mixer.in_proj_features), (mixer.d_inner, mixer.d_model)} <= gathered
    logits = (8, batch.tokens.shape[1] - 1, language.padded_vocab_size)
    assert {shape for shape in gathered if len(shape) > 2} <= {logits}


def test_a_step_with_nan_leaves_the_state_as_it_was():
    mesh, train_step = step_of((8, 1, 1), 1)
    state = start(mesh)
    scale = state.params["language"]["norm"]["scale"]
    state.params["language"]["norm"]["scale"] = jax.device_put(scale.at[3].set(jnp.nan), scale.sharding)
    before = jax.tree.map(np.asarray, state)
    after, metrics = train_step(state, {}, jax.device_put(BATCH, sharding.batch_sharding(mesh)))
    assert metrics["finite"] == 0
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), before, after)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 8), (-1, 3, 1)])
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(InputError, match="mesh: got data x fsdp x tensor"):
        sharding.make_mesh(*sizes)


def test_sizes_that_a_mesh_does_not_divide_are_listed():
    mesh = sharding.make_mesh(1, 1, 5, devices=jax.devices()[:5])
    with pytest.raises(InputError, match="does not divide"):
        sharding.param_shardings(MODEL, mesh)
