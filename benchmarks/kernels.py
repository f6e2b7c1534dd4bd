"""Times the kernels at real shapes on one GPU, against XLA, a peer and the memory floor: python benchmarks/kernels.py

One row for each shape of `ssd`, forward:

* ours, xla: this library's backends, the sum of all GPU kernels of a call (CUPTI), without the gaps between them;
* peer: `mamba_chunk_scan_combined` of mamba_ssm (Triton, PyTorch), by CUDA-graph replay, so without launch costs; "-"
  where mamba_ssm cannot be imported;
* floor: every input read and every output written once, at the speed this device copies at. Calls are repeated on the
  same inputs, so small shapes are read from the cache and may pass it;
* error: of ours, ||y - truth|| / ||truth|| over the first and the last head against the token recurrence in float64.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import functools
import json
import math
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import pallas_kernels as pk
from pallas_kernels.specs import SSDSpec

SHAPES = ("1x729", "8x729", "1x2048", "8x2048", "1x8192", "4x4096", "1x32768", "1x131072")
LONGEST_CHECKED = 8192  # tokens; the recurrence takes one step at a time
COLUMNS = ("op", "shape", "dtype", "ours", "xla", "peer", "floor", "% of floor", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="batch x tokens: 8x2048")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="pallas_gpu", help="ours (default pallas_gpu)")
    parser.add_argument("--without", nargs="*", default=[], choices=["xla", "peer", "error"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-kernels.json"))
    args = parser.parse_args()

    copy = copy_bandwidth()
    rows = []
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, copies at {copy / 1e12:.2f} TB/s. Milliseconds:")
    print_row(COLUMNS)
    for shape in args.shapes:
        b, l = map(int, shape.split("x"))  # noqa: E741, the axis letter
        rows.append(ssd_row(SSDSpec(b=b, l=l, dtype=args.dtype), args.implementation, args.without, copy))
        print_row([rows[-1][name] for name in COLUMNS])
    result = {
        "benchmark": "kernels",
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_TB_per_s": round(copy / 1e12, 3),
        "unit": "ms",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def ssd_row(spec: SSDSpec, implementation: str, without: list[str], copy: float) -> dict:
    arrays = ssd_inputs(spec)
    ours = functools.partial(pk.ssd, dt_softplus=True, implementation=implementation)
    xla = functools.partial(pk.ssd, dt_softplus=True, implementation="xla")
    floor = 1e3 * ssd_bytes(spec) / copy
    milliseconds_ours = milliseconds(ours, arrays)
    checked = "error" not in without and spec.l <= LONGEST_CHECKED
    return {
        "op": "ssd",
        "shape": f"{spec.b}x{spec.l}x{spec.h}x{spec.p} n{spec.n} g{spec.g}",
        "dtype": spec.dtype,
        "ours": milliseconds_ours,
        "xla": None if "xla" in without else milliseconds(xla, arrays),
        "peer": None if "peer" in without else peer_milliseconds(arrays),
        "floor": floor,
        "% of floor": round(100 * floor / milliseconds_ours),
        "error": ssd_error(ours, arrays) if checked else None,
    }


def ssd_inputs(spec: SSDSpec, seed: int = 0) -> dict[str, jax.Array]:
    """Random inputs, with step sizes and decay rates as Mamba-2 initialises them."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    shapes = spec.shapes()
    arrays = {name: jax.random.normal(next(keys), shapes[name].shape, shapes[name].dtype) for name in "xBC"}
    arrays["dt"] = jax.random.normal(next(keys), shapes["dt"].shape, shapes["dt"].dtype)
    step = jnp.exp(jax.random.uniform(next(keys), (spec.h,), minval=math.log(1e-3), maxval=math.log(1e-1)))
    arrays["dt_bias"] = jnp.log(jnp.expm1(step))
    arrays["A"] = -jax.random.uniform(next(keys), (spec.h,), minval=1.0, maxval=16.0)
    arrays["D"] = jnp.ones(spec.h)
    return arrays


def ssd_bytes(spec: SSDSpec) -> int:
    """x, dt, B and C read, y written."""
    shapes = spec.shapes()
    return sum(a.size * a.dtype.itemsize for a in shapes.values()) + shapes["x"].size * shapes["x"].dtype.itemsize


def ssd_error(function, arrays: dict[str, jax.Array]) -> float:
    y = function(**arrays)
    heads = np.array([0, y.shape[2] - 1])
    truth_of = {
        name: np.asarray(a, np.float64)[heads] if a.ndim == 1 else np.asarray(a, np.float64)
        for name, a in arrays.items()
    }
    truth_of |= {name: truth_of[name][:, :, heads] for name in ("x", "dt")}
    with jax.enable_x64(True):
        reference = functools.partial(pk.ssd, dt_softplus=True, implementation="reference")
        truth = np.asarray(jax.jit(reference)(**{name: jnp.asarray(a) for name, a in truth_of.items()}))
    difference = np.asarray(y[:, :, heads], np.float64) - truth
    return float(np.linalg.norm(difference) / np.linalg.norm(truth))


def milliseconds(function, arrays: dict[str, jax.Array], repetitions: int = 10) -> float:
    """Median over calls of the time their GPU kernels take; where kernels cannot be timed, of wall-clock time."""
    run = jax.jit(function)
    try:
        times = profiler.measure(lambda arrays: run(**arrays), iterations=repetitions)(arrays)[1]
    except RuntimeError:
        times = []
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            jax.block_until_ready(run(**arrays))
            times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a large elementwise operation."""
    a = jnp.zeros(2**29, jnp.bfloat16)
    return 2 * a.nbytes / (1e-3 * milliseconds(lambda a: a + 1, {"a": a}))


def peer_milliseconds(arrays: dict[str, jax.Array]) -> float | None:
    """The peer on inputs of the same shapes, by replay of a CUDA graph of 10 calls."""
    try:
        import torch
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None

    tensors = {
        name: torch.tensor(np.asarray(a, np.float32), device="cuda", dtype=getattr(torch, str(a.dtype)))
        for name, a in arrays.items()
    }
    x, dt, A, B, C = (tensors.pop(name) for name in ("x", "dt", "A", "B", "C"))

    def call():
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, dt_softplus=True, **tensors)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(10):
            call()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10)
    del graph
    torch.cuda.empty_cache()
    return sorted(times)[7]


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
    print(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, (4, 22, 9, 7, 7, 7, 7, 11, 8), strict=True)),
        flush=True,
    )


if __name__ == "__main__":
    main()
