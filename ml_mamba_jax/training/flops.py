"""Floating point operations of the model: what a step must compute, counted from the config.

Multiplications and additions of matrix products, convolutions, attention, and of the SSD as a recurrence, which is the least it
takes: 5 p n for each head and token (decay, outer product, sum, and a product with C). Norms, activations and other elementwise
work are left out, and so is what is computed twice to save memory: this is the numerator of a model FLOPs utilisation (MFU).
"""

import itertools
import math
from typing import NamedTuple

from ml_mamba_jax.config import ConnectorConfig, Mamba2Config, MixerConfig, MLMambaConfig, ViTConfig
from ml_mamba_jax.training.config import StageConfig


class Cost(NamedTuple):
    """Of a forward pass. `weights`: products of activations and parameters; `mixing`: of activations among themselves."""

    weights: int = 0
    mixing: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.weights + other.weights, self.mixing + other.mixing)

    def __mul__(self, n: int) -> "Cost":
        return Cost(self.weights * n, self.mixing * n)

    @property
    def forward(self) -> int:
        return self.weights + self.mixing

    def backward(self, trains: bool, passes: bool) -> int:
        """`trains`: the parameters have a gradient; `passes`: the input has one."""
        return self.weights * (trains + passes) + 2 * self.mixing * (trains or passes)


class ModelCost(NamedTuple):
    """Forward passes: of an image through the first layer that has parameters, and through the rest of a part; of a token."""

    encoders_first: Cost
    encoders: Cost
    connector_first: Cost
    connector: Cost
    language: Cost
    """Of one token, visual or text."""
    lora: Cost
    """Of one token through the low-rank additions to the language model."""
    head: Cost
    """The logits of one token."""

    @property
    def image(self) -> int:
        """FLOPs of an image's forward pass through encoders and connector."""
        return sum(cost.forward for cost in self[:4])

    @property
    def token(self) -> int:
        """FLOPs of a token's forward pass through the language model, with its logits."""
        return self.language.forward + self.lora.forward + self.head.forward


def model_cost(config: MLMambaConfig) -> ModelCost:
    encoders = [_encoder(encoder) for encoder in config.vision]
    first, rest = (sum(costs, Cost()) for costs in zip(*encoders, strict=True)) if encoders else (Cost(), Cost())
    connector = (Cost(), Cost())
    if config.connector:
        connector = _connector(config.connector, config.grid, sum(encoder.width for encoder in config.vision))
    language = config.language
    return ModelCost(first, rest, *connector, *(_language(language) if language else (Cost(),) * 3))


def step_flops(config: MLMambaConfig, stage: StageConfig, images: int, tokens: int) -> int:
    """FLOPs of an optimizer step over that many images and text tokens, without those for the update itself.

    The gradient passes through a frozen language model on its way to the connector, but never into frozen encoders.
    """
    cost = model_cost(config)
    vision, connector, language = (part in stage.trains for part in ("vision", "connector", "language"))
    below, lora = vision or connector, config.language is not None and config.language.lora is not None
    kernels, additions = language and not lora, language and lora
    n_all = tokens + images * config.n_visual_tokens
    terms = [
        (cost.encoders_first, images, vision, False),
        (cost.encoders, images, vision, vision),
        (cost.connector_first, images, connector, vision),
        (cost.connector, images, connector, below),
        (cost.language, n_all, kernels, language or below),
        (cost.lora, n_all, additions, language or below),
        (cost.head, tokens, kernels, True),
    ]
    return sum(n * (part.forward + part.backward(trains, passes)) for part, n, trains, passes in terms)


PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOP/s that the makers state, by the beginning of JAX's name of the device; the first that fits counts."""


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s in bfloat16 of `jax.Device.device_kind`, None where it is not known."""
    return next((peak for kind, peak in PEAK_BF16.items() if device_kind.startswith(kind)), None)


def _dense(tokens: int, *widths: int) -> Cost:
    """A chain of linear layers."""
    return Cost(weights=sum(2 * tokens * a * b for a, b in itertools.pairwise(widths)))


def _encoder(config: ViTConfig) -> tuple[Cost, Cost]:
    width, patches = config.width, config.n_patches
    tokens = patches + config.n_prefix_tokens
    block = (
        _dense(tokens, width, 3 * width) + _dense(tokens, width, width) + _dense(tokens, width, config.mlp_dim, width)
    )
    block += Cost(mixing=4 * tokens**2 * width)
    return _dense(patches, 3 * config.patch_size**2, width), block * (config.depth - 1)


def _scan(config: MixerConfig) -> Cost:
    """Convolution and SSD of one token in one direction."""
    inner, state = config.d_inner, config.d_state
    return Cost(weights=2 * config.conv_channels * config.d_conv, mixing=5 * inner * state + 2 * inner)


def _mixer(config: MixerConfig, directions: int = 1) -> Cost:
    """One token through projections and scans."""
    projections = _dense(1, config.d_model, config.in_proj_features) + _dense(1, config.d_inner, config.d_model)
    return projections + _scan(config) * directions


def _connector(config: ConnectorConfig, grid: tuple[int, int], features: int) -> tuple[Cost, Cost]:
    """An image: the layer that reads the features, and the rest."""
    tokens, d = math.prod(grid), config.mixer.d_model
    width = features if config.scan == "none" else d
    hidden = 4 * width
    widths = {
        "linear": (width, d),
        "gelu-mlp": (width, d, d),
        "fused-gelu-mlp": (width, hidden, d, d),
        "fused-ldpnet": (width, hidden, d),
    }[config.projector]
    first, rest = _dense(tokens, *widths[:2]), _dense(tokens, *widths[1:])
    if config.projector == "fused-ldpnet":
        (rows, columns), (out_rows, out_columns) = grid, config.pooled_grid
        rest += Cost(mixing=2 * d * out_rows * columns * (rows + out_columns))
        rest += Cost(weights=2 * 9 * d * out_rows * out_columns)
    if config.scan == "none":
        return first, rest
    block = _mixer(config.mixer, len(config.directions)) * tokens
    if config.scan == "advanced":
        block += _dense(tokens, d, d) * 3
    return _dense(tokens, features, d), block * config.n_layers + first + rest


def _language(config: Mamba2Config) -> tuple[Cost, Cost, Cost]:
    mixer, rank = config.mixer, config.lora_rank
    additions = _dense(1, mixer.d_model, rank, mixer.in_proj_features) + _dense(1, mixer.d_inner, rank, mixer.d_model)
    layers = config.n_layers
    return _mixer(mixer) * layers, additions * layers, _dense(1, mixer.d_model, config.padded_vocab_size)
