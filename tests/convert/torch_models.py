"""PyTorch restatements of the architectures, written from their descriptions, with the names that published weights have.

They are slow and plain on purpose: a token recurrence for the SSD, walks over the grid as lists of patches, attention as a
softmax. Converted weights are compared with them where no other PyTorch implementation can be installed.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml_mamba_jax.config import ConnectorConfig, Mamba2Config, MixerConfig, ViTConfig

DIRECTION_SUFFIXES = ("", "_b", "_c", "_d")


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrite every parameter: no bias is zero, no scale is one, decays and step sizes are those of trained models."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "A_log" in name:
                p.uniform_(1, 16, generator=generator).log_()
            elif "dt_bias" in name:
                dt = p.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif any(
                word in name for word in ("pos_embed", "position_embedding", "class_embedding", "token", "latent")
            ):
                p.normal_(0, 0.5, generator=generator)
            elif name.endswith("bias"):
                p.normal_(0, 0.2, generator=generator)
            elif p.ndim <= 1:
                p.normal_(1, 0.2, generator=generator)
            else:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
    return module.eval()


def walk(direction: str, rows: int, columns: int) -> list[int]:
    """The row-major numbers of the patches, in the order in which a scan reads them."""
    by_rows = [r * columns + c for r in range(rows) for c in range(columns)]
    by_columns = [r * columns + c for c in range(columns) for r in range(rows)]
    return {
        "rows": by_rows,
        "rows_reversed": by_rows[::-1],
        "columns": by_columns,
        "columns_reversed": by_columns[::-1],
    }[direction]


class Weight(nn.Module):
    """A weight alone, as norms without bias have it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class RMSNorm(Weight):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Mixer(nn.Module):
    """A Mamba-2 mixer. With several directions over a grid the scan parameters after the first have a suffix."""

    def __init__(self, config: MixerConfig, directions: Sequence[str] = ("rows",), grid: tuple[int, int] | None = None):
        super().__init__()
        self.config, self.directions, self.grid = config, tuple(directions), grid
        self.in_proj = nn.Linear(config.d_model, config.in_proj_features, bias=False)
        self.norm = Weight(config.d_inner)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        for suffix in DIRECTION_SUFFIXES[: len(directions)]:
            channels = config.conv_channels
            setattr(self, f"conv1d{suffix}", nn.Conv1d(channels, channels, config.d_conv, groups=channels))
            for name in ("dt_bias", "A_log", "D"):
                setattr(self, name + suffix, nn.Parameter(torch.ones(config.n_heads)))

    def forward(self, u: Tensor) -> Tensor:
        zxbcdt, merged = self.in_proj(u), 0.0
        for direction, suffix in zip(self.directions, DIRECTION_SUFFIXES, strict=False):
            order = walk(direction, *(self.grid or (1, u.shape[1])))
            back = [order.index(patch) for patch in range(len(order))]
            merged = merged + self._core(zxbcdt[:, order], suffix)[:, back]
        return self.out_proj(merged / len(self.directions))

    def _core(self, zxbcdt: Tensor, suffix: str) -> Tensor:
        config = self.config
        inner, states, heads = config.d_inner, config.n_groups * config.d_state, config.n_heads
        batch, length = zxbcdt.shape[:2]
        dt_bias, A_log, D = (getattr(self, name + suffix) for name in ("dt_bias", "A_log", "D"))
        z, xBC, dt = zxbcdt.split([inner, inner + 2 * states, heads], dim=-1)
        padded = F.pad(xBC.transpose(1, 2), (config.d_conv - 1, 0))
        xBC = F.silu(getattr(self, f"conv1d{suffix}")(padded)).transpose(1, 2)
        x, B, C = xBC.split([inner, states, states], dim=-1)
        x = x.reshape(batch, length, heads, config.head_dim)
        B, C = (
            a.reshape(batch, length, config.n_groups, config.d_state).repeat_interleave(heads // config.n_groups, dim=2)
            for a in (B, C)
        )
        dt = F.softplus(dt + dt_bias).clamp(*config.dt_limit)
        decay = torch.exp(dt * -torch.exp(A_log))
        h, ys = 0.0, []
        for t in range(length):
            update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            h = decay[:, t, :, None, None] * h + update
            ys.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
        y = torch.stack(ys, dim=1).reshape(batch, length, inner)
        if config.norm_before_gate:
            return self._norm(y) * self.norm.weight * F.silu(z)
        return self._norm(y * F.silu(z)) * self.norm.weight

    def _norm(self, y: Tensor) -> Tensor:
        grouped = y.reshape(*y.shape[:-1], self.config.n_groups, -1)
        return (grouped / torch.sqrt(grouped.square().mean(-1, keepdim=True) + self.config.norm_eps)).reshape(y.shape)


class SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class AdvancedBlock(nn.Module):
    """Of the released connector."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        width = mixer.config.d_model
        self.mixer, self.norm, self.mlp = mixer, nn.LayerNorm(width, eps=1e-5), SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.mlp(self.norm(x))


class BasicBlock(nn.Module):
    """Of a language model, and of the connector without SwiGLU."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer, self.norm = mixer, RMSNorm(mixer.config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class VssBlock(nn.Module):
    """Of VL-Mamba's connector."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(F.gelu(x))


BLOCKS = {"advanced": AdvancedBlock, "basic": BasicBlock, "vss-l2": VssBlock}


class LanguageModel(nn.Module):
    """Tokens [b l] -> logits, with the names of state-spaces; the head is the embedding."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        width, rows = config.mixer.d_model, config.padded_vocab_size
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(rows, width)
        self.backbone.layers = nn.ModuleList(BasicBlock(Mixer(config.mixer)) for _ in range(config.n_layers))
        self.backbone.norm_f = RMSNorm(width)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.backbone.embedding(tokens)
        for layer in self.backbone.layers:
            x = layer(x)
        return self.lm_head(self.backbone.norm_f(x))


class BidirectionalMamba(nn.Module):
    """The scan blocks and the norm after them."""

    def __init__(self, config: ConnectorConfig, grid: tuple[int, int]):
        super().__init__()
        width, block = config.mixer.d_model, BLOCKS[config.scan]
        mixers = [Mixer(config.mixer, config.directions, grid) for _ in range(config.n_layers)]
        self.layers = nn.ModuleList(map(block, mixers))
        self.norm_f = RMSNorm(width) if config.scan == "basic" else nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


class PositionInjection(nn.Module):
    """A depthwise convolution of the pooled grid, added to it."""

    def __init__(self, width: int):
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, stride=1, padding=1, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.peg(x)).flatten(2).transpose(1, 2)


class Pool(nn.Module):
    def __init__(self, grid: tuple[int, int], pooled_grid: tuple[int, int]):
        super().__init__()
        self.grid, self.pooled_grid = grid, pooled_grid

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, self.grid), self.pooled_grid)


class Projector(nn.Module):
    """One of the four projectors, all named `projector`, from `v` features to `d`."""

    def __init__(self, config: ConnectorConfig, v: int, d: int, grid: tuple[int, int]):
        super().__init__()
        form = config.projector
        if form == "linear":
            self.projector = nn.Linear(v, d)
        elif form == "gelu-mlp":
            self.projector = nn.Sequential(nn.Linear(v, d), nn.GELU(), nn.Linear(d, d))
        elif form == "fused-gelu-mlp":
            self.projector = nn.Sequential(
                nn.Linear(v, 4 * v), nn.GELU(), nn.Linear(4 * v, d), nn.GELU(), nn.Linear(d, d)
            )
        else:
            self.projector = nn.Sequential(
                nn.Linear(v, 4 * v),
                nn.GELU(),
                nn.Linear(4 * v, d),
                Pool(grid, config.pooled_grid),
                PositionInjection(d),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)


class Connector(nn.Module):
    """Patch features [b l c] -> visual tokens: the modules `mlp`, `bidirectional_mamba` and `projector` of a run."""

    def __init__(self, config: ConnectorConfig, n_features: int, grid: tuple[int, int]):
        super().__init__()
        d = config.mixer.d_model
        if config.scan != "none":
            gelu = [] if config.scan == "vss-l2" else [nn.GELU()]
            self.mlp = nn.Sequential(nn.Linear(n_features, d), *gelu)
            self.bidirectional_mamba = BidirectionalMamba(config, grid)
        self.projector = Projector(config, n_features if config.scan == "none" else d, d, grid)

    def forward(self, features: Tensor) -> Tensor:
        for part in self.children():
            features = part(features)
        return features


class Attention(nn.Module):
    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (a.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for a in self.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "quick_gelu":
            return self.fc2(x * torch.sigmoid(1.702 * x))
        return self.fc2(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        width, scaled = config.width, config.layer_scale is not None
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.norm_eps) for _ in range(2))
        self.attn = Attention(width, config.n_heads)
        self.mlp = Mlp(width, config.mlp_dim, config.activation)
        self.ls1, self.ls2 = (LayerScale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's head, which features of patches do not need: here for its names only."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width, hidden, "gelu")


class TimmViT(nn.Module):
    """Normalised pixels [b 3 y x] -> patch features of the second-to-last block, with timm's names.

    The last block, the final norm and the head have their weights too, as published files do.
    """

    def __init__(self, config: ViTConfig, *, attention_pool: bool = False, n_classes: int = 0):
        super().__init__()
        self.config, width, patch = config, config.width, config.patch_size
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch, bias=not config.pre_norm)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.n_patches + int(config.class_position), width))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.n_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.n_registers, width))
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(TimmBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn_pool = AttentionPool(width, config.mlp_dim) if attention_pool else None
        self.head = nn.Linear(width, n_classes) if n_classes else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        config, batch = self.config, len(pixels)
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        prefix = [self.cls_token] if config.class_token else []
        if config.class_position:  # positions for the class token and the patches
            x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1) + self.pos_embed
            prefix = [x[:, :1]]
            x = x[:, 1:]
        else:
            x = x + self.pos_embed
        if config.n_registers:
            prefix.append(self.reg_token)
        x = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), x], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, config.n_prefix_tokens :]
