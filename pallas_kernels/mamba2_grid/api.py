"""A grid of patches through a Mamba-2 mixer along several directions, between its two projections, in one call."""

import functools
from collections.abc import Sequence
from typing import Literal

from jax import Array
from jaxtyping import Float

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.gated_rms_norm.api import gated_rms_norm
from pallas_kernels.mamba2_grid.parts import by_parts
from pallas_kernels.mamba2_sequence.parts import sizes_of
from pallas_kernels.shapes import check_rank, check_shape
from pallas_kernels.sharded import current, whole_sequences
from pallas_kernels.visual_scan.api import check_walks, visual_scan

MAMBA2_GRID = Op(
    "mamba2_grid",
    "pallas_kernels.mamba2_grid",
    ("reference", "xla", "pallas_gpu"),
    axes={
        "zxbcdt": "b t e",  # t as in `visual_scan`
        "conv_weight": "k c w",
        "A": "k h",
        "conv_bias": "k c",
        "D": "k h|k h p",
        "dt_bias": "k h",
        "norm_weight": "c",
    },
    outputs=lambda *_: "b t c",
    can_split=lambda split, _: split.parts("h") == 1,
)


def mamba2_grid(
    zxbcdt: Float[Array, "b l e"],
    conv_weight: Float[Array, "k c w"],
    A: Float[Array, "k h"],
    *,
    grid: tuple[int, int],
    directions: Sequence[str],
    norm_weight: Float[Array, "inner"],
    groups: int = 1,
    conv_bias: Float[Array, "k c"] | None = None,
    D: Float[Array, "k h"] | Float[Array, "k h p"] | None = None,
    dt_bias: Float[Array, "k h"] | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    merge: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b l inner"]:
    """What lies between the two projections of the mixer of ML-Mamba's scan connector (arXiv 2407.19832, 3.3.1).

    The numbers of `visual_scan` with convolution and softplus, `gated_rms_norm` of every direction and their mean, one
    after the other, up to rounding; where a backend has kernels for all of it, z, x, B and C are read where they lie in
    `zxbcdt`, in the order of each direction, and y of every direction once, by the norm, which merges them.

    Args:
        zxbcdt: the input projection [z | x | B | C | dt] of a row-major grid, of widths h p, h p, g n, g n and h.
        grid: (rows, columns), l patches.
        directions: names from `DIRECTIONS`; k is their number. Each has its own convolution, A, D and dt_bias.
        norm_weight, norm_eps, norm_before_gate, groups: as in `mamba2_sequence`; shared by the directions.
        merge: how the directions become one.
        chunk_size: as in `ssd`.
        implementation: see `pallas_kernels.dispatch`. Where no backend takes all of it, or `use_mesh` splits heads, it is
            that of the parts, which run one after the other.

    Returns:
        y in the dtype of zxbcdt.

    Raises:
        ValueError: shapes that do not fit together, an unknown direction or merge. ExceptionGroup: no backend of
            `implementation` takes the arguments.
    """
    check_rank("zxbcdt", zxbcdt, "b l e")
    check_rank("conv_weight", conv_weight, "k c w")
    check_rank("A", A, "k h")
    check_walks(grid, directions, zxbcdt.shape[1])
    if merge not in ("mean", "sum"):
        raise ValueError(f"merge: got {merge!r}, expected 'mean' or 'sum'")
    k = len(directions)
    check_shape("A", A, "k h", (k, A.shape[1]))
    check_shape("conv_weight", conv_weight, "k c w", (k, *conv_weight.shape[1:]))
    sizes = sizes_of(zxbcdt, conv_weight[0], A[0], groups)
    expected = {
        "conv_bias": (conv_bias, "k c", (k, sizes.channels)),
        "D": (D, "k h p" if D is not None and D.ndim == 3 else "k h", (k, sizes.heads, sizes.head_dim)),
        "dt_bias": (dt_bias, "k h", (k, sizes.heads)),
        "norm_weight": (norm_weight, "h*p", (sizes.inner,)),
    }
    for name, (a, letters, shape) in expected.items():
        if a is not None:
            check_shape(name, a, letters, shape[: len(letters.split())])
    arguments = {
        "grid": tuple(grid),
        "directions": tuple(directions),
        "norm_weight": norm_weight,
        "groups": groups,
        "conv_bias": conv_bias,
        "D": D,
        "dt_bias": dt_bias,
        "dt_limit": dt_limit,
        "norm_eps": norm_eps,
        "norm_before_gate": norm_before_gate,
        "merge": merge,
        "chunk_size": chunk_size,
    }
    split = current()
    whole = not split or MAMBA2_GRID.can_split(split, {})
    explained = MAMBA2_GRID.explain(zxbcdt, conv_weight, A, implementation=implementation, **arguments)
    if whole and explained.chosen == "pallas_gpu":
        return MAMBA2_GRID(implementation, zxbcdt, conv_weight, A, **arguments)
    parts = (functools.partial(part, implementation=implementation) for part in (visual_scan, gated_rms_norm))
    with whole_sequences():  # the norm's l is that of a grid
        return by_parts(*parts)(zxbcdt, conv_weight, A, **arguments)
