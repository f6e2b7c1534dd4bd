"""Starting from existing parameters: which parts are taken, and which are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import PRESETS
from ml_mamba_jax import checkpoint
from ml_mamba_jax.config import CROSS_SCAN, MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.initial import check_given, start_from, tokenizer_of, with_model_of_init
from tests import tiny_model

TINY = tiny_model.MODEL.config
LANGUAGE_ALONE = MLMambaConfig(language=TINY.language)


def zeros(config: MLMambaConfig = TINY) -> dict:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), MLMamba(config).param_shapes())


def saved(folder, config: MLMambaConfig, params: dict, tokenizer: Tokenizer | None = None):
    checkpoint.write_model(folder, config, tokenizer)
    checkpoint.save(folder, 0, {checkpoint.PARAMS: params})
    return folder


def filled(params: dict) -> set[str]:
    """Parts that are not all zeros."""
    paths = [path for path, a in flatten_dict(params, sep="/").items() if np.any(np.asarray(a))]
    return {"/".join(path.split("/")[:2]) if path.startswith("vision") else path.split("/")[0] for path in paths}


def test_a_whole_model_is_taken_bit_by_bit(tmp_path):
    run = saved(tmp_path / "run", TINY, tiny_model.params())
    params, lines = start_from([run], TINY, zeros())
    jax.tree.map(np.testing.assert_array_equal, params, tiny_model.params())
    assert lines == [f"language, connector, vision/dinov2, vision/siglip from {run}"]


def test_parts_come_from_several_folders_and_the_rest_stays(tmp_path):
    given = tiny_model.params()
    language = saved(tmp_path / "language", LANGUAGE_ALONE, {"language": given["language"]})
    siglip = MLMambaConfig(language=None, vision=TINY.vision[1:])
    encoder = saved(tmp_path / "siglip", siglip, {"vision": {"siglip": given["vision"]["siglip"]}})
    params, lines = start_from([language, encoder], TINY, zeros())
    assert filled(params) == {"language", "vision/siglip"}
    jax.tree.map(np.testing.assert_array_equal, params["vision"]["siglip"], given["vision"]["siglip"])
    assert lines == [f"language from {language}", f"vision/siglip from {encoder}"]


def test_a_later_folder_wins(tmp_path):
    ones = jax.tree.map(jnp.ones_like, tiny_model.params())
    folders = [
        saved(tmp_path / "a", TINY, tiny_model.params()),
        saved(tmp_path / "b", LANGUAGE_ALONE, {"language": ones["language"]}),
    ]
    params, _ = start_from(folders, TINY, zeros())
    assert np.all(np.asarray(params["language"]["embedding"]) == 1)
    jax.tree.map(np.testing.assert_array_equal, params["connector"], tiny_model.params()["connector"])


def test_parameters_kept_in_half_precision_become_those_of_the_run(tmp_path):
    config = LANGUAGE_ALONE.replace(param_dtype="bfloat16")
    half = {"language": tiny_model.params()["language"]}
    half = jax.tree.map(lambda a, s: a.astype(s.dtype), half, MLMamba(config).param_shapes())
    assert (
        half["language"]["embedding"].dtype == jnp.bfloat16
        and half["language"]["blocks"]["mixer"]["D"].dtype == "float32"
    )
    params, _ = start_from([saved(tmp_path / "half", config, half)], TINY, zeros())
    assert params["language"]["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(params["language"]["embedding"], half["language"]["embedding"].astype(jnp.float32))


def test_a_run_without_encoders_gives_the_rest(tmp_path):
    given = {name: part for name, part in tiny_model.params().items() if name != "vision"}
    run = saved(tmp_path / "run", TINY, given)
    (run / checkpoint.CONVERSION_FILE).write_text(json.dumps({"missing_encoders": ["dinov2", "siglip"]}))
    params, lines = start_from([run], TINY, zeros())
    assert filled(params) == {"language", "connector"} and lines == [f"language, connector from {run}"]


def test_what_only_random_weights_need_may_differ(tmp_path):
    mixer = dataclasses.replace(TINY.language.mixer, dt_range=(1e-3, 0.1), A_range=(1.0, 16.0), chunk_size=64)
    language = dataclasses.replace(TINY.language, mixer=mixer, embedding_std=0.02)
    config = TINY.replace(language=language)
    params, _ = start_from([saved(tmp_path / "run", TINY, tiny_model.params())], config, zeros(config))
    assert filled(params) == {"language", "connector", "vision/dinov2", "vision/siglip"}


def test_another_architecture_is_refused_with_the_fields_that_differ(tmp_path):
    run = saved(tmp_path / "run", TINY, tiny_model.params())
    crossed = TINY.replace(connector=dataclasses.replace(TINY.connector, directions=CROSS_SCAN, norm_eps=1e-6))
    with pytest.raises(InputError, match=r"its connector is another one than the recipe's: directions: .*norm_eps"):
        start_from([run], crossed, zeros(crossed))
    unscaled = TINY.replace(vision=(dataclasses.replace(TINY.vision[0], layer_scale=None), TINY.vision[1]))
    with pytest.raises(InputError, match=r"vision/dinov2 is another one .*layer_scale: 0.1 -> None"):
        start_from([run], unscaled, zeros(unscaled))
    with pytest.raises(
        InputError, match="holds vision/siglip, expected at least one of language of the recipe's model"
    ):
        siglip = MLMambaConfig(language=None, vision=TINY.vision[1:])
        params = {"vision": {"siglip": tiny_model.params()["vision"]["siglip"]}}
        start_from([saved(tmp_path / "siglip", siglip, params)], LANGUAGE_ALONE, zeros(LANGUAGE_ALONE))


def test_the_model_may_be_that_of_the_folder(tmp_path):
    theirs = TINY.replace(prompt_format="mamba", resize="letterbox", param_dtype="bfloat16")
    checkpoint.write_model(tmp_path / "run", theirs, None)
    checkpoint.write_model(tmp_path / "language", LANGUAGE_ALONE, None)
    preset = PRESETS["finetune"]
    config = dataclasses.replace(preset, init=(tmp_path / "run", tmp_path / "language"))
    language = dataclasses.replace(preset.model.language, lora_rank=4)
    asked = dataclasses.replace(config, model=preset.model.replace(resize="resize-crop", language=language))
    found = with_model_of_init(asked, preset.model).model
    language = dataclasses.replace(TINY.language, lora_rank=4)
    assert found == theirs.replace(
        language=language, resize="resize-crop", dtype=preset.model.dtype, param_dtype=preset.model.param_dtype
    )
    only_language = dataclasses.replace(config, init=config.init[1:])
    assert with_model_of_init(only_language, preset.model) == only_language
    assert with_model_of_init(PRESETS["digits-vqa"], PRESETS["digits-vqa"].model) == PRESETS["digits-vqa"]
    deeper = preset.model.replace(language=dataclasses.replace(preset.model.language, n_layers=3))
    with pytest.raises(
        InputError, match=r"model: got language.n_layers: 64 -> 3, expected the model of .*run as it is"
    ):
        with_model_of_init(dataclasses.replace(config, model=deeper), preset.model)


def test_other_prompts_and_pixels_than_before_are_told(tmp_path):
    run = saved(tmp_path / "run", TINY, tiny_model.params())
    recipe = TINY.replace(prompt_format="mamba", resize="letterbox")
    _, lines = start_from([run], recipe, zeros(recipe))
    assert lines[1:] == [
        f"{run} was trained with another prompt_format: zephyr, here mamba",
        f"{run} was trained with another resize: resize-naive, here letterbox",
    ]
    alone = LANGUAGE_ALONE.replace(prompt_format="mamba")  # converted: it has seen no prompts
    language = saved(tmp_path / "language", alone, {"language": tiny_model.params()["language"]})
    assert len(start_from([language], TINY, zeros())[1]) == 1


def test_a_language_model_is_not_given_another_tokenizer(tmp_path):
    run = saved(tmp_path / "run", TINY, tiny_model.params())
    config = dataclasses.replace(PRESETS["finetune"], model=TINY, init=(run,))
    with pytest.raises(
        InputError, match=r"tokenizer: got none beside the language model of .*run, .* pass --tokenizer"
    ):
        check_given(config)
    check_given(dataclasses.replace(config, tokenizer="somewhere"))
    Tokenizer.train(["a b c"], 300).save(run)
    check_given(config)


def test_the_tokenizer_is_that_of_the_language_model(tmp_path):
    tokenizer = Tokenizer.train(["a b c"], 300)
    run = saved(tmp_path / "run", TINY, tiny_model.params(), tokenizer)
    siglip = MLMambaConfig(language=None, vision=TINY.vision[1:])
    params = {"vision": {"siglip": tiny_model.params()["vision"]["siglip"]}}
    encoder = saved(tmp_path / "siglip", siglip, params)
    assert tokenizer_of([run, encoder]) == run and tokenizer_of([encoder]) is None and tokenizer_of([]) is None
