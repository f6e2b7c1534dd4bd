"""Recipes: what `python train.py NAME` can train. Each is a `TrainConfig`; its module states command, cost and score."""

from configs.digits_vqa import DIGITS_VQA
from ml_mamba_jax.training.config import TrainConfig

PRESETS: dict[str, TrainConfig] = {preset.name: preset for preset in (DIGITS_VQA,)}
