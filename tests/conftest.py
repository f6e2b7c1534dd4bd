"""What holds for every test: eight simulated CPU devices, no silent rank promotion, no accelerator unless asked for.

Warnings are errors and array shapes are checked, both switched on in pyproject.toml.
"""

import os

import pytest

# Before JAX starts its backends, which happens at the first array.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nothing is left in the user's cache folder
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

ACCELERATORS = ("gpu", "tpu")
UNLESS_ASKED = (*ACCELERATORS, "full")
LONGEST_FIRST = (
    "test_train",
    "test_step",
    "test_survival",
    "test_sharding",
    "test_generate",
    "test_losses",
    "test_docs",
)
"""Files that take a minute or more, so that no process is left with one of them at the end."""

pytest.register_assert_rewrite("tests.kernels")


def pytest_configure(config: pytest.Config) -> None:
    import jax

    if not any(name in config.getoption("markexpr") for name in ACCELERATORS):
        jax.config.update("jax_platforms", "cpu")
        # Most of a test's time goes to the compiler, whose optimizations cost more here than they save. Children too.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        jax.config.update("jax_disable_most_optimizations", optimizations_disabled())
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What was compiled for a file is of no use to the next one, and gigabytes of it slow everything down."""
    yield
    import jax

    jax.clear_caches()


def optimizations_disabled() -> bool:
    return os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") in ("1", "true")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need an accelerator or minutes, unless `-m` names them, and begin with the longest files."""
    unasked = [name for name in UNLESS_ASKED if name not in config.getoption("markexpr")]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    files = [f"{name}.py" for name in LONGEST_FIRST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else len(files))
