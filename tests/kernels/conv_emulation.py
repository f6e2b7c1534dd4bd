"""What the kernels of the convolution on Hopper compute for several walks, in plain JAX: for where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.causal_conv1d import xla


def _order(walks, length):
    """Where in the grid the tokens lie that a walk has in memory one after the other."""
    if walks.grid is None:
        return np.arange(length)
    return np.arange(length).reshape(walks.grid).T.ravel()


def _convolve(x, weight, bias, activation, backwards):
    x = jnp.flip(x, 1) if backwards else x
    y = xla.causal_conv1d(x, weight.T, bias, activation=activation)
    return jnp.flip(y, 1) if backwards else y


def _by_walk(x, weight, bias, first, walks):
    """For each walk (x as it lies for it, its weight [w c], its bias, whether it starts from the end)."""
    taps, channels = weight.shape[0] // walks.number, weight.shape[1]
    own = x[:, _order(walks, x.shape[1]), first : first + channels]
    own = jnp.pad(own, ((0, 0), (0, 0), (0, channels - own.shape[2])))  # where the kernel would read on
    for walk in range(walks.number):
        own_bias = None if bias is None else bias[walk]
        yield own, weight[walk * taps : (walk + 1) * taps], own_bias, walk >= walks.forwards


def convolve(*, x, weight, bias=None, activation, first=0, walks):
    ys = [
        _convolve(own, weight, bias, activation, backwards)
        for own, weight, bias, backwards in _by_walk(x, weight, bias, first, walks)
    ]
    return jnp.concatenate(ys)


def convolve_backward(*, x, dy, weight, bias=None, activation, first=0, walks):
    dxs, all_sums = [], []
    parts = jnp.split(dy, walks.number)
    if bias is None:
        bias = jnp.zeros((walks.number, weight.shape[1]))
    for dy, (*own, backwards) in zip(parts, _by_walk(x, weight, bias, first, walks), strict=True):
        _, pullback = jax.vjp(lambda *a, b=backwards: _convolve(*a, activation, b), *own)
        dx, dweight, dbias = pullback(dy)
        dxs.append(dx)
        sums = jnp.concatenate([dweight, dbias[None]])[None, None]  # all in the first row of the walk
        all_sums.append(jnp.pad(sums, ((0, x.shape[0] - 1), (0, 0), (0, 0), (0, 0))))
    return jnp.concatenate(dxs), jnp.concatenate(all_sums)
