"""Low-rank additions to the language model (LoRA, arXiv 2106.09685), folded into its kernels: python -m ml_mamba_jax.lora RUN OUT

A model with `lora_rank` computes the additions beside its kernels, trains them alone, and generates with them. What is folded is
a model without them, for everything that knows no additions, as `convert_torch.py --to torch`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax import checkpoint
from ml_mamba_jax.arguments import OneLineParser
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError, one_line_errors
from ml_mamba_jax.layers import LORA_NAMES


def without(config: MLMambaConfig) -> MLMambaConfig:
    """The config of the model that `merge` gives parameters of."""
    language = config.language and dataclasses.replace(config.language, lora_rank=0)
    return config.replace(language=language)


def merge(params: dict, config: MLMambaConfig) -> tuple[dict, MLMambaConfig]:
    """Kernels with the additions in them, and the config of a model without; the sum is made in float32."""
    if config.language is None or config.language.lora is None:
        return params, config
    _, scale = config.language.lora
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b = (flat.pop((*path[:-1], name)).astype(jnp.float32) for name in LORA_NAMES)
        kernel = flat[(*path[:-1], "kernel")]
        summed = kernel.astype(jnp.float32) + scale * jnp.einsum("lir,lro->lio", a, b)
        flat[(*path[:-1], "kernel")] = summed.astype(kernel.dtype)
    return unflatten_dict(flat), without(config)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = OneLineParser(prog="python -m ml_mamba_jax.lora", description="Fold low-rank additions into the kernels.")
    parser.add_argument("run", type=Path, help="folder of a run with language.lora_rank")
    parser.add_argument("out", type=Path, help="folder to make")
    with one_line_errors():
        args = parser.parse_args(arguments)
        model, params, tokenizer = checkpoint.load(args.run)
        if model.config.language is None or model.config.language.lora is None:
            raise InputError(f"{args.run}: got a model without additions, expected language.lora_rank above 0")
        if args.out.exists():
            raise InputError(f"{args.out}: exists already; choose another folder")
        params, config = merge(params, model.config)
        checkpoint.save(args.out, 0, {checkpoint.PARAMS: params})
        checkpoint.write_model(args.out, config, tokenizer)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
