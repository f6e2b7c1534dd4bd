"""How fast images become patch features: python benchmarks/vision.py [--model NAME]

Random weights in bfloat16, random pixels, by the clock, warm: the encoders of --model up to their second-to-last blocks, for
each batch of --batches. Images per second, and the part of the dense peak that their products make of it.

* connected: the same with the connector, down to visual tokens;
* peer, with --peer: timm's DINOv2-L (four registers) and SigLIP-SO400M at 384 pixels in PyTorch with `torch.compile`.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import functools
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.flops import model_cost, peak_flops

COLUMNS = ("batch", "ms", "images/s", "% of peak", "connected ms", "peer ms", "ratio", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="ml-mamba-3b", help="name of the model (default ml-mamba-3b)")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--peer", action="store_true", help="time timm as well")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-vision.json"))
    args = parser.parse_args()

    config = MLMambaConfig.named(args.model)
    model = MLMamba(config.replace(param_dtype=config.dtype))
    key, seen = jax.random.key(0), pixels(config, 1)
    params = jax.jit(lambda: model.init(key, seen, method="encode_images")["params"])()  # no language model among them
    cost = model_cost(model.config)
    flops = (cost.encoders_first + cost.encoders).forward
    peak = peak_flops(jax.devices()[0].device_kind)
    print(f"{args.model} on {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print_row(COLUMNS)
    rows = []
    for batch in args.batches:
        images = pixels(model.config, batch)
        seconds, connected = (timed(applied(model, method), params, images) for method in ("features", "encode_images"))
        theirs = peer(batch) if args.peer else None
        rows.append(
            {
                "batch": batch,
                "ms": 1e3 * seconds,
                "images/s": batch / seconds,
                "% of peak": None if peak is None else round(100 * batch * flops / seconds / peak),
                "connected ms": 1e3 * connected,
                "peer ms": None if theirs is None else 1e3 * theirs,
                "ratio": None if theirs is None else theirs / seconds,
                "memory": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9 or None,
            }
        )
        print_row([rows[-1][name] for name in COLUMNS])
    result = {
        "benchmark": "vision",
        "model": args.model,
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def pixels(config: MLMambaConfig, batch: int) -> dict[str, jax.Array]:
    return {
        encoder.name: jax.random.randint(
            jax.random.key(i), (batch, encoder.image_size, encoder.image_size, 3), 0, 256
        ).astype(jnp.uint8)
        for i, encoder in enumerate(config.vision)
    }


def applied(model: MLMamba, method: str):
    return jax.jit(lambda params, images: model.apply({"params": params}, images, method=method))


def timed(call, *arguments, repetitions: int = 7) -> float:
    """Median seconds of a call that has run once before."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@functools.cache
def towers():
    import timm
    import torch

    names = ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_384")
    models = [timm.create_model(name, num_classes=0, img_size=384).cuda().to(torch.bfloat16).eval() for name in names]

    def features(x):
        found = [
            model.get_intermediate_layers(x, n={len(model.blocks) - 2})[0] for model in models
        ]  # of the second-to-last block
        return torch.cat(found, -1)

    return torch.compile(features)


def peer(batch: int) -> float:
    """Median seconds."""
    import torch

    x, times = torch.randn(batch, 3, 384, 384, device="cuda", dtype=torch.bfloat16), []
    with torch.inference_mode():
        for _ in range(10):
            torch.cuda.synchronize()
            started = time.perf_counter()
            towers()(x)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    print("  ".join(cell.ljust(12) for cell in cells), flush=True)


if __name__ == "__main__":
    main()
