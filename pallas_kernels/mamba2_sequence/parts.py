"""A Mamba-2 mixer on a sequence as its three parts, one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.mamba2_step.sizes import Sizes


def by_parts(causal_conv1d: Callable, ssd: Callable, gated_rms_norm: Callable) -> Callable:
    """`mamba2_sequence` from one function for each part."""

    def mamba2_sequence(
        zxbcdt,
        conv_weight,
        A,
        *,
        groups=1,
        conv_bias=None,
        D=None,
        dt_bias=None,
        dt_limit=(0.0, float("inf")),
        norm_weight=None,
        norm_eps=1e-5,
        norm_before_gate=False,
        conv_state=None,
        ssm_state=None,
        segment_ids=None,
        return_states=False,
        chunk_size=None,
    ):
        sizes = sizes_of(zxbcdt, conv_weight, A, groups)
        z, xBC, dt = jnp.split(zxbcdt, (sizes.inner, sizes.inner + sizes.channels), axis=-1)
        packed = {"segment_ids": segment_ids}
        xBC = causal_conv1d(
            *(xBC, conv_weight, conv_bias),
            activation="silu",
            initial_state=conv_state,
            return_final_state=return_states,
            **packed,
        )
        xBC, *conv = xBC if return_states else (xBC,)
        x, B, C = jnp.split(xBC, (sizes.inner, sizes.inner + sizes.groups * sizes.state), axis=-1)
        lead = zxbcdt.shape[:2]
        B, C = (a.reshape(*lead, sizes.groups, sizes.state) for a in (B, C))
        y = ssd(
            *(x.reshape(*lead, sizes.heads, sizes.head_dim), dt, A, B, C),
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            initial_state=ssm_state,
            return_final_state=return_states,
            chunk_size=chunk_size,
            **packed,
        )
        y, *ssm = y if return_states else (y,)
        y = y.reshape(z.shape)
        if norm_weight is None:
            dtype = jnp.promote_types(y.dtype, jnp.float32)
            y = (y.astype(dtype) * jax.nn.silu(z.astype(dtype))).astype(y.dtype)
        else:
            y = gated_rms_norm(
                *(y, z, norm_weight),
                eps=norm_eps,
                group_size=sizes.inner // sizes.groups,
                norm_before_gate=norm_before_gate,
            )
        return (y, *conv, *ssm) if return_states else y

    return mamba2_sequence


def sizes_of(zxbcdt, conv_weight, A, groups: int) -> Sizes:
    """The sizes that the shapes belong to. ValueError where there are none."""
    projected, channels, heads = zxbcdt.shape[-1], conv_weight.shape[0], A.shape[0]
    inner = projected - channels - heads
    state = (channels - inner) // (2 * groups)
    sizes = Sizes(heads, inner // heads, groups, state)
    if inner < 1 or state < 1 or heads % groups or (sizes.channels, sizes.projected) != (channels, projected):
        raise ValueError(
            f"zxbcdt: got {projected} channels, of which {channels} for conv_weight and {heads} heads, expected "
            f"2*h*p + 2*g*n + h and h*p + 2*g*n with g = {groups} groups that divide the heads"
        )
    return sizes
