"""Gradients of forward-only SSD kernels."""

from collections.abc import Callable

import jax
from jax import Array

from pallas_kernels.ssd import xla


def with_xla_gradient(forward: Callable, **options) -> Callable[[dict[str, Array]], tuple[Array, ...] | Array]:
    """`forward(**arrays, **options)` as a function of the dict `arrays`, differentiable in reverse mode.

    The backward pass keeps nothing but the arguments: it runs the XLA implementation of `ssd` on them and takes its
    gradient. That is correct for every forward kernel that agrees with XLA up to rounding, and costs one XLA forward
    pass more than a backward kernel of its own would. Forward mode and second derivatives are not supported.
    """

    @jax.custom_vjp
    def run(arrays):
        return forward(**arrays, **options)

    def backward(arrays, cotangents):
        _, pullback = jax.vjp(lambda arrays: xla.ssd(**arrays, **options), arrays)
        return pullback(cotangents)

    run.defvjp(lambda arrays: (run(arrays), arrays), backward)
    return run
