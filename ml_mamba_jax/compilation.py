"""Compiled programs kept between processes, and the time that compiling takes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.monitoring


def keep_compiled_programs(folder: str | Path | None = None) -> Path:
    """Keep compiled programs in `folder`, so that the next process need not compile them again; returns the folder.

    Default: what `JAX_COMPILATION_CACHE_DIR` names, else ml_mamba_jax in the user's cache folder. JAX keeps what took a
    second or more to compile. `JAX_ENABLE_COMPILATION_CACHE=false` switches it off. `load` calls this.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(folder or jax.config.jax_compilation_cache_dir or caches / "ml_mamba_jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


class CompileTime:
    """Seconds spent on compiling, or on reading compiled programs, since it was made."""

    seconds = 0.0

    def _add(self, event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration


@contextmanager
def compile_time() -> Iterator[CompileTime]:
    """Inside the block the `CompileTime` it gives grows with every compilation."""
    time = CompileTime()
    jax.monitoring.register_event_duration_secs_listener(time._add)
    try:
        yield time
    finally:
        jax.monitoring.unregister_event_duration_listener(time._add)
