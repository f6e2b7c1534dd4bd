"""A Mamba-2 mixer on a sequence on Hopper: the kernels of its parts, without copies between them.

The convolution reads x, B and C where they lie in zxbcdt, the norm reads z there. Backward, the norm's kernel makes
the array for the gradient of zxbcdt and writes z's share of it, the convolution's writes the others in place.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import xla as conv_xla
from pallas_kernels.causal_conv1d.pallas_gpu import THREADS, convolve, convolve_backward, why_not_causal_conv1d
from pallas_kernels.gated_rms_norm.pallas_gpu import normalize, normalize_backward, why_not_gated_rms_norm
from pallas_kernels.hopper import why_not_here  # noqa: F401, part of a backend
from pallas_kernels.mamba2_sequence.parts import sizes_of
from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.pallas_gpu import backward as ssd_backward
from pallas_kernels.ssd.pallas_gpu import forward as ssd_forward
from pallas_kernels.ssd.pallas_gpu import why_not_ssd


def why_not_mamba2_sequence(
    zxbcdt,
    conv_weight,
    A,
    *,
    groups=1,
    conv_bias=None,
    norm_weight=None,
    conv_state=None,
    dt_limit=(0.0, float("inf")),
    **_,
) -> str | None:
    if norm_weight is None:
        return "there is no norm_weight; the kernel normalises"
    sizes = sizes_of(zxbcdt, conv_weight, A, groups)
    x = jax.ShapeDtypeStruct((*zxbcdt.shape[:2], sizes.heads, sizes.head_dim), zxbcdt.dtype)
    B = jax.ShapeDtypeStruct((*zxbcdt.shape[:2], sizes.groups, sizes.state), zxbcdt.dtype)
    inner = jax.ShapeDtypeStruct((*zxbcdt.shape[:2], sizes.inner), zxbcdt.dtype)
    for reason in (
        why_not_ssd(x, None, A, B, B, dt_limit=dt_limit),
        why_not_causal_conv1d(zxbcdt, conv_weight, conv_bias, initial_state=conv_state),
        why_not_gated_rms_norm(inner, inner, norm_weight, group_size=sizes.inner // groups),
    ):
        if reason:
            return reason
    if sizes.state > ssd_backward.WIDEST_STATE:
        return f"the state size is {sizes.state}; the kernel of the gradient takes up to {ssd_backward.WIDEST_STATE}"
    if conv_weight.shape[1] < 2:
        return "the convolution has one tap; the kernel takes two or more"
    for name, width in (("a group", sizes.inner // groups), ("B and C", 2 * groups * sizes.state)):
        if width % THREADS:
            return f"{name} {'has' if name == 'a group' else 'have'} {width} channels; the kernel takes multiples of {THREADS}"
    return None


def mamba2_sequence(
    zxbcdt,
    conv_weight,
    A,
    *,
    groups=1,
    conv_bias=None,
    D=None,
    dt_bias=None,
    dt_limit=(0.0, float("inf")),
    norm_weight=None,
    norm_eps=1e-5,
    norm_before_gate=False,
    conv_state=None,
    ssm_state=None,
    segment_ids=None,
    return_states=False,
    chunk_size=None,
):
    del chunk_size  # tiles are 64 tokens
    sizes = sizes_of(zxbcdt, conv_weight, A, groups)
    segments = None if segment_ids is None else number_segments(segment_ids)
    arrays = {
        "zxbcdt": zxbcdt,
        "conv_weight": conv_weight,
        "A": A,
        "conv_bias": conv_bias,
        "D": D,
        "dt_bias": dt_bias,
        "norm_weight": norm_weight,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "segment_ids": segment_ids,
    }
    scan = {"dt_softplus": True, "dt_limit": dt_limit, "return_final_state": return_states}
    norm = {"eps": norm_eps, "width": sizes.inner // groups, "norm_before_gate": norm_before_gate}
    run = jax.custom_vjp(lambda arrays: _forward(sizes, scan, norm, arrays)[0])
    run.defvjp(functools.partial(_forward, sizes, scan, norm), functools.partial(_gradients, sizes, scan, norm))
    outputs = run({name: a for name, a in arrays.items() if a is not None})
    if not return_states:
        return outputs
    y, ssm = outputs
    xBC = zxbcdt[..., sizes.inner : -sizes.heads]
    if conv_state is None:
        conv_state = jnp.zeros((zxbcdt.shape[0], conv_weight.shape[1] - 1, sizes.channels), zxbcdt.dtype)
    return y, conv_xla.final_state(xBC, conv_state, segments), ssm


def _convolution(sizes, arrays: dict) -> dict[str, dict]:
    """The arguments of `convolve` for x and for [B | C]; `first` is where they lie in zxbcdt."""
    number = None
    if "segment_ids" in arrays:
        segments = number_segments(arrays["segment_ids"])
        number = jnp.where(segments.real, segments.index, -1)
    found = {}
    for name, channels in (("x", slice(0, sizes.inner)), ("BC", slice(sizes.inner, sizes.channels))):
        bias, state = arrays.get("conv_bias"), arrays.get("conv_state")
        found[name] = {
            "x": arrays["zxbcdt"],
            "weight": arrays["conv_weight"][channels].T,
            "bias": None if bias is None else bias[None, channels],
            "initial_state": None if state is None else state[..., channels],
            "number": number,
            "first": sizes.inner + channels.start,
            "activation": "silu",
        }
    return found


def _scan_arguments(sizes, arrays: dict, x, BC) -> dict:
    """The array arguments of `ssd`."""
    lead = x.shape[:2]
    B, C = (a.reshape(*lead, sizes.groups, sizes.state) for a in jnp.split(BC, 2, axis=-1))
    optional = {"D": "D", "dt_bias": "dt_bias", "initial_state": "ssm_state", "segment_ids": "segment_ids"}
    return {
        "x": x.reshape(*lead, sizes.heads, sizes.head_dim),
        "dt": arrays["zxbcdt"][..., -sizes.heads :],
        "A": arrays["A"],
        "B": B,
        "C": C,
    } | {name: arrays[given] for name, given in optional.items() if given in arrays}


def _rows(a):
    """[b l c] -> [b*l c]"""
    return a.reshape(-1, a.shape[-1])


def _forward(sizes, scan, norm, arrays: dict):
    convolved = {name: convolve(**arguments) for name, arguments in _convolution(sizes, arrays).items()}
    outputs = ssd_forward.outputs(**_scan_arguments(sizes, arrays, **convolved), **scan)
    y, *state = outputs if scan["return_final_state"] else (outputs,)
    y = y.reshape(convolved["x"].shape)
    out = normalize(x=_rows(y), z=_rows(arrays["zxbcdt"]), weight=arrays["norm_weight"], **norm).reshape(y.shape)
    return (out, *state) if state else out, (arrays, convolved, y)


def _gradients(sizes, scan, norm, kept, cotangents):
    arrays, convolved, y = kept
    zxbcdt = arrays["zxbcdt"]
    dout, *dstate = cotangents if scan["return_final_state"] else (cotangents,)
    dy, dzxbcdt, sums = normalize_backward(
        x=_rows(y), z=_rows(zxbcdt), weight=arrays["norm_weight"], dy=_rows(dout), row_of_dz=zxbcdt.shape[-1], **norm
    )
    result = {"norm_weight": sums.sum(axis=0).astype(arrays["norm_weight"].dtype)}

    scanned = _scan_arguments(sizes, arrays, **convolved)
    dy = dy.reshape(scanned["x"].shape)
    by_scan = ssd_backward.gradients(scanned, (dy, *dstate) if dstate else dy, **scan)
    for name, given in (("A", "A"), ("D", "D"), ("dt_bias", "dt_bias"), ("initial_state", "ssm_state")):
        if name in by_scan:
            result[given] = by_scan[name]
    if "segment_ids" in arrays:
        result["segment_ids"] = by_scan["segment_ids"]
    lead = zxbcdt.shape[:2]
    dconvolved = {
        "x": by_scan["x"].reshape(*lead, sizes.inner),
        "BC": jnp.concatenate([by_scan[name].reshape(*lead, -1) for name in "BC"], axis=-1),
    }

    dzxbcdt = jax.new_ref(dzxbcdt.reshape(zxbcdt.shape))
    sums = []
    for name, arguments in _convolution(sizes, arrays).items():
        target = {"into": dzxbcdt, "into_first": arguments["first"]}
        _, partial_sums = convolve_backward(**arguments, dy=dconvolved[name], **target)
        sums.append(partial_sums.sum(axis=(0, 1)))
    dzxbcdt = jax.freeze(dzxbcdt)
    result["zxbcdt"] = dzxbcdt.at[..., -sizes.heads :].set(by_scan["dt"].astype(zxbcdt.dtype))
    sums = jnp.concatenate(sums, axis=-1)
    weight = arrays["conv_weight"]
    result["conv_weight"] = sums[: weight.shape[1]].T.astype(weight.dtype)
    if "conv_bias" in arrays:
        result["conv_bias"] = sums[-1].astype(arrays["conv_bias"].dtype)
    if "conv_state" in arrays:  # reaches the first w - 1 tokens only
        result["conv_state"] = _conv_state_gradient(sizes, arrays, dconvolved)
    return ({name: result[name] for name in arrays},)


def _conv_state_gradient(sizes, arrays: dict, dconvolved: dict):
    first = slice(None), slice(None, arrays["conv_weight"].shape[1] - 1)
    segment_ids = arrays["segment_ids"][first] if "segment_ids" in arrays else None

    def beginning(conv_state):
        return conv_xla.causal_conv1d(
            arrays["zxbcdt"][first][..., sizes.inner : -sizes.heads],
            arrays["conv_weight"],
            arrays.get("conv_bias"),
            activation="silu",
            initial_state=conv_state,
            segment_ids=segment_ids,
        )

    _, pullback = jax.vjp(beginning, arrays["conv_state"])
    return pullback(jnp.concatenate([dconvolved[name][first] for name in ("x", "BC")], axis=-1))[0]
