"""Kernels of Mamba-2 for JAX: the SSD scan, 2D visual scans, the causal convolution and the gated norm around them.

Each function has several backends and picks the fastest that supports its arguments on this device; `explain` says
which and why. Depends on jax only.

Axis letters: b batch, l tokens, h heads, p head width, n state size, g groups, k scan directions, w convolution width,
c channels.
"""

from pallas_kernels.causal_conv1d.api import CAUSAL_CONV1D, causal_conv1d, causal_conv1d_step
from pallas_kernels.dispatch import IMPLEMENTATIONS, Explanation, Implementation, use_implementation
from pallas_kernels.gated_rms_norm.api import GATED_RMS_NORM, gated_rms_norm
from pallas_kernels.mamba2_sequence.api import MAMBA2_SEQUENCE, mamba2_sequence
from pallas_kernels.mamba2_step.api import MAMBA2_STEP, mamba2_step
from pallas_kernels.sharded import keep_split, use_mesh, whole_sequences
from pallas_kernels.ssd.api import SSD, SSD_STEP, ssd, ssd_step
from pallas_kernels.visual_scan.api import VISUAL_SCAN, visual_scan
from pallas_kernels.visual_scan.directions import DIRECTIONS, scan_order

OPS = {op.name: op for op in (SSD, SSD_STEP, CAUSAL_CONV1D, GATED_RMS_NORM, MAMBA2_SEQUENCE, MAMBA2_STEP, VISUAL_SCAN)}


def explain(op: str, *args, **kwargs) -> Explanation:
    """Which backend `op` would run for these arguments on this machine, and why not the others.

    The arguments are those of the op; arrays or `jax.ShapeDtypeStruct`s will do. Without any, only the device and the
    imports are judged. Print the result.

    Raises:
        ValueError: no op of that name.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    return OPS[op].explain(*args, **kwargs)


__all__ = [
    "DIRECTIONS",
    "IMPLEMENTATIONS",
    "OPS",
    "Explanation",
    "Implementation",
    "causal_conv1d",
    "causal_conv1d_step",
    "explain",
    "gated_rms_norm",
    "keep_split",
    "mamba2_sequence",
    "mamba2_step",
    "scan_order",
    "ssd",
    "ssd_step",
    "use_implementation",
    "use_mesh",
    "visual_scan",
    "whole_sequences",
]
