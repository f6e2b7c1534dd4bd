"""A window of steps that JAX's profiler records."""

from pathlib import Path

import jax


class ProfileWindow:
    """Records steps `first` to `last` into `folder`; call it before every step, and `close` at the end. None: records nothing."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._running = folder, steps, False

    def before(self, step: int) -> None:
        """Start or stop, before step number `step` is taken."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running and step > last:
            self.close()
        elif not self._running and first <= step <= last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"profile of steps {self._steps[0]} to {self._steps[1]}: {self._folder}", flush=True)
