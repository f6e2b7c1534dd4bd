"""One token through all layers of a Mamba-2 language model, from the residual to the residual, in one call."""

import functools

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int8

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.mamba2_layers_step.by_layers import by_layers
from pallas_kernels.mamba2_step.api import mamba2_step
from pallas_kernels.mamba2_step.sizes import Sizes
from pallas_kernels.shapes import check_rank, check_shape
from pallas_kernels.sharded import current

MAMBA2_LAYERS_STEP = Op("mamba2_layers_step", "pallas_kernels.mamba2_layers_step", ("reference", "xla", "pallas_gpu"))


def mamba2_layers_step(
    residual: Float[Array, "b d"],
    conv_state: Float[Array, "layers b _ c"],
    ssm_state: Float[Array, "layers b h p n"],
    in_norm_weight: Float[Array, "layers d"],
    in_proj: Float[Array, "layers d e"] | Int8[Array, "layers d e"],
    conv_weight: Float[Array, "layers c w"],
    A: Float[Array, "layers h"],
    out_proj: Float[Array, "layers h*p d"] | Int8[Array, "layers h*p d"],
    *,
    conv_bias: Float[Array, "layers c"] | None = None,
    D: Float[Array, "layers h"] | Float[Array, "layers h p"] | None = None,
    dt_bias: Float[Array, "layers h"] | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_weight: Float[Array, "layers h*p"] | None = None,
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    in_norm_eps: float = 1e-5,
    in_proj_scale: Float[Array, "layers e"] | None = None,
    out_proj_scale: Float[Array, "layers d"] | None = None,
    active: Bool[Array, "b"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b d"], Float[Array, "layers b w-1 c"], Float[Array, "layers b h p n"]]:
    """The layers of Mamba-2 (arXiv 2405.21060) when one token is decoded, one after the other:

        zxbcdt = (rms_norm(residual) * in_norm_weight) @ in_proj
        y, conv_state, ssm_state = mamba2_step(conv_state, ssm_state, zxbcdt, ..., norm_weight)
        residual = residual + y @ out_proj

    Args:
        residual: in float32, or in the dtype of the computation.
        conv_state: its dtype is that of the computation; projections are converted to it where they have another one.
        in_norm_weight: of the norm before `in_proj`, whose epsilon is `in_norm_eps`.
        conv_bias, D, dt_bias, dt_limit, norm_weight, norm_eps, norm_before_gate: as for `mamba2_step`, of all layers.
        in_proj_scale, out_proj_scale: the products are multiplied by them, in float32. Projections in int8 need them.
        active: rows for which it is false keep their states, and their residual is of no use; all by default.
        implementation: see `pallas_kernels.dispatch`. Inside `use_mesh` it is that of the `mamba2_step` of each layer,
            and XLA splits the projections.

    Returns:
        (residual, conv_state, ssm_state). Under `jax.jit(..., donate_argnums=...)`, or as the carry of a loop, the
        states are updated in place.

    Raises:
        ValueError: shapes that do not fit together. ExceptionGroup: no backend of `implementation` takes the arguments.
    """
    check_rank("ssm_state", ssm_state, "layers b h p n")
    check_rank("residual", residual, "b d")
    check_rank("conv_weight", conv_weight, "layers c w")
    layers, batch, heads, head_dim, state = ssm_state.shape
    width, inner = residual.shape[1], heads * head_dim
    channels, taps = conv_weight.shape[1:]
    sizes = Sizes(heads, head_dim, (channels - inner) // (2 * state), state)
    check_shape("residual", residual, "b d", (batch, width))
    check_shape("in_norm_weight", in_norm_weight, "layers d", (layers, width))
    check_shape("in_proj", in_proj, "layers d 2*h*p+2*g*n+h", (layers, width, sizes.projected))
    check_shape("out_proj", out_proj, "layers h*p d", (layers, inner, width))
    check_shape("conv_weight", conv_weight, "layers c w", (layers, channels, taps))
    check_shape("conv_state", conv_state, "layers b w-1 c", (layers, batch, taps - 1, channels))
    check_shape("A", A, "layers h", (layers, heads))
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, "layers c", (layers, channels))
    if D is not None:
        one = (layers, heads, head_dim)
        check_shape("D", D, "layers h" if D.ndim == 2 else "layers h p", one[: max(D.ndim, 2)])
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, "layers h", (layers, heads))
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, "layers h*p", (layers, inner))
    for name, weights, scale, columns in (
        ("in_proj", in_proj, in_proj_scale, sizes.projected),
        ("out_proj", out_proj, out_proj_scale, width),
    ):
        if scale is not None:
            check_shape(f"{name}_scale", scale, "layers e" if name == "in_proj" else "layers d", (layers, columns))
        elif weights.dtype == jnp.int8:
            raise ValueError(f"{name}: got int8, expected {name}_scale with it; pass the scale of each of its columns")
    if active is not None:
        check_shape("active", active, "b", (batch,))
    step = functools.partial(MAMBA2_LAYERS_STEP, implementation)
    if current():
        step = by_layers(functools.partial(mamba2_step, implementation=implementation))
    return step(
        residual,
        conv_state,
        ssm_state,
        in_norm_weight,
        in_proj,
        conv_weight,
        A,
        out_proj,
        conv_bias=conv_bias,
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        norm_before_gate=norm_before_gate,
        in_norm_eps=in_norm_eps,
        in_proj_scale=in_proj_scale,
        out_proj_scale=out_proj_scale,
        active=active,
    )
