"""What all kernels for NVIDIA Hopper share (Pallas, Mosaic GPU): where they run, loads, launches, the SiLU."""

import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sharded import on_one_device

PROCESSORS = 132  # streaming multiprocessors of an H100 or H200
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def why_not_here() -> str | None:
    """Why the kernels cannot be the automatic choice on the default device."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs a CUDA device of compute capability 9.x, the default device is a {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"needs a CUDA device of compute capability 9.x, {device.device_kind} has {capability}"
    if len(jax.devices()) > 1 and not on_one_device():
        return "several devices: XLA cannot split the kernel over a mesh by itself; call it inside use_mesh"
    return None


def launch(body, name: str, out_type, grid: dict[str, int], *, approximately: bool = False):
    """A kernel of one warpgroup for each block of the grid. References among its arguments are changed in place.

    Blocks start in the order of the grid, the last axis fastest: where neighbours in time are neighbours in memory, a
    large array is read and written faster. `approximately`: exponentials and roots to about 22 bits, in one instruction.
    """
    return pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid), kernel_name=name),
        compiler_params=plgpu.CompilerParams(
            approx_math=approximately,
            # What one thread writes another reads only behind an explicit barrier.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        name=name,
    )


# JAX 0.10 takes the index apart from the reference and insists on one.
_EVERYTHING = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()


def load(ref, layout, *, device_memory: bool = False):
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=not device_memory)


def load32(ref, layout):
    """Of device memory, in float32."""
    return load(ref, layout, device_memory=True).astype(jnp.float32)


def silu(a):
    return a / (1.0 + jnp.exp(-a))


def sigmoid(a):
    """In three instructions, where math is approximate."""
    root = lax.rsqrt(1.0 + jnp.exp2(a * -math.log2(math.e)))
    return root * root
