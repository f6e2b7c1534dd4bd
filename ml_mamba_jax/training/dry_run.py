"""What a run needs, before it starts: parameters, bytes on each device and FLOPs, for any mesh, without the devices.

Parameters, optimizer, gradients and kept activations are counted from abstract values and their shardings. Then the step is
compiled for simulated devices, which shows that it can be partitioned and what XLA would allocate. That figure is of the compiler
for CPUs, which computes bfloat16 in float32 and runs no hand-written kernel: an accelerator usually needs less.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Var
from jax.sharding import Mesh

from ml_mamba_jax import sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.samples import Batch
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.config import MeshConfig, StageConfig, TrainConfig
from ml_mamba_jax.training.flops import step_flops
from ml_mamba_jax.training.losses import target_losses
from ml_mamba_jax.training.optimizer import make_optimizer
from ml_mamba_jax.training.stages import join, split
from ml_mamba_jax.training.step import TrainState, abstract_params, abstract_state, make_model, make_train_step

GIB = 2**30
STEPS = 1000
"""Length of the schedule where the data is not known; nothing that is printed depends on it."""


class Needs(NamedTuple):
    """Of one stage. Bytes are those of one device."""

    n_trained: int
    n_frozen: int
    trained: int
    frozen: int
    optimizer: int
    gradients: int
    activations: int
    """Kept from the forward to the backward pass, of one micro-batch."""
    compiled: int
    """Arguments and temporary memory of the compiled step."""
    flops: int
    """Of a step on all devices, see `ml_mamba_jax.training.flops`."""

    @property
    def bytes(self) -> int:
        """What a device must hold at least."""
        return self.trained + self.frozen + self.optimizer + self.gradients + self.activations


def simulate_devices(mesh: MeshConfig) -> MeshConfig:
    """Let the CPU appear as the devices of a mesh, where -1 counts as 1. Before JAX is used for anything else."""
    sizes = {name: max(size, 1) for name, size in vars(mesh).items()}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    return MeshConfig(**sizes)


def dry_run(config: TrainConfig, mesh: Mesh) -> None:
    """Print what every stage needs.

    Raises:
        InputError: a stage that cannot fit `device_memory`, with the figures; a mesh that does not divide the model.
    """
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"{config.name} on {mesh.size} simulated device(s): {sizes}", flush=True)
    too_large = []
    for stage in config.stages:
        needs = needs_of(stage, make_model(config), mesh)
        print(
            f"\n{stage.name}, {stage.batch_size} rows, {stage.micro_batches} micro-batch(es)\n{table(needs, mesh)}",
            flush=True,
        )
        if config.device_memory is not None:
            available = config.device_memory * GIB
            if needs.bytes > available:
                too_large.append(f"{stage.name} needs at least {needs.bytes / GIB:.2f} GiB on each device")
            elif needs.compiled > available:
                print(f"  may not fit {config.device_memory:g} GiB: XLA for CPU would allocate more", flush=True)
    if too_large:
        raise InputError(
            f"device_memory: got {config.device_memory:g} GiB, but {'; '.join(too_large)}; raise mesh.fsdp or micro-batches, "
            "or pass --remat blocks"
        )


def needs_of(stage: StageConfig, model: MLMamba, mesh: Mesh) -> Needs:
    """Counts and compiles one stage."""
    trained, frozen = split(abstract_params(model, mesh), stage)
    optimizer = make_optimizer(stage.optim, model, STEPS)
    state = abstract_state(optimizer, trained, mesh)
    batch = abstract_batch(stage, model.config, mesh)
    compiled = lower(model, optimizer, mesh, stage, state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    n_rows, n_tokens = batch.tokens.shape
    n_images = n_rows if batch.image_starts is None else batch.image_starts.size
    n_text = n_rows * n_tokens - (0 if batch.image_starts is None else n_images * model.config.n_visual_tokens)
    return Needs(
        n_trained=_count(trained),
        n_frozen=_count(frozen),
        trained=_bytes_on_a_device(trained),
        frozen=_bytes_on_a_device(frozen),
        optimizer=_bytes_on_a_device(state.optimizer),
        gradients=_bytes_on_a_device(trained),
        activations=kept_activations(model, stage, mesh, trained, frozen, batch),
        compiled=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        flops=step_flops(model.config, stage, n_images, n_text),
    )


def lower(
    model: MLMamba,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    stage: StageConfig,
    state: TrainState,
    frozen: dict,
    batch: Batch,
) -> jax.stages.Lowered:
    """The step of a stage for abstract arguments."""
    return make_train_step(model, optimizer, mesh, stage).lower(state, frozen, batch)


def abstract_batch(stage: StageConfig, config: MLMambaConfig, mesh: Mesh) -> Batch:
    """A batch of full rows, each with an image if the model sees any, and packed ones with as many as there is room for."""
    place = sharding.batch_sharding(mesh)

    def array(*shape: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((stage.batch_size, *shape), dtype, sharding=place)

    if stage.data.batching == "packed":
        length, slots = stage.data.row_length, stage.data.row_length // max(config.n_visual_tokens, 1)
        return Batch(
            tokens=array(length, dtype=jnp.int32),
            is_target=array(length, dtype=jnp.bool_),
            lengths=array(dtype=jnp.int32),
            images={e.name: array(slots, e.image_size, e.image_size, 3, dtype=jnp.uint8) for e in config.vision},
            image_mask=None,
            segment_ids=array(length, dtype=jnp.int32),
            image_starts=array(slots, dtype=jnp.int32) if config.vision else None,
        )
    length = stage.data.max_tokens
    return Batch(
        tokens=array(length, dtype=jnp.int32),
        is_target=array(length, dtype=jnp.bool_),
        lengths=array(dtype=jnp.int32),
        images={e.name: array(e.image_size, e.image_size, 3, dtype=jnp.uint8) for e in config.vision},
        image_mask=None,
    )


def kept_activations(model: MLMamba, stage: StageConfig, mesh: Mesh, trained: dict, frozen: dict, batch: Batch) -> int:
    """Bytes on a device that the forward pass of a micro-batch keeps for the backward pass: what its linearisation holds on to.

    What the axis `tensor` splits of them is up to XLA, so the forward pass is compiled if there is one.
    """
    rows, place = stage.batch_size // stage.micro_batches, sharding.batch_sharding(mesh)
    part = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype, sharding=place), batch)

    def linearised(trained, frozen, part):
        with sharding.split_kernels(mesh):
            return jax.vjp(lambda p: target_losses(model, join(p, frozen), part)[0], trained)[1]

    traced = jax.jit(linearised).trace(trained, frozen, part)
    jaxpr = traced.jaxpr.jaxpr
    given = set(jaxpr.invars)
    kept = {v: i for i, v in enumerate(jaxpr.outvars) if isinstance(v, Var) and v not in given}
    if mesh.shape["tensor"] > 1:
        places = jax.tree.leaves(traced.lower().compile().output_shardings)
        return sum(math.prod(places[i].shard_shape(v.aval.shape)) * v.aval.dtype.itemsize for v, i in kept.items())
    whole = sum(v.aval.size * v.aval.dtype.itemsize for v in kept)
    parts = math.prod(mesh.shape[name] for name in (*sharding.BATCH_AXES, sharding.SEQUENCE_AXIS))
    return whole // parts


def table(needs: Needs, mesh: Mesh) -> str:
    """The needs of a stage as aligned text."""
    rows = [
        ("trained parameters", f"{needs.n_trained:>17,}", needs.trained),
        ("frozen parameters", f"{needs.n_frozen:>17,}", needs.frozen),
        ("optimizer", "", needs.optimizer),
        ("gradients", "", needs.gradients),
        ("activations kept", "", needs.activations),
        ("a device needs at least", "", needs.bytes),
        ("XLA for CPU allocates", "", needs.compiled),
    ]
    lines = [f"  {name:<24} {count:>17} {size / GIB:>10.3f} GiB a device" for name, count, size in rows]
    lines.append(f"  {'FLOPs of a step':<24} {needs.flops:>17.4g} {needs.flops / mesh.size:>10.4g} a device")
    return "\n".join(lines)


def _count(tree: dict) -> int:
    return sum(a.size for a in jax.tree.leaves(tree))


def _bytes_on_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * np.dtype(a.dtype).itemsize for a in leaves)
