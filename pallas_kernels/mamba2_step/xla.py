"""A Mamba-2 mixer's step for XLA: its parts one after the other, for XLA to fuse."""

from pallas_kernels.causal_conv1d.xla import causal_conv1d_step
from pallas_kernels.gated_rms_norm.xla import gated_rms_norm
from pallas_kernels.mamba2_step.parts import by_parts
from pallas_kernels.ssd.xla import ssd_step

mamba2_step = by_parts(causal_conv1d_step, ssd_step, gated_rms_norm)
