"""A Mamba-2 mixer on a grid of patches as its parts, one after the other."""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.mamba2_sequence.parts import sizes_of


def by_parts(visual_scan: Callable, gated_rms_norm: Callable) -> Callable:
    """`mamba2_grid` from one function for each part."""

    def mamba2_grid(
        zxbcdt,
        conv_weight,
        A,
        *,
        grid,
        directions,
        norm_weight,
        groups=1,
        conv_bias=None,
        D=None,
        dt_bias=None,
        dt_limit=(0.0, float("inf")),
        norm_eps=1e-5,
        norm_before_gate=False,
        merge="mean",
        chunk_size=None,
    ):
        sizes = sizes_of(zxbcdt, conv_weight[0], A[0], groups)
        lead = zxbcdt.shape[:2]
        widths = (sizes.inner, sizes.inner, groups * sizes.state, groups * sizes.state, sizes.heads)
        ends = [sum(widths[: i + 1]) for i in range(4)]
        z, x, B, C, dt = jnp.split(zxbcdt, ends, axis=-1)
        B, C = (a.reshape(*lead, groups, sizes.state) for a in (B, C))
        y = visual_scan(
            *(x.reshape(*lead, sizes.heads, sizes.head_dim), dt, A, B, C),
            grid=grid,
            directions=directions,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            merge=None,
            chunk_size=chunk_size,
        )
        k = len(directions)
        y = gated_rms_norm(
            y.reshape(k, *z.shape),
            jnp.broadcast_to(z[None], (k, *z.shape)),
            norm_weight,
            eps=norm_eps,
            group_size=sizes.inner // groups,
            norm_before_gate=norm_before_gate,
        )
        total = jnp.sum(y.astype(jnp.promote_types(y.dtype, jnp.float32)), axis=0)
        return (total / k if merge == "mean" else total).astype(y.dtype)

    return mamba2_grid
