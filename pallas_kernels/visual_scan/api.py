"""2D visual scans: the SSD of a patch grid along several directions."""

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jax.lax import PrecisionLike
from jaxtyping import Float

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.shapes import check_divides, check_rank, check_shape
from pallas_kernels.visual_scan.directions import DIRECTIONS

# t, not l: a walk over the grid meets all patches, so they stay together where a sequence would be split.
VISUAL_SCAN = Op(
    "visual_scan",
    "pallas_kernels.visual_scan",
    ("reference", "xla", "pallas_gpu", "pallas_tpu"),
    axes={
        "x": "b t h p",
        "dt": "b t h",
        "A": "k h",
        "B": "b t g n",
        "C": "b t g n",
        "D": "k h|k h p",
        "dt_bias": "k h",
        "conv_weight": "k hp+gn+gn w",
        "conv_bias": "k hp+gn+gn",
    },
    outputs=lambda arguments, _: "b t h p" if arguments["merge"] else "k b t h p",
)


def visual_scan(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A: Float[Array, "k h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    *,
    grid: tuple[int, int],
    directions: Sequence[str],
    D: Float[Array, "k h"] | Float[Array, "k h p"] | None = None,
    dt_bias: Float[Array, "k h"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    conv_weight: Float[Array, "k c w"] | None = None,
    conv_bias: Float[Array, "k c"] | None = None,
    merge: Literal["mean", "sum"] | None = "mean",
    chunk_size: int | None = None,
    precision: PrecisionLike = None,
    implementation: Implementation = None,
) -> Float[Array, "b l h p"] | Float[Array, "k b l h p"]:
    """Run the SSD over a row-major patch grid along k directions, each with its own parameters, and merge them.

    Every direction walks the same l = rows * columns patches in its own order (`DIRECTIONS`). With `conv_weight`, the
    channels c = h p + 2 g n of [x | B | C] first pass a causal convolution with SiLU along the direction. The result
    is row-major again.

    Args:
        grid: (rows, columns).
        directions: names from `DIRECTIONS`; k is their number.
        merge: how the directions become one, or None to return them all, [k b l h p].
        Others: as in `pallas_kernels.ssd`.

    Raises:
        ValueError: shapes that do not fit together, an unknown direction or merge.
    """
    check_rank("x", x, "b l h p")
    check_rank("B", B, "b l g n")
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    k = len(directions)
    if not batch or not length:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one grid of at least one patch")
    check_walks(grid, directions, length)
    if merge not in ("mean", "sum", None):
        raise ValueError(f"merge: got {merge!r}, expected 'mean', 'sum' or None")
    check_shape("dt", dt, "b l h", (batch, length, heads))
    check_shape("A", A, "k h", (k, heads))
    check_shape("B", B, "b l g n", (batch, length, groups, state_size))
    check_shape("C", C, "b l g n", B.shape)
    check_divides("groups", groups, "heads", heads)
    if D is not None:
        check_shape("D", D, "k h" if D.ndim == 2 else "k h p", (k, heads, head_dim)[: max(D.ndim, 2)])
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, "k h", (k, heads))
    channels = heads * head_dim + 2 * groups * state_size
    if conv_weight is not None:
        check_shape("conv_weight", conv_weight, "k c w", (k, channels, conv_weight.shape[-1]))
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, "k c", (k, channels))
        if conv_weight is None:
            raise ValueError("conv_bias: got one without conv_weight, expected both or neither")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    return VISUAL_SCAN(
        implementation,
        x,
        dt,
        A,
        B,
        C,
        grid=tuple(grid),
        directions=tuple(directions),
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        merge=merge,
        chunk_size=chunk_size,
        precision=precision,
    )


def check_walks(grid: tuple[int, int], directions: Sequence[str], length: int) -> None:
    """ValueError where `directions` are not walks over a grid of `length` patches."""
    if grid[0] * grid[1] != length:
        raise ValueError(f"grid: got {grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches, expected l = {length}")
    if not directions:
        raise ValueError(f"directions: got none, expected names from {', '.join(DIRECTIONS)}")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"directions: got {direction!r}, expected names from {', '.join(DIRECTIONS)}")
