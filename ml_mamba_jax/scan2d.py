"""The 2D scanning mixer of the connector: Mamba-2 along several walks over the patch grid."""

import flax.linen as nn
import jax.numpy as jnp

import pallas_kernels as pk
from ml_mamba_jax.config import ConnectorConfig
from ml_mamba_jax.layers import with_axes
from ml_mamba_jax.mamba2 import declare_scan_parameters, in_projection, out_projection
from ml_mamba_jax.typing import Hidden


class ScanMixer(nn.Module):
    """in_proj -> for each direction: conv + SiLU, SSD, gated norm -> mean over directions -> out_proj: `mamba2_grid`.

    Projections, gate and norm weight are shared; convolution, dt_bias, A and D belong to a direction (arXiv 2407.19832,
    3.3.1).
    """

    config: ConnectorConfig
    grid: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, u: Hidden) -> Hidden:
        mixer, directions = self.config.mixer, self.config.directions
        scan = declare_scan_parameters(self, mixer, len(directions))
        norm_weight = self.param("norm_weight", with_axes(nn.initializers.ones, "inner"), (mixer.d_inner,))
        y = pk.mamba2_grid(
            in_projection(mixer, self.dtype)(pk.keep_split(u, "b n d")),
            scan.conv_weight,
            -jnp.exp(scan.A_log.astype(jnp.float32)),
            grid=self.grid,
            directions=directions,
            norm_weight=norm_weight,
            groups=mixer.n_groups,
            conv_bias=scan.conv_bias,
            D=scan.D,
            dt_bias=scan.dt_bias,
            dt_limit=mixer.dt_limit,
            norm_eps=mixer.norm_eps,
            norm_before_gate=mixer.norm_before_gate,
            chunk_size=mixer.chunk_size,
        )
        return out_projection(mixer, self.dtype, self.config.n_layers)(y)
