"""Does the converted model compute what the PyTorch model computes? Both run on the same random inputs, on the CPU in float32."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ml_mamba_jax.convert import torch_forward
from ml_mamba_jax.convert.report import table
from ml_mamba_jax.convert.source import Source, missing_encoders
from ml_mamba_jax.errors import ConvertError
from ml_mamba_jax.model import MLMamba

N_TOKENS = 128
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest difference as a part of the largest absolute value, by the dtype in which parameters are kept."""


class Comparison(NamedTuple):
    """One output of both models. `top1` (part of the positions with the same likeliest token) and `kl` are for logits only."""

    what: str
    max_difference: float
    mean_difference: float
    largest: float
    """The largest absolute value of PyTorch's."""
    top1: float | None = None
    kl: float | None = None
    """Mean Kullback-Leibler divergence in nats, from PyTorch's to ours."""


def compare(
    source: Source, params: Mapping[str, np.ndarray], seed: int = 0, as_dtype: str | None = None
) -> list[Comparison]:
    """Run the PyTorch model and ours, part by part and as a whole.

    Tensors are read from the source layer by layer; besides the parameters only one layer of the PyTorch model is in memory, or one
    encoder of transformers.

    Args:
        as_dtype: of the tensors, where the parameters were rounded to write them.

    Raises:
        ConvertError: an output that differs by more than `TOLERANCE`.
    """
    import torch

    def read(key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(source.read(key), np.float32))

    config = source.config
    model = MLMamba(config.replace(dtype="float32"))
    variables = {"params": jax.device_put(unflatten_dict(dict(params), sep="/"), jax.devices("cpu")[0], may_alias=True)}
    rng = np.random.default_rng(seed)
    comparisons = []

    def ours(method: str, *args, **kwargs) -> np.ndarray:
        run = jax.jit(lambda v, *a, **k: model.apply(v, *a, method=method, **k))
        return np.asarray(run(variables, *args, **kwargs))

    with torch.no_grad():
        images = {
            encoder.name: rng.standard_normal((1, encoder.image_size, encoder.image_size, 3)).astype(np.float32)
            for encoder in config.vision
        }
        has_encoders = bool(config.vision) and not missing_encoders(source)
        features = visual = None
        if has_encoders:
            features = torch.cat(
                [_features(source, read, encoder, images[encoder.name]) for encoder in config.vision], -1
            )
            comparisons.append(_differences("features", features.numpy(), ours("features", images)))
        if config.connector:
            if features is None:  # the encoders were not given
                width = sum(encoder.width for encoder in config.vision)
                features = torch.from_numpy(
                    rng.standard_normal((1, config.vision[0].n_patches, width)).astype(np.float32)
                )
            visual = torch_forward.visual_tokens(read, config.connector, features, config.grid)
            mine = ours("connect", jnp.asarray(features.numpy()))
            comparisons.append(_differences("visual tokens", visual.numpy(), mine))
        if config.language:
            tokens = rng.integers(0, config.language.vocab_size, (1, N_TOKENS))
            x = read(source.embedding)[torch.from_numpy(tokens)]
            logits = torch_forward.language_logits(read, config.language, x, source.embedding)
            mine = ours("__call__", jnp.asarray(tokens, jnp.int32))
            comparisons.append(_differences("logits", logits.numpy(), mine, is_logits=True))
            if has_encoders:
                x = torch.cat([visual, x], dim=1)
                logits = torch_forward.language_logits(read, config.language, x, source.embedding)
                mine = ours("__call__", jnp.asarray(tokens, jnp.int32), images=images)
                comparisons.append(_differences("logits with image", logits.numpy(), mine, is_logits=True))
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in (config.param_dtype, as_dtype or ""))
    if wrong := [c for c in comparisons if not c.max_difference <= tolerance * c.largest]:
        raise ConvertError(
            f"{source.path}: {wrong[0].what} differ by {wrong[0].max_difference:.2e}, expected at most {tolerance:.0e} of "
            f"{wrong[0].largest:.2e}\n{as_table(comparisons)}"
        )
    return comparisons


def as_table(comparisons: list[Comparison]) -> str:
    rows = [("output", "max difference", "mean difference", "largest value", "top-1", "KL")]
    for c in comparisons:
        numbers = [f"{value:.2e}" for value in (c.max_difference, c.mean_difference, c.largest)]
        of_logits = ["", ""] if c.kl is None else [f"{c.top1:.1%}", f"{c.kl:.1e}"]
        rows.append((c.what, *numbers, *of_logits))
    return table(rows)


def _features(source: Source, read, encoder, pixels: np.ndarray):
    """PyTorch's features of normalised pixels [b y x 3]."""
    import torch

    kind, prefix = source.encoders[encoder.name]
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if kind == "timm-vit":
        return torch_forward.timm_features(read, encoder, channels_first, prefix=prefix)
    return torch_forward.hf_features(kind, read, encoder, channels_first, prefix=prefix)


def _differences(what: str, theirs: np.ndarray, ours: np.ndarray, *, is_logits: bool = False) -> Comparison:
    ours = ours[..., : theirs.shape[-1]]  # an embedding without rows for the padding gives fewer logits
    difference = np.abs(theirs - ours)
    numbers = (float(difference.max()), float(difference.mean()), float(np.abs(theirs).max()))
    if not is_logits:
        return Comparison(what, *numbers)
    top1 = float(np.mean(theirs.argmax(-1) == ours.argmax(-1)))
    p, q = (_log_softmax(a.astype(np.float64)) for a in (theirs, ours))
    return Comparison(what, *numbers, top1, float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
