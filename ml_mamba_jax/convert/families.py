"""The families of PyTorch weights that can be converted: how each is known, where its config is, which tensors it does not need."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_mamba_jax import serialize
from ml_mamba_jax.config import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    LANGUAGE_MODELS,
    VISION_BACKBONES,
    VISION_ENCODERS,
    ConnectorConfig,
    Mamba2Config,
    MixerConfig,
    MLMambaConfig,
    ViTConfig,
)
from ml_mamba_jax.convert import tables
from ml_mamba_jax.convert.pieces import Piece
from ml_mamba_jax.errors import ConvertError, InputError
from ml_mamba_jax.names import unknown

OWN_CONFIG = "ml_mamba_jax"
"""In a config.json that `to_torch` wrote, the whole of our config: it says what the original form has no word for."""

MAX_CONFIG = 2**20
"""Bytes of a config.json."""
MAX_LAYERS = 1000
MAX_SIZE = 10**6
"""Of anything else that is counted: widths, rows, pixels."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors, by key."""


class Family(NamedTuple):
    """A family, for one part of a model: language model, encoder, or all of ML-Mamba."""

    description: str
    mark: str
    """A key that its weights hold, perhaps behind a prefix such as `visual.trunk.`."""
    read_config: Callable[[dict, Shapes, Path], MLMambaConfig]
    """(config.json or {}, shapes without prefix, path of config.json) -> config."""
    pieces: Callable[[MLMambaConfig, str], list[Piece]]
    """(config, prefix) -> the table."""
    not_needed: Callable[[MLMambaConfig], str]
    """config -> a pattern of the keys, without prefix, that our model has no use for."""


def detect(keys: Collection[str], path: Path) -> tuple[str, str]:
    """The kind of weights with these keys, and the prefix before all names.

    Raises:
        ConvertError: none of `FAMILIES`, or several models; tells what was found.
    """
    _refuse_others(keys, path)
    for kind, family in FAMILIES.items():
        if any(_is_marked(key, family) for key in keys):
            return kind, prefix_of(kind, keys, path)
    shown = ", ".join(sorted(keys)[:3])
    raise ConvertError(f"{path}: got tensors of an unknown model ({shown}, ...), expected {_expected()}")


def prefix_of(kind: str, keys: Collection[str], path: Path) -> str:
    """The prefix before the names of weights that are of this kind. Raises ConvertError where there are none, or several."""
    if kind not in FAMILIES:
        raise unknown("kind", kind, FAMILIES)
    _refuse_others(keys, path)
    family = FAMILIES[kind]
    prefixes = [key.removesuffix(family.mark) for key in keys if _is_marked(key, family)]
    if not prefixes:
        raise ConvertError(f"{path}: found no tensor {family.mark}, expected {family.description}; leave --kind away")
    if len(prefixes) > 1:
        raise ConvertError(
            f"{path}: got {len(prefixes)} models, behind {' and '.join(map(repr, sorted(prefixes)[:3]))}, expected one: "
            f"{family.description}; save the state_dict of one alone"
        )
    first = next(name for name, other in FAMILIES.items() if prefixes[0] + other.mark in keys)
    if first != kind:  # CLIP has all that SigLIP is known by
        raise ConvertError(
            f"{path}: got {FAMILIES[first].description}, expected {family.description}; leave --kind away"
        )
    return prefixes[0]


def _is_marked(key: str, family: Family) -> bool:
    return key == family.mark or key.endswith((f".{family.mark}", f"/{family.mark}"))


def _refuse_others(keys: Collection[str], path: Path) -> None:
    for name, pattern in _REFUSED.items():
        if any(re.search(pattern, key) for key in keys):
            raise ConvertError(f"{path}: got {name}, expected {_expected()}")


def _expected() -> str:
    return "one of " + "; ".join(family.description for family in FAMILIES.values())


_REFUSED = {
    "Mamba-1 weights (Cobra and mamba-* are other architectures)": r"mixer\.(x_proj|dt_proj)\.",
    "a CLIP model in OpenAI's own form": r"visual\.transformer\.resblocks\.",
    "weights for flax": r"params/.*/kernel$",
}


# Language models


_MAMBA2_ARGUMENTS = (
    *("layer", "d_state", "d_conv", "expand", "headdim", "ngroups", "norm_before_gate", "dt_limit"),
    *("bias", "conv_bias", "D_has_hdim", "rmsnorm", "d_ssm"),
    # How random parameters are made, and how the kernels run: nothing of a model that is trained.
    *("conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "chunk_size", "use_mem_eff_path"),
    "sequence_parallel",
)


def _mamba_ssm_config(config: dict, shapes: Shapes, path: Path) -> MLMambaConfig:
    read = _Fields(config, path)
    ssm = _Fields(read.get("ssm_cfg", dict, {}), path, "ssm_cfg.")
    read.only("layer norms", "rms_norm", True)
    read.only("blocks with an MLP", "d_intermediate", 0)
    read.only("attention layers", "attn_layer_idx", [])
    ssm.only("layers", "layer", "Mamba2", required=True)
    ssm.no_others(_MAMBA2_ARGUMENTS)
    for name, value in {"bias": False, "conv_bias": True, "D_has_hdim": False, "rmsnorm": True, "d_ssm": None}.items():
        ssm.only("mixers", name, value)
    mixer = MixerConfig(
        d_model=read.get("d_model", int),
        d_state=ssm.get("d_state", int, 128),
        d_conv=ssm.get("d_conv", int, 4),
        expand=ssm.get("expand", int, 2),
        head_dim=ssm.get("headdim", int, 64),
        n_groups=ssm.get("ngroups", int, 1),
        norm_before_gate=ssm.get("norm_before_gate", bool, False),
        dt_limit=_limit(ssm.get("dt_limit", list, [0.0, math.inf]), path),
    )
    language = Mamba2Config(
        mixer=mixer,
        n_layers=read.get("n_layer", int),
        vocab_size=read.get("vocab_size", int),
        vocab_multiple=read.get("pad_vocab_size_multiple", int, 8),
        tie_embeddings=read.get("tie_embeddings", bool, True),
        residual_in_float32=read.get("residual_in_fp32", bool, True),
    )
    return MLMambaConfig(language=language)


def _hf_mamba2_config(config: dict, shapes: Shapes, path: Path) -> MLMambaConfig:
    read = _Fields(config, path)
    read.only("models", "model_type", "mamba2")
    read.only("projections with bias", "use_bias", False)
    read.only("convolutions without bias", "use_conv_bias", True)
    read.only("activations", "hidden_act", "silu")
    mixer = MixerConfig(
        d_model=read.get("hidden_size", int),
        d_state=read.get("state_size", int, 128),
        d_conv=read.get("conv_kernel", int, 4),
        expand=read.get("expand", int, 2),
        head_dim=read.get("head_dim", int, 64),
        n_groups=read.get("n_groups", int, 8),
        norm_eps=read.get("layer_norm_epsilon", float, 1e-5),
        # transformers has `norm_before_gate` in its config, but its code never reads it: the gate comes first.
        dt_limit=_limit(read.get("time_step_limit", list, [0.0, math.inf]), path),
    )
    language = Mamba2Config(
        mixer=mixer,
        n_layers=read.get("num_hidden_layers", int),
        vocab_size=read.get("vocab_size", int),
        vocab_multiple=1,
        norm_eps=read.get("layer_norm_epsilon", float, 1e-5),
        tie_embeddings=read.get("tie_word_embeddings", bool, False),
        residual_in_float32=read.get("residual_in_fp32", bool, True),
    )
    return MLMambaConfig(language=language)


def _limit(values: list, path: Path) -> tuple[float, float]:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    numbers = [value.get("__float__") if isinstance(value, dict) else value for value in values]
    try:
        low, high = map(float, numbers)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{path}: got limits {values} of the step size, expected two numbers") from error
    return low, high


# Encoders


def _hf_vision_config(config: dict, shapes: Shapes, path: Path) -> MLMambaConfig:
    """CLIP, SigLIP or DINOv2 of transformers; a model of images and text holds the config of its encoder inside."""
    read = _Fields(config, path)
    if "vision_config" in config:
        read = _Fields(read.get("vision_config", dict), path, "vision_config.")
    is_dinov2, is_clip = "embeddings.cls_token" in shapes, "embeddings.class_embedding" in shapes
    like = VISION_ENCODERS["dinov2-vit-l" if is_dinov2 else "clip-vit-l" if is_clip else "siglip-vit-so400m"]
    width = read.get("hidden_size", int, 768)
    if is_dinov2:
        read.only("blocks with SwiGLU", "use_swiglu_ffn", False)
        mlp_dim = int(width * read.get("mlp_ratio", float, 4.0))
    else:
        mlp_dim = read.get("intermediate_size", int, 3072)
    activations = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
    encoder = dataclasses.replace(
        like,
        image_size=read.get("image_size", int, 224),
        patch_size=read.get("patch_size", int, 32 if is_clip else 16),
        width=width,
        depth=read.get("num_hidden_layers", int, 12),
        n_heads=read.get("num_attention_heads", int, 12),
        mlp_dim=mlp_dim,
        n_registers=_axis(shapes, "embeddings.register_tokens", 1),
        norm_eps=read.get("layer_norm_eps", float, like.norm_eps),
        activation=activations[
            read.one_of("hidden_act", activations, {v: k for k, v in activations.items()}[like.activation])
        ],
    )
    return MLMambaConfig(language=None, vision=(encoder,))


def _timm_config(config: dict, shapes: Shapes, path: Path) -> MLMambaConfig:
    """timm's files hold no numbers of heads, images or channels: the structure must be that of a known encoder.

    What tells encoders of one structure apart is in timm's config.json: statistics of the images, and CLIP's activation.
    """
    projection, positions = shapes["patch_embed.proj.weight"], shapes.get("pos_embed", ())
    if len(projection) != 4 or len(positions) != 3:
        raise ConvertError(
            f"{path}: got patch_embed.proj.weight {list(projection)} and pos_embed {list(positions)}, "
            "expected [d 3 y x] and [1 l d] of a ViT of timm"
        )
    structure = {
        "width": projection[0],
        "patch_size": projection[2],
        "depth": len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        "mlp_dim": _axis(shapes, "blocks.0.mlp.fc1.weight", 0),
        "class_token": "cls_token" in shapes,
        "n_registers": _axis(shapes, "reg_token", 1),
        "pre_norm": "norm_pre.weight" in shapes,
    }
    alike = [e for e in VISION_ENCODERS.values() if all(getattr(e, k) == v for k, v in structure.items())]
    if not alike:
        found = ", ".join(f"{name} {value}" for name, value in structure.items())
        raise ConvertError(
            f"{path}: got a ViT with {found}, expected that of one of {', '.join(VISION_ENCODERS)}; "
            f"write the fields of our config into config.json under {OWN_CONFIG!r}"
        )
    n_patches = positions[1] - int(alike[0].class_position)
    fitting = [encoder for encoder in alike if encoder.n_patches == n_patches]
    image_size = math.isqrt(n_patches) * projection[2]
    encoder = fitting[0] if fitting else dataclasses.replace(alike[0], image_size=image_size)
    return MLMambaConfig(language=None, vision=(_as_timm_says(encoder, config, path),))


def _as_timm_says(encoder: ViTConfig, config: dict, path: Path) -> ViTConfig:
    """The encoder with the statistics and the activation of timm's config.json, as far as that names them."""
    read = _Fields(config, path)
    pretrained = _Fields(read.get("pretrained_cfg", dict, {}), path, "pretrained_cfg.")
    statistics = {}
    for name in ("mean", "std"):
        values = pretrained.get(name, list, list(getattr(encoder, name)))
        if len(values) != 3 or not all(isinstance(value, int | float) and 0 < value < 1 for value in values):
            raise ConvertError(f"{path}: pretrained_cfg.{name}: got {values}, expected three numbers between 0 and 1")
        statistics[name] = tuple(map(float, values))
    encoder = dataclasses.replace(encoder, **statistics)
    architecture = read.get("architecture", str, "")
    if encoder.name == "clip" and architecture:
        # Of timm's CLIPs those of OpenAI alone have the quick GELU; older versions say so in the tag only.
        tag = pretrained.get("tag", str, "")
        quick = "quickgelu" in architecture or ".openai" in architecture or tag.startswith("openai")
        encoder = dataclasses.replace(encoder, activation="quick_gelu" if quick else "gelu")
    return encoder


def assumption(kind: str, has_config: bool, config: MLMambaConfig) -> str | None:
    """What is taken for granted of weights that come without their config, in words; None where nothing is."""
    if kind != "timm-vit" or has_config:
        return None
    encoder = config.vision[0]
    return f"activation {encoder.activation}, mean {encoder.mean}, std {encoder.std}, as published for {encoder.name}"


def _axis(shapes: Shapes, key: str, axis: int) -> int:
    """Size of an axis of a tensor; 0 where there is no such tensor, or no such axis, which the plan then tells."""
    return dict(enumerate(shapes.get(key, ()))).get(axis, 0)


# All of ML-Mamba


def _ml_mamba_config(config: dict, shapes: Shapes, path: Path) -> MLMambaConfig:
    """The config of a run names the parts; what the connector is made of is seen from its tensors."""
    model = _Fields(_Fields(config, path).get("model", dict), path, "model.")
    language = LANGUAGE_MODELS[model.one_of("llm_backbone_id", LANGUAGE_MODELS)]
    vision = VISION_BACKBONES[model.one_of("vision_backbone_id", VISION_BACKBONES)]
    arch = model.get("arch_specifier", str)
    projectors = (
        "fused-gelu-mlp",
        "fused-ldpnet",
        "gelu-mlp",
        "linear",
    )  # a longer name before the one that it ends with
    projector = next((name for name in projectors if arch.endswith(name)), None)
    if projector is None:
        raise ConvertError(f"{path}: model.arch_specifier: got {arch!r}, expected an end of {', '.join(projectors)}")
    layer = "model/bidirectional_mamba/layers."
    if not any(key.startswith(layer) for key in shapes):
        scan, n_layers = "none", 2
    else:
        n_layers = len({key.removeprefix(layer).split(".")[0] for key in shapes if key.startswith(layer)})
        advanced = f"{layer}0.mlp.w1.weight" in shapes
        scan = "advanced" if advanced else "basic" if f"{layer}0.norm.weight" in shapes else "vss-l2"
    crossed = f"{layer}0.mixer.conv1d_c.weight" in shapes
    return MLMambaConfig(
        language=language,
        vision=vision,
        connector=ConnectorConfig(
            mixer=language.mixer,
            scan=scan,
            n_layers=n_layers,
            directions=CROSS_SCAN if crossed else BIDIRECTIONAL_SCAN,
            projector=projector,
        ),
        resize=model.one_of("image_resize_strategy", ("resize-naive", "resize-crop", "letterbox")),
        dtype="bfloat16",
    )


class _Fields:
    """A JSON object whose fields are read with their types."""

    def __init__(self, fields: dict, path: Path, name: str = ""):
        self._fields, self._path, self._name = fields, path, name

    def get(self, name: str, of: type | tuple[type, ...], default: Any = None) -> Any:
        value = self._fields.get(name, default)
        if value is None:
            raise ConvertError(f"{self._path}: found no {self._name}{name}, expected it in config.json")
        if of is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, of) or (of is int and isinstance(value, bool)):
            raise ConvertError(
                f"{self._path}: {self._name}{name}: got {value!r}, expected {getattr(of, '__name__', of)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConvertError(f"{self._path}: {self._name}{name}: got {value}, expected a finite number")
        return value

    def only(self, what: str, name: str, value: Any, *, required: bool = False) -> None:
        """Refuse a field with another value: this model has no such thing."""
        got = self._fields.get(name, None if required else value)
        if got != value and not (got is None and not required):
            raise ConvertError(
                f"{self._path}: {self._name}{name}: got {got!r}, expected {value!r}: no other {what} here"
            )

    def one_of(self, name: str, known: Collection[str], default: str | None = None) -> str:
        value = self.get(name, str, default)
        if value not in known:
            raise ConvertError(f"{self._path}: {unknown(f'{self._name}{name}', value, known)}")
        return value

    def no_others(self, known: Collection[str]) -> None:
        """Refuse fields of which nobody knows what they do."""
        for name in self._fields:
            if name not in known:
                raise ConvertError(f"{self._path}: {unknown(f'field of {self._name[:-1]}', name, known)}")


def _last_block(pattern: str) -> Callable[[MLMambaConfig], str]:
    """Keys behind the second-to-last block; `{last}` stands for the last one."""
    return lambda config: pattern.replace("{last}", str(config.vision[0].depth - 1))


FAMILIES: dict[str, Family] = {
    "ml-mamba": Family(
        "a run of ML-Mamba (config.json and checkpoints/latest-checkpoint.pt)",
        "model/llm_backbone/backbone.embedding.weight",
        _ml_mamba_config,
        lambda config, prefix: tables.ml_mamba(config),
        lambda config: r"(?!model/)",
    ),
    "mamba2": Family(
        "a Mamba-2 language model of state-spaces/mamba",
        "backbone.embedding.weight",
        _mamba_ssm_config,
        lambda config, prefix: tables.mamba2(config.language, prefix),
        lambda config: r"$^",
    ),
    "hf-mamba2": Family(
        "Mamba2ForCausalLM of transformers",
        "backbone.embeddings.weight",
        _hf_mamba2_config,
        lambda config, prefix: tables.mamba2(config.language, prefix, "embeddings"),
        lambda config: r"$^",
    ),
    "timm-vit": Family(
        "a vision transformer of timm or open_clip",
        "patch_embed.proj.weight",
        _timm_config,
        lambda config, prefix: tables.timm_vit(config.vision[0], prefix),
        _last_block(r"blocks\.{last}\.|norm\.|fc_norm\.|head|attn_pool\.|mask_token"),
    ),
    "hf-dinov2": Family(
        "Dinov2WithRegistersModel of transformers",
        "embeddings.patch_embeddings.projection.weight",
        _hf_vision_config,
        lambda config, prefix: tables.hf_dinov2(config.vision[0], prefix),
        _last_block(r"encoder\.layer\.{last}\.|layernorm\.|embeddings\.mask_token|classifier"),
    ),
    "hf-clip": Family(
        "CLIPVisionModel of transformers",
        "embeddings.class_embedding",
        _hf_vision_config,
        lambda config, prefix: tables.hf_clip_or_siglip(config.vision[0], prefix),
        _last_block(r"encoder\.layers\.{last}\.|post_layernorm\.|head\.|embeddings\.position_ids"),
    ),
    "hf-siglip": Family(
        "SiglipVisionModel of transformers",
        "embeddings.patch_embedding.weight",
        _hf_vision_config,
        lambda config, prefix: tables.hf_clip_or_siglip(config.vision[0], prefix),
        _last_block(r"encoder\.layers\.{last}\.|post_layernorm\.|head\.|embeddings\.position_ids"),
    ),
}


def read_config(kind: str, text: str | None, shapes: Shapes, path: Path) -> MLMambaConfig:
    """The config of weights: from the text of their config.json where they have one, and from the shapes of their tensors.

    Raises:
        ConvertError: no config.json where one is needed, one that cannot be read, or a model that is not ours; names the field.
    """
    if text is not None:
        fields = _parse(text, path)
    elif kind == "timm-vit":
        fields = {}
    else:
        raise ConvertError(f"{path}: found no such file, expected the config of {FAMILIES[kind].description}")
    try:
        if OWN_CONFIG in fields:
            config = serialize.from_json(MLMambaConfig, json.dumps(fields[OWN_CONFIG]), f"{path}: {OWN_CONFIG}")
            _check_parts(config, kind, path)
        else:
            config = FAMILIES[kind].read_config(fields, shapes, path)
    except InputError as error:
        raise ConvertError(str(error)) from error
    except ValueError as error:  # a config that checks itself
        raise ConvertError(f"{path}: {error}") from error
    _check_sizes(config, path)
    return config


def _check_parts(config: MLMambaConfig, kind: str, path: Path) -> None:
    """A config of ours that stands beside weights of this kind describes them, and nothing that they are not."""
    whole, language = kind == "ml-mamba", kind in ("mamba2", "hf-mamba2")
    expected = {"language": whole or language, "vision": not language, "connector": whole}
    got = {name: bool(getattr(config, name)) for name in expected}
    if got != expected or (len(config.vision) > 1 and not whole):
        parts = [name for name in ("language", "connector") if got[name]] + [encoder.name for encoder in config.vision]
        raise ConvertError(
            f"{path}: {OWN_CONFIG}: got a model of {', '.join(parts)}, expected the config of {FAMILIES[kind].description}"
        )


def read_text(path: Path) -> str | None:
    """The text of a config.json, None where there is none. Raises ConvertError for one that cannot be read."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise ConvertError(f"{path}: got more than {MAX_CONFIG} bytes, expected the config of a model")
        return text.decode("utf-8")
    except OSError as error:
        raise ConvertError(f"{path}: cannot read the file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path}: cannot be read as JSON: {error}") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, or nested without end
        raise ConvertError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConvertError(f"{path}: got {type(fields).__name__}, expected an object")
    return fields


def _check_sizes(config: MLMambaConfig, path: Path) -> None:
    """A table has pieces for every layer, and there is a largest array: nonsense is told before either is made."""
    language, connector = config.language, config.connector
    mixers = [part.mixer for part in (language, connector) if part]
    sizes = [("rows of the embedding", language.padded_vocab_size)] if language else []
    sizes += [("features of a mixer", mixer.in_proj_features) for mixer in mixers]
    sizes += [
        (field.name, getattr(part, field.name))
        for part in (*mixers, *config.vision)
        for field in dataclasses.fields(part)
        if isinstance(getattr(part, field.name), int)
    ]
    layers = [("layers", part.n_layers) for part in (language, connector) if part]
    layers += [("layers", encoder.depth) for encoder in config.vision]
    for most, numbers in ((MAX_LAYERS, layers), (MAX_SIZE, sizes)):
        for name, number in numbers:
            if number > most:
                raise ConvertError(f"{path}: got {number} {name}, expected at most {most}")
