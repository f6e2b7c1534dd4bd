"""The state of a run on the devices, and the step that advances it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Int

from ml_mamba_jax import sharding
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.losses import mean_loss_and_gradient


class TrainState(NamedTuple):
    """`step`: optimizer steps done, int32."""

    step: Int[Array, ""]
    params: dict
    optimizer: optax.OptState


def init_state(model: MLMamba, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    params = model.init(key, **model.dummy_inputs())["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(model: MLMamba, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state. Moments of the optimizer lie where their parameters lie."""
    abstract = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    params = sharding.param_shardings(model, mesh)
    everywhere = sharding.replicated(mesh)
    placed = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract.optimizer, params, transform_non_params=lambda _: everywhere
    )
    shardings = TrainState(everywhere, params, placed)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def make_train_step(model: MLMamba, optimizer: optax.GradientTransformation, mesh: Mesh, micro_batches: int = 1):
    """A jitted function (state, batch) -> (state, metrics) that takes the old state's memory.

    A loss or gradient that is not finite leaves the state as it was.

    Metrics are float32 scalars: `loss`, the mean over target tokens; `gradient_norm` before clipping; `targets`, their number;
    `finite`, whether loss and gradient are.
    """
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(model, optimizer, mesh))

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, Array]]:
        with sharding.split_kernels(mesh):
            loss, gradient, targets = mean_loss_and_gradient(model, state.params, batch, micro_batches)
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        following = TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state)
        metrics = {"loss": loss, "gradient_norm": norm, "targets": targets, "finite": finite.astype(jnp.float32)}
        return state, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
