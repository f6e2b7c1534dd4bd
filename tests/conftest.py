"""What holds for every test: eight simulated CPU devices, no silent rank promotion, no accelerator unless asked for.

Warnings are errors and array shapes are checked, both switched on in pyproject.toml.
"""

import os
import tempfile
from pathlib import Path

import pytest

# Before JAX starts its backends, which happens at the first array.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

ACCELERATORS = ("gpu", "tpu")
UNLESS_ASKED = (*ACCELERATORS, "full")
WORTH_KEEPING = 0.3
"""Seconds of compiling from which on a program is kept for other processes."""
MOST_MEMORY = 4e9
"""Bytes of a process, from which on compiled programs are given up."""
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

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # One for all processes of these tests, which compile much that is the same. It goes when they are done.
        folder = tempfile.TemporaryDirectory(prefix="ml_mamba_jax-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(WORTH_KEEPING)
        jax.config.update("jax_compilation_cache_dir", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    if not any(name in config.getoption("markexpr") for name in ACCELERATORS):
        jax.config.update("jax_platforms", "cpu")
        # Most of a test's time goes to the compiler, whose optimizations cost more here than they save. Children too.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        jax.config.update("jax_disable_most_optimizations", optimizations_disabled())
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What was compiled for a file is of little use to the next one, and becomes gigabytes."""
    yield
    import jax

    pages = Path("/proc/self/statm")
    if not pages.is_file() or int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
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
