"""The 2D scanning mixer of the connector: Mamba-2 along several walks over the patch grid."""

import flax.linen as nn
import jax.numpy as jnp

import pallas_kernels as pk
from ml_mamba_jax.config import ConnectorConfig
from ml_mamba_jax.layers import with_axes
from ml_mamba_jax.mamba2 import (
    declare_scan_parameters,
    in_projection,
    out_projection,
    split_channels,
    split_projection,
)
from ml_mamba_jax.typing import Hidden


class ScanMixer(nn.Module):
    """in_proj -> for each direction: conv + SiLU, SSD, gated norm -> mean over directions -> out_proj.

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
        u = pk.keep_split(u, "b n d")
        z, xBC, dt = split_projection(in_projection(mixer, self.dtype)(u), mixer)
        x, B, C = split_channels(xBC, mixer)
        y = pk.visual_scan(
            x,
            dt,
            -jnp.exp(scan.A_log.astype(jnp.float32)),
            B,
            C,
            grid=self.grid,
            directions=directions,
            D=scan.D,
            dt_bias=scan.dt_bias,
            dt_softplus=True,
            dt_limit=mixer.dt_limit,
            conv_weight=scan.conv_weight,
            conv_bias=scan.conv_bias,
            merge=None,
            chunk_size=mixer.chunk_size,
        )
        with pk.whole_sequences():  # an image is seen whole
            y = pk.gated_rms_norm(
                y.reshape(len(directions), *z.shape),
                jnp.broadcast_to(z[None], (len(directions), *z.shape)),
                norm_weight,
                eps=mixer.norm_eps,
                group_size=mixer.d_inner // mixer.n_groups,
                norm_before_gate=mixer.norm_before_gate,
            )
        return out_projection(mixer, self.dtype, self.config.n_layers)(jnp.mean(y, axis=0))
