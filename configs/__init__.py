"""Recipes: what `python train.py NAME` can train. Each is a `TrainConfig`; its module states command, cost and score."""

from configs import digits_vqa, finetune, ml_mamba
from ml_mamba_jax.training.config import TrainConfig

RECIPES: dict[str, tuple[str, TrainConfig]] = {
    **{module.RECIPE.name: (module.__doc__.splitlines()[0], module.RECIPE) for module in (digits_vqa, finetune)},
    **ml_mamba.RECIPES,
}
"""A line about each, and the recipe."""
PRESETS: dict[str, TrainConfig] = {name: recipe for name, (_, recipe) in RECIPES.items()}
