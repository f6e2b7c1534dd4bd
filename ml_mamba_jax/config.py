"""The architecture as frozen dataclasses, and the named sizes.

A config holds numbers and choices, no arrays: it is hashable, prints itself, and goes to JSON and back
(`ml_mamba_jax.serialize`). `MLMambaConfig.named("ml-mamba-3b")` is the released model; `"tiny"` differs from it by
numbers only.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ml_mamba_jax.names import unknown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

BIDIRECTIONAL_SCAN = ("rows", "rows_reversed")
"""BSM: the patches in reading order, and backwards."""
CROSS_SCAN = ("rows", "columns", "rows_reversed", "columns_reversed")
"""CSM: rows and columns, both ways; in the order of VMamba's cross scan (arXiv 2401.10166)."""


def _check_sizes(config: Any, least: int = 1, **least_of: int) -> None:
    """Raise ValueError for a whole number of `config` that is no size."""
    for field in dataclasses.fields(config):
        value, lowest = getattr(config, field.name), least_of.get(field.name, least)
        if type(value) is int and value < lowest:
            raise ValueError(f"{type(config).__name__}: got {field.name} {value}, expected at least {lowest}")


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
        _check_sizes(self)
        for name in ("dt_range", "A_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high < float("inf"):
                raise ValueError(f"MixerConfig: got {name} {low} to {high}, expected positive numbers in order")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"MixerConfig: got dt_limit {self.dt_limit}, expected two numbers in order, none negative")
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
    lora_rank: int = 0
    """Rank of what is added to the kernels of each mixer's projections (arXiv 2106.09685); 0 for nothing. A stage that trains
    the language model then trains the additions alone."""
    lora_alpha: float = 16.0
    """The additions are scaled by lora_alpha / lora_rank."""

    def __post_init__(self):
        _check_sizes(self, lora_rank=0)

    @property
    def lora(self) -> tuple[int, float] | None:
        """Rank and scale of the additions, None where there are none."""
        return (self.lora_rank, self.lora_alpha / self.lora_rank) if self.lora_rank else None

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
    class_position: bool = False
    """The class token has a position embedding of its own."""
    n_registers: int = 0
    """Register tokens after the class token."""
    pre_norm: bool = False
    """Normalise the embeddings before the first block; the patch projection then has no bias (CLIP)."""
    layer_scale: float | None = None
    """Initial value of a learnt scale on each residual branch; None for no scale."""
    norm_eps: float = 1e-6
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    """Pixels in [0, 1] are normalised as (pixel - mean) / std, channels RGB."""
    crop_fraction: float = 1.0
    """resize-crop and letterbox scale the shorter side to floor(image_size / crop_fraction) before they cut out the middle."""

    def __post_init__(self):
        _check_sizes(self, n_registers=0)
        if self.width % self.n_heads:
            raise ValueError(f"ViTConfig: got width {self.width}, expected a multiple of n_heads {self.n_heads}")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"ViTConfig: got image_size {self.image_size}, expected at least one patch of {self.patch_size}"
            )
        if self.class_position and not self.class_token:
            raise ValueError("ViTConfig: got class_position without class_token, expected both or neither")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns); pixels beyond the last whole patch are not seen."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_prefix_tokens(self) -> int:
        """The class token and the registers, in this order."""
        return int(self.class_token) + self.n_registers


Scan = Literal["none", "basic", "advanced", "vss-l2"]
Projector = Literal["linear", "gelu-mlp", "fused-gelu-mlp", "fused-ldpnet"]


@dataclass(frozen=True)
class ConnectorConfig:
    """From patch features to visual tokens: projection, scan blocks, norm, projector (arXiv 2407.19832, 3.3 and 4.4)."""

    mixer: MixerConfig
    """Of the scan blocks. Its width is that of the language model."""
    scan: Scan = "advanced"
    """The blocks:
    none      no projection, blocks or norm: the projector alone (the paper's MLP baseline)
    basic     x + mixer(rms_norm(x)), as in the language model (MSC without SwiGLU)
    advanced  x + mixer(x), then x + swiglu(layer_norm(x)) (MSC with SwiGLU: the released model)
    vss-l2    x + mixer(gelu(x)) after a projection without GELU (VL-Mamba, arXiv 2403.13600; with one layer and a linear projector)
    """
    n_layers: int = 2
    directions: tuple[str, ...] = BIDIRECTIONAL_SCAN
    """Walks over the patch grid, names from `pallas_kernels.DIRECTIONS`: BIDIRECTIONAL_SCAN, CROSS_SCAN or any others."""
    projector: Projector = "fused-gelu-mlp"
    """From the scan's width v to the language model's d, with exact GELUs:
    linear          v -> d
    gelu-mlp        v -> d -> d
    fused-gelu-mlp  v -> 4v -> d -> d
    fused-ldpnet    v -> 4v -> d, then pooled to `pooled_grid` and a depthwise 3 x 3 convolution is added (LDPv2)
    """
    pooled_grid: tuple[int, int] = (14, 14)
    """Visual tokens (rows, columns) of fused-ldpnet."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        _check_sizes(self)
        if not self.directions or len(set(self.directions) & set(CROSS_SCAN)) < len(self.directions):
            raise ValueError(
                f"ConnectorConfig: got directions {', '.join(self.directions) or 'none'}, expected different names from "
                f"{', '.join(CROSS_SCAN)}"
            )


Resize = Literal["resize-naive", "resize-crop", "letterbox"]


@dataclass(frozen=True)
class MLMambaConfig:
    """Image encoders -> scan connector -> Mamba-2 language model.

    Without encoders and connector it is a language model; without the other two, encoders that yield patch features.
    """

    language: Mamba2Config | None
    vision: tuple[ViTConfig, ...] = ()
    """Encoders whose patch features are concatenated along channels, in this order."""
    connector: ConnectorConfig | None = None
    resize: Resize = "resize-naive"
    """How an image becomes a square: squeezed, centre-cropped, or padded with each encoder's mean colour."""
    prompt_format: Literal["zephyr", "mamba", "pure"] = "zephyr"
    """How conversations are written as text, names from `ml_mamba_jax.prompt.FORMATS`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype. Step sizes, decays and states are float32 regardless."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype in which parameters are kept, but for A_log, D and dt_bias, which are float32 always."""

    def __post_init__(self):
        parts = [name for name in ("language", "vision", "connector") if getattr(self, name)]
        if parts not in (["language"], ["vision"], ["language", "vision", "connector"]):
            raise ValueError(
                f"MLMambaConfig: got {' and '.join(parts) or 'no part'}, expected all of language, vision and connector, "
                "or one of language and vision"
            )
        if self.vision:
            names = [encoder.name for encoder in self.vision]
            if len(set(names)) < len(names):
                raise ValueError(f"MLMambaConfig: got encoders {', '.join(names)}, expected different names")
            grids = {encoder.name: encoder.grid for encoder in self.vision}
            if len(set(grids.values())) > 1:
                raise ValueError(f"MLMambaConfig: got patch grids {grids}, expected the same grid for every encoder")
        if self.connector and self.connector.mixer.d_model != self.language.mixer.d_model:
            raise ValueError(
                f"MLMambaConfig: got connector width {self.connector.mixer.d_model}, "
                f"expected the language model's {self.language.mixer.d_model}"
            )

    @property
    def grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns), or None without encoders."""
        return self.vision[0].grid if self.vision else None

    @property
    def n_visual_tokens(self) -> int:
        """What an image adds to the sequence that the language model reads."""
        if self.connector is None:
            return 0
        pooled = self.connector.projector == "fused-ldpnet"
        rows, columns = self.connector.pooled_grid if pooled else self.grid
        return rows * columns

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


def _clip(image_size: int, patch_size: int, width: int, depth: int, **numbers) -> ViTConfig:
    return ViTConfig(
        name="clip",
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        n_heads=width // 64,
        mlp_dim=4 * width,
        class_token=True,
        class_position=True,
        pre_norm=True,
        norm_eps=1e-5,
        activation="quick_gelu",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        **numbers,
    )


def _siglip_b(image_size: int) -> ViTConfig:
    return ViTConfig(name="siglip", image_size=image_size, patch_size=16, width=768, depth=12, n_heads=12, mlp_dim=3072)


def _siglip_so400m(image_size: int) -> ViTConfig:
    return ViTConfig(
        name="siglip", image_size=image_size, patch_size=14, width=1152, depth=27, n_heads=16, mlp_dim=4304
    )


def _dinov2(image_size: int) -> ViTConfig:
    """ViT-L/14 with 4 registers. Published with a 37 x 37 grid of positions, which is resampled to the size that is asked for."""
    return ViTConfig(
        name="dinov2",
        image_size=image_size,
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
    )


VISION_ENCODERS: dict[str, ViTConfig] = {
    "clip-vit-b": _clip(224, 16, 768, 12, crop_fraction=0.9),
    "clip-vit-l": _clip(224, 14, 1024, 24),
    "clip-vit-l-336px": _clip(336, 14, 1024, 24),
    "siglip-vit-b16-224px": _siglip_b(224),
    "siglip-vit-b16-256px": _siglip_b(256),
    "siglip-vit-b16-384px": _siglip_b(384),
    "siglip-vit-so400m": _siglip_so400m(224),
    # 384 = 27 x 14 + 6: a 27 x 27 grid, the last 6 pixels of each side are not seen.
    "siglip-vit-so400m-384px": _siglip_so400m(384),
    "dinov2-vit-l": _dinov2(224),
    "dinov2-vit-l-336px": _dinov2(336),
    "dinov2-vit-l-384px": _dinov2(384),
    "in1k-vit-l": ViTConfig(
        name="in1k",
        image_size=224,
        patch_size=16,
        width=1024,
        depth=24,
        n_heads=16,
        mlp_dim=4096,
        class_token=True,
        class_position=True,
    ),
}
"""Single encoders; the ids are those of the reference, with a size where it is another than the id's."""

VISION_BACKBONES: dict[str, tuple[ViTConfig, ...]] = {
    **{name: (VISION_ENCODERS[name],) for name in VISION_ENCODERS if not name.startswith("dinov2-vit-l-")},
    # The reference gives CLIP's quick GELU to the single encoders only, not to this pair.
    "dinoclip-vit-l-336px": (
        VISION_ENCODERS["dinov2-vit-l-336px"],
        dataclasses.replace(VISION_ENCODERS["clip-vit-l-336px"], activation="gelu"),
    ),
    "dinosiglip-vit-so-384px": (VISION_ENCODERS["dinov2-vit-l-384px"], VISION_ENCODERS["siglip-vit-so400m-384px"]),
}
"""The twelve choices of encoders of the reference, by its ids; DINOv2's channels come first."""


def _ml_mamba(
    language: str = "mamba2-2.7b", vision: str | tuple[ViTConfig, ...] = "dinosiglip-vit-so-384px", **connector
) -> MLMambaConfig:
    mixer = LANGUAGE_MODELS[language].mixer
    return MLMambaConfig(
        language=LANGUAGE_MODELS[language],
        vision=VISION_BACKBONES[vision] if isinstance(vision, str) else vision,
        connector=ConnectorConfig(mixer=mixer, **connector),
        dtype="bfloat16",
    )


def _ml_mamba_variants() -> dict[str, MLMambaConfig]:
    """The released model, and what the paper compares it with (arXiv 2407.19832, tables 4 to 7)."""
    return {
        "ml-mamba-3b": _ml_mamba(),
        "ml-mamba-780m": _ml_mamba("mamba2-780m"),
        "ml-mamba-1.3b": _ml_mamba("mamba2-1.3b"),
        "ml-mamba-3b-dinov2": _ml_mamba(vision=(VISION_ENCODERS["dinov2-vit-l-384px"],)),
        "ml-mamba-3b-siglip": _ml_mamba(vision="siglip-vit-so400m-384px"),
        "ml-mamba-3b-mlp": _ml_mamba(scan="none"),
        "ml-mamba-3b-msc-basic": _ml_mamba(scan="basic"),
        "ml-mamba-3b-csm": _ml_mamba(directions=CROSS_SCAN),
        # The reference's model with 196 visual tokens, and VL-Mamba's connector around the same language model.
        "ml-mamba-3b-ldpnet": _ml_mamba(projector="fused-ldpnet"),
        "ml-mamba-3b-vss-l2": _ml_mamba(
            vision="siglip-vit-so400m-384px", scan="vss-l2", n_layers=1, projector="linear"
        ),
    }


def _tiny() -> MLMambaConfig:
    """Every part of ml-mamba-3b at a size that two CPU cores train in minutes, for 32-pixel images.

    Steps are longer and decays slower than in the large models from the start: with few heads, those would hardly see the image
    through the question, and would take long to learn to.
    """
    big = _ml_mamba()
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
    **_ml_mamba_variants(),
    **{name: MLMambaConfig(language=model, dtype="bfloat16") for name, model in LANGUAGE_MODELS.items()},
}
NAMED |= {name.removeprefix("mamba2-"): NAMED[name] for name in LANGUAGE_MODELS}  # "130m" ... "2.7b"
