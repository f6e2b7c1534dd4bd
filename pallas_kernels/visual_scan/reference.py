"""Visual scan, one direction after the other on explicitly reordered patches: the oracle of every other backend."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.causal_conv1d import reference as conv_reference
from pallas_kernels.ssd import reference as ssd_reference
from pallas_kernels.visual_scan.directions import scan_order


def visual_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    grid,
    directions,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    conv_weight=None,
    conv_bias=None,
    merge="mean",
    chunk_size=None,
    precision=None,
):
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    outputs = []
    for k, direction in enumerate(directions):
        order = scan_order(direction, grid)
        x_k, dt_k, B_k, C_k = (a[:, order] for a in (x, dt, B, C))
        if conv_weight is not None:
            channels = jnp.concatenate([a.reshape(batch, length, -1) for a in (x_k, B_k, C_k)], axis=-1)
            bias = None if conv_bias is None else conv_bias[k]
            channels = conv_reference.causal_conv1d(channels, conv_weight[k], bias, activation="silu")
            x_k, B_k, C_k = jnp.split(channels, (heads * head_dim, heads * head_dim + groups * state_size), axis=-1)
            x_k = x_k.reshape(x.shape)
            B_k, C_k = (a.reshape(B.shape) for a in (B_k, C_k))
        y = ssd_reference.ssd(
            x_k,
            dt_k,
            A[k],
            B_k,
            C_k,
            D=None if D is None else D[k],
            dt_bias=None if dt_bias is None else dt_bias[k],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
        )
        outputs.append(y[:, np.argsort(order)])
    y = jnp.stack(outputs)
    if merge is None:
        return y
    total = jnp.sum(y.astype(jnp.promote_types(y.dtype, jnp.float32)), axis=0)
    return (total / len(directions) if merge == "mean" else total).astype(x.dtype)
