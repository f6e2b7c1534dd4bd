"""Gradients of kernels that have no backward pass of their own."""

from collections.abc import Callable

import jax


def with_gradient_of(differentiable: Callable, forward: Callable) -> Callable:
    """`forward`, a function of one dict of arrays, with the reverse-mode gradient of `differentiable`.

    The backward pass keeps nothing but the arguments and runs `differentiable` on them. That is correct where the two
    agree up to rounding. Forward mode and second derivatives are not supported.
    """
    run = jax.custom_vjp(forward)

    def backward(arrays, cotangents):
        _, pullback = jax.vjp(differentiable, arrays)
        return pullback(cotangents)

    run.defvjp(lambda arrays: (forward(arrays), arrays), backward)
    return run
