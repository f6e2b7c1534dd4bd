"""How an SSD kernel gets its gradient."""

from collections.abc import Callable

import jax
from jax import Array

from pallas_kernels.ssd import xla

Outputs = tuple[Array, Array] | Array


def with_gradient(forward: Callable, backward: Callable, **options) -> Callable[[dict[str, Array]], Outputs]:
    """`forward(**arrays, **options)` as a function of the dict `arrays`, differentiable in reverse mode.

    `backward(arrays, cotangents, **options)` returns the gradient of every array, for the cotangents of the outputs.
    Nothing but the arguments is kept for it. Forward mode and second derivatives are not supported.
    """

    @jax.custom_vjp
    def run(arrays):
        return forward(**arrays, **options)

    def pullback(arrays, cotangents):
        return (backward(arrays, cotangents, **options),)

    run.defvjp(lambda arrays: (run(arrays), arrays), pullback)
    return run


def xla_gradient(arrays: dict[str, Array], cotangents: Outputs, **options) -> dict[str, Array]:
    """The gradient of the XLA implementation of `ssd`, for kernels that agree with it up to rounding.

    Costs an XLA forward pass more than a backward kernel.
    """
    _, pullback = jax.vjp(lambda arrays: xla.ssd(**arrays, **options), arrays)
    return pullback(cotangents)[0]
