"""One launch of a Triton kernel from JAX, by jax-triton: both are imported when the first kernel is asked for."""

import jax
from jax import Array


def why_not_importable() -> str | None:
    """Why jax-triton cannot be used here, in one line."""
    advice = "install ml-mamba-jax[triton] and a JAX for CUDA"
    try:
        import jax_triton
    except ImportError as error:  # also raised by jax-triton itself where JAX has no GPU support
        return f"needs jax-triton 0.3, which cannot be imported ({str(error).splitlines()[0]}); {advice}"
    if not jax_triton.__version__.startswith("0.3."):
        return f"needs jax-triton 0.3, found {jax_triton.__version__}; {advice}"
    return None


def launch(
    kernel: str,
    grid: tuple[int, ...],
    inputs: dict[str, Array | None],
    sizes: tuple[int, ...],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    warps: int,
    stages: int,
    **constants,
) -> dict[str, Array]:
    """The outputs by name of the function `kernel` of `kernels`, whose parameters are inputs, sizes, outputs, constants.

    An input that is None gives way to the first one; a constant tells the kernel not to read it.
    """
    import jax_triton

    from pallas_kernels.ssd.triton import kernels

    first = next(iter(inputs.values()))
    arrays = [first if a is None else a for a in inputs.values()]

    def call(*arrays):
        return jax_triton.triton_call(
            *arrays,
            *sizes,
            kernel=getattr(kernels, kernel),
            out_shape=tuple(outputs.values()),
            grid=grid,
            num_warps=warps,
            num_stages=stages,
            **constants,
        )

    with jax.named_scope(kernel):
        # jax-triton has no rule for vmap: one launch for each row then.
        results = jax.custom_batching.sequential_vmap(call)(*arrays)
    return dict(zip(outputs, results, strict=True))
