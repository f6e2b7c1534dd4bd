"""Times 2D visual scans on one GPU, against the way of the released connector: python benchmarks/visual_scan.py

A row for each of --scan, forward, and forward and backward together: a bidirectional scan (bsm: along the rows and back)
and a cross scan (csm: along the columns and back as well) of a grid of patches, and a whole connector (connector: that of
the 3B model, 184M parameters, from patch features to visual tokens), forward:

* ours: this library's backend, the sum of all GPU kernels of a call (CUPTI), without the gaps between them, nor copies
  that are no kernels; clock: the same by the clock, ten calls one behind the other;
* peer: mamba_ssm (Triton, PyTorch) by replay of a CUDA graph, so without launch costs: one `mamba_chunk_scan_combined`
  for each direction on flipped or transposed patches, flipped or transposed back, and their mean. Its connector is those
  and its gated norm between linear layers of PyTorch; for the convolution, a compiled extension there, the Triton kernel
  of triton_conv.py. "-" where mamba_ssm cannot be imported;
* floor: of the scans every input read and every output written once at the speed this device copies at, of the
  connector its products at the dense peak of the data sheet;
* memory, peer's: what a call needs besides its inputs and outputs, in MB;
* error: of ours, ||y - truth|| / ||truth|| over the first image and head against the recurrence in float64.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import functools
import json
import math
import os
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from kernels import DENSE_PEAK, copy_bandwidth, graph_milliseconds, megabytes, milliseconds

import pallas_kernels as pk
from ml_mamba_jax.config import BIDIRECTIONAL_SCAN, CROSS_SCAN, ConnectorConfig, MLMambaConfig
from ml_mamba_jax.connector import ScanConnector

DIRECTIONS = {"bsm": BIDIRECTIONAL_SCAN, "csm": CROSS_SCAN}
HEADS, HEAD_DIM, STATE = 80, 64, 128
COLUMNS = ("scan", "pass", "ours", "clock", "peer", "ratio", "by clock", "floor", "memory", "peer's", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scan", nargs="*", default=[*DIRECTIONS, "connector"], choices=[*DIRECTIONS, "connector"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--grid", default="27x27", help="rows x columns")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="pallas_gpu", help="ours (default pallas_gpu)")
    parser.add_argument("--passes", nargs="*", default=["forward", "both"], choices=["forward", "both"])
    parser.add_argument("--without", nargs="*", default=[], choices=["peer", "error"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-visual-scan.json"))
    args = parser.parse_args()
    grid = tuple(map(int, args.grid.split("x")))

    copy, rows = copy_bandwidth(), []
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, copies at {copy / 1e12:.2f} TB/s. Milliseconds:")
    print_row(COLUMNS)
    for name in args.scan:
        of_scan = connector_rows if name == "connector" else scan_rows
        for row in of_scan(name, args.batch, grid, args.dtype, args.implementation, args.passes, args.without, copy):
            row["ratio"], row["by clock"] = (row["peer"] and row["peer"] / row[of] for of in ("ours", "clock"))
            rows.append(row)
            print_row([row.get(column) for column in COLUMNS])
    result = {
        "benchmark": "visual_scan",
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "copy_TB_per_s": round(copy / 1e12, 3),
        "shape": f"{args.batch}x{args.grid}x{HEADS}x{HEAD_DIM} n{STATE}",
        "dtype": args.dtype,
        "unit": "ms",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def scan_rows(name, batch, grid, dtype, implementation, passes, without, copy):
    arrays = scan_inputs(batch, grid, len(DIRECTIONS[name]), dtype)
    scan = functools.partial(pk.visual_scan, grid=grid, directions=DIRECTIONS[name], dt_softplus=True)
    ours = functools.partial(scan, implementation=implementation)
    dy = jax.random.normal(jax.random.key(1), arrays["x"].shape, dtype)

    def both(dy, **arrays):
        y, pullback = jax.vjp(lambda arrays: ours(**arrays), arrays)
        return y, pullback(dy)

    inputs = sum(arrays[name].nbytes for name in ("x", "dt", "B", "C"))
    of_pass = {
        "forward": (ours, arrays, inputs + dy.nbytes),
        # All read and y written; then all and dy read, and the gradients written.
        "both": (both, arrays | {"dy": dy}, 3 * inputs + 2 * dy.nbytes),
    }
    for label in passes:
        (function, given, moved), backward = of_pass[label], label == "both"
        theirs = (None, None) if "peer" in without else peer_scan(name, grid, arrays, backward)
        yield {
            "scan": name,
            "pass": label,
            "ours": milliseconds(function, given),
            "clock": clock(function, given),
            "peer": theirs[0],
            "floor": 1e3 * moved / copy,
            "memory": megabytes(function, given),
            "peer's": theirs[1],
            "error": None if backward or "error" in without else scan_error(scan, ours, arrays),
        }


def connector_rows(_, batch, grid, dtype, implementation, passes, without, copy):
    if "forward" not in passes:
        return
    config = MLMambaConfig.named("ml-mamba-3b").connector
    connector = ScanConnector(config, grid, jnp.dtype(dtype))
    features = jax.random.normal(jax.random.key(0), (batch, grid[0] * grid[1], 2176), dtype)
    init = jax.jit(lambda: connector.init(jax.random.key(1), features[:1])["params"])
    params = jax.tree.map(lambda a: a.astype(dtype), init())
    size = sum(a.size for a in jax.tree.leaves(params))

    def forward(params, features):
        with pk.use_implementation((implementation, "xla")):  # one kernel may be for both of the others
            return connector.apply({"params": params}, features)

    arrays = {"params": params, "features": features}
    theirs = (None, None) if "peer" in without else peer_connector(config, features)
    yield {
        "scan": f"connector, {size / 1e6:.0f}M",
        "pass": "forward",
        "ours": milliseconds(forward, arrays),
        "clock": clock(forward, arrays),
        "peer": theirs[0],
        "floor": 1e3 * 2 * size * batch * grid[0] * grid[1] / DENSE_PEAK,
        "memory": megabytes(forward, arrays),
        "peer's": theirs[1],
    }


def scan_inputs(batch, grid, k, dtype) -> dict[str, jax.Array]:
    """Random inputs, with step sizes and decay rates as Mamba-2 initialises them."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    lead = (batch, grid[0] * grid[1])
    step = jnp.exp(jax.random.uniform(next(keys), (k, HEADS), minval=math.log(1e-3), maxval=math.log(1e-1)))
    return {
        "x": jax.random.normal(next(keys), (*lead, HEADS, HEAD_DIM), dtype),
        "dt": jax.random.normal(next(keys), (*lead, HEADS), dtype),
        "A": -jax.random.uniform(next(keys), (k, HEADS), minval=1.0, maxval=16.0),
        "B": jax.random.normal(next(keys), (*lead, 1, STATE), dtype),
        "C": jax.random.normal(next(keys), (*lead, 1, STATE), dtype),
        "D": jnp.ones((k, HEADS)),
        "dt_bias": jnp.log(jnp.expm1(step)),
    }


def scan_error(scan, ours, arrays: dict[str, jax.Array]) -> float:
    actual = np.asarray(ours(**arrays)[:1, :, :1], np.float64)
    first = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    first = {name: a[:1] if name in ("x", "dt", "B", "C") else a for name, a in first.items()}
    first |= {name: first[name][:, :, :1] for name in ("x", "dt")}
    first |= {name: first[name][:, :1] for name in ("A", "D", "dt_bias")}
    with jax.enable_x64(True):
        given = {name: jnp.asarray(a) for name, a in first.items()}
        truth = np.asarray(jax.jit(functools.partial(scan, implementation="reference"))(**given))
    return float(np.linalg.norm(actual - truth) / np.linalg.norm(truth))


def clock(function, arrays, calls: int = 10) -> float:
    """By the clock, for one of several calls one behind the other."""
    run = jax.jit(function)
    jax.block_until_ready(run(**arrays))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        results = [run(**arrays) for _ in range(calls)]
        jax.block_until_ready(results)
        times.append(1e3 * (time.perf_counter() - started) / calls)
    return sorted(times)[1]


# The peer.


def tensor(a: jax.Array):
    import torch

    return torch.tensor(np.asarray(a, np.float32), device="cuda", dtype=getattr(torch, str(a.dtype)))


def ordered(a, direction: str, grid: tuple[int, int], inverse: bool = False):
    """Row-major patches [b l ..] in the order of `direction`, or back from it."""
    if inverse and direction.endswith("reversed"):
        a = a.flip(1)
    if direction.startswith("columns"):
        a = a.unflatten(1, grid[::-1] if inverse else grid).transpose(1, 2).flatten(1, 2).contiguous()
    if not inverse and direction.endswith("reversed"):
        a = a.flip(1)
    return a


def measured(call, calls: int) -> tuple[float, float]:
    """(milliseconds of one call, its memory in MB)"""
    import torch

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    memory = torch.cuda.max_memory_allocated() - before
    for a in result if isinstance(result, tuple) else (result,):
        memory -= a.nbytes
    del result
    return graph_milliseconds(call, calls), memory / 1e6


def peer_scan(name, grid, arrays, backward: bool) -> tuple[float | None, float | None]:
    try:
        import torch
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None, None
    given = {name: tensor(a).requires_grad_(backward) for name, a in arrays.items()}
    dy = torch.randn_like(given["x"])

    def call():
        with torch.set_grad_enabled(backward):
            total = None
            for i, direction in enumerate(DIRECTIONS[name]):
                x, dt, B, C = (ordered(given[name], direction, grid) for name in ("x", "dt", "B", "C"))
                A, D, bias = (given[name][i] for name in ("A", "D", "dt_bias"))
                y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)
                y = ordered(y, direction, grid, inverse=True)
                total = y if total is None else total + y
            y = total / len(DIRECTIONS[name])
            return (y.detach(), *torch.autograd.grad(y, list(given.values()), dy)) if backward else y

    return measured(call, calls=2 if backward else 5)


def peer_connector(config: ConnectorConfig, features) -> tuple[float | None, float | None]:
    """Random weights: only the time is of interest."""
    try:
        import torch
        import torch.nn.functional as F
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        from triton_conv import conv_silu
    except ImportError:
        return None, None
    mixer, dtype = config.mixer, getattr(torch, str(features.dtype))
    d, inner, grouped = mixer.d_model, mixer.d_inner, mixer.n_groups * mixer.d_state
    features = tensor(features)

    def linear(n_in, n_out, bias=True):
        return torch.nn.Linear(n_in, n_out, bias=bias, device="cuda", dtype=dtype)

    class Block:
        def __init__(self):
            self.in_proj, self.out_proj = linear(d, mixer.in_proj_features, False), linear(inner, d, False)
            self.norm = torch.nn.LayerNorm(d, device="cuda", dtype=dtype)
            self.norm_weight = torch.ones(inner, device="cuda")
            self.w1, self.w2, self.w3 = (linear(d, d) for _ in range(3))
            self.directions = [
                {
                    "weight": 0.3 * torch.randn(mixer.conv_channels, mixer.d_conv, device="cuda"),
                    "bias": torch.randn(mixer.conv_channels, device="cuda"),
                    "A": -torch.rand(mixer.n_heads, device="cuda") - 1,
                    "D": torch.ones(mixer.n_heads, device="cuda"),
                    "dt_bias": torch.rand(mixer.n_heads, device="cuda") - 5,
                }
                for _ in range(2)
            ]

        def core(self, zxbcdt, weight, bias, A, D, dt_bias):
            z, xBC, dt = zxbcdt.split((inner, mixer.conv_channels, mixer.n_heads), dim=-1)
            x, B, C = conv_silu(xBC, weight, bias).split((inner, grouped, grouped), dim=-1)
            y = mamba_chunk_scan_combined(
                x.unflatten(-1, (mixer.n_heads, mixer.head_dim)),
                *(dt, A),
                *(a.unflatten(-1, (mixer.n_groups, mixer.d_state)) for a in (B, C)),
                chunk_size=256,
                D=D,
                dt_bias=dt_bias,
                dt_softplus=True,
            )
            return rmsnorm_fn(
                y.flatten(2), self.norm_weight, None, z=z, eps=1e-5, group_size=None, norm_before_gate=False
            )

        def __call__(self, x):
            zxbcdt = self.in_proj(x)
            forwards, backwards = self.directions
            y = self.core(zxbcdt, **forwards) + self.core(zxbcdt.flip(1), **backwards).flip(1)
            x = x + self.out_proj(y / 2)
            h = self.norm(x)
            return x + self.w3(F.silu(self.w1(h)) * self.w2(h))

    first, blocks = linear(features.shape[-1], d), [Block() for _ in range(config.n_layers)]
    norm = torch.nn.LayerNorm(d, device="cuda", dtype=dtype)
    projector = [linear(d, 4 * d), linear(4 * d, d), linear(d, d)]

    def call():
        with torch.no_grad():
            x = F.gelu(first(features))
            for block in blocks:
                x = block(x)
            x = projector[0](norm(x))
            for layer in projector[1:]:
                x = layer(F.gelu(x))
            return x

    return measured(call, calls=2)


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
    widths = (17, 8, 7, 7, 7, 6, 9, 7, 7, 7, 8)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


if __name__ == "__main__":
    main()
