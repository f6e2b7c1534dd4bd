"""The architecture as frozen dataclasses, and the named sizes.

A config holds numbers and choices, no arrays: it is hashable, prints itself, and goes to JSON and back
(`ml_mamba_jax.serialize`). `MLMambaConfig.named("ml-mamba-3b")` is the released model; `"tiny"` differs from it by
numbers only.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ml_mamba_jax.names import unknown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class MixerConfig:
    """One Mamba-2 mixer: projections, causal convolution, SSD and gated norm (arXiv 2405.21060)."""

    d_model: int
    """Model width."""
    d_state: int = 128
    """State size n of each head."""
    d_conv: int = 4
    """Width of the causal convolution."""
    expand: int = 2
    """Inner width as a multiple of d_model."""
    head_dim: int = 64
    """Width p of a head."""
    n_groups: int = 1
    """Groups of heads that share B and C."""
    norm_eps: float = 1e-5
    """Epsilon of the gated RMS norm."""
    norm_before_gate: bool = False
    """Normalise before the gate instead of after it."""
    dt_range: tuple[float, float] = (1e-3, 0.1)
    """Initial step sizes are log-uniform in this range."""
    A_range: tuple[float, float] = (1.0, 16.0)
    """Initial decay rates -A are uniform in this range."""
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    """Step sizes are clipped to this range."""
    chunk_size: int | None = None
    """Tokens per chunk of the SSD; None lets the kernel choose. Changes results by rounding only."""

    def __post_init__(self):
        if self.d_inner % self.head_dim:
            raise ValueError(
                f"MixerConfig: got d_inner {self.d_inner}, expected a multiple of head_dim {self.head_dim}"
            )
        if self.n_heads % self.n_groups:
            raise ValueError(f"MixerConfig: got {self.n_heads} heads, expected a multiple of n_groups {self.n_groups}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of [x | B | C]."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def in_proj_features(self) -> int:
        """Features of [z | x | B | C | dt]."""
        return self.d_inner + self.conv_channels + self.n_heads


@dataclass(frozen=True)
class Mamba2Config:
    """A Mamba-2 language model: embedding, pre-norm residual blocks of one mixer each, final norm, head."""

    mixer: MixerConfig
    n_layers: int
    vocab_size: int = 50277
    """Entries of the tokenizer."""
    vocab_multiple: int = 16
    """The embedding has `padded_vocab_size` rows: vocab_size rounded up to a multiple of this."""
    embedding_std: float = 0.02
    """Standard deviation of the embedding's initial entries."""
    tie_embeddings: bool = True
    """The head is the transposed embedding."""
    norm_eps: float = 1e-5
    residual_in_float32: bool = True
    """Keep the residual stream in float32 whatever the compute dtype."""

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer that yields the patch features of its second-to-last block, without a final norm.

    `depth` counts the blocks of the published model; the last one is never run and has no parameters here.
    """

    name: str
    """Names its parameters and its entry in `images`."""
    image_size: int
    patch_size: int
    width: int
    depth: int
    n_heads: int
    mlp_dim: int
    class_token: bool = False
    n_registers: int = 0
    """Register tokens after the class token."""
    layer_scale: float | None = None
    """Initial value of a learnt scale on each residual branch; None for no scale."""
    norm_eps: float = 1e-6
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    """Pixels in [0, 1] are normalised as (pixel - mean) / std, channels RGB."""
    crop_fraction: float = 1.0
    """`resize-crop` and `letterbox` first scale the shorter side to floor(image_size / crop_fraction), then crop: 0.9 for
    clip-vit-b, 1.0 for all others."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns); pixels beyond the last whole patch are not seen."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ConnectorConfig:
    """The Mamba-2 Scan Connector: projection + GELU, scan blocks with SwiGLU, norm, MLP (arXiv 2407.19832, 3.3)."""

    mixer: MixerConfig
    n_layers: int = 2
    directions: tuple[str, ...] = ("rows", "rows_reversed")
    """Walks over the patch grid, names from `pallas_kernels.DIRECTIONS`. Default: the bidirectional scan (BSM)."""
    norm_eps: float = 1e-5


Resize = Literal["resize-naive", "resize-crop", "letterbox"]


@dataclass(frozen=True)
class MLMambaConfig:
    """Image encoders -> scan connector -> Mamba-2 language model. Without encoders: the language model alone."""

    language: Mamba2Config
    vision: tuple[ViTConfig, ...] = ()
    """Encoders whose patch features are concatenated along channels, in this order."""
    connector: ConnectorConfig | None = None
    resize: Resize = "resize-naive"
    """How an image becomes a square: squeezed, centre-cropped, or padded with each encoder's mean colour."""
    prompt_format: Literal["zephyr", "mamba", "pure"] = "zephyr"
    """How conversations are written as text, names from `ml_mamba_jax.prompt.FORMATS`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype. Parameters, step sizes, decays and states are float32 regardless."""

    def __post_init__(self):
        if bool(self.vision) != (self.connector is not None):
            raise ValueError("MLMambaConfig: got only one of vision and connector, expected both or neither")
        if self.vision:
            grids = {encoder.name: encoder.grid for encoder in self.vision}
            if len(set(grids.values())) > 1:
                raise ValueError(f"MLMambaConfig: got patch grids {grids}, expected the same grid for every encoder")
            if self.connector.mixer.d_model != self.language.mixer.d_model:
                raise ValueError(
                    f"MLMambaConfig: got connector width {self.connector.mixer.d_model}, "
                    f"expected the language model's {self.language.mixer.d_model}"
                )

    @property
    def grid(self) -> tuple[int, int] | None:
        """Visual tokens (rows, columns), or None without encoders."""
        return self.vision[0].grid if self.vision else None

    @property
    def n_visual_tokens(self) -> int:
        return self.vision[0].n_patches if self.vision else 0

    def replace(self, **changes) -> "MLMambaConfig":
        return dataclasses.replace(self, **changes)

    @classmethod
    def named(cls, name: str) -> "MLMambaConfig":
        """The config of that name (see `NAMED`). Raises ValueError with the nearest name for an unknown one."""
        if name not in NAMED:
            raise unknown("model", name, NAMED)
        return NAMED[name]


def _language_model(d_model: int, n_layers: int) -> Mamba2Config:
    """A state-spaces/mamba2-* model: all sizes share state 128, heads of 64 and the GPT-NeoX vocabulary."""
    return Mamba2Config(mixer=MixerConfig(d_model=d_model), n_layers=n_layers)


LANGUAGE_MODELS: dict[str, Mamba2Config] = {
    "mamba2-130m": _language_model(768, 24),
    "mamba2-370m": _language_model(1024, 48),
    "mamba2-780m": _language_model(1536, 48),
    "mamba2-1.3b": _language_model(2048, 48),
    "mamba2-2.7b": _language_model(2560, 64),
}

VISION_ENCODERS: dict[str, ViTConfig] = {
    # ViT-L/14 with 4 registers at 384 px: a 27 x 27 grid, the last 6 pixels of each side are not seen.
    "dinov2-vit-l-384px": ViTConfig(
        name="dinov2",
        image_size=384,
        patch_size=14,
        width=1024,
        depth=24,
        n_heads=16,
        mlp_dim=4096,
        class_token=True,
        n_registers=4,
        layer_scale=1e-5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "siglip-vit-so400m-384px": ViTConfig(
        name="siglip", image_size=384, patch_size=14, width=1152, depth=27, n_heads=16, mlp_dim=4304
    ),
}


def _ml_mamba_3b() -> MLMambaConfig:
    language = LANGUAGE_MODELS["mamba2-2.7b"]
    return MLMambaConfig(
        language=language,
        vision=(VISION_ENCODERS["dinov2-vit-l-384px"], VISION_ENCODERS["siglip-vit-so400m-384px"]),
        connector=ConnectorConfig(mixer=language.mixer),
        dtype="bfloat16",
    )


def _tiny() -> MLMambaConfig:
    """Every part of ml-mamba-3b at a size that two CPU cores train in minutes, for 32-pixel images.

    Steps are longer and decays slower than in the large models from the start: with few heads, those would hardly see the image
    through the question, and would take long to learn to.
    """
    big = _ml_mamba_3b()
    dinov2, siglip = big.vision
    mixer = MixerConfig(d_model=96, d_state=32, head_dim=32, dt_range=(0.02, 0.2), A_range=(0.1, 1.0))
    return MLMambaConfig(
        language=Mamba2Config(mixer=mixer, n_layers=2, vocab_size=512, embedding_std=0.1),
        vision=(
            dataclasses.replace(
                dinov2,
                image_size=32,
                patch_size=8,
                width=64,
                depth=3,
                n_heads=4,
                mlp_dim=256,
                n_registers=2,
                layer_scale=0.1,
            ),
            dataclasses.replace(siglip, image_size=32, patch_size=8, width=48, depth=3, n_heads=4, mlp_dim=192),
        ),
        connector=ConnectorConfig(mixer=mixer),
    )


NAMED: dict[str, MLMambaConfig] = {
    "tiny": _tiny(),
    "ml-mamba-3b": _ml_mamba_3b(),
    **{name: MLMambaConfig(language=model, dtype="bfloat16") for name, model in LANGUAGE_MODELS.items()},
}
NAMED |= {name.removeprefix("mamba2-"): NAMED[name] for name in LANGUAGE_MODELS}  # "130m" ... "2.7b"
