"""Visual scan for XLA: one convolution and one scan for all directions."""

from pallas_kernels.causal_conv1d.xla import causal_conv1d
from pallas_kernels.ssd.xla import ssd
from pallas_kernels.visual_scan.parts import by_parts

visual_scan = by_parts(causal_conv1d, ssd)
