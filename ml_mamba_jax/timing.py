"""Where the time of an answer goes: until the first token, on compiling, and a token after the other."""

import contextlib
import time
from collections.abc import Iterator

from ml_mamba_jax.compilation import compile_time


class Timing:
    """What `generate`, `stream` and `Chat` fill in that get one as `timing`; print it.

    timing = Timing()
    generate(model, params, tokenizer, questions, timing=timing)
    print(timing)  # 36 tokens in 0.81 s; first token after 0.52 s, then 121.4 tokens/s; 0.40 s of it compiling
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """From the call to the end of the answer."""
        self.first_token: float | None = None
        """Seconds until prompts and images were read and the first token was known; None as long as it is not."""
        self.compiling = 0.0
        """Seconds spent on compiling, or on reading compiled programs."""
        self.tokens = 0
        """Of all rows together."""
        self.rows = 1

    def __str__(self) -> str:
        text = f"{self.tokens} tokens in {self.seconds:.2f} s"
        if self.first_token is not None:
            text += f"; first token after {self.first_token:.2f} s"
            after, later = self.seconds - self.first_token, self.tokens - self.rows
            if after > 0 and later > 0:
                text += f", then {later / after:.1f} tokens/s"
        if self.compiling >= 0.01:
            text += f"; {self.compiling:.2f} s of it compiling"
        return text

    @contextlib.contextmanager
    def running(self, rows: int = 1) -> Iterator[None]:
        """Start anew, and measure what happens inside the block."""
        self.__init__()
        self.rows, self._started = rows, time.perf_counter()
        with compile_time() as compiling:
            try:
                yield
            finally:
                self.seconds = time.perf_counter() - self._started
                self.compiling = compiling.seconds

    def came(self, tokens: int) -> None:
        """So many tokens are known, or the first ones if it is 0."""
        if self.first_token is None:
            self.first_token = time.perf_counter() - self._started
        self.tokens += tokens
