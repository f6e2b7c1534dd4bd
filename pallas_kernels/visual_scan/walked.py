"""Convolution and scan of a bundle of directions on Hopper, and their gradients: one launch of each kernel for all.

The convolution gathers: it reads the patches where they lie in the grid, in whatever order a direction meets them, and
writes them as they lie for its walks. The scan reads those from either end; without a convolution, it reads x, B and C
themselves, which all walks along rows share (for those along columns XLA transposes the grid once).
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from pallas_kernels.causal_conv1d.pallas_gpu import convolve, convolve_backward, filled_channels
from pallas_kernels.mamba2_step.sizes import Sizes
from pallas_kernels.ssd.pallas_gpu import backward, forward
from pallas_kernels.visual_scan.directions import Bundle

Patches = dict[str, tuple[Array, int]]  # of "x" and "BC": an array [b l e], and where in e the channels begin


def scan(bundle: Bundle, sizes: Sizes, arrays: Mapping, patches: Patches, options: Mapping) -> tuple[Array, dict]:
    """(y [k*b l h*p], patches as they lie for the walks; what `gradients` asks for).

    `arrays` holds dt [b l h] and those with an axis k for all directions, A, D, dt_bias, conv_weight and conv_bias, by
    name; `options` are dt_softplus and dt_limit.
    """
    convolved = {}
    if "conv_weight" in arrays:
        for name, arguments in _convolution(bundle, sizes, arrays, patches).items():
            convolved[name] = convolve(**arguments)
    y = forward.outputs(**_scan_arguments(bundle, sizes, arrays, patches, convolved), walks=bundle.walks, **options)
    return y.reshape(*y.shape[:2], sizes.inner), convolved


def gradients(
    bundle: Bundle, sizes: Sizes, arrays: Mapping, patches: Patches, options: Mapping, convolved: dict, dy: Array
) -> dict[str, Array]:
    """Float32 gradients for dy [k*b l h*p], or [b l h*p] for all walks, patches as they lie for the walks.

    x [b l h*p], BC [b l 2*g*n] and dt [b l h] are those of the grid, summed over the walks; A, D, dt_bias, conv_weight
    and conv_bias are [k ..] of the bundle's directions.
    """
    k = bundle.walks.number
    scanned = _scan_arguments(bundle, sizes, arrays, patches, convolved)
    dy = dy.reshape(*dy.shape[:2], sizes.heads, sizes.head_dim)
    by_scan = backward.gradients(scanned, dy, **options, return_final_state=False, walks=bundle.walks)
    lead = by_scan["x"].shape[:2]
    BC = jnp.concatenate([by_scan[name].reshape(*lead, -1) for name in "BC"], axis=-1)
    by_patch = {"x": by_scan["x"].reshape(*lead, -1), "BC": BC}
    result = {
        name: by_scan[name].reshape(k, *arrays[name].shape[1:]) for name in ("A", "D", "dt_bias") if name in by_scan
    }
    result["dt"] = bundle.to_grid(by_scan["dt"])

    if convolved:
        all_sums = []
        for name, arguments in _convolution(bundle, sizes, arrays, patches).items():
            width = by_patch[name].shape[-1]
            dconvolved = filled_channels(by_patch[name].astype(convolved[name].dtype))
            dpatches, sums = convolve_backward(**arguments, dy=dconvolved)
            by_patch[name] = dpatches[..., :width]
            all_sums.append(sums.reshape(k, -1, *sums.shape[2:]).sum(axis=1)[..., :width])
        sums = jnp.concatenate(all_sums, axis=-1)
        result["conv_weight"] = jnp.swapaxes(sums[:, :-1], 1, 2)
        if "conv_bias" in arrays:
            result["conv_bias"] = sums[:, -1]
    for name, a in by_patch.items():
        result[name] = bundle.to_grid(a.reshape(k, -1, *a.shape[1:]).astype(jnp.float32).sum(axis=0))
    return result


def over_directions(bundles: Sequence[Bundle], found: Sequence[Mapping]) -> dict[str, Array]:
    """All directions' results of `gradients`: sums of those for the grid, the others [k ..] in the order of directions."""
    result, of_directions = {}, {}
    for bundle, gradients in zip(bundles, found, strict=True):
        for name, a in gradients.items():
            if name in ("x", "BC", "dt"):
                result[name] = result[name] + a if name in result else a
            else:
                of_directions.setdefault(name, {}).update(zip(bundle.numbers, a, strict=True))
    for name, of in of_directions.items():
        result[name] = jnp.stack([of[number] for number in range(len(of))])
    return result


def _convolution(bundle: Bundle, sizes: Sizes, arrays: Mapping, patches: Patches) -> dict[str, dict]:
    """The arguments of `convolve` for x and for [B | C]."""
    weight = _of(bundle, arrays["conv_weight"])
    parts = {"x": slice(0, sizes.inner), "BC": slice(sizes.inner, sizes.channels)}
    found = {}
    for name, channels in parts.items():
        source, first = patches[name]
        own = filled_channels(jnp.swapaxes(weight[:, channels], 1, 2))
        found[name] = {
            "x": source,
            "first": first,
            "weight": own.reshape(-1, own.shape[-1]),
            "activation": "silu",
            "walks": bundle.walks,
        }
        if "conv_bias" in arrays:
            found[name]["bias"] = filled_channels(_of(bundle, arrays["conv_bias"])[:, channels])
    return found


def _scan_arguments(bundle: Bundle, sizes: Sizes, arrays: Mapping, patches: Patches, convolved: dict) -> dict:
    """The array arguments of `forward.outputs`."""
    found = {"dt": bundle.from_grid(arrays["dt"]).astype(jnp.float32)}
    for name, a in (convolved or {name: bundle.from_grid(a) for name, (a, _) in patches.items()}).items():
        found[name] = a
    BC = found.pop("BC")[..., : sizes.channels - sizes.inner]
    found["x"] = found["x"][..., : sizes.inner].reshape(*found["x"].shape[:2], sizes.heads, sizes.head_dim)
    for name, a in zip("BC", jnp.split(BC, 2, axis=-1), strict=True):
        found[name] = a.reshape(*a.shape[:2], sizes.groups, sizes.state)
    found["A"] = _of(bundle, arrays["A"])
    for name in ("D", "dt_bias"):
        if name in arrays:
            found[name] = _of(bundle, arrays[name])
    if "D" in found:
        found["D"] = found["D"].reshape(-1, *found["D"].shape[2:])
    return found


def _of(bundle: Bundle, a: Array) -> Array:
    """The entries of `a` [k ..], which has one for each of all directions, for those of the bundle."""
    if bundle.numbers == tuple(range(a.shape[0])):
        return a
    return jnp.stack([a[number] for number in bundle.numbers])
