"""AdamW with warm-up and cosine decay, as ML-Mamba is trained (arXiv 2407.19832, table 1)."""

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.sharding import STACKING_AXES, logical_axes
from ml_mamba_jax.training.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over the warm-up, then a cosine to 0 at the last step."""
    warmup = int(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.peak_lr, warmup, max(steps, warmup + 1))


def make_optimizer(config: OptimConfig, model: MLMamba, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW whose weight decay spares one-dimensional parameters (biases, norms, A, D, dt).

    For all parameters of the model, or those of some parts.
    """
    axes = flatten_dict(logical_axes(model))

    def decays(params: dict) -> dict:
        counts = {path: sum(axis not in STACKING_AXES for axis in axes[path]) for path in flatten_dict(params)}
        return unflatten_dict({path: count > 1 for path, count in counts.items()})

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=config.mu_dtype,
            mask=decays,
        ),
    )
