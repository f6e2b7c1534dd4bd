"""A Mamba-2 mixer's step as its three parts, one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mamba2_step.sizes import split_sizes


def by_parts(causal_conv1d_step: Callable, ssd_step: Callable, gated_rms_norm: Callable) -> Callable:
    """`mamba2_step` from one backend's functions for the parts."""

    def mamba2_step(
        conv_state,
        ssm_state,
        zxbcdt,
        conv_weight,
        A,
        *,
        conv_bias=None,
        D=None,
        dt_bias=None,
        dt_limit=(0.0, float("inf")),
        norm_weight=None,
        norm_eps=1e-5,
        norm_before_gate=False,
        layer=None,
        active=None,
    ):
        stacks = conv_state, ssm_state
        if layer is not None:
            conv_state, ssm_state = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in stacks)
        before = conv_state, ssm_state
        sizes = split_sizes(ssm_state, conv_weight)
        z, xBC, dt = sizes.split(zxbcdt)
        xBC, conv_state = causal_conv1d_step(conv_state, xBC, conv_weight, conv_bias, activation="silu")
        x, B, C = sizes.split_channels(xBC)
        y, ssm_state = ssd_step(ssm_state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit)
        y = y.reshape(z.shape)
        if norm_weight is None:
            dtype = jnp.promote_types(y.dtype, jnp.float32)
            y = (y.astype(dtype) * jax.nn.silu(z.astype(dtype))).astype(y.dtype)
        else:
            group_size = sizes.inner // sizes.groups
            y = gated_rms_norm(
                y, z, norm_weight, eps=norm_eps, group_size=group_size, norm_before_gate=norm_before_gate
            )
        if active is not None:
            conv_state, ssm_state = (
                jnp.where(active.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                for old, new in zip(before, (conv_state, ssm_state), strict=True)
            )
        if layer is not None:
            conv_state, ssm_state = (
                lax.dynamic_update_index_in_dim(stack, a, layer, axis=0)
                for stack, a in zip(stacks, (conv_state, ssm_state), strict=True)
            )
        return y, conv_state, ssm_state

    return mamba2_step
