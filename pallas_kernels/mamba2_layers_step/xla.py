"""A token through all layers for XLA: a loop over layers."""

from pallas_kernels.mamba2_layers_step.by_layers import by_layers
from pallas_kernels.mamba2_step.xla import mamba2_step

mamba2_layers_step = by_layers(mamba2_step)
