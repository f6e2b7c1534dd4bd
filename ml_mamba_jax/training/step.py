"""The state of a stage on the devices, and the step that advances it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Int

from ml_mamba_jax import processes, sharding
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.config import StageConfig, TrainConfig
from ml_mamba_jax.training.finite import are_finite
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.stages import split


class TrainState(NamedTuple):
    """What a step changes. `step`: optimizer steps of the stage, int32; `params`: those that the stage trains."""

    step: Int[Array, ""]
    params: dict
    optimizer: optax.OptState


REMAT = {"none": False, "blocks": True, "projections": "projections"}


def make_model(config: TrainConfig) -> MLMamba:
    return MLMamba(config.model, remat=REMAT[config.remat])


def init_params(model: MLMamba, mesh: Mesh, seed: int) -> dict:
    """Random parameters of all parts, each made where it will live."""
    place = sharding.param_shardings(model, mesh)
    return jax.jit(lambda key: model.init(key, **model.dummy_inputs())["params"], out_shardings=place)(
        jax.random.key(seed)
    )


def abstract_params(model: MLMamba, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of all parameters."""
    shapes, place = model.param_shapes(), sharding.param_shardings(model, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, place)


def abstract_state(optimizer: optax.GradientTransformation, params: dict, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state that trains `params`: abstract ones, or arrays.

    Moments of the optimizer lie where their parameters lie.
    """
    abstract = jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, optimizer.init(p)), params)
    place = jax.tree.map(lambda a: a.sharding, params)
    everywhere = sharding.replicated(mesh)
    placed = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract.optimizer, place, transform_non_params=lambda _: everywhere
    )
    shardings = TrainState(everywhere, place, placed)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def first_state(optimizer: optax.GradientTransformation, params: dict, mesh: Mesh) -> TrainState:
    """The state before the first step that trains `params`; takes them as they are."""
    target = abstract_state(optimizer, params, mesh)
    moments = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda a: a.sharding, target.optimizer))(params)
    return TrainState(processes.place(jnp.zeros((), jnp.int32), target.step.sharding), params, moments)


def resumed_state(params: dict, optimizer: optax.OptState, mesh: Mesh) -> TrainState:
    """The state that goes on with what was saved. AdamW counts its steps, which are those of the state."""
    counts = optax.tree_utils.tree_get_all_with_path(optimizer, "count")
    step = jnp.int32(int(counts[0][1]))
    return TrainState(processes.place(step, sharding.replicated(mesh)), params, optimizer)


def make_train_step(model: MLMamba, optimizer: optax.GradientTransformation, mesh: Mesh, stage: StageConfig):
    """A jitted function (state, frozen, batch) -> (state, metrics) that takes the old state's memory.

    `frozen` are the parameters that the stage does not train. A loss or gradient that is not finite leaves the state as it was, and
    so does an update from which a parameter or moment would not be.

    Metrics are float32 scalars: `loss`, the mean over target tokens; `gradient_norm` before clipping; `targets`, their number;
    `finite`, whether loss, gradient and the next state are. Beside them, `finite_gradient`: a tree of bool [], for each array.
    """
    trained, frozen = split(abstract_params(model, mesh), stage)
    shardings = jax.tree.map(lambda a: a.sharding, (abstract_state(optimizer, trained, mesh), frozen))

    def train_step(state: TrainState, frozen: dict, batch) -> tuple[TrainState, dict[str, Array]]:
        with sharding.split_kernels(mesh):
            loss, gradient, targets = mean_loss_and_gradient(
                model, state.params, batch, stage.micro_batches, frozen=frozen
            )
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        following = TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state)
        finite_state = jnp.stack(jax.tree.leaves(are_finite((following.params, following.optimizer)))).all()
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & finite_state
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state)
        metrics = {"loss": loss, "gradient_norm": norm, "targets": targets, "finite": finite.astype(jnp.float32)}
        return state, metrics | {"finite_gradient": are_finite(gradient)}

    return jax.jit(
        train_step,
        in_shardings=(*shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings[0], sharding.replicated(mesh)),
        donate_argnums=0,
    )
