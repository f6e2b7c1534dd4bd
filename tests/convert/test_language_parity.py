"""Language models against transformers' Mamba2ForCausalLM, and the mixer against a token recurrence where that has no word.

Random weights, converted from what `save_pretrained` writes.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config
from transformers.initialization import no_init_weights
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from ml_mamba_jax.config import MixerConfig, MLMambaConfig
from ml_mamba_jax.mamba2 import Mamba2Mixer
from ml_mamba_jax.model import MLMamba
from tests.convert.converted import convert, jit_small, relative_error
from tests.convert.torch_models import Mixer, randomise

SMALL = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "num_hidden_layers": 2}


def hf_model(vocab_size: int, *, seed: int = 0, **numbers) -> Mamba2ForCausalLM:
    config = Mamba2Config(
        vocab_size=vocab_size,
        **{"n_groups": 1, "chunk_size": 64, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 0}
        | numbers,
    )
    with no_init_weights():
        model = Mamba2ForCausalLM(config)
    model.tie_weights()
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == config.tie_word_embeddings
    return randomise(model, seed)


def converted(model: Mamba2ForCausalLM, folder):
    model.save_pretrained(folder)
    found = convert(folder)
    (folder / "model.safetensors").unlink()  # up to a gigabyte
    return found


def tokens(batch: int, length: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length)).astype(np.int32)


def logits_of(model: Mamba2ForCausalLM, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits.float().numpy()


def our_logits(model, params, ids: np.ndarray, jit=jit_small):
    return jit(lambda params, ids: model.apply({"params": params}, ids))(params, ids)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """mamba2-130m in transformers, and converted."""
    theirs = hf_model(50288, hidden_size=768, num_heads=24, num_hidden_layers=24)
    return theirs, converted(theirs, tmp_path_factory.mktemp("130m"))


def test_130m_has_the_logits_of_transformers(large):
    theirs, ours = large
    named = MLMambaConfig.named("mamba2-130m")
    assert ours.config.language.mixer == named.language.mixer and ours.config.language.n_layers == 24
    assert sum(a.size for a in jax.tree.leaves(ours.params)) == 128_989_632
    ids = tokens(1, 300, 50277)
    expected = logits_of(theirs, ids)
    assert expected.shape == (1, 300, 50288) and expected.std() > 0.5
    assert relative_error(our_logits(ours.model, ours.params, ids, jax.jit), expected) <= 1e-4


def test_130m_steps_from_a_cached_state_as_transformers_does(large):
    theirs, ours = large
    n_prompt, n_steps = 20, 2
    ids = tokens(2, n_prompt + n_steps, 50277)
    prefill = jax.jit(lambda params, ids: ours.model.apply({"params": params}, ids, method="prefill"))
    step = jax.jit(lambda params, token, state: ours.model.apply({"params": params}, token, state, method="step"))
    params = jax.device_put(ours.params)
    with torch.inference_mode():
        read = theirs(torch.from_numpy(ids[:, :n_prompt]).long(), use_cache=True)
        logits, state = prefill(params, ids[:, :n_prompt])
        assert relative_error(logits, read.logits[:, -1]) <= 1e-4
        for t in range(n_prompt, n_prompt + n_steps):
            read = theirs(torch.from_numpy(ids[:, t : t + 1]).long(), cache=read.cache, use_cache=True)
            logits, state = step(params, ids[:, t], state)
            assert relative_error(logits, read.logits[:, -1]) <= 1e-4


def test_four_layers_as_wide_as_2_7b(tmp_path):
    theirs = hf_model(512, hidden_size=2560, num_heads=80, num_hidden_layers=4)
    ours = converted(theirs, tmp_path)
    assert ours.config.language.mixer == MLMambaConfig.named("mamba2-2.7b").language.mixer
    ids = tokens(1, 280, 512)  # more than a chunk of 256
    assert relative_error(our_logits(ours.model, ours.params, ids, jax.jit), logits_of(theirs, ids)) <= 1e-4


VARIANTS = {
    "two groups": {"n_groups": 2},
    "four groups": {"n_groups": 4},
    "untied head": {"tie_word_embeddings": False},
    "limited steps": {"time_step_limit": (0.01, 0.05)},
    "wide filter": {"conv_kernel": 3, "expand": 4, "num_heads": 16},
    "another epsilon": {"layer_norm_epsilon": 0.5},
    "chunks of 8": {"chunk_size": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path):
    theirs = hf_model(49, **SMALL | VARIANTS[variant])  # a vocabulary that is no multiple of 16
    ours = converted(theirs, tmp_path)
    assert ours.config.language.padded_vocab_size == 49
    ids = tokens(2, 37, 49)
    expected = logits_of(theirs, ids)
    assert relative_error(our_logits(ours.model, ours.params, ids), expected) <= 1e-4

    if variant in ("limited steps", "another epsilon"):  # the same weights without it are another model
        plain = hf_model(49, **SMALL)
        plain.load_state_dict(theirs.state_dict())
        assert relative_error(logits_of(plain, ids), expected) > 1e-2


@pytest.mark.parametrize("in_float32", [True, False])
def test_bfloat16_with_either_residual(in_float32, tmp_path):
    exact = hf_model(48, **SMALL, residual_in_fp32=in_float32)
    ids = tokens(2, 37, 48)
    expected = logits_of(exact, ids)
    theirs = exact.to(torch.bfloat16)
    ours = converted(theirs, tmp_path)
    assert ours.config.language.residual_in_float32 == in_float32
    assert ours.params["language"]["embedding"].dtype == np.float32  # kept as the config says, whatever the file holds
    other = dataclasses.replace(ours.config.language, residual_in_float32=not in_float32)
    got, got_otherwise = (
        our_logits(MLMamba(ours.config.replace(language=language, dtype="bfloat16")), ours.params, ids)
        for language in (ours.config.language, other)
    )
    # No farther from float32 than PyTorch in bfloat16 is, and as far as bfloat16 has to be.
    assert 1e-3 < relative_error(got, expected) <= 1.2 * relative_error(logits_of(theirs, ids), expected)
    assert (got != got_otherwise).any()


@pytest.mark.parametrize("before_gate", [True, False])
@pytest.mark.parametrize("n_groups", [1, 2])
def test_norm_before_the_gate_or_after_it(before_gate, n_groups, tmp_path):
    """transformers knows the gate first only; state-spaces has `norm(y) * silu(z)` too."""
    mixer = MixerConfig(
        d_model=32, d_state=16, head_dim=16, n_groups=n_groups, norm_before_gate=before_gate, dt_limit=(0.0, 0.05)
    )
    theirs = randomise(Mixer(mixer))
    weights = {
        "backbone.embedding.weight": torch.randn(56, 32),
        "backbone.layers.0.norm.weight": torch.ones(32),
        "backbone.norm_f.weight": torch.ones(32),
        **{f"backbone.layers.0.mixer.{name}": tensor for name, tensor in theirs.state_dict().items()},
    }
    save_file(weights, tmp_path / "model.safetensors")
    ssm = {"d_state": 16, "headdim": 16, "ngroups": n_groups, "norm_before_gate": before_gate, "dt_limit": [0.0, 0.05]}
    fields = {"d_model": 32, "n_layer": 1, "vocab_size": 50, "ssm_cfg": {"layer": "Mamba2", **ssm}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = convert(tmp_path)
    assert ours.config.language.mixer == mixer

    u = np.random.default_rng(0).standard_normal((2, 21, 32)).astype(np.float32)
    expected = theirs(torch.from_numpy(u))
    params = jax.tree.map(lambda a: a[0], ours.params["language"]["blocks"]["mixer"])
    got, _ = jit_small(Mamba2Mixer(mixer, 1, jnp.dtype("float32")).apply)({"params": params}, u)
    assert relative_error(got, expected) <= 1e-4
