"""A Mamba-2 mixer on a grid of patches from the oracles of its parts."""

from pallas_kernels.gated_rms_norm.reference import gated_rms_norm
from pallas_kernels.mamba2_grid.parts import by_parts
from pallas_kernels.visual_scan.reference import visual_scan

mamba2_grid = by_parts(visual_scan, gated_rms_norm)
