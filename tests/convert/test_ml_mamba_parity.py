"""All of ML-Mamba: a run in PyTorch against ours, there and back bit by bit, and the models that the paper compares."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config as HFMamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from ml_mamba_jax import checkpoint, serialize
from ml_mamba_jax.config import (
    BIDIRECTIONAL_SCAN,
    CROSS_SCAN,
    LANGUAGE_MODELS,
    VISION_BACKBONES,
    ConnectorConfig,
    Mamba2Config,
    MixerConfig,
    MLMambaConfig,
    ViTConfig,
)
from ml_mamba_jax.convert import tables, to_jax, to_torch
from ml_mamba_jax.convert.families import OWN_CONFIG, read_config
from ml_mamba_jax.convert.pieces import by_key, torch_shape
from ml_mamba_jax.convert.plan import make_plan
from ml_mamba_jax.convert.source import RUN_CHECKPOINT, open_source
from ml_mamba_jax.model import MLMamba
from tests.convert.converted import convert, jit_small, relative_error
from tests.convert.torch_models import Connector, LanguageModel, TimmViT, randomise
from tests.convert.torch_runs import run_weights, save_run

MIXER = MixerConfig(d_model=32, d_state=16, head_dim=16)
SMALL_VIT = {"image_size": 29, "patch_size": 7, "depth": 3, "n_heads": 2, "mlp_dim": 64}
CONFIG = MLMambaConfig(
    language=Mamba2Config(mixer=MIXER, n_layers=2, vocab_size=50),
    vision=(
        ViTConfig("dinov2", **SMALL_VIT, width=48, class_token=True, n_registers=4, layer_scale=1e-5),
        ViTConfig("siglip", **SMALL_VIT, width=32),
    ),
    connector=ConnectorConfig(MIXER),
)
FLOAT32 = ("A_log", "dt_bias", ".D")
"""Tensors that stay in float32 in published language models of half precision."""


class Run:
    """A random ML-Mamba made of three PyTorch implementations, and its files."""

    def __init__(self, folder):
        encoders, connector = CONFIG.vision, CONFIG.connector
        self.encoders = [randomise(TimmViT(encoder), seed=i) for i, encoder in enumerate(encoders)]
        self.connector = randomise(Connector(connector, sum(encoder.width for encoder in encoders), encoders[0].grid))
        hf_config = HFMamba2Config(
            hidden_size=32,
            num_heads=4,
            head_dim=16,
            state_size=16,
            n_groups=1,
            num_hidden_layers=2,
            vocab_size=64,
            chunk_size=16,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=0,
        )
        self.language = randomise(Mamba2ForCausalLM(hf_config), seed=2)
        weights = {  # half of the tensors in half precision, as such files are
            name.replace("embeddings", "embedding"): tensor if name.endswith(FLOAT32) else tensor.bfloat16()
            for name, tensor in self.language.state_dict().items()
        }
        self.language.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        self.folder = save_run(folder / "run", CONFIG, weights, self.connector.state_dict())
        self.vision = [folder / "siglip" / "siglip.pth", folder / "dinov2"]
        for encoder, model in zip(encoders, self.encoders, strict=True):
            place = folder / encoder.name
            place.mkdir()
            alone = MLMambaConfig(language=None, vision=(encoder,))
            (place / "config.json").write_text(json.dumps({OWN_CONFIG: serialize.plain(alone)}))
            if encoder.name == "siglip":
                torch.save(model.state_dict(), self.vision[0])
            else:
                save_file(model.state_dict(), place / "model.safetensors")

    def logits(self, tokens: np.ndarray, images: dict[str, np.ndarray]) -> torch.Tensor:
        """DINOv2's channels before SigLIP's, the visual tokens before the text."""
        with torch.inference_mode():
            pixels = [torch.from_numpy(images[name]).permute(0, 3, 1, 2) for name in ("dinov2", "siglip")]
            features = [encoder(picture) for encoder, picture in zip(self.encoders, pixels, strict=True)]
            visual = self.connector(torch.cat(features, dim=-1))
            text = self.language.get_input_embeddings()(torch.from_numpy(tokens).long())
            return self.language(inputs_embeds=torch.cat([visual, text], dim=1), use_cache=False).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("ml_mamba"))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The run as a folder of ours."""
    out = tmp_path_factory.mktemp("converted") / "run"
    with open_source(run.folder, vision=run.vision) as source:
        plan = make_plan(source)
        to_jax.write(source, plan, to_jax.assemble(source, plan), out)
    return out


def test_logits_are_those_of_the_run_in_pytorch(run, folder):
    model, params, tokenizer = checkpoint.load(folder)
    assert model.config == CONFIG and tokenizer is None
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 9)).astype(np.int32)
    images = {e.name: rng.standard_normal((2, 29, 29, 3)).astype(np.float32) for e in CONFIG.vision}
    expected = run.logits(tokens, images)
    assert expected.shape == (2, 16 + 9, 64) and expected.std() > 0.3
    logits = jit_small(lambda params, tokens, images: model.apply({"params": params}, tokens, images=images))
    assert relative_error(logits(params, tokens, images), expected) <= 1e-4
    # The picture is seen by the text.
    images["siglip"] = images["siglip"][::-1]
    assert relative_error(logits(params, tokens, images)[:, -9:], expected[:, -9:]) > 0.05


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def test_there_and_back_and_there_again_bit_by_bit(run, folder, tmp_path):
    back = tmp_path / "back"
    written = to_torch.write(to_torch.open_export(folder, "ml-mamba"), back)
    assert back / RUN_CHECKPOINT in written
    before, after = (torch.load(path / RUN_CHECKPOINT)["model"] for path in (run.folder, back))
    assert set(before) == set(after) == {"llm_backbone", "mlp", "bidirectional_mamba", "projector"}
    for module, tensors in before.items():
        assert bits(tensors) == bits(after[module])
    dtypes = {tensor.dtype for tensor in after["llm_backbone"].values()}
    assert dtypes == {torch.float32, torch.bfloat16}

    # The encoders come back as far as they are used.
    for encoder, model in zip(CONFIG.vision, run.encoders, strict=True):
        used = {k: v for k, v in model.state_dict().items() if not k.startswith(("blocks.2.", "norm."))}
        assert bits(load_file(back / "vision" / encoder.name / "model.safetensors")) == bits(used)

    first = checkpoint.load(folder).params
    vision = [back / "vision" / encoder.name for encoder in CONFIG.vision]
    params = convert(back, vision=vision).params
    assert jax.tree.structure(first) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).view("u1"), b.view("u1")), first, params)


def test_a_run_without_its_encoders(run):
    ours = convert(run.folder)
    assert set(ours.params) == {"language", "connector"}


# What a config.json of the reference says


def reference_config(language: str, vision: str, arch: str, resize: str = "resize-naive") -> str:
    model = {
        "type": "mlmamba+3b",
        "model_id": "mlmamba+3b",
        "arch_specifier": arch,
        "llm_backbone_id": language,
        "vision_backbone_id": vision,
        "image_resize_strategy": resize,
        "llm_max_length": 2048,
        "finetune_epochs": 2,
    }
    return json.dumps({"model": model, "dataset": {"type": "llava-v15"}, "stage": "finetune", "seed": 7})


def run_shapes(config: MLMambaConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a run, from PyTorch modules that take no memory."""
    with torch.device("meta"):
        language = LanguageModel(config.language)
        connector = Connector(config.connector, sum(encoder.width for encoder in config.vision), config.grid)
    modules = run_weights(language.state_dict(), connector.state_dict())
    return {f"model/{m}/{name}": tuple(t.shape) for m, tensors in modules.items() for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("name", "language", "vision", "arch"),
    [
        ("ml-mamba-3b", "mamba2-2.7b", "dinosiglip-vit-so-384px", "no-align+fused-gelu-mlp"),
        ("ml-mamba-780m", "mamba2-780m", "dinosiglip-vit-so-384px", "fused-gelu-mlp"),
        ("ml-mamba-1.3b", "mamba2-1.3b", "dinosiglip-vit-so-384px", "no-align+fused-gelu-mlp"),
        ("ml-mamba-3b-siglip", "mamba2-2.7b", "siglip-vit-so400m-384px", "no-align+fused-gelu-mlp"),
        ("ml-mamba-3b-mlp", "mamba2-2.7b", "dinosiglip-vit-so-384px", "no-align+fused-gelu-mlp"),
        ("ml-mamba-3b-msc-basic", "mamba2-2.7b", "dinosiglip-vit-so-384px", "no-align+fused-gelu-mlp"),
        ("ml-mamba-3b-csm", "mamba2-2.7b", "dinosiglip-vit-so-384px", "no-align+fused-gelu-mlp"),
        ("ml-mamba-3b-ldpnet", "mamba2-2.7b", "dinosiglip-vit-so-384px", "no-align+fused-ldpnet"),
        ("ml-mamba-3b-vss-l2", "mamba2-2.7b", "siglip-vit-so400m-384px", "linear"),
    ],
)
def test_runs_of_real_size_are_known_and_fit(name, language, vision, arch, tmp_path):
    named = MLMambaConfig.named(name)
    shapes = run_shapes(named)
    assert read_config("ml-mamba", reference_config(language, vision, arch), shapes, tmp_path) == named
    of_params = {path: shape.shape for path, shape in flatten_dict(MLMamba(named).param_shapes(), sep="/").items()}
    expected = {key: torch_shape(pieces, of_params) for key, pieces in by_key(tables.ml_mamba(named)).items()}
    assert expected == shapes


def test_every_connector_is_seen_from_its_tensors(tmp_path):
    language, vision = "mamba2-130m", "clip-vit-b"
    mixer = LANGUAGE_MODELS[language].mixer
    forms = itertools.product(
        ("none", "basic", "advanced", "vss-l2"),
        (BIDIRECTIONAL_SCAN, CROSS_SCAN),
        ("linear", "gelu-mlp", "fused-gelu-mlp", "fused-ldpnet"),
        (1, 2),
    )
    n_seen = 0
    for scan, directions, projector, n_layers in forms:
        if scan == "none" and (directions, n_layers) != (BIDIRECTIONAL_SCAN, 2):
            continue
        connector = ConnectorConfig(mixer, scan=scan, directions=directions, projector=projector, n_layers=n_layers)
        expected = MLMambaConfig(
            language=dataclasses.replace(LANGUAGE_MODELS[language], n_layers=1),  # for less tensors
            vision=VISION_BACKBONES[vision],
            connector=connector,
            dtype="bfloat16",
        )
        shapes = run_shapes(expected)
        for prefix in ("", "no-align+"):
            found = read_config("ml-mamba", reference_config(language, vision, prefix + projector), shapes, tmp_path)
            assert found == expected.replace(language=LANGUAGE_MODELS[language])
        n_seen += 1
    assert n_seen == 4 + 3 * 2 * 4 * 2


def test_every_id_of_the_reference_is_known(tmp_path):
    shapes = {"model/projector/projector.weight": (1, 1)}
    resizes = ("resize-naive", "resize-crop", "letterbox")
    for language, vision, resize in itertools.product(LANGUAGE_MODELS, VISION_BACKBONES, resizes):
        text = reference_config(language, vision, "linear", resize)
        found = read_config("ml-mamba", text, shapes, tmp_path)
        assert (found.language, found.vision) == (LANGUAGE_MODELS[language], VISION_BACKBONES[vision])
        assert found.resize == resize and found.connector.mixer == found.language.mixer


# The models that the paper compares

D, INNER, HEADS, CHANNELS, IN_PROJ = 2560, 5120, 80, 5376, 10576
LAYER_NORM, SWIGLU = 2 * D, 3 * (D * D + D)


def n_mixer(directions: int) -> int:
    """conv1d weight and bias, dt_bias, A_log and D belong to a direction; the rest is shared."""
    return IN_PROJ * D + directions * (4 * CHANNELS + CHANNELS + 3 * HEADS) + INNER + INNER * D


def n_linear(v: int, d: int) -> int:
    return v * d + d


def n_fused(v: int) -> int:
    return n_linear(v, 4 * v) + n_linear(4 * v, D) + n_linear(D, D)


N_CONNECTOR = {
    "ml-mamba-3b-mlp": n_fused(2176),
    "ml-mamba-3b-msc-basic": n_linear(2176, D) + 2 * (n_mixer(2) + D) + D + n_fused(D),
    "ml-mamba-3b-csm": n_linear(2176, D) + 2 * (n_mixer(4) + LAYER_NORM + SWIGLU) + LAYER_NORM + n_fused(D),
    "ml-mamba-3b-ldpnet": (
        n_linear(2176, D)
        + 2 * (n_mixer(2) + LAYER_NORM + SWIGLU)
        + LAYER_NORM
        + n_linear(D, 4 * D)
        + n_linear(4 * D, D)
        + (9 * D + D)
    ),
    "ml-mamba-3b-vss-l2": n_linear(1152, D) + n_mixer(2) + LAYER_NORM + n_linear(D, D),
    "ml-mamba-3b-dinov2": n_linear(1024, D) + 2 * (n_mixer(2) + LAYER_NORM + SWIGLU) + LAYER_NORM + n_fused(D),
    "ml-mamba-3b-siglip": n_linear(1152, D) + 2 * (n_mixer(2) + LAYER_NORM + SWIGLU) + LAYER_NORM + n_fused(D),
}


@pytest.mark.parametrize("name", N_CONNECTOR)
def test_models_of_the_ablations(name):
    model = MLMamba(MLMambaConfig.named(name))
    n_visual = 196 if name.endswith("ldpnet") else 729
    assert model.config.n_visual_tokens == n_visual
    shapes = model.param_shapes()
    assert sum(a.size for a in jax.tree.leaves(shapes["connector"])) == N_CONNECTOR[name]
    assert sum(a.size for a in jax.tree.leaves(shapes["language"])) == 2_702_599_680
    inputs = model.dummy_inputs(batch_size=1, length=3)
    logits = jax.eval_shape(
        lambda params, tokens, images: model.apply({"params": params}, tokens, images=images),
        shapes,
        inputs["tokens"],
        inputs["images"],
    )
    assert logits.shape == (1, n_visual + 3, 50288) and logits.dtype == "float32"


def test_the_plain_mlp_has_the_size_of_cobras_projector():
    assert f"{N_CONNECTOR['ml-mamba-3b-mlp'] / 1e6:.1f}M" == "47.8M"
