"""Causal convolution on Hopper, forward and backward one pass each (Pallas, Mosaic GPU).

A thread block walks along some tokens of a row with some of its channels: a thread holds neighbouring channels, and
the last w - 1 inputs stay in its registers. So x is read once, in whole cache lines, and nothing is shared between
threads. The backward walk computes the activations again, w - 1 tokens further than it writes.

Several walks (`pallas_kernels.walks`), each with its own weights, read the same x where it lies, from the end or down
the columns of a grid; what they write is in the order of their tokens in memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.causal_conv1d import xla
from pallas_kernels.gradients import with_gradient
from pallas_kernels.hopper import FLOATS, PROCESSORS, launch, load32, sigmoid, why_not_here  # noqa: F401, part of a backend
from pallas_kernels.segments import number_segments
from pallas_kernels.walks import ONE_WALK, Walks, mirrored

THREADS = 128  # of a block
TOGETHER = 4  # tokens whose loads are issued before the first is used
BLOCKS = 12 * PROCESSORS  # enough to fill the device


def why_not_causal_conv1d(x, weight, bias=None, *, initial_state=None, **_) -> str | None:
    for a in (x, weight, bias, initial_state):
        if a is not None and a.dtype not in FLOATS:
            return f"an argument is {a.dtype}; the kernel takes float32, bfloat16 and float16"
    if weight.shape[1] > 4:
        return f"the convolution has {weight.shape[1]} taps; the kernel takes up to 4"
    return None


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None, return_final_state=False
):
    segments = None if segment_ids is None else number_segments(segment_ids)
    arrays = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    if segments is not None:
        arrays["number"] = jnp.where(segments.real, segments.index, -1)
    run = with_gradient(
        lambda arrays: _forward(**arrays, activation=activation),
        lambda arrays, dy: _gradients(**arrays, dy=dy, activation=activation),
    )
    y = run({name: a for name, a in arrays.items() if a is not None})
    if not return_final_state:
        return y
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], weight.shape[1] - 1, x.shape[2]), x.dtype)
    return y, xla.final_state(x, initial_state, segments)


def _forward(x, weight, bias=None, initial_state=None, number=None, *, activation):
    channels = x.shape[2]
    filled = _fill({"x": x, "weight": weight.T, "bias": _as_row(bias), "initial_state": initial_state})
    return convolve(**filled, number=number, activation=activation)[..., :channels]


def _gradients(x, weight, bias=None, initial_state=None, number=None, *, dy, activation) -> dict:
    channels, width = weight.shape
    filled = _fill({"x": x, "dy": dy, "weight": weight.T, "bias": _as_row(bias), "initial_state": initial_state})
    dx, sums = convolve_backward(**filled, number=number, activation=activation)
    sums = sums.sum(axis=(0, 1))[:, :channels]
    result = {"x": dx[..., :channels], "weight": sums[:width].T.astype(weight.dtype)}
    if bias is not None:
        result["bias"] = sums[width].astype(bias.dtype)
    if number is not None:
        result["number"] = jnp.zeros(number.shape, jax.dtypes.float0)
    if initial_state is not None and width == 1:
        result["initial_state"] = initial_state
    elif initial_state is not None:  # reaches the first w - 1 tokens only
        first = slice(None), slice(None, width - 1)

        def beginning(initial_state):
            segment_ids = None if number is None else number[first]
            return xla.causal_conv1d(
                x[first], weight, bias, activation=activation, initial_state=initial_state, segment_ids=segment_ids
            )

        _, pullback = jax.vjp(beginning, initial_state)
        (result["initial_state"],) = pullback(dy[first])
    return result


def _as_row(bias):
    return None if bias is None else bias[None]


def _fill(arrays: dict) -> dict:
    """Without what is None, and zeros behind the last channels up to a multiple of `THREADS`."""
    return {name: filled_channels(a) for name, a in arrays.items() if a is not None and a.size}


def filled_channels(a):
    """`a` with zeros behind its last axis up to a multiple of `THREADS`."""
    missing = -a.shape[-1] % THREADS
    return jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, missing),)) if missing else a


# The kernels.


def convolve(*, x, weight, bias=None, initial_state=None, number=None, activation, first=0, walks=ONE_WALK):
    """y [b l c] of the channels of x [b l e] from `first` on; weight [w c], bias [1 c], number [b l] the
    segments, -1 for padding.

    Of k walks weight [k*w c], bias [k c], and y [k*b l c], its tokens as they lie for the walks; without initial_state.
    """
    batch, length, row = x.shape
    channels = weight.shape[1]
    width = _neighbours(channels, first, row)
    tokens = _tokens(batch * walks.number, length, channels // width)
    inputs = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state, "number": number}
    inputs = {name: a for name, a in inputs.items() if a is not None}
    return launch(
        functools.partial(_walk, [*inputs], tokens, width, first, activation, walks),
        "causal_conv1d",
        jax.ShapeDtypeStruct((batch * walks.number, length, channels), x.dtype),
        grid=_grid(batch, -(-length // tokens), channels // width, walks),
        approximately=True,
    )(*inputs.values())


def convolve_backward(
    *,
    x,
    dy,
    weight,
    bias=None,
    initial_state=None,
    number=None,
    activation,
    first=0,
    into=None,
    into_first=0,
    walks=ONE_WALK,
):
    """(dx [b l c], sums [b blocks w+1 c] float32: in parts the gradient of weight and bias); arguments as of `convolve`.

    With `into`, a reference to an array [b l e], dx is written to its channels from `into_first` on; dx is then None.
    Of k walks dy, dx and sums have k*b rows; dx is of each walk, its tokens as they lie for the walks.
    """
    batch, length, row = x.shape
    channels, rows = weight.shape[1], batch * walks.number
    taps = weight.shape[0] // walks.number
    width = _neighbours(channels, math.gcd(first, into_first), row)
    tokens = _tokens(rows, length, channels // width)
    blocks = -(-length // tokens)
    inputs = {"x": x, "dy": dy, "weight": weight, "bias": bias, "initial_state": initial_state, "number": number}
    inputs = {name: a for name, a in inputs.items() if a is not None}
    dx = jax.ShapeDtypeStruct((rows, length, channels), x.dtype)
    sums = jax.ShapeDtypeStruct((rows, blocks, taps + 1, channels), jnp.float32)
    names = [*inputs] if into is None else [*inputs, "dx"]
    run = launch(
        functools.partial(_walk_back, names, tokens, width, first, into_first, activation, walks),
        "causal_conv1d_gradient",
        (dx, sums) if into is None else sums,
        grid=_grid(batch, blocks, channels // width, walks),
        approximately=True,
    )
    return run(*inputs.values()) if into is None else (None, run(*inputs.values(), into))


def _grid(batch: int, tokens: int, channels: int, walks: Walks) -> dict[str, int]:
    """All walks over some tokens start together: one of them brings x into the cache."""
    return {"batch": batch, "tokens": tokens, "walk": walks.number, "channels": channels}


def _neighbours(channels: int, first: int, row: int) -> int:
    """How many channels a block takes: each thread some neighbours, as many as alignment and registers allow."""
    return THREADS * math.gcd(4, channels // THREADS, first or 4, row)


def _tokens(batch: int, length: int, blocks: int) -> int:
    """How many tokens a block takes: many, so that few are read twice, but not so many that the device is not full."""
    for tokens in (256, 128, 64, 32):
        if batch * blocks * -(-length // tokens) >= BLOCKS:
            return tokens
    return 32


def _walk(names, tokens, width, first, activation, walks, *refs):
    *inputs, y_ref = refs
    refs = dict(zip(names, inputs, strict=True))
    walk = _Walk(refs, tokens, width, first, walks)

    def step(group, window):
        at = walk.start + group * TOGETHER
        rows = [walk.token(at + i) for i in range(TOGETHER)]
        for i, row in enumerate(rows):
            y = walk.convolved(row, window)
            if activation == "silu":
                y = y * sigmoid(y)
            if "number" in refs:
                y = jnp.where(row.number >= 0, y, 0.0)

            @pl.when(at + i < walk.length)
            def _(y=y, t=at + i):
                y_ref.at[walk.row, walk.place(t), walk.own_channels][...] = y.astype(y_ref.dtype)

            window = (row, *window)[: walk.taps - 1]
        return window

    groups = lax.div(jnp.minimum(tokens, walk.length - walk.start) + TOGETHER - 1, TOGETHER)
    lax.fori_loop(0, groups, step, walk.window())


def _walk_back(names, tokens, width, first, into_first, activation, walks, *refs):
    refs = dict(zip([*names, "sums"] if "dx" in names else [*names, "dx", "sums"], refs, strict=True))
    walk = _Walk(refs, tokens, width, first, walks)
    taps = walk.taps
    end = walk.start + jnp.minimum(tokens, walk.length - walk.start)
    dx_channels = pl.ds(into_first + lax.axis_index("channels") * width, width)

    def step(group, carry):
        window, gradients, sums = carry
        at = walk.start + group * TOGETHER
        rows = [(walk.token(at + i), walk.load("dy", at + i)) for i in range(TOGETHER)]
        for i, (row, dy) in enumerate(rows):
            t = at + i
            gradient = dy
            if activation == "silu":
                before = walk.convolved(row, window)
                gate = sigmoid(before)
                gradient = dy * (gate * (1.0 + before * (1.0 - gate)))
            real = t < walk.length
            if "number" in refs:
                real = real & (row.number >= 0)
            gradient = jnp.where(real, gradient, 0.0)
            own = jnp.where(t < end, gradient, 0.0)
            sums = tuple(
                total + own * seen for total, seen in zip(sums, [*reversed(walk.seen(row, window)), 1.0], strict=True)
            )

            # The token w - 1 before this one has now met all that it reaches.
            gradients = (_Token(gradient, row.number), *gradients)
            target = gradients[-1]
            dx = None
            for distance, later in enumerate(reversed(gradients)):
                reached = later.values
                if "number" in refs:
                    reached = jnp.where(later.number == target.number, reached, 0.0)
                term = walk.weights[taps - 1 - distance] * reached
                dx = term if dx is None else dx + term
            if "number" in refs:
                dx = jnp.where(target.number >= 0, dx, 0.0)
            behind = t - (taps - 1)

            @pl.when((behind >= walk.start) & (behind < end))
            def _(dx=dx, behind=behind):
                refs["dx"].at[walk.row, walk.place(behind), dx_channels][...] = dx.astype(refs["dx"].dtype)

            gradients = gradients[:-1]
            window = (row, *window)[: walk.taps - 1]
        return window, gradients, sums

    nothing = _Token(walk.zeros(), jnp.int32(-1))
    groups = lax.div(end - walk.start + taps - 1 + TOGETHER - 1, TOGETHER)
    carry = walk.window(), (nothing,) * (taps - 1), (walk.zeros(),) * (taps + 1)
    *_, sums = lax.fori_loop(0, groups, step, carry)
    for i, total in enumerate(sums):
        refs["sums"].at[walk.row, lax.axis_index("tokens"), i, walk.own_channels][...] = total


class _Token(NamedTuple):
    values: Array
    number: Array
    """Of the segment, -1 for padding."""


class _Walk:
    """Where a thread block walks: from the token met as number `start` on, with channels whose weights it holds."""

    def __init__(self, refs: dict, tokens: int, width: int, first: int, walks: Walks):
        batch, self.length = refs["x"].shape[:2]
        self.batch, walk = lax.axis_index("batch"), lax.axis_index("walk")
        self.row = walk * batch + self.batch
        self.backwards = walks.backwards(walk, walks.number)
        # Blocks that start together are near each other in memory.
        self.start = mirrored(self.backwards, lax.axis_index("tokens"), -(-self.length // tokens)) * tokens
        self.taps = refs["weight"].shape[0] // walks.number
        self.own_channels = pl.ds(lax.axis_index("channels") * width, width)
        self.channels = {"x": pl.ds(first + self.own_channels.start, width)}
        self.layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // THREADS)
        self.weights = [
            load32(refs["weight"].at[walk * self.taps + tap, self.own_channels], self.layout)
            for tap in range(self.taps)
        ]
        self.bias = None
        if "bias" in refs:
            self.bias = load32(refs["bias"].at[walk, self.own_channels], self.layout)
        self._refs, self._width, self._walks = refs, width, walks

    def place(self, token):
        """Where the token lies that is met as number `token`."""
        return mirrored(self.backwards, token, self.length)

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros(self._width, jnp.float32), self.layout)

    def load(self, name: str, token):
        """A row of x or dy. Behind the end that of the last token, which nobody uses."""
        place = self.place(jnp.minimum(token, self.length - 1))
        row = self.row
        if name == "x":
            row, place = self.batch, self._walks.on_grid(place)
        channels = self.channels.get(name, self.own_channels)
        return load32(self._refs[name].at[row, place, channels], self.layout)

    def token(self, token) -> _Token:
        """An input and its segment, zero where it is padding."""
        values = self.load("x", token)
        if "number" not in self._refs:
            return _Token(values, jnp.int32(0))
        number = self._refs["number"][self.batch, jnp.minimum(token, self.length - 1)]
        return _Token(jnp.where(number >= 0, values, 0.0), number)

    def window(self) -> tuple[_Token, ...]:
        """The w - 1 inputs before the first token, the nearest first."""
        return tuple(self._before(distance) for distance in range(1, self.taps))

    def _before(self, distance: int) -> _Token:
        token = self.start - distance
        inside = token >= 0
        found = self.token(jnp.maximum(token, 0))
        outside = 0.0
        if "initial_state" in self._refs:
            row = jnp.clip(self.taps - 1 + token, 0, self.taps - 2)
            outside = load32(self._refs["initial_state"].at[self.batch, row, self.own_channels], self.layout)
        # What stands before the row belongs to its first segment.
        return _Token(jnp.where(inside, found.values, outside), jnp.where(inside, found.number, 0))

    def seen(self, token: _Token, window: tuple[_Token, ...]) -> list:
        """The inputs that a token sees, its own first; zero for those of other segments."""
        if "number" not in self._refs:
            return [token.values, *(earlier.values for earlier in window)]
        same = [jnp.where(earlier.number == token.number, earlier.values, 0.0) for earlier in window]
        return [token.values, *same]

    def convolved(self, token: _Token, window: tuple[_Token, ...]):
        total = self.bias
        for weight, values in zip(reversed(self.weights), self.seen(token, window), strict=True):
            total = weight * values if total is None else total + weight * values
        return total
