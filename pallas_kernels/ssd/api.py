"""State space duality (SSD), the scan of Mamba-2: a whole sequence, and one token of decoding."""

from jax import Array
from jax.lax import PrecisionLike
from jaxtyping import Float, Int

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.shapes import check_divides, check_rank, check_shape

SSD = Op(
    "ssd",
    "pallas_kernels.ssd",
    ("reference", "xla", "pallas_gpu", "pallas_tpu", "triton"),
    axes={
        "x": "b l h p",
        "dt": "b l h",
        "A": "h",
        "B": "b l g n",
        "C": "b l g n",
        "D": "h|h p",
        "z": "b l h p",
        "dt_bias": "h",
        "initial_state": "b h p n",
        "segment_ids": "b l",
    },
    outputs=lambda arguments, _: ("b l h p", "b h p n") if arguments["return_final_state"] else "b l h p",
    sequential=True,
)
SSD_STEP = Op(
    "ssd_step",
    "pallas_kernels.ssd",
    ("reference", "xla", "pallas_gpu"),
    axes={
        "state": "b h p n",
        "x": "b h p",
        "dt": "b h",
        "A": "h",
        "B": "b g n",
        "C": "b g n",
        "D": "h|h p",
        "z": "b h p",
        "dt_bias": "h",
    },
    outputs=lambda *_: ("b h p", "b h p n"),
)


def ssd(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, "h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    *,
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    z: Float[Array, "b l h p"] | None = None,
    dt_bias: Float[Array, "h"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    precision: PrecisionLike = None,
    implementation: Implementation = None,
) -> Float[Array, "b l h p"] | tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Run the selective state space recurrence of Mamba-2 (arXiv 2405.21060) over a sequence of any length.

    For head h of group h // (heads // groups), with d_t = clip(softplus(dt_t + dt_bias), *dt_limit):

        S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T
        y_t = (S_t C_t + D x_t) * silu(z_t)

    Args:
        A: negative decay rates. Step sizes, decays and the state are computed in float32 whatever the dtype of x.
        D: skip connection, one number for each head or for each channel.
        dt_softplus: apply softplus after the bias. The limits are applied last and also hold without softplus.
        segment_ids: sequences packed in one row, negative ids for padding; see `pallas_kernels.segments`.
        chunk_size: tokens that are handled as one matrix product; changes results by rounding only.
        precision: of the matrix products. float32 inputs are multiplied in full float32 unless this says otherwise.
        implementation: see `pallas_kernels.dispatch`.

    Returns:
        y [b l h p] in the dtype of x, and with `return_final_state` the float32 state [b h p n] after the last real
        token.

    Raises:
        ValueError: shapes that do not fit together. ExceptionGroup: no backend of `implementation` takes the arguments.
    """
    _check("b l", x, dt, A, B, C, D, z, dt_bias, {"initial_state": initial_state})
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, "b l", x.shape[:2])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    return SSD(
        implementation,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
        segment_ids=segment_ids,
        return_final_state=return_final_state,
        chunk_size=chunk_size,
        precision=precision,
    )


def ssd_step(
    state: Float[Array, "b h p n"],
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, "h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    *,
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    z: Float[Array, "b h p"] | None = None,
    dt_bias: Float[Array, "h"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    implementation: Implementation = None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token of `ssd`: returns (y, next state).

    The state keeps its dtype, float32 or less; the arithmetic is float32, and y sees the next state before it is
    rounded. Under `jax.jit(..., donate_argnums=...)`, or as the carry of a loop, the state is updated in place.
    """
    _check("b", x, dt, A, B, C, D, z, dt_bias, {"state": state})
    return SSD_STEP(
        implementation,
        state,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )


def _check(axes, x, dt, A, B, C, D, z, dt_bias, named_state):
    """`axes` are the letters of the leading axes: "b l" for a sequence, "b" for one token."""
    check_rank("x", x, f"{axes} h p")
    check_rank("B", B, f"{axes} g n")
    *leading, heads, head_dim = x.shape
    *_, groups, state_size = B.shape
    if 0 in leading:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one sequence of at least one token")
    check_shape("dt", dt, f"{axes} h", (*leading, heads))
    check_shape("A", A, "h", (heads,))
    check_shape("B", B, f"{axes} g n", (*leading, groups, state_size))
    check_shape("C", C, f"{axes} g n", (*leading, groups, state_size))
    check_divides("groups", groups, "heads", heads)
    if D is not None:
        check_shape("D", D, "h" if D.ndim == 1 else "h p", (heads, head_dim)[: max(D.ndim, 1)])
    if z is not None:
        check_shape("z", z, f"{axes} h p", x.shape)
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, "h", (heads,))
    for name, state in named_state.items():
        if state is not None:
            check_shape(name, state, "b h p n", (leading[0], heads, head_dim, state_size))
