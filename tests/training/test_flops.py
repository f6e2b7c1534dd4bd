"""The count of floating point operations, against the matrix products that JAX traces and the sizes of the parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from ml_mamba_jax.config import NAMED, MLMambaConfig
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.config import ALIGN, FINETUNE, FULL_FINETUNE, StageConfig
from ml_mamba_jax.training.flops import Cost, model_cost, peak_flops, step_flops
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.stages import split
from tests import tiny_model
from tests.training.test_losses import make_batch

TINY = tiny_model.MODEL.config


def traced_flops(function, *args) -> float:
    """2 m n k of every matrix product that `function` traces, a loop's body as often as it runs."""
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> float:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for param in eqn.params.values():
            inner = getattr(param, "jaxpr", param)
            if hasattr(inner, "eqns"):
                total += times * _flops(inner)
    return total


@pytest.mark.parametrize("name", ["ml-mamba-3b", "ml-mamba-3b-siglip", "tiny"])
def test_encoders_cost_what_is_traced(name):
    config = NAMED[name]
    model, cost = MLMamba(config), model_cost(config)
    images = model.dummy_inputs(batch_size=2)["images"]
    traced = traced_flops(
        lambda p: model.apply({"params": p}, images, method="features"), {"vision": model.param_shapes()["vision"]}
    )
    assert traced == 2 * (cost.encoders_first + cost.encoders).forward


@pytest.mark.parametrize("projector", ["linear", "gelu-mlp", "fused-gelu-mlp"])
def test_a_connector_without_scan_costs_what_is_traced(projector):
    config = TINY.replace(connector=dataclasses.replace(TINY.connector, scan="none", projector=projector))
    model, cost = MLMamba(config), model_cost(config)
    features = jnp.zeros((3, 16, 112))
    traced = traced_flops(lambda p: model.apply({"params": p}, features, method="connect"), model.param_shapes())
    assert traced == 3 * (cost.connector_first + cost.connector).forward


@pytest.mark.parametrize("name", ["mamba2-130m", "ml-mamba-3b", "ml-mamba-3b-csm", "tiny"])
def test_every_parameter_of_a_matrix_multiplies_each_token_once(name):
    """In the language model and, for each token of the grid, in a connector with scans; scans cost 5 p n a head beside it."""
    config = NAMED[name]
    shapes, cost = MLMamba(config).param_shapes(), model_cost(config)
    mixer, layers = config.language.mixer, config.language.n_layers

    def weights(tree) -> int:
        names = ("kernel", "conv_weight")
        return sum(a.size for path, a in flatten_dict(tree).items() if path[-1] in names)

    assert cost.language.weights == 2 * weights(shapes["language"])
    assert cost.language.mixing == layers * mixer.d_inner * (5 * mixer.d_state + 2)
    assert cost.head == Cost(2 * shapes["language"]["embedding"].size, 0)
    if config.connector:
        assert (cost.connector_first + cost.connector).weights == 2 * config.grid[0] ** 2 * weights(shapes["connector"])
        directions, grid = len(config.connector.directions), config.grid[0] ** 2
        assert cost.connector.mixing == 2 * directions * grid * mixer.d_inner * (5 * mixer.d_state + 2)


def test_a_step_costs_less_where_parts_are_frozen():
    """The differences are matrix products of a gradient, which are traced; the scans of all three are the same."""
    config = TINY.replace(connector=dataclasses.replace(TINY.connector, scan="none"))
    model, batch = MLMamba(config), make_batch(2)
    images, tokens = 2, 2 * batch.tokens.shape[1]

    def of(trains) -> tuple[float, float]:
        stage = StageConfig("s", trains=trains)
        trained, frozen = split(model.param_shapes(), stage)
        traced = traced_flops(lambda p, f: mean_loss_and_gradient(model, p, batch, frozen=f)[1], trained, frozen)
        return traced, step_flops(config, stage, images, tokens)

    (whole, counted_whole), (finetune, counted_finetune), (align, counted_align) = map(
        of, (FULL_FINETUNE, FINETUNE, ALIGN)
    )
    assert whole - finetune == counted_whole - counted_finetune > 0
    mixer, layers = config.language.mixer, config.language.n_layers
    convolutions = layers * 2 * mixer.conv_channels * mixer.d_conv * (tokens + images * config.n_visual_tokens)
    assert finetune - align == counted_finetune - counted_align - convolutions > 0  # traced as sums of products


@pytest.mark.parametrize("trains", [FULL_FINETUNE, FINETUNE])
def test_an_image_costs_what_is_traced(trains):
    """Forward and backward through encoders and connector; what reads pixels, or frozen features, has no gradient to pass on."""
    config = TINY.replace(connector=dataclasses.replace(TINY.connector, scan="none"))
    model, stage = MLMamba(config), StageConfig("s", trains=trains)
    images = model.dummy_inputs(batch_size=1)["images"]
    shapes = {name: tree for name, tree in model.param_shapes().items() if name != "language"}
    trained, frozen = split(shapes, stage)

    def gradient(trained, frozen):
        return jax.grad(lambda p: model.apply({"params": {**p, **frozen}}, images, method="encode_images").sum())(
            trained
        )

    language = model_cost(config).language
    visual = config.n_visual_tokens * (language.forward + language.backward(trains=True, passes=True))
    assert traced_flops(gradient, trained, frozen) == step_flops(config, stage, images=1, tokens=0) - visual


def test_a_language_model_alone_costs_six_flops_a_parameter_and_token():
    config = MLMambaConfig.named("2.7b")
    flops = step_flops(config, StageConfig("s", trains=("language",)), images=0, tokens=1000)
    n_params = sum(a.size for a in jax.tree.leaves(MLMamba(config).param_shapes()))
    assert 6 < flops / (1000 * n_params) < 6.5


def test_the_peak_is_that_of_the_device_or_unknown():
    kinds = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "TPU v5 lite",
        "TPU v5p",
        "NVIDIA GH200 480GB",
        "cpu",
    )
    assert [peak_flops(kind) for kind in kinds] == [989e12, 756e12, 989e12, 197e12, 459e12, 989e12, None]
