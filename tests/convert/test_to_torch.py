"""A folder -> PyTorch weights: what was converted comes back bit by bit, and transformers reads what is written."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax import checkpoint
from ml_mamba_jax.config import CROSS_SCAN, MLMambaConfig
from ml_mamba_jax.convert import export_torch, import_torch, to_torch
from ml_mamba_jax.convert.weight_files import open_weights
from ml_mamba_jax.errors import CheckpointError, ConvertError, InputError
from ml_mamba_jax.model import MLMamba
from tests.convert.small_weights import (
    DTYPES,
    LANGUAGE,
    SMALL_ENCODERS,
    TINY,
    cast,
    language,
    run,
    timm,
    write_hf_mamba2,
    write_hf_vision,
    write_mamba_ssm,
    write_run,
    write_timm,
    write_tokenizer,
)


def there_and_back(src: Path, tmp_path: Path, **options) -> Path:
    import_torch(src, tmp_path / "jax")
    export_torch(tmp_path / "jax", tmp_path / "torch", **options)
    return tmp_path / "torch"


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right), "the same keys in the same order"
    for key in left:
        assert (left[key].dtype, left[key].shape) == (right[key].dtype, right[key].shape), key
        assert bits(left[key]) == bits(right[key]), key


def loaded(folder: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(a) for path, a in flatten_dict(checkpoint.load_params(folder), sep="/").items()}


def assert_same_params(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype and left[path].tobytes() == right[path].tobytes(), path


def write_folder(folder: Path, config: MLMambaConfig, seed: int = 0) -> Path:
    """A folder as training leaves it: no conversion, and any numbers."""
    rng = np.random.default_rng(seed)
    shapes = flatten_dict(MLMamba(config).param_shapes(), sep="/")
    params = {path: jax.numpy.asarray(rng.standard_normal(a.shape), a.dtype) for path, a in shapes.items()}
    checkpoint.write_model(folder, config, None)
    checkpoint.save(folder, 3, {checkpoint.PARAMS: unflatten_dict(params, sep="/")})
    return folder


# What came from PyTorch comes back


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_of_transformers_comes_back_byte_by_byte(tmp_path, dtype):
    src = write_hf_mamba2(tmp_path / "src", dtype)
    out = there_and_back(src, tmp_path)
    assert (out / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
    fields = json.loads((out / "config.json").read_text())
    original = json.loads((src / "config.json").read_text())
    del original["transformers_version"]
    assert {name: fields[name] for name in original} == original
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]


def test_dtypes_come_back_in_another_form(tmp_path):
    """Published weights of state-spaces/mamba hold float16 and float32."""
    tensors = {key: t if key.endswith(("A_log", "D", "dt_bias")) else t.half() for key, t in language().items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    src = write_mamba_ssm(tmp_path / "src", tensors)
    write_tokenizer(src)
    out = there_and_back(src, tmp_path)
    back = safetensors.torch.load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    expected = {key.replace("embedding.", "embeddings."): tensor for key, tensor in tensors.items()}
    assert_same(dict(sorted(back.items())), dict(sorted(expected.items())))
    assert (out / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["dinov2-vit-l", "clip-vit-b", "siglip-vit-so400m", "in1k-vit-l"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_of_timm_comes_back_without_what_is_not_run(tmp_path, name, dtype):
    encoder = SMALL_ENCODERS[name]
    tensors = cast(timm(encoder), dtype)
    out = there_and_back(write_timm(tmp_path / "src", encoder, tensors), tmp_path)
    unused = ("blocks.2.", "norm.", "head.", "attn_pool.", "mask_token")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(unused)}
    back = safetensors.torch.load_file(out / "model.safetensors")
    assert_same(dict(sorted(back.items())), dict(sorted(kept.items())))


@pytest.mark.parametrize("kind", ["hf-siglip", "hf-clip", "hf-dinov2"])
def test_an_encoder_of_transformers_keeps_its_one_dtype(tmp_path, kind):
    """Three tensors become one, which has no original."""
    src = write_hf_vision(tmp_path / "src", kind)
    tensors = cast(safetensors.torch.load_file(src / "model.safetensors"), "bfloat16")
    safetensors.torch.save_file(tensors, src / "model.safetensors", {"format": "pt"})
    out = there_and_back(src, tmp_path)
    back = safetensors.torch.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    import_torch(out, tmp_path / "again")
    mine, again = loaded(tmp_path / "jax"), loaded(tmp_path / "again")
    for path in mine:
        if kind == "hf-dinov2" and path.endswith("prefix_tokens"):  # a sum, which bfloat16 rounds
            np.testing.assert_allclose(mine[path], again[path], rtol=2**-8)
        else:
            assert mine[path].tobytes() == again[path].tobytes(), path


def assert_same_tree(left: dict, right: dict) -> None:
    assert list(left) == list(right)
    for key in left:
        if isinstance(left[key], dict):
            assert_same_tree(left[key], right[key])
        else:
            assert left[key].dtype == right[key].dtype and bits(left[key]) == bits(right[key]), key


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_a_run_comes_back_with_its_nesting_and_order(tmp_path, dtype):
    mixer = dataclasses.replace(TINY.language.mixer, head_dim=64)  # an odd number of heads
    connector = dataclasses.replace(TINY.connector, mixer=mixer, directions=CROSS_SCAN)
    config = TINY.replace(connector=connector, language=dataclasses.replace(TINY.language, mixer=mixer))
    src = write_run(tmp_path / "src", config)
    path = Path("checkpoints") / "latest-checkpoint.pt"
    content = torch.load(src / path, weights_only=True)
    if dtype == "mixed":
        # Three numbers of two bytes each stand before some of four.
        model = content["model"]
        model["llm_backbone"] = {
            key: t if key.endswith(("A_log", "D")) else t.bfloat16() for key, t in model["llm_backbone"].items()
        }
        model["bidirectional_mamba"] = cast(model["bidirectional_mamba"], "float16")
        torch.save(content, src / path)
    out = there_and_back(src, tmp_path)
    assert_same_tree(torch.load(out / path, weights_only=True), content)
    for encoder in config.vision:
        back = safetensors.torch.load_file(out / "vision" / encoder.name / "model.safetensors")
        source = safetensors.torch.load_file(src / "vision" / encoder.name / "model.safetensors")
        assert back.keys() < source.keys()
        assert_same(back, {key: source[key] for key in back})
    own = json.loads((out / "config.json").read_text())
    assert own["model"]["arch_specifier"] == "no-align+fused-gelu-mlp"
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "vision"]
    assert os.listdir(out / "checkpoints") == ["latest-checkpoint.pt"], "nothing is left of how it was written"


def test_a_head_that_is_stored_with_the_embedding_comes_back_so(tmp_path):
    src = write_run(tmp_path / "run")
    back = there_and_back(src, tmp_path)
    left, right = (folder / "checkpoints" / "latest-checkpoint.pt" for folder in (src, back))
    assert left.read_bytes() == right.read_bytes()
    tensors = torch.load(right, weights_only=True)["model"]["llm_backbone"]
    assert tensors["lm_head.weight"].data_ptr() == tensors["backbone.embedding.weight"].data_ptr()


@pytest.mark.parametrize("part", ["language", "vision"])
def test_choices_about_the_input_come_back(tmp_path, part):
    whole = TINY.replace(prompt_format="mamba", resize="letterbox", dtype="bfloat16")
    config = whole.replace(vision=(), connector=None) if part == "language" else None
    config = config or whole.replace(language=None, connector=None, vision=TINY.vision[:1])
    export_torch(write_folder(tmp_path / "ours", config), tmp_path / "torch")
    import_torch(tmp_path / "torch", tmp_path / "back")
    assert checkpoint.load_config(tmp_path / "back") == config


def test_a_dry_run_cannot_check(of_language):
    with pytest.raises(InputError, match="check: got it for a dry run"):
        export_torch(of_language, None, check=True, dry_run=True)


def test_a_run_without_encoders_comes_back_without(tmp_path):
    src = write_run(tmp_path / "src", encoders=False)
    out = there_and_back(src, tmp_path)
    path = Path("checkpoints") / "latest-checkpoint.pt"
    assert_same_tree(torch.load(out / path, weights_only=True), run(TINY))
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json"]
    with pytest.raises(ConvertError, match="jax: was converted without its encoders, which timm-vit needs"):
        export_torch(tmp_path / "jax", tmp_path / "vit", form="timm-vit")


# What was trained here goes there and comes back


@pytest.mark.parametrize("scan", ["none", "basic", "advanced", "vss-l2"])
def test_every_scan_goes_there_and_comes_back(tmp_path, scan):
    connector = dataclasses.replace(TINY.connector, scan=scan, directions=CROSS_SCAN)
    assert_comes_back(tmp_path, TINY.replace(connector=connector))


@pytest.mark.parametrize("projector", ["linear", "gelu-mlp", "fused-ldpnet"])
def test_every_projector_goes_there_and_comes_back(tmp_path, projector):
    connector = dataclasses.replace(TINY.connector, projector=projector, directions=CROSS_SCAN)
    assert_comes_back(tmp_path, TINY.replace(connector=connector, resize="letterbox", prompt_format="pure"))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_language_model_goes_there_and_comes_back(tmp_path, tie_embeddings, param_dtype):
    config = MLMambaConfig(language=dataclasses.replace(LANGUAGE, tie_embeddings=tie_embeddings), dtype="bfloat16")
    assert_comes_back(tmp_path, config.replace(param_dtype=param_dtype))


def assert_comes_back(tmp_path: Path, config: MLMambaConfig) -> None:
    folder = write_folder(tmp_path / "folder", config)
    export_torch(folder, tmp_path / "torch")
    import_torch(tmp_path / "torch", tmp_path / "again", dtype=config.param_dtype)
    assert checkpoint.load_config(tmp_path / "again") == config
    assert_same_params(loaded(tmp_path / "again"), loaded(folder))


def test_one_part_of_a_whole_model(tmp_path):
    folder = write_folder(tmp_path / "folder", TINY)
    export_torch(folder, tmp_path / "language", form="hf-mamba2")
    export_torch(folder, tmp_path / "vision", form="timm-vit")
    import_torch(tmp_path / "language", tmp_path / "mine")
    params = loaded(folder)
    of_language = {path: a for path, a in params.items() if path.startswith("language/")}
    assert_same_params(loaded(tmp_path / "mine"), of_language)
    for encoder in TINY.vision:
        import_torch(tmp_path / "vision" / "vision" / encoder.name, tmp_path / encoder.name)
        of_encoder = {path: a for path, a in params.items() if path.startswith(f"vision/{encoder.name}/")}
        assert_same_params(loaded(tmp_path / encoder.name), of_encoder)


# What others read


def logits_of_transformers(folder: Path) -> np.ndarray:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

    model = Mamba2ForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits.numpy()


def test_transformers_loads_what_is_written(tmp_path, monkeypatch):
    src = write_hf_mamba2(tmp_path / "src")
    out = there_and_back(src, tmp_path)
    theirs = logits_of_transformers(src)
    assert np.array_equal(logits_of_transformers(out), theirs)
    params = checkpoint.load_params(tmp_path / "jax")
    model = MLMamba(checkpoint.load_config(tmp_path / "jax"))
    ours = jax.jit(model.apply)({"params": params}, jax.numpy.arange(40)[None])
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4 * np.abs(theirs).max())

    monkeypatch.setattr(to_torch, "SHARD_BYTES", 40_000)
    export_torch(tmp_path / "jax", tmp_path / "sharded")
    names = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all(path.stat().st_size < 45_000 for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert np.array_equal(logits_of_transformers(tmp_path / "sharded"), theirs)
    mine, whole = open_weights(tmp_path / "sharded"), open_weights(src)
    assert {key: mine[key].tobytes() for key in mine} == {key: whole[key].tobytes() for key in whole}
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(whole[key].nbytes for key in whole)


def test_transformers_loads_an_untied_half_precision_model(tmp_path):
    config = MLMambaConfig(language=dataclasses.replace(LANGUAGE, tie_embeddings=False))
    folder = write_folder(tmp_path / "folder", config)
    export_torch(folder, tmp_path / "torch", dtype="bfloat16")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "torch")
    expected = loaded(folder)["language/head"]
    assert model.lm_head.weight.dtype == torch.bfloat16
    np.testing.assert_allclose(model.lm_head.weight.detach().float().numpy().T, expected, rtol=2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_is_asked_for(tmp_path, dtype):
    import_torch(write_run(tmp_path / "src", encoders=False), tmp_path / "jax")
    export_torch(tmp_path / "jax", tmp_path / "torch", dtype=dtype)
    weights = open_weights(tmp_path / "torch")
    source = open_weights(tmp_path / "src")
    assert {str(weights[key].dtype) for key in weights} == {dtype}
    for key in source:
        np.testing.assert_array_equal(weights[key], source[key].astype(weights[key].dtype))


# What is refused


@pytest.fixture(scope="module")
def of_language(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("language"), MLMambaConfig(language=LANGUAGE))


@pytest.fixture(scope="module")
def of_vision(tmp_path_factory) -> Path:
    config = MLMambaConfig(language=None, vision=(SMALL_ENCODERS["siglip-vit-so400m"],))
    return write_folder(tmp_path_factory.mktemp("vision"), config)


def test_forms_that_a_folder_has_no_parts_for(of_language, of_vision, tmp_path):
    out = tmp_path / "out"
    for folder, form, message in (
        (of_language, "timm-vit", "holds no vision, which timm-vit needs; choose another form"),
        (of_language, "ml-mamba", "holds no connector, which ml-mamba needs"),
        (of_vision, "hf-mamba2", "holds no language, which hf-mamba2 needs"),
        (of_vision, "ml-mamba", "holds no language and no connector, which ml-mamba needs"),
    ):
        for dry_run in (False, True):
            with pytest.raises(ConvertError, match=message):
                export_torch(folder, out, form=form, dry_run=dry_run)
    with pytest.raises(InputError, match="unknown dtype 'float8'; did you mean"):
        export_torch(of_language, out, dtype="float8")
    assert not out.exists() and os.listdir(tmp_path) == []


def test_a_norm_that_transformers_has_not(tmp_path):
    mixer = dataclasses.replace(LANGUAGE.mixer, norm_before_gate=True)
    folder = write_folder(tmp_path / "f", MLMambaConfig(language=dataclasses.replace(LANGUAGE, mixer=mixer)))
    with pytest.raises(ConvertError, match="normalises before the gate, which hf-mamba2 cannot"):
        export_torch(folder, tmp_path / "out")


def test_an_output_that_exists_is_left_alone(of_language, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: exists already"):
        export_torch(of_language, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"found no config\.json"):
        export_torch(tmp_path, tmp_path / "out")
    checkpoint.write_model(tmp_path / "new", TINY, None)
    with pytest.raises(CheckpointError, match="found no checkpoint"):
        export_torch(tmp_path / "new", tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"tensors": 3}', '{"tensors": [{"key": "a"}]}'])
def test_a_damaged_record_of_a_conversion(of_language, tmp_path, text):
    record = of_language / "conversion.json"
    record.write_text(text)
    try:
        with pytest.raises(
            CheckpointError, match=r"conversion\.json: the record of the conversion is damaged"
        ) as caught:
            export_torch(of_language, tmp_path / "out")
        assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []
    finally:
        record.unlink()


def test_numbers_that_overflow_are_told(tmp_path):
    config = MLMambaConfig(language=LANGUAGE)
    folder = write_folder(tmp_path / "folder", config)
    params = checkpoint.load_params(folder)
    params["language"]["norm"]["scale"] = params["language"]["norm"]["scale"].at[3].set(1e6)
    checkpoint.save(folder, 4, {checkpoint.PARAMS: params})
    with pytest.raises(
        ConvertError, match=r"backbone\.norm_f\.weight: NaN or infinity as float16; choose another dtype"
    ):
        export_torch(folder, tmp_path / "out", dtype="float16")
    assert os.listdir(tmp_path) == ["folder"]
