"""A causal depthwise convolution with SiLU in Triton: for the peer of `visual_scan.py`, whose own is a compiled extension."""

import torch
import triton
import triton.language as tl

TOKENS, CHANNELS = 32, 128  # of a block


def conv_silu(x, weight, bias):
    """x [b l c], rows of any stride; weight [c w], bias [c]"""
    batch, length, channels = x.shape
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(channels, CHANNELS), triton.cdiv(length, TOKENS), batch)
    _kernel[grid](x, weight, bias, y, length, channels, x.stride(0), x.stride(1), weight.shape[1], TOKENS, CHANNELS)
    return y


@triton.jit
def _kernel(x, weight, bias, y, length, channels, x_batch, x_row, TAPS: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    c = tl.program_id(0) * W + tl.arange(0, W)
    t = tl.program_id(1) * T + tl.arange(0, T)
    batch = tl.program_id(2).to(tl.int64)
    real = c < channels
    total = tl.zeros((T, W), tl.float32) + tl.load(bias + c, mask=real)[None]
    for tap in tl.static_range(TAPS):
        seen = t - (TAPS - 1) + tap
        mask = (seen >= 0)[:, None] & (seen < length)[:, None] & real[None]
        value = tl.load(x + batch * x_batch + seen[:, None] * x_row + c[None], mask=mask, other=0.0)
        total += value.to(tl.float32) * tl.load(weight + c * TAPS + tap, mask=real)[None]
    total = total * tl.sigmoid(total)
    tl.store(
        y + (batch * length + t)[:, None] * channels + c[None],
        total.to(y.dtype.element_ty),
        mask=(t < length)[:, None] & real[None],
    )
