"""One launch of a Triton kernel from JAX, by jax-triton: both are imported when the first kernel is asked for."""

import jax
from jax import Array
from jax.custom_batching import sequential_vmap

from pallas_kernels.ssd.triton.plan import Plan, filled

ADVICE = "install ml-mamba-jax[triton] beside a JAX for CUDA"


def why_not_importable() -> str | None:
    """Why jax-triton cannot be used here, in one line."""
    try:
        import jax_triton
    except (ImportError, AttributeError) as error:  # of jax-triton itself too, where JAX has no GPU support
        return f"needs jax-triton 0.3, which cannot be imported: {str(error).splitlines()[0]}; {ADVICE}"
    if not jax_triton.__version__.startswith("0.3."):
        return f"needs jax-triton 0.3, found {jax_triton.__version__}; {ADVICE}"
    return None


def launch(
    kernel: str,
    plan: Plan,
    grid: tuple[int, int, int],
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
    **constants,
) -> dict[str, Array]:
    """The outputs by name of a function of `kernels`, whose parameters are: inputs, sizes, outputs, constants.

    An input that is None gives way to the first one; a constant tells the kernel not to read it.
    """
    import jax_triton

    from pallas_kernels.ssd.triton import kernels

    first = next(iter(inputs.values()))
    arrays = [first if a is None else a for a in inputs.values()]
    how = plan.launch_of(kernel)
    constants = {
        "P": plan.head_dim,
        "N": plan.state_size,
        "Q": plan.chunk,
        "BP": filled(plan.head_dim),
        "BN": how.slice,
        "PACKED": inputs["first_visible"] is not None,
    } | constants

    def call(*arrays):
        return jax_triton.triton_call(
            *arrays,
            plan.length,
            plan.chunks,
            plan.heads,
            plan.groups,
            kernel=getattr(kernels, kernel),
            out_shape=tuple(outputs.values()),
            grid=grid,
            num_warps=how.warps,
            num_stages=how.stages,
            **constants,
        )

    with jax.named_scope(kernel):
        results = sequential_vmap(call)(*arrays)  # jax-triton has no rule for vmap
    return dict(zip(outputs, results, strict=True))
