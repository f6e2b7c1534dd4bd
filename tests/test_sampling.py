"""Sampling against its definition in numpy, by the tokens it allows and by how often it draws them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.sampling import Sampling, penalize_repetition, sample

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 2.5, -1.0, 0.5], np.float32)


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `sample` should draw from: temperature, then top-k, top-p and min-p, one token at a time."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: sampling.top_k or len(p)]
    total = sum(p[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if sampling.top_p is not None and reached >= sampling.top_p:
            break
        if sampling.min_p is None or p[i] >= sampling.min_p * p.max():
            nucleus.append(i)
        reached += p[i] / total
    result = np.zeros_like(p)
    result[nucleus] = p[nucleus]
    return result / result.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=1.0, top_k=100),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=2.0, top_k=5, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1.0, min_p=0.0),
        Sampling(temperature=2.0, top_k=6, top_p=0.9, min_p=0.3),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_definition(sampling):
    draws = 40_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (draws, len(LOGITS)))
    tokens = jax.jit(sample)(jax.random.key(1), logits, sampling.rule())
    assert tokens.dtype == jnp.int32 and tokens.shape == (draws,)
    expected = distribution(LOGITS, sampling)
    frequencies = np.bincount(tokens, minlength=len(LOGITS)) / draws
    assert not frequencies[expected == 0].any()
    error = np.abs(frequencies - expected)
    assert (error <= 4.5 * np.sqrt(expected * (1 - expected) / draws)).all(), (frequencies, expected)


def test_combined_options_act_in_order():
    # Top-k leaves {1, 3}; of these top-p measures the renormalised probabilities: 0.622 and 0.378.
    logits = jnp.asarray(LOGITS)[None]
    sampling = Sampling(temperature=1.0, top_k=2, top_p=0.62)
    drawn = {int(sample(jax.random.key(i), logits, sampling.rule())[0]) for i in range(40)}
    assert drawn == {1}
    drawn = {
        int(sample(jax.random.key(i), logits, Sampling(temperature=1.0, top_k=2, top_p=0.63).rule())[0])
        for i in range(40)
    }
    assert drawn == {1, 3}  # of the equal 3 and 5, top-k keeps the lower id


def test_greedy_takes_the_likeliest_whatever_the_key():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 30)), jnp.float32)
    for seed in range(3):
        tokens = sample(jax.random.key(seed), logits, Sampling().rule())
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_tiny_temperature_becomes_greedy_without_overflow():
    logits = jnp.asarray(LOGITS)[None] * 100
    for temperature in (1e-36, 1e-60):  # 300 / 1e-36 is infinite in float32, and 1e-60 is zero
        for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
            assert sample(jax.random.key(0), logits, Sampling(temperature=temperature, **options).rule())[0] == 1


def test_rows_draw_independently():
    tokens = sample(jax.random.key(0), jnp.zeros((200, 50)), Sampling(temperature=1.0).rule())
    assert len(set(np.asarray(tokens).tolist())) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, expected a finite number, 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": 0}, "top_k: got 0, expected a whole number of at least 1"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_p": float("nan")}, "top_p: got nan"),
        ({"min_p": -0.1}, "min_p: got -0.1, expected 0 to 1"),
        ({"min_p": float("nan")}, "min_p: got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a finite number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty: got inf"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_options_are_hashable_and_compare_by_value():
    assert hash(Sampling(0.5, top_k=3)) == hash(Sampling(0.5, top_k=3)) and Sampling(0.5) != Sampling(0.6)


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    seen = np.arange(len(LOGITS)) % 2 == 0
    actual = penalize_repetition(jnp.asarray(LOGITS)[None], jnp.asarray(seen)[None], 2.0)[0]
    np.testing.assert_array_equal(actual, [0.5, 3.0, -4.0, 2.5, 0.0, 2.5, -2.0, 0.5])
