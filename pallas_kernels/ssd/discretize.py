"""The step sizes of the SSD: bias, softplus and limits, in float32."""

import jax
import jax.numpy as jnp
from jax import Array


def discretize(dt: Array, dt_bias: Array | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype) -> Array:
    """clip(softplus(dt + dt_bias), *dt_limit) in `dtype`, any leading axes, heads last.

    On the limits themselves the derivative is 1, outside it is 0.
    """
    dt = dt.astype(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)[(None,) * (dt.ndim - 1)]
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    low, high = dt_limit
    return jnp.where(dt < low, low, jnp.where(dt > high, high, dt))
