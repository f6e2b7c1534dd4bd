"""Every connector against its restatement in PyTorch: visual tokens, and gradients of the features and of every parameter.

Gradients come over as weights do: those of PyTorch are saved as a run, and converted.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from ml_mamba_jax.config import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    ConnectorConfig,
    Mamba2Config,
    MixerConfig,
    MLMambaConfig,
    ViTConfig,
)
from ml_mamba_jax.connector import ScanConnector
from tests.convert.converted import convert, jit_small, relative_error
from tests.convert.torch_models import Connector, LanguageModel, randomise
from tests.convert.torch_runs import gradients, save_run

MIXER = MixerConfig(d_model=16, d_state=8, head_dim=8, n_groups=2)
LANGUAGE = Mamba2Config(mixer=MIXER, n_layers=1, vocab_size=16)
VISION = (ViTConfig("siglip", image_size=40, patch_size=8, width=24, depth=2, n_heads=2, mlp_dim=32),)
GRID = (5, 5)
DIRECTIONS = {"bsm": BIDIRECTIONAL_SCAN, "csm": CROSS_SCAN}
PROJECTORS = ("linear", "gelu-mlp", "fused-gelu-mlp", "fused-ldpnet")


def cases() -> dict[str, ConnectorConfig]:
    found = {}
    for scan, directions, projector in itertools.product(("advanced", "basic", "vss-l2"), DIRECTIONS, PROJECTORS):
        found[f"{scan} {directions} {projector}"] = ConnectorConfig(
            MIXER,
            scan=scan,
            n_layers=2 if scan == "advanced" else 1,
            directions=DIRECTIONS[directions],
            projector=projector,
        )
    for projector in PROJECTORS:
        found[f"none {projector}"] = ConnectorConfig(MIXER, scan="none", projector=projector)
    pooled = ConnectorConfig(MIXER, scan="none", projector="fused-ldpnet", pooled_grid=(2, 3))
    before_gate = dataclasses.replace(MIXER, norm_before_gate=True, dt_limit=(0.01, 0.05))
    others = {
        "pooled to 2 x 3": pooled,
        "norm before gate, limited steps": ConnectorConfig(before_gate, directions=CROSS_SCAN),
        "one direction, three layers": ConnectorConfig(MIXER, directions=("columns",), n_layers=3),
    }
    return found | others


CASES = cases()


@pytest.fixture(scope="module")
def language():
    return randomise(LanguageModel(LANGUAGE)).state_dict()


def both(case: str, language: dict, folder) -> tuple[MLMambaConfig, Connector, dict]:
    """The config, the connector in PyTorch with random weights in float64, and its weights after conversion."""
    config = MLMambaConfig(language=LANGUAGE, vision=VISION, connector=CASES[case])
    theirs = randomise(Connector(config.connector, n_features=24, grid=GRID)).double()
    ours = convert(save_run(folder / "run", config, language, theirs.state_dict()))
    assert ours.config == config and set(ours.params) == {"language", "connector"}
    return config, theirs, ours.params["connector"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_visual_tokens(case, language, tmp_path):
    config, theirs, params = both(case, language, tmp_path)
    features = normal(0, 2, 25, 24)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(features).double())
    assert expected.shape == (2, config.n_visual_tokens, 16)
    model = ScanConnector(config.connector, GRID, jnp.dtype("float32"))
    assert relative_error(jit_small(model.apply)({"params": params}, features), expected) <= 1e-4


WITH_GRADIENTS = (
    "advanced bsm fused-gelu-mlp",
    "advanced csm fused-ldpnet",
    "basic bsm fused-ldpnet",
    "basic csm gelu-mlp",
    "vss-l2 bsm linear",
    "vss-l2 csm fused-gelu-mlp",
    "norm before gate, limited steps",
)


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_gradients(case, language, tmp_path):
    config, theirs, params = both(case, language, tmp_path)
    features, cotangent = normal(0, 2, 25, 24), normal(1, 2, config.n_visual_tokens, 16)
    their_features = torch.from_numpy(features).double().requires_grad_()
    (theirs(their_features) * torch.from_numpy(cotangent)).sum().backward()
    of_params = convert(save_run(tmp_path / "gradients", config, language, gradients(theirs))).params["connector"]

    model = ScanConnector(config.connector, GRID, jnp.dtype("float32"))

    @jit_small
    def pulled_back(params, features, cotangent):
        _, pull = jax.vjp(lambda params, features: model.apply({"params": params}, features), params, features)
        return pull(cotangent)

    ours_of_params, ours_of_features = pulled_back(params, features, cotangent)
    assert relative_error(ours_of_features, their_features.grad) <= 1e-3
    of_params, ours_of_params = flatten_dict(of_params, sep="/"), flatten_dict(ours_of_params, sep="/")
    assert set(ours_of_params) == set(of_params)
    for path, gradient in ours_of_params.items():
        assert relative_error(gradient, of_params[path]) <= 1e-3, path


def test_real_grid_is_pooled_as_by_torch(language, tmp_path):
    """27 x 27 patches to 14 x 14 tokens: bins overlap and differ in size."""
    connector = ConnectorConfig(MIXER, scan="none", projector="fused-ldpnet")
    vision = (dataclasses.replace(VISION[0], image_size=384, patch_size=14),)
    config = MLMambaConfig(language=LANGUAGE, vision=vision, connector=connector)
    theirs = randomise(Connector(connector, n_features=24, grid=(27, 27)))
    ours = convert(save_run(tmp_path, config, language, theirs.state_dict()))
    features = np.random.default_rng(0).standard_normal((1, 729, 24)).astype(np.float32)
    expected = theirs(torch.from_numpy(features))
    assert expected.shape == (1, 196, 16) and config.n_visual_tokens == 196
    model = ScanConnector(connector, (27, 27), jnp.dtype("float32"))
    got = jit_small(model.apply)({"params": ours.params["connector"]}, features)
    assert relative_error(got, expected) <= 1e-4
