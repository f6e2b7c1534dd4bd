"""What the kernels of `mamba2_grid.merged_norm` compute, in plain JAX: for where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_rms_norm import xla


def _merged(ys, z, weight, walks, length, share, eps, width, norm_before_gate):
    channels = weight.shape[0]
    z = z[:, :channels].astype(jnp.float32).reshape(-1, length, channels)
    total = 0
    for y, of in zip(ys, walks, strict=True):
        places = np.arange(length)
        if of.grid is not None:
            places = places.reshape(of.grid[::-1]).T.ravel()
        for one in jnp.split(y.astype(jnp.float32), of.number):
            one = one.reshape(-1, length, channels)[:, places]
            total += xla.gated_rms_norm(one, z, weight, eps=eps, group_size=width, norm_before_gate=norm_before_gate)
    return share * total.reshape(-1, channels)


def normalize_and_merge(*, ys, z, weight, **options):
    return _merged(ys, z, weight, **options).astype(z.dtype)


def normalize_and_merge_backward(*, ys, z, weight, dout, **options):
    _, pullback = jax.vjp(lambda *a: _merged(*a, **options), ys, z, weight)
    dys, dz, dweight = pullback(dout.astype(jnp.float32))
    return dys, dz[:, : dout.shape[1]], dweight[None]
