"""Where arrays live on a mesh of devices.

Modules name the axes of their parameters (`embed`, `heads`, ...); `RULES` maps those names to the mesh axes `data`, `fsdp` and
`tensor`. Inside `split_kernels` the kernels run on each device's part of the batch and of the heads. Nothing else in the library
knows about meshes.
"""

import contextlib

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import pallas_kernels as pk
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The batch is split over both; parameters over `fsdp` and `tensor`."""

RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "inner": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "conv_channels": "tensor",
    "norm": None,
    "layers": None,
    "directions": None,
}

STACKING_AXES = ("layers", "directions")
"""Axes along which equal parameters are stacked; what is one-dimensional stays so whatever is stacked."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave.

    Axes are of type Auto: flax.linen fails under the Explicit type that `jax.make_mesh` would choose.

    Raises:
        InputError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(
            f"mesh: got data x fsdp x tensor = {data} x {fsdp} x {tensor}, expected positive sizes and at most one -1"
        )
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise InputError(
            f"mesh: got data x fsdp x tensor = {data} x {fsdp} x {tensor}, "
            f"expected a product of {len(devices)}, the number of devices"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def logical_axes(model: MLMamba) -> dict:
    """The tree of the parameters with a tuple of axis names, or None for an axis without one, in place of each array."""
    abstract = jax.eval_shape(lambda: model.init_with_axes(jax.random.key(0), **model.dummy_inputs()))
    specs = nn.get_partition_spec(abstract)["params"]
    ndims = jax.tree.map(lambda a: a.ndim, nn.unbox(abstract)["params"])
    return jax.tree.map(lambda ndim, spec: tuple(spec) + (None,) * (ndim - len(spec)), ndims, specs)


def param_shardings(model: MLMamba, mesh: Mesh) -> dict:
    """The tree of the parameters with a NamedSharding in place of each array.

    Raises:
        InputError: a size that its mesh axis does not divide; lists all of them.
    """
    shapes = model.param_shapes()
    problems = []

    def place(path, shape, axes):
        spec = []
        for size, axis in zip(shape.shape, axes, strict=True):
            mesh_axis = RULES.get(axis) if axis else None
            spec.append(None if mesh_axis in spec else mesh_axis)
            if spec[-1] and size % mesh.shape[mesh_axis]:
                name = "/".join(str(key.key) for key in path)
                problems.append(f"{name} [{axis}] has {size}, {mesh_axis} is {mesh.shape[mesh_axis]}")
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, shapes, logical_axes(model))
    if problems:
        raise InputError(
            f"mesh: got {dict(mesh.shape)}, which does not divide {len(problems)} axes; "
            f"choose other sizes: {'; '.join(problems[:5])}"
        )
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over `BATCH_AXES`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def split_kernels(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Split the kernels of a model that is called inside the block as its batch and its parameters are."""
    return pk.use_mesh(mesh, batch=BATCH_AXES, heads=RULES["heads"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
