"""How far weights in 8 bits put the logits off: python benchmarks/quantization.py [--model NAME] [--checkpoint FOLDER]

Random weights of a named language model, or those of a checkpoint, on random tokens: the error of the logits as a part of their
standard deviation, how often the likeliest next token stays the same, and the bytes of the parameters before and after.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from ml_mamba_jax.checkpoint import load
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.quantization import logit_error, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="130m", help="name of the model (default 130m)")
    parser.add_argument("--checkpoint", type=Path, help="folder of a run or of converted weights instead")
    parser.add_argument("--dtype", default="bfloat16", help="to compute in, and of random weights (default bfloat16)")
    parser.add_argument("--tokens", type=int, default=128, help="of each of two prompts (default 128)")
    args = parser.parse_args()

    if args.checkpoint:
        model, params, _ = load(args.checkpoint)
        model = MLMamba(model.config.replace(dtype=args.dtype))
    else:
        config = MLMambaConfig.named(args.model)
        model = MLMamba(config.replace(vision=(), connector=None, dtype=args.dtype, param_dtype=args.dtype))
        params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    shape = (2, args.tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model.config.language.vocab_size)
    quantized = quantize(params)
    error = logit_error(model, params, quantized, tokens)
    before, after = (sum(a.nbytes for a in jax.tree.leaves(tree["language"])) / 1e6 for tree in (params, quantized))
    print(
        f"{args.checkpoint or args.model}, {args.dtype}, {jax.devices()[0].device_kind}, JAX {jax.__version__}: logits are off "
        f"by {error.relative:.2%} of their standard deviation, the likeliest of {tokens.size} tokens stays the same in "
        f"{error.same_choice:.1%}; parameters of the language model {before:.4g} MB -> {after:.4g} MB"
    )


if __name__ == "__main__":
    main()
