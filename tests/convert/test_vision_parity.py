"""Encoders against transformers at real widths, and against a restatement of timm's in every form in which weights are found.

Random weights; features of the second-to-last block without its final norm; pixels that are normalised already.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, SiglipVisionConfig
from transformers.initialization import no_init_weights
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from ml_mamba_jax import serialize
from ml_mamba_jax.config import VISION_BACKBONES, VISION_ENCODERS, MLMambaConfig, ViTConfig
from ml_mamba_jax.convert.families import OWN_CONFIG
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.vit import resample_positions
from tests.convert.converted import Converted, convert, jit_small, relative_error
from tests.convert.torch_models import TimmViT, randomise

SMALL = {"image_size": 37, "patch_size": 8, "width": 48, "depth": 4, "n_heads": 3, "mlp_dim": 80}


def hf_model(kind: type, config):
    """Eager attention: written out, in float32."""
    config._attn_implementation = "eager"
    with no_init_weights():
        return randomise(kind(config))


def pixels(size: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)


def hf_features(model, images: np.ndarray, n_prefix: int) -> torch.Tensor:
    with torch.inference_mode():
        outputs = model(torch.from_numpy(images).permute(0, 3, 1, 2), output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1  # the embeddings are the first
    return outputs.hidden_states[-2][:, n_prefix:]


def our_features(ours: Converted, images: np.ndarray) -> jax.Array:
    (encoder,) = ours.config.vision
    jit = jax.jit if encoder.width > 100 else jit_small
    apply = jit(lambda params, images: ours.model.apply({"params": params}, images, method="features"))
    return apply(ours.params, {encoder.name: images})


def own_config(folder, encoder: ViTConfig) -> None:
    """Write the whole of our config into the config.json of the weights, where what is there is kept."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) if path.is_file() else {}
    fields[OWN_CONFIG] = serialize.plain(MLMambaConfig(language=None, vision=(encoder,)))
    path.write_text(json.dumps(fields))


def siglip_config(encoder: ViTConfig, **changes) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        **{
            "hidden_size": encoder.width,
            "intermediate_size": encoder.mlp_dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.n_heads,
            "image_size": encoder.image_size,
            "patch_size": encoder.patch_size,
            "hidden_act": "gelu",
        }
        | changes
    )


def test_siglip_so400m_at_384_pixels(tmp_path):
    encoder = dataclasses.replace(VISION_ENCODERS["siglip-vit-so400m-384px"], depth=5)
    theirs = hf_model(SiglipVisionModel, siglip_config(encoder))
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path)
    shutil.rmtree(tmp_path)
    assert ours.config.vision == (encoder,) and encoder.grid == (27, 27)
    images = pixels(384)
    expected = hf_features(theirs, images, 0)
    assert expected.shape == (1, 729, 1152)
    got = our_features(ours, images)
    assert relative_error(got, expected) <= 1e-4
    images[:, 378:] = 0  # the last 6 pixels are not seen, by either
    images[:, :, 378:] = 0
    np.testing.assert_array_equal(our_features(ours, images), got)


@pytest.mark.parametrize(("activation", "ours_is"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_exact_gelu_and_that_by_tanh_are_told_apart(activation, ours_is, tmp_path):
    encoder = ViTConfig("siglip", **SMALL, activation=ours_is)
    theirs = hf_model(SiglipVisionModel, siglip_config(encoder, hidden_act=activation))
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path)
    assert ours.config.vision == (encoder,)
    images = pixels(37)
    expected = hf_features(theirs, images, 0)
    assert relative_error(our_features(ours, images), expected) <= 1e-5  # they differ by a few 1e-4
    other = dataclasses.replace(encoder, activation={"gelu": "gelu_tanh", "gelu_tanh": "gelu"}[ours_is])
    mistaken = ours._replace(config=ours.config.replace(vision=(other,)))
    assert relative_error(our_features(mistaken, images), expected) > 5e-5


def test_all_blocks_of_siglip_so400m(tmp_path):
    encoder = VISION_ENCODERS["siglip-vit-so400m"]
    theirs = hf_model(SiglipVisionModel, siglip_config(encoder))
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path)
    shutil.rmtree(tmp_path)  # 1.7 GB
    assert ours.config.vision == (encoder,)
    images = pixels(224)
    assert relative_error(our_features(ours, images), hf_features(theirs, images, 0)) <= 1e-4


@pytest.mark.parametrize(("name", "depth", "side"), [("dinov2-vit-l-384px", 4, 27), ("dinov2-vit-l", 24, 16)])
def test_dinov2_l_with_its_37_x_37_positions(name, depth, side, tmp_path):
    """Positions are resampled by transformers when it sees a picture of another size, and by us when weights are converted."""
    encoder = dataclasses.replace(VISION_ENCODERS[name], depth=depth)
    theirs = hf_model(
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(
            hidden_size=1024, num_attention_heads=16, num_hidden_layers=depth, image_size=518, patch_size=14
        ),
    )
    theirs.save_pretrained(tmp_path)
    if depth == 24:  # all of the encoder: it is asked for by name
        ours = convert(tmp_path, encoder=name)
    else:
        own_config(tmp_path, encoder)
        ours = convert(tmp_path)
    shutil.rmtree(tmp_path)
    assert ours.config.vision == (encoder,)
    resampled = [finding.detail for finding in ours.findings if finding.what == "resampled"]
    assert resampled == [f"positions 37 x 37 -> {side} x {side}"]
    images = pixels(encoder.image_size)
    expected = hf_features(theirs, images, 5)
    assert expected.shape == (1, side * side, 1024)
    assert relative_error(our_features(ours, images), expected) <= 1e-4


def test_clip_b(tmp_path):
    encoder = VISION_ENCODERS["clip-vit-b"]
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        hidden_act="quick_gelu",
    )
    theirs = hf_model(CLIPVisionModel, config)
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path)
    shutil.rmtree(tmp_path)
    # transformers says nothing of cropping; the rest is that of the encoder by name.
    assert ours.config.vision == (dataclasses.replace(encoder, crop_fraction=1.0),)
    images = pixels(224, batch=2)
    assert relative_error(our_features(ours, images), hf_features(theirs, images, 1)) <= 1e-4


TIMM = {
    "clip": (
        ViTConfig(
            "clip",
            **SMALL,
            class_token=True,
            class_position=True,
            pre_norm=True,
            norm_eps=1e-5,
            activation="quick_gelu",
        ),
        {"n_classes": 10},
    ),
    "siglip": (ViTConfig("siglip", **SMALL), {"attention_pool": True}),
    "siglip with tanh": (ViTConfig("siglip", **SMALL, activation="gelu_tanh"), {"attention_pool": True}),
    "dinov2": (ViTConfig("dinov2", **SMALL, class_token=True, n_registers=3, layer_scale=1e-5), {}),
    "dinov2 without registers": (ViTConfig("dinov2", **SMALL, class_token=True, layer_scale=1e-5), {}),
    "in1k": (ViTConfig("in1k", **SMALL, class_token=True, class_position=True), {"n_classes": 10}),
}


def save_safetensors(weights, folder):
    save_file(weights, folder / "model.safetensors")
    return folder


def save_pth(weights, folder):
    torch.save(weights, folder / "vit.pth")
    return folder / "vit.pth"


def save_in_state_dict(weights, folder):
    torch.save({"state_dict": weights, "epoch": 3}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def save_as_open_clip(weights, folder):
    whole = {f"visual.trunk.{name}": tensor for name, tensor in weights.items()}
    whole |= {"logit_scale": torch.ones(()), "text.transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    torch.save(whole, folder / "open_clip_pytorch_model.bin")
    return folder / "open_clip_pytorch_model.bin"


FORMS = {
    "safetensors": save_safetensors,
    "pth": save_pth,
    "state_dict": save_in_state_dict,
    "open_clip": save_as_open_clip,
}


@pytest.fixture(scope="module", params=TIMM)
def timm_model(request):
    """An encoder, its weights, pictures and what timm makes of them."""
    encoder, extras = TIMM[request.param]
    theirs = randomise(TimmViT(encoder, **extras))
    images = pixels(37, batch=2)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert expected.shape == (2, 16, 48)
    return encoder, theirs.state_dict(), images, expected


def test_timm_features(timm_model, tmp_path):
    """The same tensors in every form of file give the same parameters, and those timm's features."""
    encoder, weights, images, expected = timm_model
    assert any(name.startswith(f"blocks.{encoder.depth - 1}.") for name in weights)
    results = {}
    for form, save in FORMS.items():
        (tmp_path / form).mkdir()
        own_config(tmp_path / form, encoder)
        results[form] = convert(save(weights, tmp_path / form))
    ours = results["safetensors"]
    assert ours.config.vision == (encoder,)
    not_needed = {finding.key for finding in ours.findings if finding.what == "not needed"}
    unused = (f"blocks.{encoder.depth - 1}.", "norm.", "head.", "attn_pool.")
    assert not_needed == {name for name in weights if name.startswith(unused)}
    assert relative_error(our_features(ours, images), expected) <= 1e-4
    for found in results.values():
        jax.tree.map(np.testing.assert_array_equal, found.params, ours.params)


@pytest.mark.parametrize(("old", "new"), [(37, 27), (16, 24), (27, 14), (24, 37)])
def test_positions_are_resampled_as_by_torch(old, new):
    positions = np.random.default_rng(0).standard_normal((old * old, 8)).astype(np.float32)
    square = torch.from_numpy(positions).reshape(1, old, old, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(new, new), mode="bicubic", antialias=True)
    got = resample_positions(jnp.asarray(positions), (new, new))
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1).reshape(-1, 8), rtol=0, atol=1e-5)


# Patches along a side, width, blocks, hidden width of the MLP, pixels along a patch.
CLIP_B, CLIP_L, CLIP_L_336 = (14, 768, 12, 3072, 16), (16, 1024, 24, 4096, 14), (24, 1024, 24, 4096, 14)
SIGLIP_SO, SIGLIP_SO_384 = (16, 1152, 27, 4304, 14), (27, 1152, 27, 4304, 14)
DINOV2_L, DINOV2_L_336, DINOV2_L_384 = (16, 1024, 24, 4096, 14), (24, 1024, 24, 4096, 14), (27, 1024, 24, 4096, 14)
BACKBONES = {
    "clip-vit-b": (196, {"clip": CLIP_B}),
    "clip-vit-l": (256, {"clip": CLIP_L}),
    "clip-vit-l-336px": (576, {"clip": CLIP_L_336}),
    "siglip-vit-b16-224px": (196, {"siglip": (14, 768, 12, 3072, 16)}),
    "siglip-vit-b16-256px": (256, {"siglip": (16, 768, 12, 3072, 16)}),
    "siglip-vit-b16-384px": (576, {"siglip": (24, 768, 12, 3072, 16)}),
    "siglip-vit-so400m": (256, {"siglip": SIGLIP_SO}),
    "siglip-vit-so400m-384px": (729, {"siglip": SIGLIP_SO_384}),
    "dinov2-vit-l": (256, {"dinov2": DINOV2_L}),
    "in1k-vit-l": (196, {"in1k": (14, 1024, 24, 4096, 16)}),
    "dinoclip-vit-l-336px": (576, {"dinov2": DINOV2_L_336, "clip": CLIP_L_336}),
    "dinosiglip-vit-so-384px": (729, {"dinov2": DINOV2_L_384, "siglip": SIGLIP_SO_384}),
}


def n_parameters(kind: str, side: int, width: int, depth: int, hidden: int, patch: int) -> int:
    """Of an encoder without its last block, final norm and head."""
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    norms = 4 * width
    layer_scale = 2 * width if kind == "dinov2" else 0
    embedding = patch * patch * 3 * width + (0 if kind == "clip" else width)  # CLIP's has no bias
    # Rows beside the patches' positions: CLIP's class token, its position, and two of a norm; DINOv2's class token and
    # registers; the class token and its position.
    rows = {"clip": 4, "siglip": 0, "dinov2": 1 + 4, "in1k": 2}[kind]
    return embedding + (side * side + rows) * width + (depth - 1) * (attention + mlp + norms + layer_scale)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_the_sizes_of_the_reference(name):
    n_patches, encoders = BACKBONES[name]
    config = MLMambaConfig(language=None, vision=VISION_BACKBONES[name])
    model = MLMamba(config)
    shapes = model.param_shapes()["vision"]
    counts = {kind: sum(a.size for a in jax.tree.leaves(tree)) for kind, tree in shapes.items()}
    assert counts == {kind: n_parameters(kind, *sizes) for kind, sizes in encoders.items()}
    features = jax.eval_shape(
        lambda params, images: model.apply({"params": params}, images, method="features"),
        {"vision": shapes},
        model.dummy_inputs()["images"],
    )
    assert list(encoders) == [encoder.name for encoder in config.vision]  # the order of the channels
    assert features.shape == (1, n_patches, sum(sizes[1] for sizes in encoders.values()))


def test_every_backbone_of_the_reference_is_there():
    assert set(VISION_BACKBONES) == set(BACKBONES) and len(BACKBONES) == 12
