"""The forward passes of the PyTorch models, straight from the tensors of a source, for `check`.

Language models run through transformers' own blocks, one layer at a time, and encoders of transformers through its models. What
transformers has no implementation of, timm's encoders and the connector, is stated here in plain torch: the scan token by token.
"""

import math
from collections.abc import Callable
from typing import Any

from ml_mamba_jax.config import ConnectorConfig, Mamba2Config, MixerConfig, ViTConfig
from ml_mamba_jax.convert.tables import DIRECTION_SUFFIXES
from ml_mamba_jax.errors import ConvertError

Read = Callable[[str], Any]
"""The float32 torch tensor of a key."""


def language_logits(read: Read, config: Mamba2Config, x, embedding: str):
    """Logits [b l v] of embeddings x [b l d], through the blocks of transformers. `embedding` is the key of the table."""
    import torch
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as HFConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Block, Mamba2RMSNorm

    mixer = config.mixer
    if mixer.norm_before_gate:
        raise ConvertError("check: transformers has no norm before the gate, so this model cannot be compared with it")
    hf_config = HFConfig(
        hidden_size=mixer.d_model,
        num_heads=mixer.n_heads,
        head_dim=mixer.head_dim,
        state_size=mixer.d_state,
        conv_kernel=mixer.d_conv,
        expand=mixer.expand,
        n_groups=mixer.n_groups,
        layer_norm_epsilon=mixer.norm_eps,
        time_step_limit=mixer.dt_limit,
        num_hidden_layers=config.n_layers,
        residual_in_fp32=config.residual_in_float32,
    )
    with torch.device("meta"):
        block = Mamba2Block(hf_config, layer_idx=0)
        norm = Mamba2RMSNorm(mixer.d_model, eps=config.norm_eps)
    prefix = embedding[: embedding.index("backbone.")]
    for i in range(config.n_layers):
        names = block.state_dict()
        weights = {name: read(f"{prefix}backbone.layers.{i}.{name}") for name in names}
        block.load_state_dict(weights, assign=True)
        x = block(x)
    norm.load_state_dict({"weight": read(f"{prefix}backbone.norm_f.weight")}, assign=True)
    return norm(x) @ read(embedding if config.tie_embeddings else f"{prefix}lm_head.weight").T


def hf_features(kind: str, read: Read, encoder: ViTConfig, pixels, *, prefix: str):
    """Features [b l d] of normalised pixels [b 3 y x] by the encoder of transformers, with all blocks but the last."""
    import torch

    options = {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth - 1,
        "num_attention_heads": encoder.n_heads,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "layer_norm_eps": encoder.norm_eps,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}[
            encoder.activation
        ],
    }
    with torch.device("meta"):
        if kind == "hf-dinov2":
            from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import (
                Dinov2WithRegistersConfig,
            )
            from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
                Dinov2WithRegistersModel,
            )

            side = math.isqrt(read(f"{prefix}embeddings.position_embeddings").shape[1] - 1)
            options |= {"mlp_ratio": encoder.mlp_dim // encoder.width, "num_register_tokens": encoder.n_registers}
            options |= {"image_size": side * encoder.patch_size}
            model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**options))
        elif kind == "hf-siglip":
            from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
            from transformers.models.siglip.modeling_siglip import SiglipVisionModel

            options |= {"intermediate_size": encoder.mlp_dim, "vision_use_head": False}
            model = SiglipVisionModel(SiglipVisionConfig(**options))
        else:
            from transformers.models.clip.configuration_clip import CLIPVisionConfig
            from transformers.models.clip.modeling_clip import CLIPVisionModel

            model = CLIPVisionModel(CLIPVisionConfig(**options, intermediate_size=encoder.mlp_dim))
    # Ids of positions are counted, not learnt, and are not in the weights.
    weights = {name: read(prefix + _published(name)) for name in model.state_dict()}
    positions = "embeddings.position_embedding.weight"
    if positions in weights:  # CLIP and SigLIP; DINOv2 interpolates by itself
        weights[positions] = _interpolated(weights[positions][None], int(encoder.class_position), encoder.grid)[0]
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    hidden = model.eval()(pixels, output_hidden_states=True).hidden_states[-1]
    return hidden[:, encoder.n_prefix_tokens :]


def _published(name: str) -> str:
    """The key in the weights of a parameter of DINOv2, whose modules have other names in newer versions of transformers."""
    for new, old in {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}.items():
        name = name.replace(f".attention.{new}.", f".attention.{old}.")
    return name.replace(".attention.o_proj.", ".attention.output.dense.")


def timm_features(read: Read, encoder: ViTConfig, pixels, *, prefix: str):
    """Features [b l d] of normalised pixels [b 3 y x] as timm computes them: the output of the second-to-last block."""
    import torch.nn.functional as nnf

    def weights(name: str):
        return read(f"{prefix}{name}.weight"), read(f"{prefix}{name}.bias")

    def norm(name: str, x):
        return nnf.layer_norm(x, (encoder.width,), *weights(name), eps=encoder.norm_eps)

    def activation(x):
        if encoder.activation == "quick_gelu":
            return x * (1.702 * x).sigmoid()
        return nnf.gelu(x, approximate="tanh" if encoder.activation == "gelu_tanh" else "none")

    def scaled(name: str, x):
        return x if encoder.layer_scale is None else x * read(f"{prefix}{name}.gamma")

    bias = None if encoder.pre_norm else read(f"{prefix}patch_embed.proj.bias")
    x = nnf.conv2d(pixels, read(f"{prefix}patch_embed.proj.weight"), bias, stride=encoder.patch_size)
    x = x.flatten(2).mT
    positions = _interpolated(read(f"{prefix}pos_embed"), int(encoder.class_position), encoder.grid)
    x = _with_prefix_tokens(read, encoder, x, positions, prefix)
    if encoder.pre_norm:
        x = norm("norm_pre", x)
    batch, length, width = x.shape
    for i in range(encoder.depth - 1):
        qkv = nnf.linear(norm(f"blocks.{i}.norm1", x), *weights(f"blocks.{i}.attn.qkv"))
        q, k, v = qkv.view(batch, length, 3, encoder.n_heads, -1).permute(2, 0, 3, 1, 4)
        attended = nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + scaled(f"blocks.{i}.ls1", nnf.linear(attended, *weights(f"blocks.{i}.attn.proj")))
        hidden = activation(nnf.linear(norm(f"blocks.{i}.norm2", x), *weights(f"blocks.{i}.mlp.fc1")))
        x = x + scaled(f"blocks.{i}.ls2", nnf.linear(hidden, *weights(f"blocks.{i}.mlp.fc2")))
    return x[:, encoder.n_prefix_tokens :]


def _with_prefix_tokens(read: Read, encoder: ViTConfig, x, positions, prefix: str):
    """[class, registers, patches], with positions on the patches, and on the class token where it has one."""
    import torch

    batch = len(x)
    if encoder.class_position:
        x = torch.cat([read(f"{prefix}cls_token").expand(batch, -1, -1), x], dim=1) + positions
        return x
    x = x + positions
    tokens = [read(f"{prefix}cls_token")] if encoder.class_token else []
    tokens += [read(f"{prefix}reg_token")] if encoder.n_registers else []
    return torch.cat([*(token.expand(batch, -1, -1) for token in tokens), x], dim=1)


def _interpolated(positions, n_prefix: int, grid: tuple[int, int]):
    """Positions [1 l d] of a square grid, resampled to another one; those of `n_prefix` tokens before it stay."""
    import torch

    prefix, square = positions[:, :n_prefix], positions[:, n_prefix:]
    side = math.isqrt(square.shape[1])
    if (side, side) == grid:
        return positions
    square = square.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, size=grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, square.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)], dim=1)


def visual_tokens(read: Read, config: ConnectorConfig, features, grid: tuple[int, int]):
    """Visual tokens [b l d] of patch features [b l v] by the three modules of ML-Mamba's connector."""
    import torch.nn.functional as nnf

    def linear(name: str, x):
        return nnf.linear(x, read(f"model/{name}.weight"), read(f"model/{name}.bias"))

    def norm(name: str, x):
        weight = read(f"model/{name}.weight")
        if config.scan == "basic":
            return nnf.rms_norm(x, x.shape[-1:], weight, eps=config.norm_eps)
        return nnf.layer_norm(x, x.shape[-1:], weight, read(f"model/{name}.bias"), eps=config.norm_eps)

    x = features
    if config.scan != "none":
        x = linear("mlp/0", x)
        x = x if config.scan == "vss-l2" else nnf.gelu(x)
        for i in range(config.n_layers):
            layer = f"bidirectional_mamba/layers.{i}."
            if config.scan == "basic":
                x = x + scan_mixer(read, config, norm(f"{layer}norm", x), grid, f"model/{layer}mixer.")
            elif config.scan == "vss-l2":
                x = x + scan_mixer(read, config, nnf.gelu(x), grid, f"model/{layer}mixer.")
            else:
                x = x + scan_mixer(read, config, x, grid, f"model/{layer}mixer.")
                u = norm(f"{layer}norm", x)
                x = x + linear(f"{layer}mlp.w3", nnf.silu(linear(f"{layer}mlp.w1", u)) * linear(f"{layer}mlp.w2", u))
        x = norm("bidirectional_mamba/norm_f", x)
    name = "projector/projector"
    if config.projector == "linear":
        return linear(name, x)
    for i in range(3 if config.projector == "fused-gelu-mlp" else 2):
        x = linear(f"{name}.{2 * i}", nnf.gelu(x) if i else x)
    if config.projector == "fused-ldpnet":
        x = x.mT.reshape(len(x), -1, *grid)
        x = nnf.adaptive_avg_pool2d(x, config.pooled_grid)
        weight, bias = read(f"model/{name}.4.peg.0.weight"), read(f"model/{name}.4.peg.0.bias")
        x = x + nnf.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
        x = x.flatten(2).mT
    return x


def scan_mixer(read: Read, config: ConnectorConfig, u, grid: tuple[int, int], key: str):
    """The mixer of the connector: every direction reads the tokens in its own order, and their mean is projected."""
    import torch

    mixer = config.mixer
    zxbcdt = u @ read(f"{key}in_proj.weight").T
    total = 0
    for direction, suffix in zip(config.directions, DIRECTION_SUFFIXES, strict=False):
        order = torch.arange(grid[0] * grid[1]).reshape(grid)
        order = (order.T if direction.startswith("columns") else order).flatten()
        order = order.flip(0) if direction.endswith("reversed") else order
        y = _one_direction(read, mixer, zxbcdt[:, order], key, suffix)
        total = total + y[:, order.argsort()]
    return (total / len(config.directions)) @ read(f"{key}out_proj.weight").T


def _one_direction(read: Read, mixer: MixerConfig, zxbcdt, key: str, suffix: str):
    import torch
    import torch.nn.functional as nnf

    batch, length, _ = zxbcdt.shape
    heads, groups, n = mixer.n_heads, mixer.n_groups, mixer.d_state
    z, xbc, dt = zxbcdt.split([mixer.d_inner, mixer.conv_channels, heads], dim=-1)
    xbc = nnf.pad(xbc.mT, (mixer.d_conv - 1, 0))
    weight, bias = read(f"{key}conv1d{suffix}.weight"), read(f"{key}conv1d{suffix}.bias")
    xbc = nnf.silu(nnf.conv1d(xbc, weight, bias, groups=mixer.conv_channels)).mT
    x, b, c = xbc.split([mixer.d_inner, groups * n, groups * n], dim=-1)
    x = x.reshape(batch, length, heads, mixer.head_dim)
    b, c = (a.reshape(batch, length, groups, n).repeat_interleave(heads // groups, dim=2) for a in (b, c))
    dt = nnf.softplus(dt + read(f"{key}dt_bias{suffix}")).clamp(*mixer.dt_limit)
    decay = (-dt * read(f"{key}A_log{suffix}").exp()).exp()
    state, ys = torch.zeros(batch, heads, mixer.head_dim, n), []
    for t in range(length):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = decay[:, t, :, None, None] * state + added
        ys.append((state * c[:, t, :, None]).sum(-1))
    y = torch.stack(ys, dim=1) + read(f"{key}D{suffix}")[:, None] * x
    y = y.reshape(batch, length, -1)
    weight, size = read(f"{key}norm.weight"), mixer.d_inner // groups

    def norm(a):
        return nnf.rms_norm(a.unflatten(-1, (groups, size)), (size,), eps=mixer.norm_eps).flatten(-2) * weight

    return norm(y) * nnf.silu(z) if mixer.norm_before_gate else norm(y * nnf.silu(z))
