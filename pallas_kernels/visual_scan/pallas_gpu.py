"""Visual scan on Hopper: one launch of each kernel along the rows and one along the columns, whatever the directions.

Nothing is flipped, and what walks share is not copied for each of them, see `walked`. XLA merges: one pass that reads y
of every direction once, through the inverse of its order, and writes the result. The gradient of that is read by the
kernels of the scan as it comes, one for all directions; the mean is taken of the results.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.pallas_gpu import filled_channels, why_not_causal_conv1d
from pallas_kernels.gradients import with_gradient_of
from pallas_kernels.hopper import why_not_here  # noqa: F401, part of a backend
from pallas_kernels.mamba2_step.sizes import Sizes
from pallas_kernels.ssd.pallas_gpu import why_not_ssd
from pallas_kernels.ssd.pallas_gpu.backward import WIDEST_STATE
from pallas_kernels.visual_scan import walked, xla
from pallas_kernels.visual_scan.directions import bundles


def why_not_visual_scan(
    x, dt, A, B, C, *, conv_weight=None, conv_bias=None, dt_limit=(0.0, float("inf")), **_
) -> str | None:
    if reason := why_not_ssd(x, dt, A, B, C, dt_limit=dt_limit):
        return reason
    if conv_weight is None:
        return None
    return why_not_causal_conv1d(x, jax.ShapeDtypeStruct(conv_weight.shape[1:], conv_weight.dtype), conv_bias)


def visual_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    grid,
    directions,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    conv_weight=None,
    conv_bias=None,
    merge="mean",
    chunk_size=None,
    precision=None,
):
    del chunk_size, precision  # see `ssd`
    arrays = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "dt_bias": dt_bias,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
    }
    arrays = {name: a for name, a in arrays.items() if a is not None}
    scan = _VisualScan(bundles(directions, grid), merge, {"dt_softplus": dt_softplus, "dt_limit": dt_limit})
    if B.shape[-1] > WIDEST_STATE:
        differentiable = functools.partial(xla.visual_scan, grid=grid, directions=directions, merge=merge)
        options = scan.options
        return with_gradient_of(
            lambda arrays: differentiable(**arrays, **options), lambda arrays: scan.forward(arrays)[0]
        )(arrays)
    run = jax.custom_vjp(lambda arrays: scan.forward(arrays)[0])
    run.defvjp(scan.forward, scan.gradients)
    return run(arrays)


class _VisualScan:
    def __init__(self, bundles, merge, options):
        self.bundles, self.merge, self.options = bundles, merge, options
        self.directions = sum(len(bundle.numbers) for bundle in bundles)

    def forward(self, arrays):
        x, sizes = arrays["x"], _sizes(arrays)
        patches, kept, by_direction = _patches(arrays), [], {}
        for bundle in self.bundles:
            y, convolved = walked.scan(bundle, sizes, arrays, patches, self.options)
            kept.append(convolved)
            y = y.reshape(len(bundle.numbers), *x.shape)
            by_direction |= {number: bundle.to_grid(one) for number, one in zip(bundle.numbers, y, strict=True)}
        ys = [by_direction[number] for number in range(self.directions)]
        if self.merge is None:
            return jnp.stack(ys), (arrays, kept)
        total = sum(y.astype(jnp.float32) for y in ys)
        return (total * self._share).astype(x.dtype), (arrays, kept)

    @property
    def _share(self) -> float:
        """Of a direction in the result."""
        return 1 / self.directions if self.merge == "mean" else 1.0

    def gradients(self, kept, dy):
        arrays, kept = kept
        x, B, sizes = arrays["x"], arrays["B"], _sizes(arrays)
        patches, found = _patches(arrays), []
        for bundle, convolved in zip(self.bundles, kept, strict=True):
            if self.merge is None:
                own = jnp.concatenate([bundle.from_grid(dy[number]) for number in bundle.numbers])
            else:
                own = bundle.from_grid(dy)
            own = own.reshape(*own.shape[:2], sizes.inner)
            found.append(walked.gradients(bundle, sizes, arrays, patches, self.options, convolved, own))
        result = walked.over_directions(self.bundles, found)
        dB, dC = jnp.split(result.pop("BC"), 2, axis=-1)
        result |= {"x": result["x"].reshape(x.shape), "B": dB.reshape(B.shape), "C": dC.reshape(B.shape)}
        return ({name: (self._share * result[name]).astype(a.dtype) for name, a in arrays.items()},)


def _sizes(arrays) -> Sizes:
    return Sizes(*arrays["x"].shape[2:], *arrays["B"].shape[2:])


def _patches(arrays) -> walked.Patches:
    """x and [B | C] as the convolution reads them."""
    lead = arrays["x"].shape[:2]
    BC = jnp.concatenate([arrays[name].reshape(*lead, -1) for name in "BC"], axis=-1)
    patches = {"x": arrays["x"].reshape(*lead, -1), "BC": BC}
    fill = filled_channels if "conv_weight" in arrays else lambda a: a
    return {name: (fill(a), 0) for name, a in patches.items()}
