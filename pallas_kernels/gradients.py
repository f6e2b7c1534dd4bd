"""How a kernel gets its gradient: from a backward kernel, or from a slower function that JAX can differentiate."""

from collections.abc import Callable

import jax


def with_gradient(forward: Callable, backward: Callable) -> Callable:
    """`forward`, a function of one dict of arrays, differentiable in reverse mode.

    `backward(arrays, cotangents)` returns the gradient of every array, for the cotangents of the outputs. Nothing but
    the arguments is kept for it. Forward mode and second derivatives are not supported.
    """
    run = jax.custom_vjp(forward)
    run.defvjp(lambda arrays: (forward(arrays), arrays), lambda arrays, cotangents: (backward(arrays, cotangents),))
    return run


def with_gradient_of(differentiable: Callable, forward: Callable) -> Callable:
    """`forward` with the gradient of `differentiable`: correct where the two agree up to rounding."""

    def backward(arrays, cotangents):
        _, pullback = jax.vjp(differentiable, arrays)
        return pullback(cotangents)[0]

    return with_gradient(forward, backward)
