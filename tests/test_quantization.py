"""Projections in 8 bits: the form, what the model computes with them, and how far its logits are off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax import checkpoint
from ml_mamba_jax.config import Mamba2Config, MixerConfig, MLMambaConfig
from ml_mamba_jax.conversation import Chat
from ml_mamba_jax.errors import CheckpointError, InputError
from ml_mamba_jax.generation import generate, stream
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.quantization import Quantized, dequantize, dot_general, is_quantized, logit_error, quantize
from tests import tiny_model
from tests.test_generate import QUESTIONS, TOKENIZER, weights
from tests.tiny_model import MODEL, apply


@functools.cache
def quantized() -> dict:
    return quantize(weights())


def dequantized(params: dict) -> dict:
    """The same parameters with what each `Quantized` stands for in its place; for a model whose head is not tied."""
    return jax.tree.map(
        lambda a: dequantize(a) if isinstance(a, Quantized) else a, params, is_leaf=lambda a: isinstance(a, Quantized)
    )


UNTIED = MLMamba(MODEL.config.replace(language=dataclasses.replace(MODEL.config.language, tie_embeddings=False)))


def test_every_output_channel_has_its_scale_and_is_off_by_half_a_step():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 40, 9)) * np.exp(rng.standard_normal((3, 1, 9))), jnp.float32)
    kernel = kernel.at[1, :, 4].set(0)
    params = {"language": {**weights()["language"], "head": kernel[0]}}
    params["language"]["blocks"] = {"mixer": {"in_proj": {"kernel": kernel}, "out_proj": {"kernel": kernel}}}
    got = quantize(params)["language"]
    leaf = got["blocks"]["mixer"]["in_proj"]["kernel"]
    assert leaf.values.dtype == jnp.int8 and leaf.values.shape == kernel.shape
    assert leaf.scale.dtype == jnp.float32 and leaf.scale.shape == (3, 9)
    np.testing.assert_allclose(leaf.scale, np.abs(kernel).max(1) / 127, rtol=1e-6)
    assert (np.abs(np.asarray(leaf.values, int)).max(1) == np.where(np.abs(kernel).max(1) > 0, 127, 0)).all()
    assert (np.abs(dequantize(leaf) - kernel) <= 0.5001 * np.asarray(leaf.scale)[:, None]).all()
    np.testing.assert_array_equal(got["head"].values, leaf.values[0])
    # On the host it is the same, and what is quantised stays as it is.
    again = quantize(jax.tree.map(np.asarray, params))["language"]["blocks"]["mixer"]["out_proj"]["kernel"]
    assert isinstance(again.values, np.ndarray) and isinstance(again.scale, np.ndarray)
    np.testing.assert_array_equal(again.values, leaf.values)
    np.testing.assert_allclose(again.scale, leaf.scale, rtol=1e-6)
    assert quantize({"language": got})["language"]["head"] is got["head"]


def test_only_the_projections_of_the_language_model_are_quantised():
    before, after = weights(), quantized()
    assert after["vision"] is before["vision"] and after["connector"] is before["connector"]
    language, mixer = after["language"], after["language"]["blocks"]["mixer"]
    kinds = [mixer["in_proj"]["kernel"], mixer["out_proj"]["kernel"], language["head"]]
    assert all(isinstance(leaf, Quantized) for leaf in kinds)
    assert language["head"].values.shape == before["language"]["embedding"].T.shape
    others = [leaf for leaf in jax.tree.leaves(language) if leaf.dtype == jnp.int8]
    assert len(others) == 3 and language["embedding"] is before["language"]["embedding"]
    with pytest.raises(InputError, match="params: got vision, expected those of a model with a language part"):
        quantize({"vision": {}})


def test_the_arrays_that_were_replaced_may_be_given_up():
    params = jax.tree.map(jnp.copy, weights())
    quantize(params, donate=True)
    gone = [path for path, leaf in jax.tree.leaves_with_path(params) if leaf.is_deleted()]
    assert {jax.tree_util.keystr(path[-2:]) for path in gone} == {"['in_proj']['kernel']", "['out_proj']['kernel']"}


def test_the_model_computes_what_it_computes_with_the_weights_that_they_stand_for():
    tokens, lengths = tiny_model.tokens(2, 9), jnp.asarray([9, 4])
    results = []
    for model, params in ((MODEL, quantized()), (UNTIED, dequantized(quantized()))):
        logits, state = apply(params, tokens, lengths=lengths, method="prefill", model=model)
        results.append((logits, apply(params, tokens[:, 0], state, method="step", model=model)))
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6 * np.abs(expected).max())
    forward = apply(quantized(), tokens)
    by_head = apply(quantized(), tokens, method="hidden") @ dequantize(quantized()["language"]["head"])
    np.testing.assert_allclose(forward, by_head, atol=5e-6 * np.abs(by_head).max())
    original = apply(weights(), tokens)
    assert np.abs(forward - original).max() > 1e-3 * np.abs(original).max()  # the rounding is there


def test_in_16_bits_the_products_are_exact_until_they_are_rounded():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 1, 300)), jnp.bfloat16)
    leaf = Quantized(
        jnp.asarray(rng.integers(-127, 128, (300, 20)), jnp.int8), jnp.asarray(rng.uniform(0.5, 2, 20), jnp.float32)
    )
    contracted = ((2,), (0,)), ((), ())
    expected = np.asarray(x, np.float64) @ (np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64))
    whole = dot_general(x, leaf, contracted, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(whole, expected, atol=1e-6 * np.abs(expected).max())
    rounded = dot_general(x, leaf, contracted)
    assert rounded.dtype == jnp.bfloat16 and whole.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(rounded, np.float32), whole, rtol=2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_off_by_little_at_the_widths_of_a_real_model(dtype):
    """Two of the layers of the 130m shape, a part of its vocabulary; `benchmarks/quantization.py` measures whole models."""
    config = Mamba2Config(MixerConfig(d_model=768), n_layers=2, vocab_size=5000)
    model = MLMamba(MLMambaConfig(config, dtype=dtype, param_dtype=dtype))
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.dummy_inputs()))()["params"]
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 5000)
    error = logit_error(model, params, quantize(params), tokens)
    assert 1e-3 < error.relative < 0.02 and error.same_choice > 0.9, error


def test_whatever_generates_takes_quantised_parameters():
    options = {"max_new_tokens": 6}
    expected = generate(UNTIED, dequantized(quantized()), TOKENIZER, QUESTIONS, **options)
    assert generate(MODEL, quantized(), TOKENIZER, QUESTIONS, **options) == expected
    assert "".join(stream(MODEL, quantized(), TOKENIZER, QUESTIONS[0], **options)) == expected[0]
    assert Chat(MODEL, quantized(), TOKENIZER).ask(QUESTIONS[0], **options) == expected[0]


def test_nan_among_the_weights_is_still_found():
    for value in (jnp.nan, jnp.inf):
        mixer = weights()["language"]["blocks"]["mixer"]
        kernel = mixer["in_proj"]["kernel"].at[0, 3, 5].set(value)
        blocks = {**weights()["language"]["blocks"], "mixer": {**mixer, "in_proj": {"kernel": kernel}}}
        broken = quantize({**weights(), "language": {**weights()["language"], "blocks": blocks}})
        logits = apply(broken, tiny_model.tokens(1, 5))
        assert not np.isfinite(logits).all()


def test_a_checkpoint_gives_quantised_parameters_back(tmp_path):
    checkpoint.write_model(tmp_path, MODEL.config, TOKENIZER)
    checkpoint.save(tmp_path, 1, {checkpoint.PARAMS: quantized()})
    params = checkpoint.load(tmp_path).params
    assert is_quantized(params) and not is_quantized(weights())
    assert jax.tree.structure(params) == jax.tree.structure(quantized())
    for got, expected in zip(jax.tree.leaves(params), jax.tree.leaves(quantized()), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), MODEL.param_shapes())
    with pytest.raises(CheckpointError, match="got quantised parameters, expected whole ones"):
        checkpoint.load_params(tmp_path, shardings=shardings)
