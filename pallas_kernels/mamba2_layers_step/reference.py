"""A token through all layers from the oracle of one. In float32, or in float64 when everything is float64."""

from pallas_kernels.mamba2_layers_step.by_layers import by_layers
from pallas_kernels.mamba2_step.reference import mamba2_step

mamba2_layers_step = by_layers(mamba2_step)
