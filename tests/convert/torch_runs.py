"""A run of ML-Mamba as the reference leaves it: config.json and checkpoints/latest-checkpoint.pt, without the encoders."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ml_mamba_jax import serialize
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.convert.families import OWN_CONFIG
from ml_mamba_jax.convert.source import CONFIG_FILE, RUN_CHECKPOINT

Weights = Mapping[str, Tensor]


def run_weights(language: Weights, connector: Weights) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a run's modules by their names, from those of a language model and a `torch_models.Connector`."""
    modules = {"llm_backbone": dict(language)}
    for key, tensor in connector.items():
        module, name = key.split(".", 1)
        modules.setdefault(module, {})[name] = tensor
    return modules


def save_run(folder: Path, config: MLMambaConfig, language: Weights, connector: Weights) -> Path:
    """Write a run whose config.json holds the whole of our config."""
    path = folder / RUN_CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": run_weights(language, connector)}, path)
    (folder / CONFIG_FILE).write_text(json.dumps({OWN_CONFIG: serialize.plain(config)}))
    return folder


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By the names of `state_dict`."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}
