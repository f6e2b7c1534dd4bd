"""Pieces and tables: layouts and indices go there and back, and every table fills every number of every parameter once."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ml_mamba_jax.config import BIDIRECTIONAL_SCAN, CROSS_SCAN, VISION_ENCODERS, ConnectorConfig, MLMambaConfig
from ml_mamba_jax.convert import tables
from ml_mamba_jax.convert.pieces import (
    DEPTHWISE,
    DEPTHWISE_2D,
    PATCHES,
    SAME,
    TRANSPOSED,
    Piece,
    by_key,
    torch_shape,
)
from ml_mamba_jax.model import MLMamba
from tests.convert.small_weights import LANGUAGE, MIXER, SMALL_ENCODERS, language, run, timm

LAYOUTS = {layout.name: layout for layout in (SAME, TRANSPOSED, DEPTHWISE, DEPTHWISE_2D, PATCHES)}
TORCH_SHAPES = {  # of the tensors, and of our parameters
    "same": ((3,), (3,)),
    "transposed": ((3, 5), (5, 3)),
    "depthwise": ((6, 1, 4), (6, 4)),
    "depthwise 2d": ((6, 1, 3, 2), (3, 2, 1, 6)),
    "patches": ((5, 3, 4, 4), (48, 5)),
}


def counted(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_go_there_and_back_without_copying(name):
    torch_shape_, jax_shape = TORCH_SHAPES[name]
    tensor, parameter = counted(torch_shape_), counted(jax_shape)
    there, back = LAYOUTS[name].to_jax(tensor), LAYOUTS[name].to_torch(parameter)
    assert there.shape == jax_shape and back.shape == torch_shape_
    np.testing.assert_array_equal(LAYOUTS[name].to_torch(there), tensor)
    np.testing.assert_array_equal(LAYOUTS[name].to_jax(back), parameter)
    if name != "patches":  # a grid and channels that become one axis are copied
        assert np.shares_memory(there, tensor)
    assert np.shares_memory(back, parameter)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_a_transposed_layer_computes_the_same(rows, columns):
    weight, x = counted((rows, columns)), counted((columns,))
    np.testing.assert_array_equal(x @ TRANSPOSED.to_jax(weight), weight @ x)


def test_a_patch_convolution_is_a_product_with_flattened_patches():
    """What `vit._patches` flattens as [y x 3] meets what the convolution multiplies as [3 y x]."""
    weight, patch = counted((5, 3, 4, 4)), counted((4, 4, 3))
    expected = np.einsum("dcyx,yxc->d", weight, patch)
    np.testing.assert_allclose(patch.reshape(-1) @ PATCHES.to_jax(weight), expected, rtol=1e-6)


def test_depthwise_kernels_keep_time_and_place():
    tensor = counted((6, 1, 4))
    assert DEPTHWISE.to_jax(tensor)[2, 3] == tensor[2, 0, 3]
    grid = counted((6, 1, 3, 2))
    assert DEPTHWISE_2D.to_jax(grid)[2, 1, 0, 5] == grid[5, 0, 2, 1]


ALL = slice(None)
INDICES = [
    ((), (), SAME, (7,)),
    ((2,), (), TRANSPOSED, (5, 3)),
    ((2, 1), (), DEPTHWISE, (6, 1, 4)),
    ((1, ALL, slice(4, 8)), (), TRANSPOSED, (4, 3)),
    ((1, slice(4, 8)), (), SAME, (4,)),
    ((slice(0, 1),), (0,), SAME, (1, 3)),
    ((slice(1, None),), (0,), SAME, (4, 3)),
    ((0,), (), SAME, (3,)),
]
PARAMETERS = [(7,), (4, 3, 5), (4, 2, 6, 4), (2, 3, 12), (2, 12), (5, 3), (5, 3), (1, 3)]


@pytest.mark.parametrize(("index", "source", "layout", "shape"), INDICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_indices_go_there_and_back(index, source, layout, shape, dtype):
    parameter_shape = PARAMETERS[INDICES.index((index, source, layout, shape))]
    piece = Piece("key", "path", layout, index, source)
    tensor = np.random.default_rng(0).standard_normal(((1,) if source else ()) + shape).astype(dtype)
    parameter = np.full(parameter_shape, np.nan, dtype)
    assert np.shares_memory(piece.region(parameter), parameter)
    piece.region(parameter)[...] = layout.to_jax(tensor[piece.source])
    assert np.isfinite(parameter).sum() == tensor.size, "it fills its region and no more"
    back = np.empty_like(tensor)
    back[piece.source] = layout.to_torch(piece.region(parameter))
    assert back.tobytes() == tensor.tobytes()
    assert torch_shape([piece], {"path": parameter_shape}) == tensor.shape


@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 6), st.integers(1, 4))))
def test_parts_of_a_tensor_are_rows_behind_leading_axes(parameter):
    """Positions of a class token and of patches, which are one tensor and two parameters."""
    pieces = [Piece("k", "class", source=(0, slice(0, 1))), Piece("k", "patches", source=(0, slice(1, None)))]
    shapes = {"class": parameter[:1].shape, "patches": parameter[1:].shape}
    assert torch_shape(pieces, shapes) == (1, *parameter.shape)
    flat = [piece._replace(source=piece.source[1:]) for piece in pieces]
    assert torch_shape(flat, shapes) == parameter.shape


def test_reports_say_where_and_how():
    piece = Piece("k", "blocks/qkv/kernel", TRANSPOSED, (3, ALL, slice(4, 8)), (0, slice(1, None)), resampled=True)
    assert piece.where == "blocks/qkv/kernel[3, :, 4:8]" and piece.how == "transposed, resampled, of [0, 1:]"
    assert Piece("k", "norm").where == "norm" and Piece("k", "norm").how == "same"
    assert Piece("k", "norm", added=True).how == "added" and Piece("k", "norm", tied=True).how == "tied"


def test_pieces_are_grouped_in_the_order_of_the_table():
    pieces = [Piece("b", "1"), Piece("a", "2"), Piece("b", "3")]
    assert by_key(pieces) == {"b": [pieces[0], pieces[2]], "a": [pieces[1]]}


# Tables


def parameters(config: MLMambaConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(MLMamba(config).param_shapes(), sep="/").items()}


def assert_fills_once(pieces: list[Piece], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Paint the pieces over the parameters; returns the shape of every tensor."""
    paint = {path: np.zeros(shape, np.int32) for path, shape in shapes.items()}
    keys = by_key(pieces)
    for key, parts in keys.items():
        covered = np.zeros(torch_shape(parts, shapes), np.int32)
        for piece in parts:
            region = piece.region(paint[piece.path])
            assert piece.layout.to_torch(region).shape == covered[piece.source].shape, f"{key} does not fit {piece}"
            covered[piece.source] += 1
            if not (piece.added or piece.tied):
                region += 1
        assert (covered == 1).all(), f"{key}: not every number is used once"
    wrong = {path: np.unique(count).tolist() for path, count in paint.items() if not (count == 1).all()}
    assert wrong == {}, "parameters that are not filled once everywhere, with how often"
    return {key: torch_shape(parts, shapes) for key, parts in keys.items()}


def shapes_of(tensors: dict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("embedding", ["embedding", "embeddings"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("n_groups", [1, 2])
def test_table_of_mamba2(embedding, tie_embeddings, n_groups):
    mixer = dataclasses.replace(MIXER, n_groups=n_groups)
    config = dataclasses.replace(LANGUAGE, mixer=mixer, tie_embeddings=tie_embeddings)
    pieces = tables.mamba2(config, "some.prefix.", embedding)
    found = assert_fills_once(pieces, parameters(MLMambaConfig(language=config)))
    expected = shapes_of(language(config, embedding))
    assert found == {f"some.prefix.{key}": shape for key, shape in expected.items()}
    assert [piece.key for piece in pieces if piece.tied] == ["some.prefix.lm_head.weight"] * tie_embeddings


@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_table_of_timm(name):
    encoder = SMALL_ENCODERS[name]
    shapes = parameters(MLMambaConfig(language=None, vision=(encoder,)))
    found = assert_fills_once(tables.timm_vit(encoder, "visual.trunk."), shapes)
    unused = (f"blocks.{encoder.depth - 1}.", "norm.", "head", "attn_pool", "mask_token")
    expected = {key: shape for key, shape in shapes_of(timm(encoder)).items() if not key.startswith(unused)}
    assert found == {f"visual.trunk.{key}": shape for key, shape in expected.items()}


@pytest.mark.parametrize("name", ["clip-vit-b", "clip-vit-l-336px", "siglip-vit-b16-224px", "siglip-vit-so400m-384px"])
def test_table_of_clip_and_siglip_of_transformers(name):
    encoder = SMALL_ENCODERS[name]
    shapes = parameters(MLMambaConfig(language=None, vision=(encoder,)))
    found = assert_fills_once(tables.hf_clip_or_siglip(encoder, "vision_model."), shapes)
    with_meta = hf_shapes("clip" if "clip-vit" in name and "sig" not in name else "siglip", encoder)
    assert found == {f"vision_model.{key}": shape for key, shape in with_meta.items()}


def test_table_of_dinov2_of_transformers():
    for encoder in (SMALL_ENCODERS["dinov2-vit-l"], dataclasses.replace(SMALL_ENCODERS["dinov2-vit-l"], n_registers=0)):
        shapes = parameters(MLMambaConfig(language=None, vision=(encoder,)))
        pieces = tables.hf_dinov2(encoder)
        found = assert_fills_once(pieces, shapes)
        expected = hf_shapes("dinov2", encoder)
        if not encoder.n_registers:
            expected.pop("embeddings.register_tokens", None)
        assert found == expected
        assert [(piece.key, piece.path) for piece in pieces if piece.added] == [
            ("embeddings.position_embeddings", "vision/dinov2/prefix_tokens")
        ]


PUBLISHED = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}


def hf_shapes(kind: str, encoder) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the models of transformers, without what lies behind the second-to-last block."""
    import torch

    numbers = {
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.n_heads,
    }
    with torch.device("meta"):
        if kind == "clip":
            from transformers.models.clip.configuration_clip import CLIPVisionConfig
            from transformers.models.clip.modeling_clip import CLIPVisionModel

            model = CLIPVisionModel(CLIPVisionConfig(intermediate_size=encoder.mlp_dim, **numbers))
        elif kind == "siglip":
            from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
            from transformers.models.siglip.modeling_siglip import SiglipVisionModel

            model = SiglipVisionModel(SiglipVisionConfig(intermediate_size=encoder.mlp_dim, **numbers))
        else:
            from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import (
                Dinov2WithRegistersConfig,
            )
            from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
                Dinov2WithRegistersModel,
            )

            numbers |= {"mlp_ratio": encoder.mlp_dim // encoder.width, "num_register_tokens": encoder.n_registers}
            model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**numbers))
    # transformers reads and writes DINOv2 with the names of its publication, whatever its modules are called.
    published = {f"attention.{mine}_proj": f"attention.{theirs}" for mine, theirs in PUBLISHED.items()}
    last = encoder.depth - 1
    unused = (f"encoder.layers.{last}.", f"encoder.layer.{last}.", "post_layernorm", "layernorm", "head.")
    shapes = {}
    for key, shape in shapes_of(model.state_dict()).items():
        for mine, theirs in published.items() if kind == "dinov2" else ():
            key = key.replace(mine, theirs)
        if not key.startswith((*unused, "embeddings.mask_token")):
            shapes[key] = shape
    return shapes


@pytest.mark.parametrize("projector", ["linear", "gelu-mlp", "fused-gelu-mlp", "fused-ldpnet"])
@pytest.mark.parametrize("directions", [BIDIRECTIONAL_SCAN, CROSS_SCAN], ids=["bsm", "csm"])
@pytest.mark.parametrize("scan", ["none", "basic", "advanced", "vss-l2"])
def test_table_of_ml_mamba(scan, directions, projector):
    connector = ConnectorConfig(mixer=MIXER, scan=scan, directions=directions, projector=projector, pooled_grid=(2, 2))
    vision = (SMALL_ENCODERS["dinov2-vit-l"], SMALL_ENCODERS["siglip-vit-so400m"])
    config = MLMambaConfig(language=LANGUAGE, vision=vision, connector=connector)
    shapes = {path: shape for path, shape in parameters(config).items() if not path.startswith("vision/")}
    found = assert_fills_once(tables.ml_mamba(config), shapes)
    expected = {
        f"model/{part}/{key}": tuple(tensor.shape)
        for part, tensors in run(config)["model"].items()
        for key, tensor in tensors.items()
    }
    assert found == expected


def test_direction_tensors_fill_their_own_direction():
    connector = ConnectorConfig(mixer=MIXER, directions=CROSS_SCAN)
    index = {piece.key: piece.index for piece in tables.connector(connector) if piece.path.endswith("A_log")}
    assert index["model/bidirectional_mamba/layers.1.mixer.A_log_c"] == (1, 2)
    assert len(index) == 2 * 4


def test_a_table_with_a_hole_or_an_overlap_is_noticed():
    """The painting itself: two tensors for one column, and a column for none."""
    shapes = {"qkv": (2, 6)}
    good = [Piece(key, "qkv", TRANSPOSED, (ALL, slice(i, i + 2))) for key, i in zip("qkv", (0, 2, 4), strict=True)]
    assert_fills_once(good, shapes)
    for wrong in (good[:2], [*good, good[0]], [*good[:2], good[1]._replace(key="v")]):
        with pytest.raises(AssertionError):
            assert_fills_once(wrong, shapes)
