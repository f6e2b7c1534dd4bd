"""Small checkpoints with random numbers as other programs write them, with the keys that are published, not those of our tables."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ml_mamba_jax import serialize
from ml_mamba_jax.config import NAMED, VISION_ENCODERS, Mamba2Config, MixerConfig, MLMambaConfig, ViTConfig
from ml_mamba_jax.tokenizer import Tokenizer

Tensors = dict[str, torch.Tensor]

MIXER = MixerConfig(d_model=32, d_state=8, head_dim=16)
LANGUAGE = Mamba2Config(mixer=MIXER, n_layers=3, vocab_size=260)
"""260 entries, 272 rows: as for the published models, of which 50277 become 50288."""
TINY = NAMED["tiny"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def small(encoder: ViTConfig, **numbers) -> ViTConfig:
    """An encoder of the same structure for images of 32 pixels."""
    defaults = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 3, "n_heads": 2, "mlp_dim": 48}
    registers = {"n_registers": 2} if encoder.n_registers else {}
    return dataclasses.replace(encoder, **(defaults | registers | numbers))


SMALL_ENCODERS = {name: small(encoder) for name, encoder in VISION_ENCODERS.items()}


def noise(generator: torch.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return mean + scale * torch.randn(*shape, generator=generator)


def linear(generator: torch.Generator, name: str, n_in: int, n_out: int) -> Tensors:
    return {
        f"{name}.weight": noise(generator, n_out, n_in, scale=n_in**-0.5),
        f"{name}.bias": noise(generator, n_out, scale=0.1),
    }


def norm(generator: torch.Generator, name: str, width: int) -> Tensors:
    return {
        f"{name}.weight": noise(generator, width, scale=0.1, mean=1),
        f"{name}.bias": noise(generator, width, scale=0.1),
    }


def mixer(generator: torch.Generator, prefix: str, config: MixerConfig, suffixes: tuple[str, ...] = ("",)) -> Tensors:
    """in_proj, norm and out_proj once, the rest once for each direction."""
    d, inner, heads = config.d_model, config.expand * config.d_model, config.expand * config.d_model // config.head_dim
    channels = inner + 2 * config.n_groups * config.d_state
    tensors = {
        "in_proj.weight": noise(generator, inner + channels + heads, d, scale=d**-0.5),
        "norm.weight": noise(generator, inner, scale=0.1, mean=1),
        "out_proj.weight": noise(generator, d, inner, scale=inner**-0.5),
    }
    for suffix in suffixes:
        tensors |= {
            f"conv1d{suffix}.weight": noise(generator, channels, 1, config.d_conv, scale=0.5),
            f"conv1d{suffix}.bias": noise(generator, channels, scale=0.1),
            f"dt_bias{suffix}": noise(generator, heads, mean=-3),
            f"A_log{suffix}": noise(generator, heads).abs(),
            f"D{suffix}": noise(generator, heads, scale=0.1, mean=1),
        }
    return {prefix + key: tensor for key, tensor in tensors.items()}


def language(
    config: Mamba2Config = LANGUAGE, embedding: str = "embedding", seed: int = 0, rows: int | None = None
) -> Tensors:
    """The state dict of a language model of state-spaces/mamba, or with "embeddings" of transformers."""
    generator, d = torch.Generator().manual_seed(seed), config.mixer.d_model
    rows = rows or math.ceil(config.vocab_size / config.vocab_multiple) * config.vocab_multiple
    tensors = {f"backbone.{embedding}.weight": noise(generator, rows, d)}
    for i in range(config.n_layers):
        tensors[f"backbone.layers.{i}.norm.weight"] = noise(generator, d, scale=0.1, mean=1)
        tensors |= mixer(generator, f"backbone.layers.{i}.mixer.", config.mixer)
    tensors["backbone.norm_f.weight"] = noise(generator, d, scale=0.1, mean=1)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors[f"backbone.{embedding}.weight"]
    else:
        tensors["lm_head.weight"] = noise(generator, rows, d, scale=d**-0.5)
    return tensors


def timm(encoder: ViTConfig, seed: int = 0, side: int | None = None) -> Tensors:
    """The state dict of a ViT of timm with its last block and head; `side`: of the grid of positions."""
    generator, d, patch = torch.Generator().manual_seed(seed), encoder.width, encoder.patch_size
    tensors = {"patch_embed.proj.weight": noise(generator, d, 3, patch, patch, scale=(3 * patch * patch) ** -0.5)}
    if encoder.name == "clip":
        tensors |= norm(generator, "norm_pre", d)
    else:
        tensors["patch_embed.proj.bias"] = noise(generator, d, scale=0.1)
    n_positions = (side or encoder.image_size // patch) ** 2 + (encoder.name in ("clip", "in1k"))
    tensors["pos_embed"] = noise(generator, 1, n_positions, d, scale=0.5)
    if encoder.name != "siglip":
        tensors["cls_token"] = noise(generator, 1, 1, d)
    if encoder.name == "dinov2":
        tensors["reg_token"] = noise(generator, 1, encoder.n_registers, d)
        tensors["mask_token"] = noise(generator, 1, d)
    for i in range(encoder.depth):
        block = f"blocks.{i}."
        tensors |= norm(generator, f"{block}norm1", d) | linear(generator, f"{block}attn.qkv", d, 3 * d)
        tensors |= linear(generator, f"{block}attn.proj", d, d) | norm(generator, f"{block}norm2", d)
        tensors |= linear(generator, f"{block}mlp.fc1", d, encoder.mlp_dim)
        tensors |= linear(generator, f"{block}mlp.fc2", encoder.mlp_dim, d)
        if encoder.name == "dinov2":
            tensors |= {f"{block}ls{k}.gamma": noise(generator, d, scale=0.1, mean=0.5) for k in (1, 2)}
    tensors |= norm(generator, "norm", d)
    if encoder.name == "siglip":
        tensors |= {"attn_pool.latent": noise(generator, 1, 1, d)} | linear(generator, "attn_pool.q", d, d)
    else:
        tensors |= linear(generator, "head", d, 10)
    return tensors


SUFFIXES = ("", "_b", "_c", "_d")


def run(config: MLMambaConfig, seed: int = 0) -> dict[str, Any]:
    """The content of checkpoints/latest-checkpoint.pt of a run of ML-Mamba."""
    generator, connector, d = torch.Generator().manual_seed(seed), config.connector, config.language.mixer.d_model
    width, n = sum(encoder.width for encoder in config.vision), len(config.connector.directions)
    content = {"llm_backbone": language(config.language, seed=seed)}
    if connector.scan != "none":
        content["mlp"] = linear(generator, "0", width, d)
        scan = {}
        for i in range(connector.n_layers):
            scan |= mixer(generator, f"layers.{i}.mixer.", connector.mixer, SUFFIXES[:n])
            if connector.scan == "basic":
                scan[f"layers.{i}.norm.weight"] = noise(generator, d, scale=0.1, mean=1)
            if connector.scan == "advanced":
                scan |= norm(generator, f"layers.{i}.norm", d)
                for name in ("w1", "w2", "w3"):
                    scan |= linear(generator, f"layers.{i}.mlp.{name}", d, d)
        if connector.scan == "basic":
            scan["norm_f.weight"] = noise(generator, d, scale=0.1, mean=1)
        else:
            scan |= norm(generator, "norm_f", d)
        content["bidirectional_mamba"], width = scan, d
    if connector.projector == "linear":
        projector = linear(generator, "projector", width, d)
    elif connector.projector == "gelu-mlp":
        projector = linear(generator, "projector.0", width, d) | linear(generator, "projector.2", d, d)
    else:
        projector = linear(generator, "projector.0", width, 4 * width)
        projector |= linear(generator, "projector.2", 4 * width, d)
        if connector.projector == "fused-gelu-mlp":
            projector |= linear(generator, "projector.4", d, d)
        else:
            projector["projector.4.peg.0.weight"] = noise(generator, d, 1, 3, 3, scale=0.3)
            projector["projector.4.peg.0.bias"] = noise(generator, d, scale=0.1)
    content["projector"] = projector
    return {"model": content}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


MAMBA_SSM = {
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 3,
    "vocab_size": 260,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
"""config.json of `LANGUAGE` as state-spaces/mamba writes it."""

HF_MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 1,
    "num_hidden_layers": 3,
    "vocab_size": 272,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "rms_norm": True,
    "time_step_limit": [0.0, math.inf],
    "transformers_version": "5.0.0",
}
"""config.json of `LANGUAGE` as transformers writes it."""


def cast(tensors: Tensors, dtype: str) -> Tensors:
    return {key: tensor.to(DTYPES[dtype]) for key, tensor in tensors.items()}


def write_mamba_ssm(folder: Path, tensors: Tensors | None = None, **fields) -> Path:
    """A folder of state-spaces/mamba: pytorch_model.bin, in which the head is the embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(language() if tensors is None else tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", MAMBA_SSM | fields)
    return folder


def write_hf_mamba2(folder: Path, dtype: str = "float32", tensors: Tensors | None = None, **fields) -> Path:
    """A folder of transformers: model.safetensors without the tied head."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = language(embedding="embeddings")
        del tensors["lm_head.weight"]
    safetensors.torch.save_file(cast(tensors, dtype), folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", HF_MAMBA2 | fields)
    return folder


def write_timm(folder: Path, encoder: ViTConfig, tensors: Tensors | None = None) -> Path:
    """A folder of a ViT of timm, with our config: timm knows no small ones."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(timm(encoder) if tensors is None else tensors, folder / "model.safetensors")
    own = serialize.plain(MLMambaConfig(language=None, vision=(encoder,)))
    write_json(folder / "config.json", {"architecture": "vit", "ml_mamba_jax": own})
    return folder


def write_run(folder: Path, config: MLMambaConfig = TINY, *, encoders: bool = True, dtype: str = "float32") -> Path:
    """A run of ML-Mamba, with our config, and each encoder in a folder of its own."""
    (folder / "checkpoints").mkdir(parents=True)
    content = run(config)
    content["model"] = {name: cast(part, dtype) for name, part in content["model"].items()}
    torch.save(content, folder / "checkpoints" / "latest-checkpoint.pt")
    ids = {"model_id": "mlmamba+3b", "arch_specifier": f"no-align+{config.connector.projector}"}
    write_json(folder / "config.json", {"model": ids, "ml_mamba_jax": serialize.plain(config)})
    if encoders:
        for i, encoder in enumerate(config.vision):
            write_timm(folder / "vision" / encoder.name, encoder, timm(encoder, seed=i))
    return folder


def write_hf_vision(folder: Path, kind: str, **numbers) -> Path:
    """An encoder as `save_pretrained` of transformers writes it, with all its blocks."""
    numbers = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, **numbers}
    numbers = {"num_attention_heads": 2, **numbers}
    torch.manual_seed(0)
    if kind == "hf-siglip":
        from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        model = SiglipVisionModel(SiglipVisionConfig(**({"intermediate_size": 48} | numbers)))
    elif kind == "hf-clip":
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        model = CLIPVisionModel(CLIPVisionConfig(**({"intermediate_size": 48} | numbers)))
    else:
        from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import (
            Dinov2WithRegistersConfig,
        )
        from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel

        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**({"mlp_ratio": 2, "num_register_tokens": 2} | numbers))
        )
    randomise(model)
    model.save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module) -> None:
    """So that no bias, scale or token can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise(generator, *parameter.shape, scale=0.1)


def write_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.train(["<|user|>\nwhat?<|endoftext|>\n"], 260)
    tokenizer.save(folder)
    return tokenizer


def write_foreign_tokenizer(folder: Path) -> Path:
    """A tokenizer.json without <|endoftext|>."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
