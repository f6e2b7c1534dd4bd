"""How fast a language model reads prompts and writes tokens: python benchmarks/decode.py [--model NAME]

Random weights in bfloat16, random prompts, all by the clock, warm, with the largest memory so far in GB:

* decode: tokens per second of all rows together, --new tokens after a prompt of --prompt tokens, in one loop on the device;
* int8: the same with the projections in 8 bits, for each of --int8; its peer is that of bfloat16;
* answer, with --answer NAME: a whole ML-Mamba of that name, --new tokens about one image and a short question, with the time
  that encoding the image and reading the question take;
* prefill: tokens of a prompt per second, for each of --prefill as batch x tokens;
* peer: the same of mamba_ssm's `MambaLMHeadModel` of the 2.7b shape (`generate(cg=True)`: CUDA graphs), with --peer;
* bound: decode at the speed at which the device copies all weights and states once a token, prefill at its dense peak.

With --long N one row writes N tokens instead, and it is seen that neither memory nor the time of a token grow. With --kernels N
it is the N kernels of the GPU that take longest while each of --batches is decoded, in microseconds of a token.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections import Counter
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from ml_mamba_jax.compilation import compile_time
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.decoding import Decoding, bucket, read, write, write_in_place
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.quantization import quantize
from ml_mamba_jax.sampling import Sampling

DENSE_PEAK = 989e12  # floating-point operations per second of an H100 or H200 in bfloat16, NVIDIA's data sheet
BLOCK = 1000  # tokens between two looks of --long
COLUMNS = ("what", "batch", "tokens", "tokens/s", "bound", "% of bound", "peer", "ratio", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="2.7b", help="name of the model (default 2.7b)")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64], help="of decode")
    parser.add_argument("--prompt", type=int, default=800)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--int8", nargs="*", type=int, default=[1], help="batches of decode with 8 bits")
    parser.add_argument("--answer", metavar="NAME", help="a whole ML-Mamba, such as ml-mamba-3b")
    parser.add_argument("--prefill", nargs="*", default=["1x2048", "8x2048"], help="batch x tokens")
    parser.add_argument("--peer", action="store_true", help="time mamba_ssm as well")
    parser.add_argument("--long", type=int, metavar="N", help="only write N tokens")
    parser.add_argument("--kernels", type=int, metavar="N", help="only show where a token's time goes on the GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-decode.json"))
    args = parser.parse_args()

    config = MLMambaConfig.named(args.model)
    model = MLMamba(config.replace(vision=(), connector=None, param_dtype=config.dtype))
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    copy = copy_bandwidth()
    print(f"{args.model} on {jax.devices()[0].device_kind}, JAX {jax.__version__}, copies at {copy / 1e12:.3g} TB/s")
    if args.long:
        rows = [long_row(model, params, args.long)]
    elif args.kernels:
        rows = [row for batch in args.batches for row in kernel_rows(model, params, batch, args.kernels)]
    else:
        peer = Peer() if args.peer else None
        print_row(COLUMNS)
        rows = []

        def add(row: dict) -> None:
            rows.append(row)
            print_row([row[name] for name in COLUMNS])

        for batch in args.batches:
            add(decode_row("decode", model, params, batch, args.prompt, args.new, copy, peer))
        for shape in args.prefill:
            add(prefill_row(model, params, *map(int, shape.split("x")), peer))
        if args.int8:
            params = quantize(params, donate=True)
        for batch in args.int8:
            add(decode_row("int8", model, params, batch, args.prompt, args.new, copy, peer))
        if args.answer:
            del params
            add(answer_row(MLMambaConfig.named(args.answer), args.new, copy))
    result = {
        "benchmark": "decode",
        "model": args.model,
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "copy_TB_per_s": round(copy / 1e12, 3),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def prompt(batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Random tokens, padded to a bucket, and the lengths."""
    tokens = jax.random.randint(jax.random.key(1), (batch, bucket(length)), 1, 500)
    return tokens, jnp.full(batch, length)


def options(model: MLMamba, capacity: int) -> dict:
    return {
        "capacity": capacity,
        "sampling": Sampling(),
        "stop_ids": (),
        "vocab_size": model.config.language.vocab_size,
    }


def decode_row(what: str, model, params, batch: int, length: int, new: int, copy: float, peer) -> dict:
    decoding = read(model, params, *prompt(batch, length))
    seconds = timed(lambda: write(model, params, decoding, jax.random.key(0), new, **options(model, new)))
    theirs = peer.decode(batch, length, new) if peer else None
    return row(what, batch, new, batch * new / seconds, decode_bound(params, decoding, copy), theirs)


def decode_bound(params: dict, decoding: Decoding, copy: float) -> float:
    """Tokens per second where nothing is moved but weights and states; of the embeddings a token needs one row."""
    read_whole = {
        name: a for name, a in params["language"].items() if name != "embedding" or "head" not in params["language"]
    }
    weights = sum(a.nbytes for a in jax.tree.leaves(read_whole))
    states = sum(a.nbytes for a in decoding.state)
    return decoding.finished.size * copy / (weights + 2 * states)


def answer_row(config: MLMambaConfig, new: int, copy: float) -> dict:
    model = MLMamba(config.replace(param_dtype=config.dtype))
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.dummy_inputs())["params"])()
    images, question = model.dummy_inputs()["images"], prompt(1, 24)

    def answer():
        decoding = read(model, params, *question, images)
        return write(model, params, decoding, jax.random.key(0), new, donate=True, **options(model, new))

    bound = decode_bound(params, read(model, params, *question, images), copy)
    return row("answer", 1, new, new / timed(answer), bound, None)


def prefill_row(model, params, batch: int, length: int, peer) -> dict:
    tokens = prompt(batch, length)
    seconds = timed(lambda: read(model, params, *tokens))
    bound = DENSE_PEAK / (2 * sum(a.size for a in jax.tree.leaves(params)))
    theirs = peer.prefill(batch, length) if peer else None
    return row("prefill", batch, length, batch * length / seconds, bound, theirs)


def row(what: str, batch: int, tokens: int, rate: float, bound: float, theirs: float | None) -> dict:
    statistics_of_memory = jax.devices()[0].memory_stats() or {}
    return {
        "what": what,
        "batch": batch,
        "tokens": tokens,
        "tokens/s": rate,
        "bound": bound,
        "% of bound": round(100 * rate / bound),
        "peer": theirs,
        "ratio": rate / theirs if theirs else None,
        "memory": statistics_of_memory.get("peak_bytes_in_use", 0) / 1e9 or None,
    }


def long_row(model, params, total: int) -> dict:
    """Blocks of tokens one after the other, each from where the last one ended."""
    decoding: Decoding = read(model, params, *prompt(1, 32))
    times, buffers, memory = [], [], []
    compiled = None  # seconds, up to the end of the first block
    with compile_time() as compiling:
        for block in range(-(-total // BLOCK) + 1):  # the first compiles
            started = time.perf_counter()
            *_, decoding = write_in_place(
                model, params, decoding, jax.random.key(0), BLOCK, **options(model, bucket(BLOCK))
            )
            jax.block_until_ready(decoding)
            times.append(1e6 * (time.perf_counter() - started) / BLOCK)
            buffers.append(sum(a.nbytes for a in jax.live_arrays()))
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
            compiled = compiling.seconds if compiled is None else compiled
            if block % max(1, total // BLOCK // 10) == 0:
                print(
                    f"{block * BLOCK:>9,} tokens: {times[-1]:.0f} us each, {buffers[-1] / 1e6:.1f} MB in device buffers"
                )
    tenth = max(1, len(times) // 10)
    first, last = statistics.median(times[1 : 1 + tenth]), statistics.median(times[-tenth:])
    print(
        f"a token took {first:.0f} us at the start and {last:.0f} us at the end ({last / first - 1:+.1%}); device buffers "
        f"grew by {buffers[-1] - buffers[1]} bytes, memory of the process by {memory[-1] - memory[1]:.1f} MB; "
        f"{compiling.seconds - compiled:.2f} s of compiling after the first block"
    )
    return {
        "what": "long",
        "tokens": total,
        "us at the start": first,
        "us at the end": last,
        "device bytes grown": buffers[-1] - buffers[1],
        "process MB grown": memory[-1] - memory[1],
        "compiling s": compiling.seconds - compiled,
    }


def kernel_rows(model, params, batch: int, longest: int, new: int = 32) -> list[dict]:
    """The `longest` kernels of a token and how often each runs; before them all together, and a token by the clock."""
    decoding = read(model, params, *prompt(batch, 32))
    some = options(model, new)
    token = jax.jit(lambda params, decoding: write(model, params, decoding, jax.random.key(0), new, **some))
    by_the_clock = timed(lambda: token(params, decoding))
    counts, times = Counter(), Counter()
    for name, milliseconds in profiler.measure(token, aggregate=False)(params, decoding)[1]:
        counts[name] += 1
        times[name] += 1e3 * milliseconds / new
    rows = [("by the clock", None, 1e6 * by_the_clock / new), ("all kernels", counts.total() / new, times.total())]
    rows += [(name, counts[name] / new, us) for name, us in times.most_common(longest)]
    for name, count, us in rows:
        print(f"batch {batch}  {us:9.1f} us  {f'{count:7.1f} x' if count else ' ' * 9}  {name[:90]}", flush=True)
    return [{"what": name, "batch": batch, "a token": count, "us": us} for name, count, us in rows]


def timed(call, repetitions: int = 3) -> float:
    """Median seconds of a call that has run once before."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a large elementwise operation."""
    a = jnp.zeros(2**29 if jax.default_backend() == "gpu" else 2**25, jnp.bfloat16)
    copy = jax.jit(lambda a: a + 1)
    # Several, one behind the other: what starting one costs is no matter of memory.
    return 20 * a.nbytes / timed(lambda: [copy(a) for _ in range(10)])


class Peer:
    """mamba_ssm's language model of the 2.7b shape, random weights in bfloat16."""

    def __init__(self):
        import torch
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        config = MambaConfig(
            d_model=2560,
            n_layer=64,
            vocab_size=50277,
            ssm_cfg={"layer": "Mamba2"},
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
            pad_vocab_size_multiple=16,
        )
        self._torch, self._decode = torch, {}
        self._model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()

    def decode(self, batch: int, length: int, new: int) -> float:
        """Tokens per second, the time to the first token taken off; measured once."""
        if (batch, length, new) in self._decode:
            return self._decode[batch, length, new]
        ids = self._torch.randint(1, 500, (batch, length), device="cuda")

        def generate(count):
            self._model.generate(
                input_ids=ids, max_length=length + count, cg=True, return_dict_in_generate=True, top_k=1
            )

        seconds = self._timed(lambda: generate(new)) - self._timed(lambda: generate(1))
        return self._decode.setdefault((batch, length, new), batch * (new - 1) / seconds)

    def prefill(self, batch: int, length: int) -> float:
        ids = self._torch.randint(1, 500, (batch, length), device="cuda")
        with self._torch.inference_mode():
            return batch * length / self._timed(lambda: self._model(ids, num_last_tokens=1).logits)

    def _timed(self, call) -> float:
        times = []
        for _ in range(4):
            self._torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            self._torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    print("  ".join(cell.ljust(10) for cell in cells), flush=True)


if __name__ == "__main__":
    main()
