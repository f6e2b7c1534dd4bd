"""Numbers and names of parameters: the released sizes, and the paths that checkpoints are made of."""

import dataclasses

import jax
import pytest

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.model import MLMamba


def abstract_params(name: str) -> dict:
    model = MLMamba(MLMambaConfig.named(name))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.dummy_inputs()))["params"]


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def paths(tree) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mamba2-130m", 128_989_632),
        ("mamba2-370m", 368_346_624),
        ("mamba2-780m", 780_161_280),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
    ],
)
def test_language_models_have_the_published_numbers_of_parameters(name, expected):
    params = abstract_params(name)
    assert set(params) == {"language"}
    assert count(params) == expected
    assert MLMambaConfig.named(name.removeprefix("mamba2-")) == MLMambaConfig.named(name)


def test_ml_mamba_3b_has_the_published_numbers_of_parameters():
    params = abstract_params("ml-mamba-3b")
    assert count(params["language"]) == 2_702_599_680

    # The keys and shapes of the released checkpoint, one by one.
    d, vision, inner, heads, channels, in_proj = 2560, 1024 + 1152, 5120, 80, 5376, 10576
    mlp = vision * d + d
    directional = channels * 4 + channels + 3 * heads  # conv1d weight and bias, dt_bias, A_log, D
    mixer = in_proj * d + 2 * directional + inner + d * inner
    block = mixer + 2 * d + 3 * (d * d + d)
    projector = (4 * d * d + 4 * d) + (4 * d * d + d) + (d * d + d)
    expected = mlp + 2 * block + 2 * d + projector
    assert count(params["connector"]) == expected == 184_405_440
    assert f"{expected / 1e6:.1f}M" == "184.4M"
    assert count(params["connector"]["in_proj"]) == mlp and f"{mlp / 1e6:.2f}M" == "5.57M"
    assert f"{(2 * block + 2 * d) / 1e6:.2f}M" == "119.83M"
    assert f"{projector / 1e6:.2f}M" == "59.00M"

    # DINOv2-L with registers (304.4M with a 37 x 37 grid) and SigLIP SO400M without attention pool, less their last
    # block and final norm.
    for name, width, depth, mlp_dim, prefix, scaled in (
        ("dinov2", 1024, 24, 4096, 5, 2),
        ("siglip", 1152, 27, 4304, 0, 0),
    ):
        attention = width * 3 * width + 3 * width + width * width + width
        block = attention + 2 * width * mlp_dim + mlp_dim + width + 4 * width + scaled * width
        whole = (14 * 14 * 3 + 1) * width + (729 + prefix) * width + depth * block
        assert count(params["vision"][name]) == whole - block
        assert f"{(whole + 2 * width) / 1e6:.1f}M" == {"dinov2": "303.7M", "siglip": "413.0M"}[name]


def test_tiny_differs_from_ml_mamba_3b_by_numbers_only():
    def choices(value):
        """The value with every number replaced by its type."""
        if dataclasses.is_dataclass(value):
            fields = {field.name: choices(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"class": type(value).__name__, **fields}
        if isinstance(value, tuple):
            return tuple(choices(item) for item in value)
        return type(value).__name__ if isinstance(value, int | float) and not isinstance(value, bool) else value

    tiny, big = MLMambaConfig.named("tiny"), MLMambaConfig.named("ml-mamba-3b")
    # Half precision is slower than single on a CPU, and the compute dtype is no part of the architecture.
    assert choices(tiny) == choices(big.replace(dtype=tiny.dtype))
    assert paths(abstract_params("tiny")) == paths(abstract_params("ml-mamba-3b"))


def test_parameter_paths_are_frozen():
    """These names are the checkpoint format. A change here breaks every checkpoint: it needs a converter."""
    assert "\n".join(paths(abstract_params("tiny"))) == FROZEN.strip()


def test_all_parameters_are_float32():
    for name in ("tiny", "ml-mamba-3b"):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(name))} == {"float32"}


FROZEN = """
connector/blocks/mixer/A_log
connector/blocks/mixer/D
connector/blocks/mixer/conv_bias
connector/blocks/mixer/conv_weight
connector/blocks/mixer/dt_bias
connector/blocks/mixer/in_proj/kernel
connector/blocks/mixer/norm_weight
connector/blocks/mixer/out_proj/kernel
connector/blocks/norm/bias
connector/blocks/norm/scale
connector/blocks/w1/bias
connector/blocks/w1/kernel
connector/blocks/w2/bias
connector/blocks/w2/kernel
connector/blocks/w3/bias
connector/blocks/w3/kernel
connector/in_proj/bias
connector/in_proj/kernel
connector/norm/bias
connector/norm/scale
connector/projector_0/bias
connector/projector_0/kernel
connector/projector_1/bias
connector/projector_1/kernel
connector/projector_2/bias
connector/projector_2/kernel
language/blocks/mixer/A_log
language/blocks/mixer/D
language/blocks/mixer/conv_bias
language/blocks/mixer/conv_weight
language/blocks/mixer/dt_bias
language/blocks/mixer/in_proj/kernel
language/blocks/mixer/norm_weight
language/blocks/mixer/out_proj/kernel
language/blocks/norm/scale
language/embedding
language/norm/scale
vision/dinov2/blocks/attention_norm/bias
vision/dinov2/blocks/attention_norm/scale
vision/dinov2/blocks/attention_out/bias
vision/dinov2/blocks/attention_out/kernel
vision/dinov2/blocks/attention_scale
vision/dinov2/blocks/mlp_in/bias
vision/dinov2/blocks/mlp_in/kernel
vision/dinov2/blocks/mlp_norm/bias
vision/dinov2/blocks/mlp_norm/scale
vision/dinov2/blocks/mlp_out/bias
vision/dinov2/blocks/mlp_out/kernel
vision/dinov2/blocks/mlp_scale
vision/dinov2/blocks/qkv/bias
vision/dinov2/blocks/qkv/kernel
vision/dinov2/patch_embed/bias
vision/dinov2/patch_embed/kernel
vision/dinov2/pos_embed
vision/dinov2/prefix_tokens
vision/siglip/blocks/attention_norm/bias
vision/siglip/blocks/attention_norm/scale
vision/siglip/blocks/attention_out/bias
vision/siglip/blocks/attention_out/kernel
vision/siglip/blocks/mlp_in/bias
vision/siglip/blocks/mlp_in/kernel
vision/siglip/blocks/mlp_norm/bias
vision/siglip/blocks/mlp_norm/scale
vision/siglip/blocks/mlp_out/bias
vision/siglip/blocks/mlp_out/kernel
vision/siglip/blocks/qkv/bias
vision/siglip/blocks/qkv/kernel
vision/siglip/patch_embed/bias
vision/siglip/patch_embed/kernel
vision/siglip/pos_embed
"""
