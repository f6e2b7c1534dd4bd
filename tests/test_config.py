"""Configs refuse numbers that are no sizes, whoever wrote them."""

import dataclasses

import pytest

from ml_mamba_jax.config import NAMED, VISION_ENCODERS

TINY = NAMED["tiny"]


@pytest.mark.parametrize(
    ("config", "numbers", "message"),
    [
        (TINY.language.mixer, {"head_dim": 0}, "MixerConfig: got head_dim 0, expected at least 1"),
        (TINY.language.mixer, {"d_model": -96}, "MixerConfig: got d_model -96, expected at least 1"),
        (TINY.language.mixer, {"head_dim": 7}, "MixerConfig: got d_inner 192, expected a multiple of head_dim 7"),
        (TINY.language.mixer, {"n_groups": 4}, "MixerConfig: got 6 heads, expected a multiple of n_groups 4"),
        (TINY.language.mixer, {"dt_range": (0.0, 0.1)}, "got dt_range 0.0 to 0.1, expected positive numbers in order"),
        (TINY.language.mixer, {"A_range": (2.0, 1.0)}, "got A_range 2.0 to 1.0, expected positive"),
        (
            TINY.language.mixer,
            {"dt_limit": (-1.0, 1.0)},
            "got dt_limit .*, expected two numbers in order, none negative",
        ),
        (TINY.language.mixer, {"dt_limit": (float("nan"), 1.0)}, "got dt_limit"),
        (TINY.language, {"n_layers": 0}, "Mamba2Config: got n_layers 0, expected at least 1"),
        (TINY.language, {"vocab_multiple": 0}, "Mamba2Config: got vocab_multiple 0, expected at least 1"),
        (TINY.connector, {"n_layers": -1}, "ConnectorConfig: got n_layers -1, expected at least 1"),
        (
            TINY.connector,
            {"directions": ()},
            "ConnectorConfig: got directions none, expected different names from rows",
        ),
        (
            TINY.connector,
            {"directions": ("rows", "diagonal")},
            "got directions rows, diagonal, expected different names",
        ),
        (TINY.connector, {"directions": ("rows", "rows")}, "got directions rows, rows, expected different names"),
        (TINY.vision[0], {"patch_size": 0}, "ViTConfig: got patch_size 0, expected at least 1"),
        (TINY.vision[0], {"n_registers": -1}, "ViTConfig: got n_registers -1, expected at least 0"),
        (TINY.vision[0], {"n_heads": 5}, "ViTConfig: got width 64, expected a multiple of n_heads 5"),
        (TINY.vision[0], {"patch_size": 33}, "ViTConfig: got image_size 32, expected at least one patch of 33"),
        (VISION_ENCODERS["siglip-vit-so400m"], {"class_position": True}, "got class_position without class_token"),
    ],
)
def test_sizes_are_checked(config, numbers, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **numbers)


def test_no_size_and_no_registers_are_fine():
    assert dataclasses.replace(TINY.language.mixer, chunk_size=None).chunk_size is None
    assert dataclasses.replace(TINY.vision[0], n_registers=0).n_prefix_tokens == 1
