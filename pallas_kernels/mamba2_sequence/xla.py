"""A Mamba-2 mixer on a sequence for XLA: its parts one after the other."""

from pallas_kernels.causal_conv1d.xla import causal_conv1d
from pallas_kernels.gated_rms_norm.xla import gated_rms_norm
from pallas_kernels.mamba2_sequence.parts import by_parts
from pallas_kernels.ssd.xla import ssd

mamba2_sequence = by_parts(causal_conv1d, ssd, gated_rms_norm)
