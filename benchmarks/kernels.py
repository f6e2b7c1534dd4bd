"""Times the kernels at real shapes on one GPU, against XLA, a peer and the memory floor: python benchmarks/kernels.py

One row for each shape of `ssd`, forward:

* ours, xla: this library's backends, the sum of all GPU kernels of a call (CUPTI), without the gaps between them;
* peer: `mamba_chunk_scan_combined` of mamba_ssm (Triton, PyTorch), by CUDA-graph replay, so without launch costs; "-"
  where mamba_ssm cannot be imported;
* floor: every input read and every output written once, at the speed this device copies at. Calls are repeated on the
  same inputs, so small shapes are read from the cache and may pass it;
* memory: what ours needs besides inputs and outputs, in MB;
* error: of ours, ||y - truth|| / ||truth|| over the first and the last head against the token recurrence in float64.

With --op ssd_gradient the same for the forward and the backward pass together, without error.

With --op causal_conv1d, gated_rms_norm or mixer two rows for each shape, forward, and forward and backward together
(_gradient), for what surrounds the scan in a 2.7B layer: the convolution with SiLU, the norm with its gate, and a whole
mixer from input to output projection. The peer of the mixer is `mamba_split_conv1d_scan_combined` of mamba_ssm (which
needs causal_conv1d) between two products, and its floor the time of the products alone.

With --op ssd_step or mamba2_step one row for each batch of a 2.7B layer, one token of decoding, states in place:

* ours, xla, peer (`selective_state_update`, for ssd_step only), floor: as above, and the caches do not count: each call
  takes the next of several states, 84 MB or more together;
* loop: the same by the clock, of a compiled loop over tokens that owns its states, gaps between kernels and all.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import pallas_kernels as pk
from pallas_kernels.specs import SSDSpec

SHAPES = ("1x729", "8x729", "1x2048", "8x2048", "1x8192", "4x4096", "1x32768", "1x131072")
LARGE = 4e9  # bytes
LONGEST_CHECKED = 8192  # tokens; the recurrence takes one step at a time
BATCHES = (1, 8, 64, 256)
COLUMNS = ("op", "shape", "dtype", "ours", "xla", "peer", "floor", "% of floor", "memory", "error")
STEP_COLUMNS = ("op", "shape", "state", "ours", "xla", "peer", "floor", "% of floor", "error", "loop ours", "loop xla")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--op", nargs="*", default=["ssd"], choices=[*SEQUENCE_ROWS, *STATES])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="batch x tokens: 8x2048")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="of the steps")
    parser.add_argument("--state", default="float32", help="dtype of the state of the steps: float32 or bfloat16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="pallas_gpu", help="ours (default pallas_gpu)")
    parser.add_argument("--without", nargs="*", default=[], choices=["xla", "peer", "error"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-kernels.json"))
    args = parser.parse_args()

    copy = copy_bandwidth()
    rows = []
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, copies at {copy / 1e12:.2f} TB/s. Milliseconds:")
    for op in (op for op in args.op if op in SEQUENCE_ROWS):
        print_row(COLUMNS)
        for shape in args.shapes:
            b, l = map(int, shape.split("x"))  # noqa: E741, the axis letter
            spec = SSDSpec(b=b, l=l, dtype=args.dtype)
            for row in SEQUENCE_ROWS[op](spec, args.implementation, args.without, copy):
                rows.append(row)
                print_row([row.get(name) for name in COLUMNS])
    for op in (op for op in args.op if op in STATES):
        print_row(STEP_COLUMNS)
        for batch in args.batches:
            spec = SSDSpec(b=batch, l=1, dtype=args.dtype)
            rows.append(step_row(op, spec, args.state, args.implementation, args.without, copy))
            print_row([rows[-1][name] for name in STEP_COLUMNS])
    result = {
        "benchmark": "kernels",
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "copy_TB_per_s": round(copy / 1e12, 3),
        "unit": "ms",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def ssd_row(spec: SSDSpec, implementation: str, without: list[str], copy: float) -> Iterator[dict]:
    arrays = ssd_inputs(spec)
    ours = functools.partial(pk.ssd, dt_softplus=True, implementation=implementation)
    xla = functools.partial(pk.ssd, dt_softplus=True, implementation="xla")
    floor = 1e3 * ssd_bytes(spec) / copy
    milliseconds_ours = milliseconds(ours, arrays)
    checked = "error" not in without and spec.l <= LONGEST_CHECKED
    yield {
        "op": "ssd",
        "shape": f"{spec.b}x{spec.l}x{spec.h}x{spec.p} n{spec.n} g{spec.g}",
        "dtype": spec.dtype,
        "ours": milliseconds_ours,
        "xla": None if "xla" in without else milliseconds(xla, arrays),
        "peer": None if "peer" in without else peer_milliseconds(arrays),
        "floor": floor,
        "% of floor": round(100 * floor / milliseconds_ours),
        "memory": megabytes(ours, arrays),
        "error": ssd_error(ours, arrays) if checked else None,
    }


def row_of(op, spec: SSDSpec, function, arrays: dict, moved: int, peer, implementation, without, copy) -> dict:
    """A row for `function(implementation, **arrays)`, which moves `moved` bytes at least."""
    ours, xla = (functools.partial(function, name) for name in (implementation, "xla"))
    milliseconds_ours = milliseconds(ours, arrays)
    floor = 1e3 * moved / copy
    return {
        "op": op,
        "shape": f"{spec.b}x{spec.l}x{spec.h}x{spec.p} n{spec.n} g{spec.g}",
        "dtype": spec.dtype,
        "ours": milliseconds_ours,
        "xla": None if "xla" in without else milliseconds(xla, arrays),
        "peer": None if "peer" in without or peer is None else peer(),
        "floor": floor,
        "% of floor": round(100 * floor / milliseconds_ours),
        "memory": megabytes(ours, arrays),
    }


def gradient_row(op, spec: SSDSpec, function, arrays: dict, moved: int, peer, *options) -> dict:
    """`row_of` the function and its gradients together."""
    dy = jax.eval_shape(functools.partial(function, "xla"), **arrays)
    dy = jax.random.normal(jax.random.key(1), dy.shape, dy.dtype)

    def forward_and_backward(implementation, dy, **arrays):
        y, pullback = jax.vjp(lambda arrays: function(implementation, **arrays), arrays)
        return y, pullback(dy)

    return row_of(f"{op}_gradient", spec, forward_and_backward, arrays | {"dy": dy}, moved, peer, *options)


def ssd_gradient_row(spec: SSDSpec, *options) -> Iterator[dict]:
    def ssd(implementation, **arrays):
        return pk.ssd(**arrays, dt_softplus=True, implementation=implementation)

    arrays = ssd_inputs(spec)
    # x, dt, B and C read and y written forward; these and dy read, and the gradients written, backward.
    moved = 3 * ssd_bytes(spec) - arrays["x"].nbytes
    yield gradient_row(
        "ssd", spec, ssd, arrays, moved, functools.partial(peer_milliseconds, arrays, backward=True), *options
    )


def conv_rows(spec: SSDSpec, *options) -> Iterator[dict]:
    def conv(implementation, **arrays):
        return pk.causal_conv1d(**arrays, activation="silu", implementation=implementation)

    mixer = mixer_inputs(spec, "float32")
    x = jax.random.normal(jax.random.key(3), (spec.b, spec.l, spec.sizes.channels), spec.dtype)
    arrays = {"x": x, "weight": mixer["conv_weight"], "bias": mixer["conv_bias"]}
    yield row_of("causal_conv1d", spec, conv, arrays, 2 * x.nbytes, None, *options)
    yield gradient_row("causal_conv1d", spec, conv, arrays, 5 * x.nbytes, None, *options)


def norm_rows(spec: SSDSpec, *options) -> Iterator[dict]:
    def norm(implementation, **arrays):
        return pk.gated_rms_norm(**arrays, eps=1e-5, implementation=implementation)

    shape = (spec.b, spec.l, spec.sizes.inner)
    x, z = (jax.random.normal(jax.random.key(seed), shape, spec.dtype) for seed in (3, 4))
    arrays = {"x": x, "z": z, "weight": jnp.ones(spec.sizes.inner)}
    yield row_of("gated_rms_norm", spec, norm, arrays, 3 * x.nbytes, None, *options)
    yield gradient_row("gated_rms_norm", spec, norm, arrays, 8 * x.nbytes, None, *options)


def mixer_rows(spec: SSDSpec, implementation: str, without: list[str], copy: float) -> Iterator[dict]:
    sizes = spec.sizes
    width = sizes.inner // 2

    def mixer(implementation, u, in_proj, out_proj, **arrays):
        y = pk.mamba2_sequence(u @ in_proj, **arrays, groups=sizes.groups, implementation=implementation)
        return y @ out_proj

    arrays = {name: a for name, a in mixer_inputs(spec, "float32").items() if "state" not in name and name != "zxbcdt"}
    keys = jax.random.split(jax.random.key(5), 3)
    for name, key, shape in zip(
        ("u", "in_proj", "out_proj"),
        keys,
        ((spec.b, spec.l, width), (width, sizes.projected), (sizes.inner, width)),
        strict=True,
    ):
        arrays[name] = (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(spec.dtype)
    products = 2 * spec.b * spec.l * width * (sizes.projected + sizes.inner)
    moved = int(products / DENSE_PEAK * copy)  # bytes that take as long as the products: they are the floor of a mixer
    options = (implementation, without, copy)
    forward, both = (
        functools.partial(peer_mixer_milliseconds, arrays, backward=backward) for backward in (False, True)
    )
    yield row_of("mixer", spec, mixer, arrays, moved, forward, *options)
    yield gradient_row("mixer", spec, mixer, arrays, 3 * moved, both, *options)


DENSE_PEAK = 989e12  # floating-point operations per second of an H100 or H200 in bfloat16, NVIDIA's data sheet

SEQUENCE_ROWS = {
    "ssd": ssd_row,
    "ssd_gradient": ssd_gradient_row,
    "causal_conv1d": conv_rows,
    "gated_rms_norm": norm_rows,
    "mixer": mixer_rows,
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
    if sum(a.nbytes for a in jax.tree.leaves(arrays)) > LARGE:  # the results of all repetitions are kept
        repetitions = 2
    try:
        times = profiler.measure(lambda arrays: run(**arrays), iterations=repetitions)(arrays)[1]
    except RuntimeError:
        times = []
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            jax.block_until_ready(run(**arrays))
            times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def megabytes(function, arrays: dict[str, jax.Array]) -> float:
    """Memory of the compiled call besides its inputs and outputs."""
    compiled = jax.jit(function).lower(**arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a large elementwise operation."""
    a = jnp.zeros(2**29, jnp.bfloat16)
    return 2 * a.nbytes / (1e-3 * milliseconds(lambda a: a + 1, {"a": a}))


def peer_milliseconds(arrays: dict[str, jax.Array], backward: bool = False) -> float | None:
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
    differentiated = [a.requires_grad_(backward) for a in tensors.values()]
    x, dt, A, B, C = (tensors.pop(name) for name in ("x", "dt", "A", "B", "C"))
    dy = torch.randn_like(x)

    def call():
        with torch.set_grad_enabled(backward):
            y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, dt_softplus=True, **tensors)
            return torch.autograd.grad(y, differentiated, dy) if backward else y

    return graph_milliseconds(call, calls=5 if backward else 10)


def peer_mixer_milliseconds(arrays: dict[str, jax.Array], backward: bool) -> float | None:
    """The peer's mixer, forward or forward and backward, on inputs of the same shapes."""
    try:
        import torch
        from causal_conv1d import causal_conv1d_fn  # noqa: F401, the peer needs it
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    except ImportError:
        return None

    tensors = {
        name: torch.tensor(np.asarray(a, np.float32), device="cuda", dtype=getattr(torch, str(a.dtype)))
        for name, a in arrays.items()
    }
    for name in ("conv_weight", "conv_bias"):  # the peer takes them in the dtype of its activations
        tensors[name] = tensors[name].to(tensors["u"].dtype)
    for tensor in tensors.values():
        tensor.requires_grad_(backward)
    heads = arrays["A"].size
    head_dim = arrays["norm_weight"].size // heads
    dy = torch.randn_like(tensors["u"])

    def call():
        with torch.set_grad_enabled(backward):
            y = mamba_split_conv1d_scan_combined(
                tensors["u"] @ tensors["in_proj"],
                *(tensors[name] for name in ("conv_weight", "conv_bias", "dt_bias", "A", "D")),
                chunk_size=256,
                rmsnorm_weight=tensors["norm_weight"],
                rmsnorm_eps=1e-5,
                headdim=head_dim,
                norm_before_gate=False,
            )
            y = y @ tensors["out_proj"]
            return torch.autograd.grad(y, list(tensors.values()), dy) if backward else y

    return graph_milliseconds(call, calls=2)


def graph_milliseconds(call, calls: int = 10) -> float:
    """Median time of `call` in PyTorch, by replay of a CUDA graph of several."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(calls):
            call()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    del graph
    torch.cuda.empty_cache()
    return sorted(times)[7]


# One token.

STATES_TOGETHER = 168e6  # bytes, several times the cache


def step_row(op: str, spec: SSDSpec, state: str, implementation: str, without: list[str], copy: float) -> dict:
    arrays = step_inputs(spec, state) if op == "ssd_step" else mixer_inputs(spec, state)
    size = arrays["state" if op == "ssd_step" else "ssm_state"].nbytes
    copies = max(2, min(32, math.ceil(STATES_TOGETHER / size)))
    ours = functools.partial(getattr(pk, op), implementation=implementation)
    xla = functools.partial(getattr(pk, op), implementation="xla")
    if op == "ssd_step":
        ours, xla = (functools.partial(function, dt_softplus=True) for function in (ours, xla))
    moved = sum(a.nbytes for a in arrays.values()) + sum(arrays[name].nbytes for name in STATES[op])
    moved += spec.b * spec.h * spec.p * jnp.dtype(spec.dtype).itemsize  # y
    floor = 1e3 * moved / copy
    milliseconds_ours, loop_ours = step_milliseconds(ours, arrays, STATES[op], copies)
    milliseconds_xla, loop_xla = (
        (None, None) if "xla" in without else step_milliseconds(xla, arrays, STATES[op], copies)
    )
    peer = op == "ssd_step" and "peer" not in without
    return {
        "op": op,
        "shape": f"{spec.b}x{spec.h}x{spec.p} n{spec.n} g{spec.g}",
        "dtype": spec.dtype,
        "state": state,
        "ours": milliseconds_ours,
        "xla": milliseconds_xla,
        "peer": peer_step_milliseconds(arrays, copies) if peer else None,
        "floor": floor,
        "% of floor": round(100 * floor / milliseconds_ours),
        "error": None if "error" in without else step_error(op, ours, arrays),
        "loop ours": loop_ours,
        "loop xla": loop_xla,
    }


STATES = {"ssd_step": ("state",), "mamba2_step": ("conv_state", "ssm_state")}


def step_inputs(spec: SSDSpec, state: str) -> dict[str, jax.Array]:
    arrays = {name: a[:, 0] if a.ndim > 2 else a for name, a in ssd_inputs(spec).items()}
    shape = (spec.b, spec.h, spec.p, spec.n)
    return arrays | {"state": jax.random.normal(jax.random.key(1), shape, jnp.dtype(state))}


def mixer_inputs(spec: SSDSpec, state: str, width: int = 4) -> dict[str, jax.Array]:
    step = step_inputs(spec, state)
    sizes = spec.sizes
    normal = jax.random.normal
    keys = jax.random.split(jax.random.key(2), 4)
    return {
        "conv_state": normal(keys[0], (spec.b, width - 1, sizes.channels), spec.dtype),
        "ssm_state": step["state"],
        "zxbcdt": normal(keys[1], (spec.b, sizes.projected), spec.dtype),
        "conv_weight": 0.3 * normal(keys[2], (sizes.channels, width)),
        "conv_bias": 0.3 * normal(keys[3], (sizes.channels,)),
        "norm_weight": jnp.ones(sizes.inner),
    } | {name: step[name] for name in ("A", "D", "dt_bias")}


def step_milliseconds(function, arrays: dict, states: tuple[str, ...], copies: int) -> tuple[float, float]:
    """(by the sum of the GPU kernels, by the clock in a loop) for one call, over `copies` sets of states."""
    function = jax.jit(function)  # traced once for all copies
    rest = {name: a for name, a in arrays.items() if name not in states}

    def fresh():
        return [tuple(arrays[name] + 0 for name in states) for _ in range(copies)]

    def token(sets):
        outputs = [function(**dict(zip(states, one, strict=True)), **rest) for one in sets]
        return [y for y, *_ in outputs], [tuple(new) for _, *new in outputs]

    by_kernels = milliseconds(token, {"sets": fresh()}) / copies
    tokens = math.ceil(200 / copies)

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(sets):
        y, _ = jax.eval_shape(token, sets)
        start = ([jnp.zeros(a.shape, a.dtype) for a in y], sets)
        return jax.lax.fori_loop(0, tokens, lambda i, carry: token(carry[1]), start)

    sets, times = fresh(), []
    for _ in range(6):
        jax.block_until_ready(sets)
        started = time.perf_counter()
        _, sets = jax.block_until_ready(decode(sets))
        times.append(1e3 * (time.perf_counter() - started) / (tokens * copies))
    return by_kernels, sorted(times)[len(times) // 2]


def step_error(op: str, function, arrays: dict[str, jax.Array]) -> float:
    """Of y, over the first row of the batch, against the definition in float64."""
    batched = {"state", "conv_state", "ssm_state", "zxbcdt", "x", "dt", "B", "C"}
    first = {name: a[:1] if name in batched else a for name, a in arrays.items()}
    actual = np.asarray(jax.jit(function)(**arrays)[0], np.float64)[:1]
    with jax.enable_x64(True):
        options = {"dt_softplus": True} if op == "ssd_step" else {}
        reference = functools.partial(getattr(pk, op), implementation="reference", **options)
        truth = np.asarray(
            jax.jit(reference)(**{n: jnp.asarray(np.asarray(a, np.float64)) for n, a in first.items()})[0]
        )
    return float(np.linalg.norm(actual - truth) / np.linalg.norm(truth))


def peer_step_milliseconds(arrays: dict[str, jax.Array], copies: int) -> float | None:
    """The peer on `copies` states in turn, by replay of a CUDA graph, for one of them."""
    try:
        import torch
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        return None
    tensors = {
        name: torch.tensor(np.asarray(a, np.float32), device="cuda", dtype=getattr(torch, str(a.dtype)))
        for name, a in arrays.items()
    }
    head_dim, state_size = arrays["state"].shape[2:]
    states = [tensors["state"].clone() for _ in range(copies)]
    dt = tensors["dt"][..., None].expand(-1, -1, head_dim)  # strides of 0 select the peer's path for Mamba-2
    A = tensors["A"][:, None, None].expand(-1, head_dim, state_size)
    bias, D = (tensors[name][:, None].expand(-1, head_dim) for name in ("dt_bias", "D"))

    def call():
        for state in states:
            selective_state_update(
                state, tensors["x"], dt, A, tensors["B"], tensors["C"], D, dt_bias=bias, dt_softplus=True
            )

    return graph_milliseconds(call, calls=max(1, 16 // copies)) / copies


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
    widths = (23, 22, 9, 7, 7, 7, 7, 11, 8, 10, 8)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)), flush=True)


if __name__ == "__main__":
    main()
