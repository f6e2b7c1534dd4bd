"""Weights are known by their tensors, and every config that is not ours is one line that names its file and field."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_mamba_jax import serialize
from ml_mamba_jax.config import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    LANGUAGE_MODELS,
    NAMED,
    VISION_BACKBONES,
    VISION_ENCODERS,
    ConnectorConfig,
    MLMambaConfig,
)
from ml_mamba_jax.convert.families import FAMILIES, detect, prefix_of, read_config, read_text
from ml_mamba_jax.convert.plan import make_plan
from ml_mamba_jax.convert.source import open_source
from ml_mamba_jax.errors import ConvertError, InputError
from tests.convert.small_weights import (
    HF_MAMBA2,
    LANGUAGE,
    MAMBA_SSM,
    MIXER,
    SMALL_ENCODERS,
    TINY,
    run,
    timm,
    write_hf_mamba2,
    write_hf_vision,
    write_json,
    write_mamba_ssm,
    write_run,
    write_timm,
)

SRC = Path("src")


def found(folder: Path, kind: str | None = None) -> tuple[str, MLMambaConfig, list]:
    """Kind, config and problems of a source."""
    with open_source(folder, kind) as source:
        return source.kind, source.config, make_plan(source).problems


# Detection


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One folder of every kind."""
    root = tmp_path_factory.mktemp("sources")
    return {
        "ml-mamba": write_run(root / "run", encoders=False),
        "mamba2": write_mamba_ssm(root / "ssm"),
        "hf-mamba2": write_hf_mamba2(root / "hf"),
        "timm-vit": write_timm(root / "timm", SMALL_ENCODERS["siglip-vit-so400m"]),
        "hf-dinov2": write_hf_vision(root / "dinov2", "hf-dinov2"),
        "hf-clip": write_hf_vision(root / "clip", "hf-clip"),
        "hf-siglip": write_hf_vision(root / "siglip", "hf-siglip"),
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_is_known_by_its_tensors(sources, kind):
    assert found(sources[kind])[0] == kind and found(sources[kind])[2] == []


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("said", FAMILIES)
def test_kinds_that_are_said(sources, kind, said):
    if kind == said:
        assert found(sources[kind], said)[0] == kind
    elif (kind, said) == ("ml-mamba", "mamba2"):  # a run holds such a language model, but not its config
        message = (
            r"run/config\.json: ml_mamba_jax: got a model of language, connector, dinov2, siglip, expected the config"
        )
        with pytest.raises(ConvertError, match=message):
            found(sources[kind], said)
    else:
        with pytest.raises(ConvertError, match=r": (found no tensor|got) .*, expected .*; leave --kind away"):
            found(sources[kind], said)


def test_an_unknown_kind_gets_a_suggestion(sources):
    with pytest.raises(InputError, match="unknown kind 'mamba-2'; did you mean 'mamba2'"):
        found(sources["mamba2"], "mamba-2")


def rekeyed(tensors: dict, change) -> dict:
    return {change(key): tensor.clone() for key, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "visual.trunk.", "backbone.", "module.", "model.vision_backbone.featurizer."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "teacher", "module"])
def test_prefixes_and_wrappers(tmp_path, prefix, wrapper):
    encoder = SMALL_ENCODERS["dinov2-vit-l"]
    folder = write_timm(tmp_path / "vit", encoder)
    (folder / "model.safetensors").unlink()
    tensors = rekeyed(timm(encoder), lambda key: prefix + key)
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, folder / "pytorch_model.bin")
    kind, config, problems = found(folder)
    assert (kind, config.vision, problems) == ("timm-vit", (encoder,), [])


def test_the_trunk_of_open_clip_is_found_among_its_text_tower(tmp_path):
    encoder = SMALL_ENCODERS["siglip-vit-so400m"]
    folder = write_timm(tmp_path / "vit", encoder)
    tensors = rekeyed(timm(encoder), lambda key: f"visual.trunk.{key}")
    text = {
        "text.token_embedding.weight": torch.ones(9, 4),
        "logit_scale": torch.ones(1),
        "text.blocks.0.w": torch.ones(2),
    }
    (folder / "model.safetensors").unlink()
    torch.save(tensors | text, folder / "open_clip_pytorch_model.bin")
    with open_source(folder) as source:
        plan = make_plan(source)
    not_needed = {finding.key for finding in plan.findings if finding.what == "not needed"}
    assert plan.problems == [] and text.keys() <= not_needed
    assert {key for key in tensors if "blocks.2." in key or "attn_pool" in key} <= not_needed


@pytest.mark.parametrize("kind", ["hf-siglip", "hf-clip"])
@pytest.mark.parametrize("whole", [False, True], ids=["older transformers", "with text tower"])
def test_vision_models_behind_a_prefix(sources, tmp_path, kind, whole):
    """Older versions wrote `vision_model.` before the keys; a model of images and text holds two of everything."""
    tensors = safetensors.torch.load_file(sources[kind] / "model.safetensors")
    config = json.loads((sources[kind] / "config.json").read_text())
    tensors = rekeyed(tensors, lambda key: f"vision_model.{key}")
    if whole:
        tensors |= {
            "text_model.embeddings.token_embedding.weight": torch.ones(9, 4),
            "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(4),
            "logit_scale": torch.ones(()),
        }
        text = {"hidden_size": 4, "num_hidden_layers": 1}
        config = {"model_type": kind[3:], "text_config": text, "vision_config": config, "projection_dim": 4}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config)
    assert found(tmp_path) == found(sources[kind])


def test_two_models_in_one_file_are_refused(tmp_path):
    encoder = SMALL_ENCODERS["dinov2-vit-l"]
    folder = write_timm(tmp_path / "vit", encoder)
    both = rekeyed(timm(encoder), lambda key: f"featurizer.{key}") | rekeyed(timm(encoder), lambda key: f"fused.{key}")
    safetensors.torch.save_file(both, folder / "model.safetensors")
    for kind in (None, "timm-vit"):
        with pytest.raises(ConvertError, match=r"vit: got 2 models, behind 'featurizer\.' and 'fused\.', expected one"):
            found(folder, kind)


def test_a_mark_is_a_whole_name():
    with pytest.raises(
        ConvertError, match=r"src: got tensors of an unknown model \(mybackbone\.embedding\.weight, \.\.\.\)"
    ):
        detect(["mybackbone.embedding.weight"], SRC)
    assert detect(["my.backbone.embedding.weight"], SRC) == ("mamba2", "my.")
    assert prefix_of("mamba2", ["backbone.embedding.weight"], SRC) == ""


MAMBA1 = "Mamba-1 weights"
REFUSED = {
    "backbone.layers.0.mixer.x_proj.weight": MAMBA1,
    "model/llm_backbone/llm.backbone.layers.0.mixer.dt_proj.bias": MAMBA1,  # Cobra
    "visual.transformer.resblocks.0.attn.in_proj_weight": "CLIP model in OpenAI's own form",
    "params/language/blocks/mixer/in_proj/kernel": "weights for flax",
}


@pytest.mark.parametrize(("key", "message"), REFUSED.items())
@pytest.mark.parametrize("kind", [None, "mamba2"])
def test_other_architectures_are_refused_by_name(tmp_path, key, message, kind):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"backbone.embedding.weight": torch.ones(2, 2), key: torch.ones(2)}, path)
    with pytest.raises(ConvertError, match=rf"w\.safetensors: got (a )?{message}.*, expected one of a run of ML-Mamba"):
        found(path, kind)


def test_what_nobody_knows_is_refused_with_what_was_found(tmp_path):
    safetensors.torch.save_file({"b": torch.ones(2), "a": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(
        ConvertError, match=r"w\.safetensors: got tensors of an unknown model \(a, b, \.\.\.\), expected one of"
    ):
        found(tmp_path / "w.safetensors")


# Configs of language models


def read_beside(kind: str, shapes: dict, folder: Path) -> MLMambaConfig:
    """The config of tensors of these shapes in a folder."""
    path = folder / "config.json"
    return read_config(kind, read_text(path), shapes, path)


def read(kind: str, fields: dict, tmp_path: Path, shapes: dict | None = None) -> MLMambaConfig:
    write_json(tmp_path / "config.json", fields)
    return read_beside(kind, shapes or {}, tmp_path)


def test_mamba_ssm_config(tmp_path):
    assert read("mamba2", MAMBA_SSM, tmp_path) == MLMambaConfig(language=LANGUAGE)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_published_mamba_ssm_configs(tmp_path, name):
    """As on the hub: 50277 entries, padded to 50288 rows."""
    sizes = {"d_model": LANGUAGE_MODELS[name].mixer.d_model, "n_layer": LANGUAGE_MODELS[name].n_layers}
    published = MAMBA_SSM | sizes | {"vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    config = read("mamba2", published, tmp_path)
    assert config.language == LANGUAGE_MODELS[name] and config.language.padded_vocab_size == 50288


@pytest.mark.parametrize(
    ("ssm", "numbers"),
    [
        ({"ngroups": 2}, {"n_groups": 2}),
        ({"d_state": 64, "headdim": 32}, {"d_state": 64, "head_dim": 32}),
        ({"norm_before_gate": True}, {"norm_before_gate": True}),
        ({"d_conv": 3, "expand": 4}, {"d_conv": 3, "expand": 4}),
        ({"dt_limit": [0.001, 0.5]}, {"dt_limit": (0.001, 0.5)}),
        ({"chunk_size": 64, "use_mem_eff_path": False, "dt_min": 0.1, "bias": False, "conv_bias": True}, {}),
    ],
)
def test_mixers_of_other_sizes(tmp_path, ssm, numbers):
    fields = MAMBA_SSM | {"ssm_cfg": MAMBA_SSM["ssm_cfg"] | ssm}
    expected = {"d_state": 8, "head_dim": 16} | numbers
    mixer = read("mamba2", fields, tmp_path).language.mixer
    assert {name: getattr(mixer, name) for name in expected} == expected


def test_hf_mamba2_config(tmp_path):
    expected = serialize.plain(MLMambaConfig(language=LANGUAGE))
    expected["language"] |= {"vocab_size": 272, "vocab_multiple": 1}
    assert serialize.plain(read("hf-mamba2", HF_MAMBA2, tmp_path)) == expected
    infinity = HF_MAMBA2 | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert serialize.plain(read("hf-mamba2", infinity, tmp_path)) == expected
    other = HF_MAMBA2 | {"n_groups": 2, "tie_word_embeddings": False, "norm_before_gate": True, "layer_norm_epsilon": 1}
    config = read("hf-mamba2", other, tmp_path).language
    assert config.mixer.n_groups == 2 and not config.tie_embeddings and config.norm_eps == config.mixer.norm_eps == 1
    assert not config.mixer.norm_before_gate, "transformers never reads that field"


def test_defaults_are_those_of_transformers(tmp_path):
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config

    theirs = Mamba2Config()
    needed = {name: getattr(theirs, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    ours = read("hf-mamba2", needed, tmp_path).language
    assert ours.mixer.d_state == theirs.state_size and ours.mixer.n_groups == theirs.n_groups
    assert (ours.mixer.d_conv, ours.mixer.expand) == (theirs.conv_kernel, theirs.expand)
    assert (ours.mixer.head_dim, ours.mixer.norm_eps) == (theirs.head_dim, theirs.layer_norm_epsilon)
    assert ours.mixer.dt_limit == (0, math.inf) and ours.residual_in_float32 == theirs.residual_in_fp32
    assert ours.tie_embeddings == theirs.tie_word_embeddings


# Configs of encoders


@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_encoders_of_timm_are_known_by_their_shapes(tmp_path, name):
    """Those of one structure differ in image size, which the positions tell; DINOv2 comes with 37 x 37."""
    encoder, width = VISION_ENCODERS[name], VISION_ENCODERS[name].width
    shapes = {
        "patch_embed.proj.weight": (width, 3, encoder.patch_size, encoder.patch_size),
        "pos_embed": (1, encoder.n_patches + encoder.class_position, width),
        "blocks.0.mlp.fc1.weight": (encoder.mlp_dim, width),
    }
    shapes |= {f"blocks.{i}.norm1.weight": (width,) for i in range(encoder.depth)}
    shapes |= {"cls_token": (1, 1, width)} if encoder.class_token else {}
    shapes |= {"reg_token": (1, 4, width)} if encoder.n_registers else {}
    shapes |= {"norm_pre.weight": (width,)} if encoder.pre_norm else {}
    assert read_beside("timm-vit", shapes, tmp_path).vision == (encoder,)
    if encoder.name == "dinov2":
        published = shapes | {"pos_embed": (1, 37 * 37, width)}
        (found_encoder,) = read_beside("timm-vit", published, tmp_path).vision
        assert (found_encoder.image_size, found_encoder.n_patches) == (518, 37 * 37)


@pytest.mark.parametrize("name", ["dinov2-vit-l", "clip-vit-b", "siglip-vit-so400m"])
def test_configs_of_transformers_give_our_encoders(sources, name):
    encoder = SMALL_ENCODERS[name]
    (mine,) = found(sources[f"hf-{encoder.name}"])[1].vision
    fields = {"activation": mine.activation, "layer_scale": mine.layer_scale, "norm_eps": mine.norm_eps}
    expected = {"activation": {"siglip": "gelu_tanh"}.get(encoder.name, encoder.activation)}
    expected |= {"layer_scale": encoder.layer_scale, "norm_eps": 1e-5 if encoder.name == "clip" else 1e-6}
    assert fields == expected
    assert serialize.plain(mine) == serialize.plain(encoder) | expected | {"crop_fraction": mine.crop_fraction}


# Configs of runs


def reference(**model) -> dict:
    """config.json of the reference's run, cut to what matters."""
    fields = {
        "model_id": "mlmamba+3b",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "llm_backbone_id": "mamba2-2.7b",
        "vision_backbone_id": "dinosiglip-vit-so-384px",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
        "type": "mlmamba+3b",
    }
    return {"dataset": {"type": "llava-v15"}, "model": fields | model, "seed": 7, "stage": "finetune"}


def run_shapes(**connector) -> dict[str, tuple[int, ...]]:
    """Shapes of a small run: only which tensors there are matters."""
    vision = (SMALL_ENCODERS["siglip-vit-so400m"],)
    mine = ConnectorConfig(mixer=MIXER, **{"pooled_grid": (2, 2)} | connector)
    content = run(MLMambaConfig(language=LANGUAGE, vision=vision, connector=mine))["model"]
    return {f"model/{part}/{key}": tuple(t.shape) for part, tensors in content.items() for key, t in tensors.items()}


def test_the_released_run(tmp_path):
    assert read("ml-mamba", reference(), tmp_path, run_shapes()) == NAMED["ml-mamba-3b"]


WITH_IDS = [name for name, config in NAMED.items() if config.connector and config.vision in VISION_BACKBONES.values()]


@pytest.mark.parametrize("name", WITH_IDS)
def test_every_named_variant_is_read_back(tmp_path, name):
    config = NAMED[name]
    connector = config.connector
    ids = {"llm_backbone_id": next(k for k, v in LANGUAGE_MODELS.items() if v == config.language)}
    ids |= {"arch_specifier": f"no-align+{connector.projector}"}
    ids |= {"vision_backbone_id": next(k for k, v in VISION_BACKBONES.items() if v == config.vision)}
    numbers = {"scan": connector.scan, "directions": connector.directions, "n_layers": connector.n_layers}
    shapes = run_shapes(projector=connector.projector, **numbers)
    assert read("ml-mamba", reference(**ids), tmp_path, shapes) == config


@pytest.mark.parametrize("directions", [BIDIRECTIONAL_SCAN, CROSS_SCAN], ids=["bsm", "csm"])
@pytest.mark.parametrize("scan", ["none", "basic", "advanced", "vss-l2"])
def test_the_connector_is_seen_from_its_tensors(tmp_path, scan, directions):
    shapes = run_shapes(scan=scan, directions=directions, n_layers=3, projector="gelu-mlp")
    connector = read("ml-mamba", reference(arch_specifier="gelu-mlp"), tmp_path, shapes).connector
    assert (connector.scan, connector.projector) == (scan, "gelu-mlp")
    if scan != "none":
        assert (connector.directions, connector.n_layers) == (directions, 3)


@pytest.mark.parametrize("vision", VISION_BACKBONES)
@pytest.mark.parametrize("resize", ["resize-naive", "resize-crop", "letterbox"])
def test_ids_of_the_reference(tmp_path, vision, resize):
    fields = reference(vision_backbone_id=vision, image_resize_strategy=resize, llm_backbone_id="mamba2-130m")
    config = read("ml-mamba", fields, tmp_path, run_shapes(projector="fused-ldpnet"))
    assert (config.vision, config.resize, config.language) == (
        VISION_BACKBONES[vision],
        resize,
        LANGUAGE_MODELS["mamba2-130m"],
    )


# What is refused

REFUSED_FIELDS = [
    ("mamba2", {"ssm_cfg": {}}, r"ssm_cfg\.layer: got None, expected 'Mamba2'"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba1"}}, r"ssm_cfg\.layer: got 'Mamba1', expected 'Mamba2'"),
    ("mamba2", {"ssm_cfg": "Mamba2"}, r"ssm_cfg: got 'Mamba2', expected dict"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "bias": True}}, r"ssm_cfg\.bias: got True, expected False"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "conv_bias": False}}, r"ssm_cfg\.conv_bias: got False"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, r"ssm_cfg\.D_has_hdim: got True"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, r"ssm_cfg\.rmsnorm: got False"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 16}}, r"ssm_cfg\.d_ssm: got 16"),
    (
        "mamba2",
        {"ssm_cfg": {"layer": "Mamba2", "head_dim": 16}},
        r"unknown field of ssm_cfg 'head_dim'; did you mean 'headdim'",
    ),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [1]}}, r"got limits \[1\] of the step size, expected two"),
    ("mamba2", {"d_intermediate": 2048}, r"d_intermediate: got 2048, expected 0: no other blocks with an MLP here"),
    ("mamba2", {"attn_layer_idx": [9, 18]}, r"attn_layer_idx: got \[9, 18\], expected \[\]: no other attention"),
    ("mamba2", {"rms_norm": False}, r"rms_norm: got False, expected True: no other layer norms"),
    ("mamba2", {"d_model": None}, r"found no d_model, expected it in config\.json"),
    ("mamba2", {"d_model": 32.0}, r"d_model: got 32\.0, expected int"),
    ("mamba2", {"d_model": True}, r"d_model: got True, expected int"),
    ("mamba2", {"d_model": "32"}, r"d_model: got '32', expected int"),
    ("mamba2", {"d_model": -32}, r"MixerConfig: got d_model -32, expected at least 1"),
    ("mamba2", {"d_model": 10**9}, r"got \d+ features of a mixer, expected at most 1000000"),
    ("mamba2", {"n_layer": 0}, r"Mamba2Config: got n_layers 0"),
    ("mamba2", {"n_layer": 10**9}, r"got 1000000000 layers, expected at most 1000"),
    ("mamba2", {"vocab_size": 10**9}, r"got 1000000000 rows of the embedding"),
    ("mamba2", {"tie_embeddings": 1}, r"tie_embeddings: got 1, expected bool"),
    ("hf-mamba2", {"model_type": "mamba"}, r"model_type: got 'mamba', expected 'mamba2'"),
    ("hf-mamba2", {"use_bias": True}, r"use_bias: got True, expected False: no other projections with bias"),
    ("hf-mamba2", {"use_conv_bias": False}, r"use_conv_bias: got False, expected True"),
    ("hf-mamba2", {"hidden_act": "gelu"}, r"hidden_act: got 'gelu', expected 'silu'"),
    ("hf-mamba2", {"head_dim": 24}, r"MixerConfig: got d_inner 64, expected a multiple of head_dim 24"),
    ("hf-mamba2", {"n_groups": 3}, r"MixerConfig: got 4 heads, expected a multiple of n_groups 3"),
    ("hf-mamba2", {"layer_norm_epsilon": "small"}, r"layer_norm_epsilon: got 'small', expected float"),
    ("hf-mamba2", {"layer_norm_epsilon": math.nan}, r"layer_norm_epsilon: got nan, expected a finite number"),
    ("hf-mamba2", {"time_step_limit": [0, "many"]}, r"got limits \[0, 'many'\] of the step size"),
    ("hf-siglip", {"hidden_act": "relu"}, r"unknown hidden_act 'relu'; did you mean"),
    ("hf-siglip", {"num_attention_heads": 5}, r"ViTConfig: got width 768, expected a multiple of n_heads 5"),
    ("hf-siglip", {"patch_size": 500}, r"ViTConfig: got image_size 224, expected at least one patch of 500"),
    ("hf-siglip", {"vision_config": "large"}, r"vision_config: got 'large', expected dict"),
    ("hf-clip", {"vision_config": {"hidden_size": "x"}}, r"vision_config\.hidden_size: got 'x', expected int"),
    ("hf-dinov2", {"use_swiglu_ffn": True}, r"use_swiglu_ffn: got True, expected False"),
    ("hf-dinov2", {"mlp_ratio": math.inf}, r"mlp_ratio: got inf, expected a finite number"),
    ("ml-mamba", {"model": None}, r"found no model, expected it in config\.json"),
    ("ml-mamba", {"model": []}, r"model: got \[\], expected dict"),
    (
        "ml-mamba",
        reference(llm_backbone_id="mamba2-2.8b"),
        r"unknown model\.llm_backbone_id 'mamba2-2\.8b'; did you mean 'mamba2-2\.7b'",
    ),
    (
        "ml-mamba",
        reference(vision_backbone_id="dinosiglip-vit-so-384"),
        r"unknown model\.vision_backbone_id .*; did you mean 'dinosiglip-vit-so-384px'",
    ),
    (
        "ml-mamba",
        reference(arch_specifier="no-align+mlp"),
        r"model\.arch_specifier: got 'no-align\+mlp', expected an end",
    ),
    (
        "ml-mamba",
        reference(image_resize_strategy="letter-box"),
        r"unknown model\.image_resize_strategy 'letter-box'; did you mean 'letterbox'",
    ),
    (
        "ml-mamba",
        {"ml_mamba_jax": {"languag": 1}},
        r"unknown field of .*ml_mamba_jax 'languag'; did you mean 'language'",
    ),
    ("timm-vit", {"ml_mamba_jax": {"language": None}}, r"ml_mamba_jax: MLMambaConfig: got no part"),
    (
        "timm-vit",
        {"ml_mamba_jax": serialize.plain(TINY.replace(language=None, connector=None))},
        r"model of dinov2, siglip",
    ),
    (
        "timm-vit",
        {"ml_mamba_jax": serialize.plain(MLMambaConfig(language=LANGUAGE))},
        r"got a model of language, expected",
    ),
    (
        "ml-mamba",
        {"ml_mamba_jax": serialize.plain(MLMambaConfig(language=LANGUAGE))},
        r"got a model of language, expected",
    ),
    ("timm-vit", {"ml_mamba_jax": 7}, r"ml_mamba_jax: got 7, expected the fields of MLMambaConfig"),
]
BASES = {"mamba2": MAMBA_SSM, "hf-mamba2": HF_MAMBA2}
MARKED = {"hf-clip": {"embeddings.class_embedding": (768,)}, "hf-dinov2": {"embeddings.cls_token": (1, 1, 768)}}


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED_FIELDS)
def test_refused_fields_are_named(tmp_path, kind, fields, message):
    with pytest.raises(ConvertError, match=message) as caught:
        read(kind, BASES.get(kind, {}) | fields, tmp_path, MARKED.get(kind))
    assert one_line(caught.value, tmp_path)


def one_line(error: ConvertError, folder: Path) -> bool:
    text = str(error)
    return "\n" not in text and text.count(str(folder)) == 1 and f"{folder / 'config.json'}: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{'d_model': 32}", "cannot be read as JSON: Expecting property name"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON: 'utf-8' codec"),
        (b"[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (b"1" * 10_000, "cannot be read as JSON: Exceeds the limit"),
        (b"[1]", "got list, expected an object"),
        (b" " * 2_000_000, "got more than 1048576 bytes, expected the config of a model"),
    ],
)
@pytest.mark.parametrize("kind", ["mamba2", "timm-vit"])
def test_a_config_that_is_no_json_object(tmp_path, kind, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConvertError, match=message) as caught:
        read_beside(kind, {}, tmp_path)
    assert one_line(caught.value, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "timm-vit"])
def test_a_missing_config(sources, tmp_path, kind):
    with pytest.raises(ConvertError, match=r"config\.json: found no such file, expected the config of ") as caught:
        read_beside(kind, {}, tmp_path)
    assert one_line(caught.value, tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"pos_embed": (1, 4, 7)},
            "got a ViT with width 7, patch_size 8, depth 0, mlp_dim 0, .* expected that of one of",
        ),
        ({}, r"got patch_embed\.proj\.weight \[7, 3, 8, 8\] and pos_embed \[\], expected \[d 3 y x\] and \[1 l d\]"),
        ({"pos_embed": (1, 4, 7), "reg_token": (3,)}, "n_registers 0"),
        ({"pos_embed": (1, 4, 7), "blocks.0.mlp.fc1.weight": ()}, "depth 1, mlp_dim 0"),
    ],
)
def test_a_vit_that_nobody_knows(tmp_path, shapes, message):
    with pytest.raises(ConvertError, match=message) as caught:
        read_beside("timm-vit", {"patch_embed.proj.weight": (7, 3, 8, 8)} | shapes, tmp_path)
    assert one_line(caught.value, tmp_path)


NONSENSE = st.sampled_from(
    [
        0,
        -1,
        1,
        7,
        10**6,
        2**31,
        2**63,
        10**30,
        1.5,
        math.nan,
        math.inf,
        True,
        None,
        "x",
        "",
        [],
        [1],
        [0, 1, 2],
        {},
        {"a": 1},
    ]
)


def leaves(value, path=()):
    """Paths of all that stands in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(sorted(FAMILIES)))
def test_any_value_in_any_field_is_read_or_refused(sources, data, kind):
    path = sources[kind] / "config.json"
    text = path.read_text(encoding="utf-8")
    fields = json.loads(text)
    *parents, last = data.draw(st.sampled_from(list(leaves(fields))))
    inside = fields
    for key in parents:
        inside = inside[key]
    inside[last] = data.draw(NONSENSE)
    try:
        write_json(path, fields)
        found(sources[kind])
    except ConvertError as error:
        assert one_line(error, sources[kind])
    finally:
        path.write_text(text, encoding="utf-8")


def test_our_own_config_says_what_the_form_has_no_word_for(tmp_path):
    own = {"ml_mamba_jax": serialize.plain(TINY.replace(resize="letterbox", prompt_format="pure"))}
    assert read("ml-mamba", reference() | own, tmp_path) == TINY.replace(resize="letterbox", prompt_format="pure")
