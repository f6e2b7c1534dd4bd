"""Causal depthwise convolution over tokens, with an optional SiLU: a whole sequence, and one token of decoding."""

from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.shapes import check_rank, check_shape

CAUSAL_CONV1D = Op(
    "causal_conv1d",
    "pallas_kernels.causal_conv1d",
    ("reference", "xla", "pallas_gpu"),
    axes={"x": "b l c", "weight": "c w", "bias": "c", "initial_state": "b w c", "segment_ids": "b l"},
    outputs=lambda arguments, _: ("b l c", "b w c") if arguments["return_final_state"] else "b l c",
    sequential=True,
)

Activation = Literal["silu"] | None


def causal_conv1d(
    x: Float[Array, "b l c"],
    weight: Float[Array, "c w"],
    bias: Float[Array, "c"] | None = None,
    *,
    activation: Activation = None,
    initial_state: Float[Array, "b w-1 c"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    return_final_state: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "b l c"] | tuple[Float[Array, "b l c"], Float[Array, "b w-1 c"]]:
    """y[t] = activation(bias + sum_k weight[:, k] x[t - (w - 1) + k]), for each channel on its own.

    Accumulates in float32. `weight[:, -1]` multiplies the present token. Before the sequence stands `initial_state`,
    the last w - 1 inputs of what came before, or zeros; a window never reaches into another sequence of the row
    (`pallas_kernels.segments`).

    Returns:
        y in the dtype of x, and with `return_final_state` the last w - 1 inputs up to the last real token of each row.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
    """
    _check(x, weight, bias, activation, {"initial_state": initial_state})
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, "b l", x.shape[:2])
    return CAUSAL_CONV1D(
        implementation,
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        segment_ids=segment_ids,
        return_final_state=return_final_state,
    )


def causal_conv1d_step(
    state: Float[Array, "b _ c"],
    x: Float[Array, "b c"],
    weight: Float[Array, "c w"],
    bias: Float[Array, "c"] | None = None,
    *,
    activation: Activation = None,
) -> tuple[Float[Array, "b c"], Float[Array, "b w-1 c"]]:
    """One token of `causal_conv1d` from a state [b w-1 c]: returns (y, next state). XLA fuses it: no choice."""
    from pallas_kernels.causal_conv1d import xla

    check_rank("x", x, "b c")
    _check(x[:, None], weight, bias, activation, {"state": state})
    return xla.causal_conv1d_step(state, x, weight, bias, activation=activation)


def _check(x, weight, bias, activation, named_state):
    check_rank("x", x, "b l c")
    check_rank("weight", weight, "c w")
    batch, length, channels = x.shape
    width = weight.shape[1]
    if not batch or not length:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one sequence of at least one token")
    check_shape("weight", weight, "c w", (channels, width))
    if bias is not None:
        check_shape("bias", bias, "c", (channels,))
    for name, state in named_state.items():
        if state is not None:
            check_shape(name, state, "b w-1 c", (batch, width - 1, channels))
    if activation not in ("silu", None):
        raise ValueError(f"activation: got {activation!r}, expected 'silu' or None")
