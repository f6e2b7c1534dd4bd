"""Compiled programs are found again by the next process, and the time they take is counted."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from ml_mamba_jax import checkpoint
from ml_mamba_jax.compilation import compile_time
from ml_mamba_jax.config import MLMambaConfig

PROGRAM = """
import jax, jax.numpy as jnp
from ml_mamba_jax.compilation import keep_compiled_programs
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(keep_compiled_programs())
assert jax.jit(lambda x: x * 2 + 1)(jnp.ones(3)).sum() == 9
print(len(hits))
"""


def run(**environment) -> tuple[str, int]:
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment = inherited | {"JAX_ENABLE_COMPILATION_CACHE": "true"} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    folder, hits = done.stdout.split()
    return folder, int(hits)


def test_the_next_process_finds_what_this_one_compiled(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path)) == (str(tmp_path / "ml_mamba_jax"), 0)
    folder, hits = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "ml_mamba_jax") and hits > 0 and any((tmp_path / "ml_mamba_jax").iterdir())
    named = str(tmp_path / "named")
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=named) == (named, 0)


def test_a_model_that_is_loaded_keeps_its_programs(tmp_path, monkeypatch):
    tiny = MLMambaConfig.named("tiny")
    checkpoint.write_model(tmp_path, tiny, None)
    monkeypatch.setattr(checkpoint, "load_params", lambda *_: {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    try:
        for already, expected in ((None, str(tmp_path / "cache" / "ml_mamba_jax")), ("mine", "mine")):
            jax.config.update("jax_compilation_cache_dir", already)
            checkpoint.load(tmp_path)
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_only_compiling_is_counted():
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((4, 4))
    with compile_time() as first:
        function(x)
    with compile_time() as second:
        function(x)
    counted = first.seconds
    function(jnp.ones((5, 5)))  # outside
    assert first.seconds == counted > 0 == second.seconds
