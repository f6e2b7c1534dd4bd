"""The mixer and the language model against the recurrence of the paper, token by token, in float64 numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from ml_mamba_jax import layers
from ml_mamba_jax.config import MixerConfig
from ml_mamba_jax.mamba2 import Mamba2Mixer
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.state import MambaState, init_state, insert_rows, take_rows
from tests import tiny_model
from tests.kernels.test_ssd_pallas_gpu import export


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mixer_by_token(p: dict, u: np.ndarray, config: MixerConfig) -> np.ndarray:
    """One row u [l d] through a mixer, written from the paper: no chunks, no batches, float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    inner, n, heads, width = config.d_inner, config.d_state, config.n_heads, config.head_dim
    window = np.zeros((config.d_conv, config.conv_channels))
    state = np.zeros((heads, width, n))
    outputs = []
    for u_t in np.asarray(u, np.float64):
        zxbcdt = u_t @ p["in_proj"]["kernel"]
        z, xBC, dt = (
            zxbcdt[:inner],
            zxbcdt[inner : inner + config.conv_channels],
            zxbcdt[inner + config.conv_channels :],
        )
        window = np.concatenate([window[1:], xBC[None]])
        xBC = np.sum(window * p["conv_weight"].T, axis=0) + p["conv_bias"]
        xBC = xBC * sigmoid(xBC)
        x = xBC[:inner].reshape(heads, width)
        B = xBC[inner : inner + config.n_groups * n].reshape(config.n_groups, n)
        C = xBC[inner + config.n_groups * n :].reshape(config.n_groups, n)
        dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *config.dt_limit)
        y = np.zeros((heads, width))
        for h in range(heads):
            g = h * config.n_groups // heads
            decay = np.exp(-np.exp(p["A_log"][h]) * dt[h])
            state[h] = decay * state[h] + dt[h] * np.outer(x[h], B[g])
            y[h] = state[h] @ C[g] + p["D"][h] * x[h]
        gate = z * sigmoid(z)
        y = y.reshape(inner)

        def normalise(a):
            a = a.reshape(config.n_groups, -1)
            return (a / np.sqrt(np.mean(a**2, axis=1, keepdims=True) + config.norm_eps)).reshape(inner)

        y = (
            normalise(y) * p["norm_weight"] * gate
            if config.norm_before_gate
            else normalise(y * gate) * p["norm_weight"]
        )
        outputs.append(y @ p["out_proj"]["kernel"])
    return np.stack(outputs)


@pytest.mark.parametrize(
    "config",
    [
        MixerConfig(d_model=24, d_state=12, head_dim=8, chunk_size=7),
        MixerConfig(
            d_model=24, d_state=12, head_dim=8, n_groups=3, d_conv=3, norm_before_gate=True, dt_limit=(0.01, 0.05)
        ),
    ],
    ids=["default", "groups, limits, norm before gate"],
)
def test_mixer_is_the_recurrence(config):
    mixer = Mamba2Mixer(config, n_layers=2, dtype=jnp.dtype("float32"))
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.standard_normal((2, 19, 24)), jnp.float32)
    params = nn.unbox(mixer.init(jax.random.key(0), u))["params"]
    params = jax.tree.map(lambda a: a + jnp.asarray(0.1 * rng.standard_normal(a.shape), a.dtype), params)
    y, state = jax.jit(mixer.apply)({"params": params}, u)
    assert state is None
    expected = np.stack([mixer_by_token(params, row, config) for row in u])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-5)


def test_without_a_state_none_is_computed():
    """It would be written by the forward pass, and its gradient, which is zero, read by the backward pass."""
    config = MixerConfig(d_model=128, d_state=128, head_dim=64)
    mixer = Mamba2Mixer(config, n_layers=1, dtype=jnp.dtype("bfloat16"))
    u = jax.ShapeDtypeStruct((3, 70, 128), jnp.bfloat16)
    params = jax.eval_shape(lambda u: nn.unbox(mixer.init(jax.random.key(0), u)), u)
    ends = "2x3x4x64x128xf32"  # [b h p n] of the first state and of the gradient of the last

    def lowered(state):
        def loss(params, u):
            with pk.use_implementation("pallas_gpu"):
                y, after = mixer.apply(params, u, state, layer=jnp.int32(0))
            return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves((y, after)))

        return export(lambda arrays: jax.grad(loss)(*arrays), (params, u))

    assert ends not in lowered(None)
    states = MambaState(jnp.zeros((1, 3, 3, config.conv_channels), jnp.bfloat16), jnp.zeros((1, 3, 4, 64, 128)))
    assert ends in lowered(states)


def test_language_model_is_prenorm_residual_blocks_with_a_tied_head():
    params, tokens = tiny_model.params(), tiny_model.tokens(2, 11)
    config = tiny_model.MODEL.config.language
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["language"])

    def rms(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    x = p["embedding"][np.asarray(tokens)]
    for i in range(config.n_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        u = rms(x, layer["norm"]["scale"])
        x = x + np.stack([mixer_by_token(layer["mixer"], row, config.mixer) for row in u])
    expected = rms(x, p["norm"]["scale"]) @ p["embedding"].T

    logits = tiny_model.apply(params, tokens)
    assert logits.shape == (2, 11, config.padded_vocab_size) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=5e-5)


def test_a_loop_over_layers_equals_straight_code(monkeypatch):
    """Large models loop over their layers, the tiny one is unrolled: both are one function of the parameters."""
    params, tokens = {"language": tiny_model.params()["language"]}, tiny_model.tokens(2, 9)
    n_layers = tiny_model.MODEL.config.language.n_layers

    def loss(params):
        return jnp.mean(jnp.square(tiny_model.MODEL.apply({"params": params}, tokens)))

    def traced(limit):
        monkeypatch.setattr(layers, "UNROLLED_LAYERS", limit)
        function = jax.jit(jax.value_and_grad(lambda params: loss(params)))  # a new function, so that it is traced anew
        return str(jax.make_jaxpr(function)(params)), function(params)

    (straight, (value, grads)), (loop, (loop_value, loop_grads)) = traced(n_layers), traced(0)
    assert f"unroll={n_layers}" in straight and f"unroll={n_layers}" not in loop
    np.testing.assert_allclose(loop_value, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(loop_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_untied_head_has_weights_of_its_own():
    config = tiny_model.MODEL.config
    language = config.language.__class__(config.language.mixer, n_layers=1, vocab_size=30, tie_embeddings=False)
    model = MLMamba(config.replace(language=language, vision=(), connector=None))
    params = model.init(jax.random.key(0), **model.dummy_inputs())["params"]
    assert params["language"]["head"].shape == (96, 32)
    hidden = model.apply({"params": params}, jnp.asarray([[1, 2]]), method="hidden")
    logits = model.apply({"params": params}, jnp.asarray([[1, 2]]))
    np.testing.assert_allclose(logits, hidden @ params["language"]["head"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token", [-1, 512, -100, 2**31 - 1])
def test_ids_outside_the_table_give_nan_and_not_a_neighbour(token):
    logits = tiny_model.apply(tiny_model.params(), jnp.asarray([[3, token, 4], [3, 5, 4]]))
    assert np.isnan(logits[0, 1:]).all() and np.isfinite(logits[1]).all()


def test_initial_parameters_are_in_their_ranges():
    model = tiny_model.MODEL
    params = jax.jit(lambda: model.init(jax.random.key(3), **model.dummy_inputs()))()["params"]
    for part, config in (("language", model.config.language), ("connector", model.config.connector)):
        mixer = params[part]["blocks"]["mixer"]
        dt, A = np.logaddexp(0, mixer["dt_bias"]), np.exp(mixer["A_log"])
        for values, (low, high) in ((dt, config.mixer.dt_range), (A, config.mixer.A_range)):
            assert 0.999 * low <= values.min() and values.max() <= 1.001 * high
            assert values.min() < low + 0.2 * (high - low) and values.max() > high - 0.4 * (high - low)
        np.testing.assert_array_equal(mixer["D"], 1)
        bound = (192 * config.n_layers) ** -0.5  # PyTorch's 1/sqrt(fan_in), shrunk by sqrt(layers)
        assert 0.97 * bound < np.abs(mixer["out_proj"]["kernel"]).max() <= bound
        assert 0.97 * 96**-0.5 < np.abs(mixer["in_proj"]["kernel"]).max() <= 96**-0.5
        assert 0.9 * 0.5 < np.abs(mixer["conv_weight"]).max() <= 0.5
    expected = model.config.language.embedding_std
    assert abs(np.std(params["language"]["embedding"]) / expected - 1) < 0.02


def test_state_rows_can_be_taken_and_inserted():
    config = tiny_model.MODEL.config.language
    _, state = tiny_model.apply(tiny_model.params(), tiny_model.tokens(3, 5), method="prefill")
    forked = take_rows(state, jnp.asarray([2, 2, 0]))
    assert forked.batch_size == 3
    for a, b in zip(forked, state, strict=True):
        np.testing.assert_array_equal(a[:, 0], b[:, 2])
        np.testing.assert_array_equal(a[:, 2], b[:, 0])
    fresh = init_state(config, 3)
    mixed = insert_rows(fresh, jnp.asarray([1]), take_rows(state, jnp.asarray([0])))
    for a, b in zip(mixed, state, strict=True):
        np.testing.assert_array_equal(a[:, 1], b[:, 0])
        assert not a[:, 0].any() and not a[:, 2].any()
