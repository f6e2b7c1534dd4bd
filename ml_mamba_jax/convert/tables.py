"""The tables of keys: for each family of PyTorch weights, which tensor is which parameter.

Every function returns pieces for one part of a model. The same table is read in one direction by `to_jax` and in the other by
`to_torch`; `docs/keys.md` shows them.
"""

from collections.abc import Iterator

from ml_mamba_jax.config import ConnectorConfig, Mamba2Config, MLMambaConfig, ViTConfig
from ml_mamba_jax.convert.pieces import DEPTHWISE, DEPTHWISE_2D, PATCHES, SAME, TRANSPOSED, Index, Layout, Piece

DIRECTION_SUFFIXES = ("", "_b", "_c", "_d")
"""Of a connector's tensors by direction. The released code has the first two; the others go on in its manner."""

_ALL = slice(None)


def mamba2(config: Mamba2Config, prefix: str = "", embedding: str = "embedding") -> list[Piece]:
    """A language model of state-spaces/mamba, or with `embedding="embeddings"` of transformers."""
    pieces = [Piece(f"{prefix}backbone.{embedding}.weight", "language/embedding")]
    for i in range(config.n_layers):
        key, path = f"{prefix}backbone.layers.{i}.", "language/blocks/"
        pieces.append(Piece(f"{key}norm.weight", f"{path}norm/scale", index=(i,)))
        pieces += _mixer(f"{key}mixer.", f"{path}mixer/", (i,))
    pieces.append(Piece(f"{prefix}backbone.norm_f.weight", "language/norm/scale"))
    if config.tie_embeddings:
        pieces.append(Piece(f"{prefix}lm_head.weight", "language/embedding", tied=True))
    else:
        pieces.append(Piece(f"{prefix}lm_head.weight", "language/head", TRANSPOSED))
    return pieces


def connector(config: ConnectorConfig) -> list[Piece]:
    """The three modules `mlp`, `bidirectional_mamba` and `projector` of a run of ML-Mamba."""
    pieces = []
    if config.scan != "none":
        pieces += _linear("model/mlp/0", "connector/in_proj")
        scan = "model/bidirectional_mamba/"
        for i in range(config.n_layers):
            key, path = f"{scan}layers.{i}.", "connector/blocks/"
            pieces += _mixer(f"{key}mixer.", f"{path}mixer/", (i,), DIRECTION_SUFFIXES[: len(config.directions)])
            if config.scan == "basic":
                pieces.append(Piece(f"{key}norm.weight", f"{path}norm/scale", index=(i,)))
            if config.scan == "advanced":
                pieces += _norm(f"{key}norm", f"{path}norm", (i,))
                for name in ("w1", "w2", "w3"):
                    pieces += _linear(f"{key}mlp.{name}", path + name, (i,))
        if config.scan == "basic":
            pieces.append(Piece(f"{scan}norm_f.weight", "connector/norm/scale"))
        else:
            pieces += _norm(f"{scan}norm_f", "connector/norm")
    return pieces + list(_projector(config))


def _projector(config: ConnectorConfig) -> Iterator[Piece]:
    key, path = "model/projector/projector", "connector/projector_"
    if config.projector == "linear":
        yield from _linear(key, f"{path}0")
        return
    n_linear = 3 if config.projector == "fused-gelu-mlp" else 2
    for i in range(n_linear):  # every other entry of the sequence is a GELU
        yield from _linear(f"{key}.{2 * i}", f"{path}{i}")
    if config.projector == "fused-ldpnet":
        yield Piece(f"{key}.4.peg.0.weight", f"{path}position/kernel", DEPTHWISE_2D)
        yield Piece(f"{key}.4.peg.0.bias", f"{path}position/bias")


def timm_vit(encoder: ViTConfig, prefix: str = "") -> list[Piece]:
    """A vision transformer with the names of timm."""
    path = f"vision/{encoder.name}/"
    pieces = _patch_embed(encoder, f"{prefix}patch_embed.proj")
    if encoder.class_token:
        pieces.append(Piece(f"{prefix}cls_token", f"{path}prefix_tokens", index=(slice(0, 1),), source=(0,)))
    if encoder.n_registers:
        registers = slice(int(encoder.class_token), None)
        pieces.append(Piece(f"{prefix}reg_token", f"{path}prefix_tokens", index=(registers,), source=(0,)))
    pieces += _positions(encoder, f"{prefix}pos_embed", leading=True)
    if encoder.pre_norm:
        pieces += _norm(f"{prefix}norm_pre", f"{path}pre_norm")
    for i in range(encoder.depth - 1):
        key, block = f"{prefix}blocks.{i}.", f"{path}blocks/"
        pieces += _norm(f"{key}norm1", f"{block}attention_norm", (i,))
        pieces += _linear(f"{key}attn.qkv", f"{block}qkv", (i,))
        pieces += _linear(f"{key}attn.proj", f"{block}attention_out", (i,))
        pieces += _norm(f"{key}norm2", f"{block}mlp_norm", (i,))
        pieces += _linear(f"{key}mlp.fc1", f"{block}mlp_in", (i,))
        pieces += _linear(f"{key}mlp.fc2", f"{block}mlp_out", (i,))
        if encoder.layer_scale is not None:
            pieces.append(Piece(f"{key}ls1.gamma", f"{block}attention_scale", index=(i,)))
            pieces.append(Piece(f"{key}ls2.gamma", f"{block}mlp_scale", index=(i,)))
    return pieces


def hf_clip_or_siglip(encoder: ViTConfig, prefix: str = "") -> list[Piece]:
    """`CLIPVisionModel` or `SiglipVisionModel` of transformers."""
    path, embeddings = f"vision/{encoder.name}/", f"{prefix}embeddings."
    pieces = _patch_embed(encoder, f"{embeddings}patch_embedding")
    if encoder.class_token:
        pieces.append(Piece(f"{embeddings}class_embedding", f"{path}prefix_tokens", index=(0,)))
    pieces += _positions(encoder, f"{embeddings}position_embedding.weight", leading=False)
    if encoder.pre_norm:
        pieces += _norm(f"{prefix}pre_layrnorm", f"{path}pre_norm")
    for i in range(encoder.depth - 1):
        key, block = f"{prefix}encoder.layers.{i}.", f"{path}blocks/"
        pieces += _norm(f"{key}layer_norm1", f"{block}attention_norm", (i,))
        pieces += _separate_qkv([f"{key}self_attn.{name}_proj" for name in "qkv"], f"{block}qkv", i, encoder.width)
        pieces += _linear(f"{key}self_attn.out_proj", f"{block}attention_out", (i,))
        pieces += _norm(f"{key}layer_norm2", f"{block}mlp_norm", (i,))
        pieces += _linear(f"{key}mlp.fc1", f"{block}mlp_in", (i,))
        pieces += _linear(f"{key}mlp.fc2", f"{block}mlp_out", (i,))
    return pieces


def hf_dinov2(encoder: ViTConfig, prefix: str = "") -> list[Piece]:
    """`Dinov2WithRegistersModel` of transformers. The class token's position is added to the token, as timm does it."""
    path, embeddings = f"vision/{encoder.name}/", f"{prefix}embeddings."
    tokens, positions = f"{path}prefix_tokens", f"{embeddings}position_embeddings"
    pieces = _patch_embed(encoder, f"{embeddings}patch_embeddings.projection")
    pieces += [
        Piece(f"{embeddings}cls_token", tokens, index=(slice(0, 1),), source=(0,)),
        Piece(positions, tokens, index=(slice(0, 1),), source=(0, slice(0, 1)), added=True),
        Piece(positions, f"{path}pos_embed", source=(0, slice(1, None)), resampled=True),
    ]
    if encoder.n_registers:
        pieces.append(Piece(f"{embeddings}register_tokens", tokens, index=(slice(1, None),), source=(0,)))
    for i in range(encoder.depth - 1):
        key, block = f"{prefix}encoder.layer.{i}.", f"{path}blocks/"
        attention = f"{key}attention.attention."
        pieces += _norm(f"{key}norm1", f"{block}attention_norm", (i,))
        pieces += _separate_qkv(
            [attention + name for name in ("query", "key", "value")], f"{block}qkv", i, encoder.width
        )
        pieces += _linear(f"{key}attention.output.dense", f"{block}attention_out", (i,))
        pieces += _norm(f"{key}norm2", f"{block}mlp_norm", (i,))
        pieces += _linear(f"{key}mlp.fc1", f"{block}mlp_in", (i,))
        pieces += _linear(f"{key}mlp.fc2", f"{block}mlp_out", (i,))
        pieces.append(Piece(f"{key}layer_scale1.lambda1", f"{block}attention_scale", index=(i,)))
        pieces.append(Piece(f"{key}layer_scale2.lambda1", f"{block}mlp_scale", index=(i,)))
    return pieces


def ml_mamba(config: MLMambaConfig) -> list[Piece]:
    """A checkpoint of ML-Mamba: language model and connector. It never holds the encoders."""
    return mamba2(config.language, "model/llm_backbone/") + connector(config.connector)


def _mixer(key: str, path: str, index: Index, suffixes: tuple[str, ...] | None = None) -> list[Piece]:
    """A Mamba-2 mixer. With `suffixes` the scan parameters have an axis of directions behind the layers."""
    pieces = [
        Piece(f"{key}in_proj.weight", f"{path}in_proj/kernel", TRANSPOSED, index),
        Piece(f"{key}norm.weight", f"{path}norm_weight", SAME, index),
        Piece(f"{key}out_proj.weight", f"{path}out_proj/kernel", TRANSPOSED, index),
    ]
    for k, suffix in enumerate(suffixes or ("",)):
        where = (*index, k) if suffixes else index
        pieces += [
            Piece(f"{key}conv1d{suffix}.weight", f"{path}conv_weight", DEPTHWISE, where),
            Piece(f"{key}conv1d{suffix}.bias", f"{path}conv_bias", SAME, where),
            Piece(f"{key}dt_bias{suffix}", f"{path}dt_bias", SAME, where),
            Piece(f"{key}A_log{suffix}", f"{path}A_log", SAME, where),
            Piece(f"{key}D{suffix}", f"{path}D", SAME, where),
        ]
    return pieces


def _linear(key: str, path: str, index: Index = (), layout: Layout = TRANSPOSED) -> list[Piece]:
    return [
        Piece(f"{key}.weight", f"{path}/kernel", layout, index),
        Piece(f"{key}.bias", f"{path}/bias", SAME, index),
    ]


def _norm(key: str, path: str, index: Index = ()) -> list[Piece]:
    return [
        Piece(f"{key}.weight", f"{path}/scale", SAME, index),
        Piece(f"{key}.bias", f"{path}/bias", SAME, index),
    ]


def _separate_qkv(keys: list[str], path: str, layer: int, width: int) -> list[Piece]:
    """Three linear layers side by side in one."""
    pieces = []
    for i, key in enumerate(keys):
        columns = slice(i * width, (i + 1) * width)
        pieces.append(Piece(f"{key}.weight", f"{path}/kernel", TRANSPOSED, (layer, _ALL, columns)))
        pieces.append(Piece(f"{key}.bias", f"{path}/bias", SAME, (layer, columns)))
    return pieces


def _patch_embed(encoder: ViTConfig, key: str) -> list[Piece]:
    pieces = _linear(key, f"vision/{encoder.name}/patch_embed", layout=PATCHES)
    return pieces[:1] if encoder.pre_norm else pieces


def _positions(encoder: ViTConfig, key: str, *, leading: bool) -> list[Piece]:
    """Positions of the patches, where the class token has one after its own. `leading`: behind an axis of size one."""
    path, lead = f"vision/{encoder.name}/", (0,) if leading else ()
    if not encoder.class_position:
        return [Piece(key, f"{path}pos_embed", source=lead, resampled=True)]
    return [
        Piece(key, f"{path}class_pos_embed", source=(*lead, slice(0, 1))),
        Piece(key, f"{path}pos_embed", source=(*lead, slice(1, None)), resampled=True),
    ]
