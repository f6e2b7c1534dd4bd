"""A sequence through a Mamba-2 mixer, from the input projection to the output projection, in one call."""

import functools

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.causal_conv1d.api import causal_conv1d
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.gated_rms_norm.api import gated_rms_norm
from pallas_kernels.mamba2_sequence.parts import by_parts, sizes_of
from pallas_kernels.shapes import check_rank, check_shape
from pallas_kernels.sharded import current
from pallas_kernels.ssd.api import ssd

MAMBA2_SEQUENCE = Op(
    "mamba2_sequence",
    "pallas_kernels.mamba2_sequence",
    ("reference", "xla", "pallas_gpu"),
    axes={
        "zxbcdt": "b l e",
        "conv_weight": "c w",
        "A": "h",
        "conv_bias": "c",
        "D": "h|h p",
        "dt_bias": "h",
        "norm_weight": "c",
        "conv_state": "b w c",
        "ssm_state": "b h p n",
        "segment_ids": "b l",
    },
    outputs=lambda arguments, _: ("b l c", "b w c", "b h p n") if arguments["return_states"] else "b l c",
    can_split=lambda split, _: split.parts("h") == 1 and not split.sequence,
)


def mamba2_sequence(
    zxbcdt: Float[Array, "b l e"],
    conv_weight: Float[Array, "c w"],
    A: Float[Array, "h"],
    *,
    groups: int = 1,
    conv_bias: Float[Array, "c"] | None = None,
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    dt_bias: Float[Array, "h"] | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    norm_weight: Float[Array, "inner"] | None = None,
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    conv_state: Float[Array, "b _ c"] | None = None,
    ssm_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    return_states: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b l inner"] | tuple[Float[Array, "b l inner"], Float[Array, "b w-1 c"], Float[Array, "b h p n"]]:
    """What lies between the two projections of Mamba-2 (arXiv 2405.21060, figure 6), for a whole sequence.

    The numbers of `causal_conv1d` with SiLU, `ssd` with softplus and `gated_rms_norm` one after the other, up to
    rounding; where a backend has kernels for all of it, z, x and their gradients are read and written where they lie
    in `zxbcdt`, and no part of it is copied. For one token with states see `mamba2_step`.

    Args:
        zxbcdt: the input projection [z | x | B | C | dt] of widths h p, h p, g n, g n and h.
        groups: g. The norm runs over the channels of each group.
        norm_weight: without it y is only gated: y * silu(z).
        norm_before_gate: rms_norm(y) * norm_weight * silu(z) instead of rms_norm(y * silu(z)) * norm_weight.
        conv_state, ssm_state: what came before, zeros if None.
        segment_ids: packed sequences and padding, see `pallas_kernels.segments`.
        chunk_size: as in `ssd`.
        implementation: see `pallas_kernels.dispatch`. Where no backend takes all of it, or `use_mesh` splits heads or
            sequence, it is that of the parts, which run one after the other.

    Returns:
        y in the dtype of zxbcdt; with `return_states` also the last w - 1 inputs of the convolution and the state
        after the last token, in float32.

    Raises:
        ValueError: shapes that do not fit together. ExceptionGroup: no backend of `implementation` takes the arguments.
    """
    check_rank("zxbcdt", zxbcdt, "b l e")
    check_rank("conv_weight", conv_weight, "c w")
    sizes = sizes_of(zxbcdt, conv_weight, A, groups)
    (batch, length, _), (channels, width) = zxbcdt.shape, conv_weight.shape
    expected = {
        "conv_bias": (conv_bias, "c", (channels,)),
        "D": (D, "h p" if D is not None and D.ndim == 2 else "h", (sizes.heads, sizes.head_dim)),
        "dt_bias": (dt_bias, "h", (sizes.heads,)),
        "norm_weight": (norm_weight, "h*p", (sizes.inner,)),
        "conv_state": (conv_state, "b w-1 c", (batch, width - 1, channels)),
        "ssm_state": (ssm_state, "b h p n", (batch, sizes.heads, sizes.head_dim, sizes.state)),
        "segment_ids": (segment_ids, "b l", (batch, length)),
    }
    for name, (a, letters, shape) in expected.items():
        if a is not None:
            check_shape(name, a, letters, shape[: len(letters.split())])
    arguments = {
        "groups": groups,
        "conv_bias": conv_bias,
        "D": D,
        "dt_bias": dt_bias,
        "dt_limit": dt_limit,
        "norm_weight": norm_weight,
        "norm_eps": norm_eps,
        "norm_before_gate": norm_before_gate,
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "segment_ids": segment_ids,
        "return_states": return_states,
        "chunk_size": chunk_size,
    }
    split = current()
    whole = not split or MAMBA2_SEQUENCE.can_split(split, {})
    explained = MAMBA2_SEQUENCE.explain(zxbcdt, conv_weight, A, implementation=implementation, **arguments)
    if whole and explained.chosen == "pallas_gpu":
        return MAMBA2_SEQUENCE(implementation, zxbcdt, conv_weight, A, **arguments)
    parts = (functools.partial(part, implementation=implementation) for part in (causal_conv1d, ssd, gated_rms_norm))
    return by_parts(*parts)(zxbcdt, conv_weight, A, **arguments)
