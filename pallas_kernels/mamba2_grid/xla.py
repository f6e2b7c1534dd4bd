"""A Mamba-2 mixer on a grid of patches for XLA: its parts one after the other."""

from pallas_kernels.gated_rms_norm.xla import gated_rms_norm
from pallas_kernels.mamba2_grid.parts import by_parts
from pallas_kernels.visual_scan.xla import visual_scan

mamba2_grid = by_parts(visual_scan, gated_rms_norm)
