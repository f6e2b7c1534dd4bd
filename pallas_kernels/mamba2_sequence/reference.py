"""A Mamba-2 mixer on a sequence as the oracles of its parts. In float32, or in float64 when zxbcdt is float64."""

from pallas_kernels.causal_conv1d.reference import causal_conv1d
from pallas_kernels.gated_rms_norm.reference import gated_rms_norm
from pallas_kernels.mamba2_sequence.parts import by_parts
from pallas_kernels.ssd.reference import ssd

mamba2_sequence = by_parts(causal_conv1d, ssd, gated_rms_norm)
