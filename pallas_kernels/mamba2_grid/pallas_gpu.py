"""A Mamba-2 mixer on a grid of patches on Hopper: nothing is copied between its projections.

The convolution reads x, B and C where they lie in zxbcdt, in the order of each direction; the norm reads z there, and y
of every direction through the inverse of its order, and writes their mean. See `visual_scan.walked` for what lies
between. The gradient goes the same way back; XLA adds up what the directions contribute to that of zxbcdt.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import why_not_here  # noqa: F401, part of a backend
from pallas_kernels.mamba2_grid.merged_norm import normalize_and_merge, normalize_and_merge_backward
from pallas_kernels.mamba2_sequence.pallas_gpu import why_not_mamba2_sequence
from pallas_kernels.mamba2_sequence.parts import sizes_of
from pallas_kernels.visual_scan import walked
from pallas_kernels.visual_scan.directions import bundles


def why_not_mamba2_grid(zxbcdt, conv_weight, A, *, conv_bias=None, **options) -> str | None:
    one_weight, one_A = (jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in (conv_weight, A))
    return why_not_mamba2_sequence(zxbcdt, one_weight, one_A, conv_bias=conv_bias, **options)


def mamba2_grid(
    zxbcdt,
    conv_weight,
    A,
    *,
    grid,
    directions,
    norm_weight,
    groups=1,
    conv_bias=None,
    D=None,
    dt_bias=None,
    dt_limit=(0.0, float("inf")),
    norm_eps=1e-5,
    norm_before_gate=False,
    merge="mean",
    chunk_size=None,
):
    del chunk_size  # tiles are 64 tokens
    sizes = sizes_of(zxbcdt, conv_weight[0], A[0], groups)
    arrays = {
        "zxbcdt": zxbcdt,
        "conv_weight": conv_weight,
        "A": A,
        "conv_bias": conv_bias,
        "D": D,
        "dt_bias": dt_bias,
        "norm_weight": norm_weight,
    }
    found = bundles(directions, grid)
    norm = {
        "walks": [bundle.walks for bundle in found],
        "length": zxbcdt.shape[1],
        "share": 1 / len(directions) if merge == "mean" else 1.0,
        "eps": norm_eps,
        "width": sizes.inner // groups,
        "norm_before_gate": norm_before_gate,
    }
    mixer = _Mixer(found, sizes, {"dt_softplus": True, "dt_limit": dt_limit}, norm)
    run = jax.custom_vjp(lambda arrays: mixer.forward(arrays)[0])
    run.defvjp(mixer.forward, mixer.gradients)
    return run({name: a for name, a in arrays.items() if a is not None})


class _Mixer:
    def __init__(self, bundles, sizes, scan, norm):
        self.bundles, self.sizes, self.scan, self.norm = bundles, sizes, scan, norm

    def forward(self, arrays):
        zxbcdt = arrays["zxbcdt"]
        of_scan = arrays | {"dt": zxbcdt[..., -self.sizes.heads :]}
        kept = [walked.scan(bundle, self.sizes, of_scan, self._patches(zxbcdt), self.scan) for bundle in self.bundles]
        ys = [_rows(y) for y, _ in kept]
        out = normalize_and_merge(ys=ys, z=_rows(zxbcdt), weight=arrays["norm_weight"], **self.norm)
        return out.reshape(*zxbcdt.shape[:2], -1), (arrays, kept)

    def gradients(self, kept, dout):
        arrays, kept = kept
        zxbcdt, heads = arrays["zxbcdt"], self.sizes.heads
        of_scan = arrays | {"dt": zxbcdt[..., -heads:]}
        ys = [_rows(y) for y, _ in kept]
        dys, dz, sums = normalize_and_merge_backward(
            ys=ys, z=_rows(zxbcdt), weight=arrays["norm_weight"], dout=_rows(dout), **self.norm
        )
        found = [
            walked.gradients(
                bundle, self.sizes, of_scan, self._patches(zxbcdt), self.scan, convolved, dy.reshape(y.shape)
            )
            for bundle, (y, convolved), dy in zip(self.bundles, kept, dys, strict=True)
        ]
        result = walked.over_directions(self.bundles, found)
        parts = [dz.reshape(*zxbcdt.shape[:2], -1), *(result.pop(name) for name in ("x", "BC", "dt"))]
        result["zxbcdt"] = jnp.concatenate([a.astype(zxbcdt.dtype) for a in parts], axis=-1)
        result["norm_weight"] = sums.sum(axis=0)
        return ({name: result[name].astype(a.dtype) for name, a in arrays.items()},)

    def _patches(self, zxbcdt) -> walked.Patches:
        """Where x and [B | C] begin."""
        return {"x": (zxbcdt, self.sizes.inner), "BC": (zxbcdt, 2 * self.sizes.inner)}


def _rows(a):
    """[b l c] -> [b*l c]"""
    return a.reshape(-1, a.shape[-1])
