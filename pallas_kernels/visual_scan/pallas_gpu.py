"""Visual scan on Hopper: the kernels of the convolution and of the scan, each launched once for all directions.

XLA brings the patches into the order of each direction, and back.
"""

import jax

from pallas_kernels.causal_conv1d.pallas_gpu import causal_conv1d, why_not_causal_conv1d
from pallas_kernels.hopper import why_not_here  # noqa: F401, part of a backend
from pallas_kernels.ssd.pallas_gpu import ssd, why_not_ssd
from pallas_kernels.visual_scan.parts import by_parts

visual_scan = by_parts(causal_conv1d, ssd)


def why_not_visual_scan(
    x, dt, A, B, C, *, conv_weight=None, conv_bias=None, dt_limit=(0.0, float("inf")), **_
) -> str | None:
    if reason := why_not_ssd(x, dt, A, B, C, dt_limit=dt_limit):
        return reason
    if conv_weight is None:
        return None
    channels = jax.ShapeDtypeStruct((*x.shape[:2], conv_weight.shape[0] * conv_weight.shape[1]), x.dtype)
    weight = jax.ShapeDtypeStruct((channels.shape[2], conv_weight.shape[2]), conv_weight.dtype)
    return why_not_causal_conv1d(channels, weight, conv_bias)
