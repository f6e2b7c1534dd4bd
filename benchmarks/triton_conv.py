"""A causal depthwise convolution with SiLU in Triton: for the peer of `visual_scan.py`, whose own is a compiled extension."""

import functools

TOKENS, CHANNELS = 32, 128  # of a block


def conv_silu(x, weight, bias):
    """x [b l c] in PyTorch, rows of any stride; weight [c w], bias [c]"""
    import torch

    batch, length, channels = x.shape
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    grid = (-(-channels // CHANNELS), -(-length // TOKENS), batch)
    arguments = (x, weight, bias, y, length, channels, x.stride(0), x.stride(1), weight.shape[1], TOKENS, CHANNELS)
    _kernel()[grid](*arguments)
    return y


@functools.cache
def _kernel():
    global tl  # where Triton looks its language up

    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, weight, bias, y, length, channels, x_batch, x_row, W: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
        c = tl.program_id(0) * C + tl.arange(0, C)
        t = tl.program_id(1) * T + tl.arange(0, T)
        batch = tl.program_id(2).to(tl.int64)
        real = c < channels
        total = tl.zeros((T, C), tl.float32) + tl.load(bias + c, mask=real)[None]
        for tap in tl.static_range(W):
            seen = t - (W - 1) + tap
            mask = (seen >= 0)[:, None] & (seen < length)[:, None] & real[None]
            value = tl.load(x + batch * x_batch + seen[:, None] * x_row + c[None], mask=mask, other=0.0)
            total += value.to(tl.float32) * tl.load(weight + c * W + tap, mask=real)[None]
        total = (total * tl.sigmoid(total)).to(y.dtype.element_ty)
        tl.store(y + (batch * length + t)[:, None] * channels + c[None], total, mask=(t < length)[:, None] & real[None])

    return kernel
