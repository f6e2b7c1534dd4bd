"""RMS norm with a SiLU gate, as between the scan and the output projection of Mamba-2."""

from collections.abc import Mapping

from jax import Array
from jaxtyping import Float

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.shapes import check_divides, check_shape
from pallas_kernels.sharded import Split


def _groups_stay_whole(split: Split, arguments: Mapping) -> bool:
    channels = arguments["x"].shape[-1]
    groups = channels // (arguments.get("group_size") or channels)
    return groups % split.parts("c") == 0


ROWS = "b c|b l c|k b l c"
GATED_RMS_NORM = Op(
    "gated_rms_norm",
    "pallas_kernels.gated_rms_norm",
    ("reference", "xla", "pallas_gpu"),
    axes={"x": ROWS, "z": ROWS, "weight": "c"},
    outputs=lambda _, forms: forms["x"],
    can_split=_groups_stay_whole,
)


def gated_rms_norm(
    x: Float[Array, "*b c"],
    z: Float[Array, "*b c"],
    weight: Float[Array, "c"],
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "*b c"]:
    """rms_norm(x * silu(z)) * weight, or with `norm_before_gate` rms_norm(x) * weight * silu(z).

    The mean square runs over groups of `group_size` neighbouring channels (default: all). Computed in float32,
    returned in the dtype of x. Inside `use_mesh` the axes are [b c], [b l c] or [k b l c]; a group of channels that lies
    on several devices is left to XLA, which adds its parts up.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shape("z", z, "... c", x.shape)
    check_shape("weight", weight, "c", x.shape[-1:])
    if group_size is not None:
        check_divides("group_size", group_size, "channels", x.shape[-1])
    return GATED_RMS_NORM(
        implementation, x, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
    )
