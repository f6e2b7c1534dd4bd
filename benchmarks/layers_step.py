"""Times a token through all layers of a language model, without embedding and head: python benchmarks/layers_step.py

One row for each batch and kind of projections, of the 2.7B shape in bfloat16 with states in float32, all by the clock, of
a compiled loop over tokens that owns its states:

* ours: `mamba2_layers_step` of pallas_gpu; in one launch, or for more rows in its loop over layers;
* layers: the loop over layers around `mamba2_step` of pallas_gpu, with --loop;
* xla: the loop over layers, all by XLA, with --xla;
* floor: every weight and every state read once and every state written once, at the speed this device copies at.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import functools
import json
import os
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels.mamba2_layers_step.by_layers import by_layers
from pallas_kernels.mamba2_step.sizes import Sizes

STATES = ("residual", "conv_state", "ssm_state")
COLUMNS = ("batch", "weights", "ours", "layers", "xla", "floor", "% of floor", "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--weights", nargs="*", default=["bfloat16", "int8"], choices=["bfloat16", "int8"])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--heads", type=int, default=80, help="of 64 channels each; the width is half of them together")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--implementation", default="pallas_gpu")
    parser.add_argument("--loop", action="store_true", help="time the loop over layers as well")
    parser.add_argument("--xla", action="store_true", help="time XLA as well")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-layers-step.json"))
    args = parser.parse_args()

    copy = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, copies at {copy / 1e12:.2f} TB/s. Milliseconds:")
    print_row(COLUMNS)
    sizes, rows = Sizes(args.heads, 64, 1, 128), []
    for kind in args.weights:
        weights = random_weights(args.layers, sizes, kind)
        for batch in args.batches:
            ours = functools.partial(pk.mamba2_layers_step, implementation=args.implementation)
            loop = by_layers(functools.partial(pk.mamba2_step, implementation=args.implementation))
            xla = functools.partial(pk.mamba2_layers_step, implementation="xla")
            time_of = functools.partial(milliseconds, weights, batch, args.layers, sizes, args.tokens)
            row = {
                "batch": batch,
                "weights": kind,
                "ours": time_of(ours),
                "layers": time_of(loop) if args.loop else None,
                "xla": time_of(xla) if args.xla else None,
                "floor": 1e3 * moved(weights, batch, args.layers, sizes) / copy,
            }
            row |= {
                "% of floor": round(100 * row["floor"] / row["ours"]),
                "tokens/s": 1e3 * batch / row["ours"],
            }
            rows.append(row)
            print_row([row[name] for name in COLUMNS])
    result = {
        "benchmark": "layers_step",
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


def random_weights(layers: int, sizes: Sizes, kind: str) -> dict[str, jax.Array]:
    inner, channels, heads = sizes.inner, sizes.channels, sizes.heads
    width = inner // 2
    keys = iter(jax.random.split(jax.random.key(0), 8))
    dtype = jnp.bfloat16

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    def projection(rows, columns):
        """Layer by layer: float32 random numbers of all at once would not fit."""
        one = jax.jit(lambda key: jax.random.normal(key, (rows, columns), dtype) * jnp.asarray(rows**-0.5, dtype))
        if kind == "int8":
            one = jax.jit(lambda key: jax.random.randint(key, (rows, columns), -127, 128, jnp.int8))
        return jax.lax.map(one, jax.random.split(next(keys), layers))

    weights = {
        "in_norm_weight": jnp.ones((layers, width), dtype),
        "in_proj": projection(width, sizes.projected),
        "conv_weight": 0.3 * normal(layers, channels, 4),
        "conv_bias": 0.3 * normal(layers, channels),
        "A": -jnp.ones((layers, heads)),
        "D": jnp.ones((layers, heads)),
        "dt_bias": jnp.full((layers, heads), -3.0),
        "norm_weight": jnp.ones((layers, inner), dtype),
        "out_proj": projection(inner, width),
    }
    if kind == "int8":
        for name in ("in_proj", "out_proj"):
            scale = weights[name].shape[1] ** -0.5 / 73  # the root of the mean square of these whole numbers
            weights[f"{name}_scale"] = jnp.full((layers, weights[name].shape[2]), scale)
    return weights


def random_states(batch: int, layers: int, sizes: Sizes) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "residual": jax.random.normal(keys[0], (batch, sizes.inner // 2)),
        "conv_state": jax.random.normal(keys[1], (layers, batch, 3, sizes.channels), jnp.bfloat16),
        "ssm_state": jax.random.normal(keys[2], (layers, batch, sizes.heads, sizes.head_dim, sizes.state)),
    }


def moved(weights: dict, batch: int, layers: int, sizes: Sizes) -> int:
    """Bytes."""
    states = jax.eval_shape(lambda: random_states(batch, layers, sizes))
    return sum(a.nbytes for a in weights.values()) + 2 * sum(a.size * a.dtype.itemsize for a in states.values())


def milliseconds(weights: dict, batch: int, layers: int, sizes: Sizes, tokens: int, step) -> float:
    @functools.partial(jax.jit, donate_argnums=0)
    def decode(states, weights):
        def token(_, states):
            return dict(zip(STATES, step(**states, **weights), strict=True))

        return jax.lax.fori_loop(0, tokens, token, states)

    states, times = random_states(batch, layers, sizes), []
    for _ in range(5):  # the first compiles
        jax.block_until_ready(states)
        started = time.perf_counter()
        states = jax.block_until_ready(decode(states, weights))
        times.append(1e3 * (time.perf_counter() - started) / tokens)
    return sorted(times[1:])[1]


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a large elementwise operation."""
    a = jnp.zeros(2**29 if jax.default_backend() == "gpu" else 2**25, jnp.bfloat16)
    copy, times = jax.jit(lambda a: a + 1), []
    for _ in range(5):  # the first compiles
        started = time.perf_counter()
        # Several, one behind the other: what starting one costs is no matter of memory.
        jax.block_until_ready([copy(a) for _ in range(10)])
        times.append(time.perf_counter() - started)
    return 20 * a.nbytes / sorted(times[1:])[1]


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    print("  ".join(cell.ljust(10) for cell in cells), flush=True)


if __name__ == "__main__":
    main()
