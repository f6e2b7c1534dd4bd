"""One token through a Mamba-2 mixer, from the input projection to the output projection, in one call."""

import functools

from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.causal_conv1d.api import causal_conv1d_step
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.gated_rms_norm.api import gated_rms_norm
from pallas_kernels.mamba2_step.parts import by_parts
from pallas_kernels.mamba2_step.sizes import split_sizes
from pallas_kernels.shapes import check_rank, check_shape
from pallas_kernels.sharded import current
from pallas_kernels.ssd.api import ssd_step

MAMBA2_STEP = Op(
    "mamba2_step",
    "pallas_kernels.mamba2_step",
    ("reference", "xla", "pallas_gpu"),
    axes={
        "conv_state": "b w c|k b w c",
        "ssm_state": "b h p n|k b h p n",
        "zxbcdt": "b e",
        "conv_weight": "c w",
        "A": "h",
        "conv_bias": "c",
        "D": "h|h p",
        "dt_bias": "h",
        "norm_weight": "c",
        "layer": "",
        "active": "b",
    },
    outputs=lambda _, forms: ("b c", forms["conv_state"], forms["ssm_state"]),
    can_split=lambda split, _: split.parts("h") == 1,  # heads lie apart in the channels of zxbcdt
)


def mamba2_step(
    conv_state: Float[Array, "*layers b _ c"],
    ssm_state: Float[Array, "*layers b h p n"],
    zxbcdt: Float[Array, "b e"],
    conv_weight: Float[Array, "c w"],
    A: Float[Array, "h"],
    *,
    conv_bias: Float[Array, "c"] | None = None,
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    dt_bias: Float[Array, "h"] | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_weight: Float[Array, "h*p"] | None = None,
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    layer: Int[Array, ""] | None = None,
    active: Bool[Array, "b"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b h*p"], Float[Array, "*layers b w-1 c"], Float[Array, "*layers b h p n"]]:
    """What lies between the two projections of Mamba-2 (arXiv 2405.21060, figure 6) when one token is decoded.

    The same numbers as `causal_conv1d_step` with SiLU, `ssd_step` with softplus and `gated_rms_norm` one after the
    other, up to rounding, in as few launches as the backend manages:

        x, B, C = silu(conv(conv_state, [x | B | C]))
        y = ssd_step(ssm_state, x, softplus(dt + dt_bias), A, B, C, D)
        y = rms_norm(y * silu(z)) * norm_weight

    Args:
        conv_state: the last w - 1 inputs of the convolution, in the dtype of `zxbcdt`.
        zxbcdt: the input projection [z | x | B | C | dt] of widths h p, h p, g n, g n and h; so c = h p + 2 g n, and
            the groups g follow from the shapes.
        norm_weight: its norm runs over the channels of each group. Without it y is only gated: y * silu(z).
        norm_before_gate: rms_norm(y) * norm_weight * silu(z) instead.
        layer: the states are those of all layers, [layers b w-1 c] and [layers b h p n]; this one's are read and
            replaced. A loop over layers that carries the stack copies nothing, where slices of it would be copied.
        active: rows for which it is false keep their states, and their y is of no use; all are active by default.
        implementation: see `pallas_kernels.dispatch`. Where `use_mesh` splits the heads it is that of the parts, which
            run one after the other.

    Returns:
        (y [b h*p] in the dtype of zxbcdt, conv_state, ssm_state). Under `jax.jit(..., donate_argnums=...)`, or as the
        carry of a loop, the states are updated in place.

    Raises:
        ValueError: shapes that do not fit together. ExceptionGroup: no backend of `implementation` takes the arguments.
    """
    stacked = "" if layer is None else "layers "
    check_rank("ssm_state", ssm_state, f"{stacked}b h p n")
    check_rank("zxbcdt", zxbcdt, "b e")
    check_rank("conv_weight", conv_weight, "c w")
    *layers, batch, heads, head_dim, _ = ssm_state.shape
    channels, width = conv_weight.shape
    sizes = split_sizes(ssm_state, conv_weight)
    check_shape("zxbcdt", zxbcdt, "b 2*h*p+2*g*n+h", (batch, sizes.projected))
    check_shape("conv_state", conv_state, f"{stacked}b w-1 c", (*layers, batch, width - 1, channels))
    check_shape("A", A, "h", (heads,))
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, "c", (channels,))
    if D is not None:
        check_shape("D", D, "h" if D.ndim == 1 else "h p", (heads, head_dim)[: max(D.ndim, 1)])
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, "h", (heads,))
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, "h*p", (sizes.inner,))
    if active is not None:
        check_shape("active", active, "b", (batch,))
    step = functools.partial(MAMBA2_STEP, implementation)
    split = current()
    if split and split.parts("h") > 1:
        step = by_parts(
            causal_conv1d_step,
            functools.partial(ssd_step, implementation=implementation),
            functools.partial(gated_rms_norm, implementation=implementation),
        )
    return step(
        conv_state,
        ssm_state,
        zxbcdt,
        conv_weight,
        A,
        conv_bias=conv_bias,
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        norm_before_gate=norm_before_gate,
        layer=layer,
        active=active,
    )
