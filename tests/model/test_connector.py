"""The connector against the composition of the released model, written with explicit flips in float64 numpy."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ml_mamba_jax.connector import ScanConnector
from tests import tiny_model

erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def layer_norm(layer, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]


def core(zxbcdt, k, p, config):
    """One direction of a mixer, on its projected tokens [l ..] in the order it reads them; the gated norm is inside."""
    inner, n, heads = config.d_inner, config.d_state, config.n_heads
    z, xBC, dt = np.split(zxbcdt, [inner, 2 * inner + 2 * n], axis=-1)
    padded = np.pad(xBC, ((config.d_conv - 1, 0), (0, 0)))
    xBC = sum(padded[w : w + len(xBC)] * p["conv_weight"][k, :, w] for w in range(config.d_conv)) + p["conv_bias"][k]
    x, B, C = np.split(silu(xBC), [inner, inner + n], axis=-1)
    x = x.reshape(len(x), heads, -1)
    dt = np.log1p(np.exp(dt + p["dt_bias"][k]))
    A = -np.exp(p["A_log"][k])
    h, y = np.zeros((heads, config.head_dim, n)), np.zeros_like(x)
    for t in range(len(x)):
        h = np.exp(dt[t] * A)[:, None, None] * h + dt[t][:, None, None] * x[t][:, :, None] * B[t]
        y[t] = h @ C[t] + p["D"][k][:, None] * x[t]
    y = y.reshape(len(x), inner) * silu(z)
    return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-5) * p["norm_weight"]


def bidirectional(u, p, config):
    zxbcdt = u @ p["in_proj"]["kernel"]
    forward = core(zxbcdt, 0, p, config)
    backward = core(zxbcdt[::-1], 1, p, config)[::-1]
    return (forward + backward) / 2 @ p["out_proj"]["kernel"]


def cross(u, p, config, grid):
    """The same with VMamba's four walks, each an explicit list of patches."""
    rows, columns = grid
    by_rows = [r * columns + c for r in range(rows) for c in range(columns)]
    by_columns = [r * columns + c for c in range(columns) for r in range(rows)]
    zxbcdt, total = u @ p["in_proj"]["kernel"], 0
    for k, order in enumerate((by_rows, by_rows[::-1], by_columns, by_columns[::-1])):
        y = core(zxbcdt[order], k, p, config)
        total = total + y[np.argsort(order)]
    return total / 4 @ p["out_proj"]["kernel"]


def connector(features, p, mixer, n_layers):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    x = gelu(linear(p["in_proj"], features))
    for i in range(n_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        x = x + mixer(x, layer["mixer"])
        u = layer_norm(layer["norm"], x)
        x = x + linear(layer["w3"], silu(linear(layer["w1"], u)) * linear(layer["w2"], u))
    x = layer_norm(p["norm"], x)
    return linear(p["projector_2"], gelu(linear(p["projector_1"], gelu(linear(p["projector_0"], x)))))


def test_connector_is_the_released_composition():
    config, params = tiny_model.MODEL.config.connector, tiny_model.params()["connector"]
    features = np.random.default_rng(0).standard_normal((2, 16, 112))
    model = ScanConnector(config, (4, 4), jnp.dtype("float32"))
    visual = jax.jit(model.apply)({"params": params}, jnp.asarray(features, jnp.float32))
    assert visual.shape == (2, 16, 96)
    expected = [
        connector(row, params, lambda u, p: bidirectional(u, p, config.mixer), config.n_layers) for row in features
    ]
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(visual, np.stack(expected), atol=2e-5, rtol=1e-4)


def test_cross_scan_on_a_grid_that_is_not_square():
    config = dataclasses.replace(
        tiny_model.MODEL.config.connector, directions=("rows", "rows_reversed", "columns", "columns_reversed")
    )
    model = ScanConnector(config, (3, 5), jnp.dtype("float32"))
    rng = np.random.default_rng(1)
    features = rng.standard_normal((1, 15, 20))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(features, jnp.float32))
    params = jax.tree.map(
        lambda a: a + jnp.asarray(0.1 * rng.standard_normal(a.shape), a.dtype), nn.unbox(variables)["params"]
    )
    visual = jax.jit(model.apply)({"params": params}, jnp.asarray(features, jnp.float32))
    expected = connector(features[0], params, lambda u, p: cross(u, p, config.mixer, (3, 5)), config.n_layers)
    np.testing.assert_allclose(visual[0], expected, atol=2e-5, rtol=1e-4)
