"""Where arrays live on a mesh of devices.

Modules name the axes of their parameters (`embed`, `heads`, ...); `RULES` maps those names to the mesh axes `fsdp` and `tensor`.
Inside `split_kernels` the kernels run on each device's part of the batch, the heads and the sequence, and
`pallas_kernels.keep_split` in the modules keeps what lies between them split alike. Nothing else in the library knows about meshes.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import pallas_kernels as pk
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")
"""The batch is split over both; parameters over `fsdp` and `tensor`."""
SEQUENCE_AXIS = "sequence"
"""Splits the tokens that the language model reads, for long rows; encoders and connector see whole images."""

Rules = Mapping[str, str | None]
RULES: Rules = {
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


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what the others leave.

    Axes are of type Auto: flax.linen fails under the Explicit type that `jax.make_mesh` would choose.

    Raises:
        InputError: sizes that do not multiply to the number of devices.
    """
    # Those of a process lie together, so that it holds one part of each batch.
    devices = sorted(jax.devices(), key=lambda device: device.process_index) if devices is None else devices
    sizes = [data, fsdp, tensor, sequence]
    shown = 3 if sequence == 1 else 4
    got = f"mesh: got {' x '.join(MESH_AXES[:shown])} = {' x '.join(map(str, sizes[:shown]))}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{got}, expected positive sizes and at most one -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise InputError(f"{got}, expected a product of {len(devices)}, the number of devices")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def logical_axes(model: MLMamba) -> dict:
    """The tree of the parameters with a tuple of axis names, or None for an axis without one, in place of each array."""
    abstract = jax.eval_shape(lambda: model.init_with_axes(jax.random.key(0), **model.dummy_inputs()))
    specs = nn.get_partition_spec(abstract)["params"]
    ndims = jax.tree.map(lambda a: a.ndim, nn.unbox(abstract)["params"])
    return jax.tree.map(lambda ndim, spec: tuple(spec) + (None,) * (ndim - len(spec)), ndims, specs)


def param_shardings(model: MLMamba, mesh: Mesh, rules: Rules = RULES) -> dict:
    """The tree of the parameters with a NamedSharding in place of each array.

    Raises:
        InputError: two axes of a parameter that `rules` map to the same mesh axis, or a size that its mesh axis does not
            divide; lists them.
    """
    problems = []

    def place(path, shape, axes):
        name, spec = "/".join(str(key.key) for key in path), []
        for size, axis in zip(shape.shape, axes, strict=True):
            mesh_axis = rules.get(axis) if axis else None
            if mesh_axis is not None and mesh_axis in spec:
                problems.append(f"{name} [{', '.join(map(str, axes))}] would be split over {mesh_axis} twice")
                mesh_axis = None
            spec.append(mesh_axis)
            if mesh_axis and size % mesh.shape[mesh_axis]:
                problems.append(f"{name} [{axis}] has {size}, {mesh_axis} is {mesh.shape[mesh_axis]}")
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, model.param_shapes(), logical_axes(model))
    problems = _heads_that_do_not_split(model, mesh.shape[rules["heads"]] if rules["heads"] else 1) + problems
    if problems:
        raise InputError(
            f"mesh: got {dict(mesh.shape)}, which does not divide {len(problems)} axes; "
            f"choose other sizes: {'; '.join(problems[:5])}"
        )
    return shardings


def _heads_that_do_not_split(model: MLMamba, parts: int) -> list[str]:
    """Heads are whole on a device, although what is split are the features of all of them together."""
    config = model.config
    heads = {f"vision/{encoder.name}": encoder.n_heads for encoder in config.vision}
    heads |= {name: part.mixer.n_heads for name in ("connector", "language") if (part := getattr(config, name))}
    return [f"{name} has {n} heads, {RULES['heads']} is {parts}" for name, n in heads.items() if n % parts]


def check_tokens(n_tokens: int, mesh: Mesh) -> None:
    """Raise InputError for rows of visual tokens and text that the mesh axis `sequence` does not divide."""
    parts = mesh.shape[SEQUENCE_AXIS]
    if n_tokens % parts:
        raise InputError(
            f"mesh: got sequence {parts}, which does not divide rows of {n_tokens} tokens (image and text); "
            f"choose another size, change data.max-tokens by {parts - n_tokens % parts}, or pack rows of one length: "
            f"--data.batching packed with a --data.row-length that {parts} divides"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over `BATCH_AXES`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(i, n): the devices of this process hold the i-th of n equal parts of a batch, those of other processes perhaps the same.

    Raises:
        InputError: an axis that is split within a process and over several, so that parts would not be equal.
    """
    inner, local = mesh.shape["tensor"] * mesh.shape[SEQUENCE_AXIS], len(mesh.local_devices)
    return _part_of(jax.process_index(), mesh.size, local, inner)


def _part_of(process: int, n_devices: int, local: int, inner: int) -> tuple[int, int]:
    """`batch_part` of a process with `local` devices, where each row of a batch is held by `inner` devices that lie together."""
    if local % inner and inner % local:
        raise InputError(
            f"mesh: got tensor x sequence = {inner} with {local} devices in a process, expected one to divide the other"
        )
    together = max(local, inner)
    return process * local // together, n_devices // together


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """The part of a batch that this process has read, as `batch_part` says -> the whole batch on the mesh."""
    sharding, (_, n) = batch_sharding(mesh), batch_part(mesh)

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, (n * array.shape[0], *array.shape[1:]))

    return jax.tree.map(put, batch)


def copy_to_each_process(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are split over all processes -> the same ones whole in each, split over its own devices alone."""
    local, axes = mesh.local_mesh, ("process", *MESH_AXES)
    if local == mesh:
        return tree
    by_process = Mesh(mesh.devices.reshape(-1, *local.devices.shape), axes, axis_types=(AxisType.Auto,) * len(axes))
    wide = jax.tree.map(lambda a: NamedSharding(by_process, a.sharding.spec), tree)
    whole = jax.jit(lambda t: t, out_shardings=wide)(tree)

    def own(array: jax.Array) -> jax.Array:
        pieces = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(local, array.sharding.spec), pieces)

    return jax.tree.map(own, whole)


def split_kernels(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Split the kernels of a model that is called inside the block as its batch and its parameters are."""
    sequence = SEQUENCE_AXIS if mesh.shape[SEQUENCE_AXIS] > 1 else None
    return pk.use_mesh(mesh, batch=BATCH_AXES, heads=RULES["heads"], sequence=sequence)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
