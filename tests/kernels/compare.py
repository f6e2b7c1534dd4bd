"""How a kernel's numbers are compared with the truth: outputs and gradients, a bound for each dtype."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]

# Largest error allowed, as a part of the largest number in the array. In units of the dtype's spacing at 1 these are
# about 400, 4 and 8: sums in float32 lose little, rounding operands and results to 16 bits costs a few units.
BOUNDS = {"float32": 5e-5, "bfloat16": 3e-2, "float16": 8e-3}


def outputs_and_gradients(function: Callable, arrays: Arrays, dtype: str | None = None) -> tuple[Arrays, Arrays]:
    """(outputs, gradients) of `function(**arrays)`, the gradients for a fixed random cotangent of each output.

    `function` returns an array or a tuple of arrays. With `dtype` all arrays are converted first; float64 is switched
    on for the call.
    """
    with jax.enable_x64(dtype == "float64"):
        arrays = {name: jnp.asarray(a, dtype or a.dtype) for name, a in arrays.items()}

        @jax.jit
        def run(arrays):
            outputs, pullback = jax.vjp(lambda arrays: _as_tuple(function(**arrays)), arrays)
            return outputs, pullback(tuple(_cotangent(i, a) for i, a in enumerate(outputs)))[0]

        outputs, gradients = run(arrays)
        outputs = {f"output {i}": np.asarray(a, np.float64) for i, a in enumerate(outputs)}
        return outputs, {f"gradient of {name}": np.asarray(a, np.float64) for name, a in gradients.items()}


def assert_close(actual: Arrays, expected: Arrays, bound: float) -> None:
    """Each array finite and within `bound` of the expected one, relative to the largest number expected in it.

    Where nothing but zeros is expected, relative to a thousandth.
    """
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        assert np.isfinite(actual[name]).all(), f"{name} is not finite"
        error = np.max(np.abs(actual[name] - expected[name]), initial=0)
        allowed = bound * (np.max(np.abs(expected[name]), initial=0) or 1e-3)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_as_exact(actual: Arrays, other: Arrays, exact: Arrays, dtype: str, units: float = 0.1) -> None:
    """Each array is off the exact one by at most 1.5 times what `other` is off, plus some units of `dtype`."""
    for name, truth in exact.items():
        size = np.linalg.norm(truth)
        error, allowed = (np.linalg.norm(a[name] - truth) / size for a in (actual, other))
        allowed = 1.5 * allowed + units * float(jnp.finfo(dtype).eps)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def jitted(function: Callable, **options):
    """`function(**options)`, compiled as one program: arrays are its arguments, everything else is a constant."""
    arrays = {name: a for name, a in options.items() if isinstance(a, (np.ndarray, jax.Array))}
    constants = {name: a for name, a in options.items() if name not in arrays}
    return jax.jit(functools.partial(function, **constants))(**on_device(arrays))


def exactly(function: Callable, **options) -> tuple[np.ndarray, ...]:
    """The outputs of the `reference` backend of `function` in float64."""
    with jax.enable_x64(True):
        exact = {n: a.astype(np.float64) if _is_float(a) else a for n, a in options.items()}
        return tuple(map(np.asarray, _as_tuple(jitted(function, **exact, implementation="reference"))))


def named(outputs, *names: str) -> Arrays:
    """Outputs as `assert_close` takes them."""
    return {name: np.asarray(a, np.float64) for name, a in zip(names, _as_tuple(outputs), strict=True)}


def _is_float(a) -> bool:
    return isinstance(a, (np.ndarray, jax.Array)) and jnp.issubdtype(a.dtype, jnp.floating)


def on_device(values: dict) -> dict:
    """The same with NumPy arrays as JAX arrays."""
    return {name: jnp.asarray(a) if isinstance(a, np.ndarray) else a for name, a in values.items()}


def _as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cotangent(seed: int, like: jax.Array) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=like.shape).astype(np.float32), like.dtype)
