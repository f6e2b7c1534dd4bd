"""Visual scan as one SSD: the directions become further heads and groups, so a single scan runs them all."""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.visual_scan.directions import from_scan_order, to_scan_order


def by_parts(causal_conv1d: Callable, ssd: Callable) -> Callable:
    """`visual_scan` from one backend's convolution and scan."""

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
        k = len(directions)

        def walk(a):
            """[b l ...] -> [b l k ...], each direction in its own order."""
            return jnp.stack([to_scan_order(a, direction, grid) for direction in directions], axis=2)

        if conv_weight is None:
            x, B, C = walk(x), walk(B), walk(C)
        else:
            channels = walk(jnp.concatenate([a.reshape(batch, length, -1) for a in (x, B, C)], axis=-1))
            weight = conv_weight.reshape(-1, conv_weight.shape[-1])
            bias = None if conv_bias is None else conv_bias.reshape(-1)
            channels = causal_conv1d(channels.reshape(batch, length, -1), weight, bias, activation="silu")
            inner, grouped = heads * head_dim, groups * state_size
            x, B, C = jnp.split(channels.reshape(batch, length, k, -1), (inner, inner + grouped), axis=-1)

        y = ssd(
            x.reshape(batch, length, k * heads, head_dim),
            walk(dt).reshape(batch, length, k * heads),
            A.reshape(-1),
            B.reshape(batch, length, k * groups, state_size),
            C.reshape(batch, length, k * groups, state_size),
            D=None if D is None else D.reshape(k * heads, *D.shape[2:]),
            dt_bias=None if dt_bias is None else dt_bias.reshape(-1),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            precision=precision,
        ).reshape(batch, length, k, heads, head_dim)

        by_direction = [from_scan_order(y[:, :, i], direction, grid) for i, direction in enumerate(directions)]
        if merge is None:
            return jnp.stack(by_direction)
        total = sum(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in by_direction)
        return (total / k if merge == "mean" else total).astype(y.dtype)

    return visual_scan
