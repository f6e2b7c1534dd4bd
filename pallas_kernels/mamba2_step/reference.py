"""A Mamba-2 mixer's step as the oracles of its parts. Computed in float32, or in float64 when zxbcdt is float64."""

from pallas_kernels.causal_conv1d.reference import causal_conv1d_step
from pallas_kernels.gated_rms_norm.reference import gated_rms_norm
from pallas_kernels.mamba2_step.parts import by_parts
from pallas_kernels.ssd.reference import ssd_step

mamba2_step = by_parts(causal_conv1d_step, ssd_step, gated_rms_norm)
