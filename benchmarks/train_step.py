"""How fast a model is trained: python benchmarks/train_step.py

Random weights and random tokens, by the clock, warm:

* language: loss and gradient of a language model (--language) over batch x tokens of --shape, parameters and computation in
  bfloat16, without an optimizer, for each of --remat;
* step: an optimizer step of the last stage of --recipe on one device (float32 parameters, bfloat16 computation, AdamW), with
  --rows rows of one image and --text tokens each, for each of --remat;
* peer, with --peer: loss and gradient of mamba_ssm's `MambaLMHeadModel` of the 2.7b shape, in bfloat16, eager.

Tokens are those that the language model reads, with the visual ones. MFU: floating-point operations of the model, without what
is computed twice, per second, over the dense peak. Memory in GB: arguments, results and temporary memory of the compiled
function; of the peer, the most that PyTorch held.

Prints a table and writes it, with versions and device, to --out as JSON.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import PRESETS
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.samples import Batch
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.sharding import make_mesh
from ml_mamba_jax.training.config import OptimConfig, StageConfig
from ml_mamba_jax.training.dry_run import abstract_batch
from ml_mamba_jax.training.flops import peak_flops, step_flops
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.optimizer import make_optimizer
from ml_mamba_jax.training.stages import split
from ml_mamba_jax.training.step import REMAT, first_state, init_params, make_train_step

COLUMNS = ("what", "remat", "batch", "tokens", "ms", "tokens/s", "MFU %", "memory", "peer", "ratio")
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--language", default="2.7b", help="name of a language model (default 2.7b)")
    parser.add_argument("--shape", default="8x2048", help="batch x tokens")
    parser.add_argument("--recipe", default="ml-mamba-3b", choices=sorted(PRESETS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--text", type=int, default=256)
    parser.add_argument("--remat", nargs="*", default=["none", "projections", "blocks"], choices=list(REMAT))
    parser.add_argument("--only", choices=["language", "step"])
    parser.add_argument("--peer", action="store_true", help="time mamba_ssm as well")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-train-step.json"))
    args = parser.parse_args()

    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print_row(COLUMNS)
    batch, tokens = map(int, args.shape.split("x"))
    rows = []

    def attempt(measure, what: str, remat: str, *arguments) -> None:
        """A row; what does not fit the device is said, and the others go on."""
        try:
            rows.append(measure(what, remat, *arguments))
            print_row([rows[-1][name] for name in COLUMNS])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{what}, remat {remat}: does not fit the device", flush=True)

    theirs = peer(batch, tokens) if args.peer else None
    for what, measure, arguments in (
        ("language", language_row, (MLMambaConfig.named(args.language), batch, tokens, theirs)),
        ("step", step_row, (args.recipe, args.rows, args.text)),
    ):
        for remat in args.remat:
            if args.only in (None, what):
                attempt(measure, what, remat, *arguments)
    result = {
        "benchmark": "train_step",
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "language": args.language,
        "recipe": args.recipe,
        "peer": theirs,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def language_row(what: str, remat: str, config: MLMambaConfig, batch: int, tokens: int, theirs: dict | None) -> dict:
    config = config.replace(vision=(), connector=None, param_dtype=config.dtype)
    model = MLMamba(config, remat=REMAT[remat])
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    function = jax.jit(lambda params, batch: mean_loss_and_gradient(model, params, batch)[:2])
    arguments = params, random_batch(StageConfig("language", batch_size=batch), config, tokens)
    compiled = function.lower(*arguments).compile()
    flops = step_flops(config, StageConfig("language", trains=("language",)), 0, batch * tokens)
    seconds = timed(lambda: compiled(*arguments))
    return row(what, remat, batch, tokens, seconds, flops, memory_of(compiled), theirs)


def step_row(what: str, remat: str, recipe: str, batch: int, text: int) -> dict:
    recipe = PRESETS[recipe]
    stage = dataclasses.replace(recipe.stages[-1], batch_size=batch, micro_batches=1)
    mesh, model = make_mesh(devices=jax.devices()[:1]), MLMamba(recipe.model, remat=REMAT[remat])
    optimizer = make_optimizer(OptimConfig(), model, 1000)
    trained, frozen = split(init_params(model, mesh, 0), stage)
    state, images = first_state(optimizer, trained, mesh), random_batch(stage, recipe.model, text)
    del trained
    step = make_train_step(model, optimizer, mesh, stage).lower(state, frozen, images).compile()

    def advance():
        nonlocal state
        state, metrics = step(state, frozen, images)
        return metrics

    seconds = timed(advance)
    visual = recipe.model.n_visual_tokens
    flops = step_flops(recipe.model, stage, batch, batch * text)
    return row(what, remat, batch, text + visual, seconds, flops, memory_of(step), None)


def random_batch(stage: StageConfig, config: MLMambaConfig, text: int) -> Batch:
    """Rows of random tokens, all of them targets, and random pixels."""
    data = dataclasses.replace(stage.data, batching="random", max_tokens=text)
    shapes = abstract_batch(dataclasses.replace(stage, data=data), config, make_mesh(devices=jax.devices()[:1]))

    def filled(a):
        if a.dtype == jnp.bool_:
            return jnp.ones(a.shape, a.dtype)
        return jax.random.randint(jax.random.key(0), a.shape, 0, 256).astype(a.dtype)

    return jax.tree.map(filled, shapes)._replace(lengths=jnp.full(stage.batch_size, text))


def row(what, remat, batch, tokens, seconds, flops, memory, theirs: dict | None) -> dict:
    peak = peak_flops(jax.devices()[0].device_kind)
    rate = batch * tokens / seconds
    return {
        "what": what,
        "remat": remat,
        "batch": batch,
        "tokens": tokens,
        "ms": 1e3 * seconds,
        "tokens/s": rate,
        "MFU %": None if peak is None else 100 * flops / seconds / peak,
        "memory": memory / 1e9,
        "peer": theirs and theirs["tokens/s"],
        "ratio": theirs and rate / theirs["tokens/s"],
    }


def memory_of(compiled) -> int:
    """Bytes; what takes the place of an argument counts once."""
    sizes = compiled.memory_analysis()
    whole = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return whole - sizes.alias_size_in_bytes


def timed(call) -> float:
    """Median seconds of a call that has run once before."""
    jax.block_until_ready(call())
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peer(batch: int, tokens: int) -> dict:
    """Tokens per second and GB."""
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
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    ids, times = torch.randint(1, 500, (batch, tokens), device="cuda"), []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        logits = model(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
        ).backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    held = torch.cuda.max_memory_allocated()
    del model, logits
    torch.cuda.empty_cache()
    return {"tokens/s": batch * tokens / statistics.median(times[2:]), "memory": held / 1e9}


def print_row(values) -> None:
    cells = ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    print("  ".join(cell.ljust(11) for cell in cells), flush=True)


if __name__ == "__main__":
    main()
