"""Importing the library is light: no heavy package, and little time beyond that of JAX."""

import json
import subprocess
import sys

import pytest

# flax.linen itself imports optax and orbax, so a library that promises less must not import its model either.
HEAVY = (
    "flax",
    "grain",
    "matplotlib",
    "optax",
    "orbax",
    "PIL",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "tokenizers",
    "torch",
    "transformers",
    "tyro",
    "wandb",
)

MEASURE = """
import json, sys, time
import jax
start = time.perf_counter()
import {package}
print(json.dumps({{"seconds": time.perf_counter() - start, "modules": sorted(sys.modules)}}))
"""


def imported(package: str) -> dict:
    """What `import package` costs in a fresh process that has imported jax."""
    command = [sys.executable, "-c", MEASURE.format(package=package)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("package", ["ml_mamba_jax", "pallas_kernels"])
def test_import_is_light(package):
    runs = [imported(package) for _ in range(3)]
    assert {module for module in runs[0]["modules"] if module.split(".")[0] in HEAVY} == set()
    assert min(run["seconds"] for run in runs) < 2


def test_a_heavy_import_would_be_seen():
    assert "optax" in imported("optax")["modules"]


def test_public_names_can_be_imported():
    """Each name of `__all__` exists: the lazy table points at real modules."""
    import ml_mamba_jax

    for name in ml_mamba_jax.__all__:
        assert getattr(ml_mamba_jax, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        ml_mamba_jax.nonsense  # noqa: B018
