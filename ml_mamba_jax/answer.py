"""One answer while it is written: text comes out as the device writes tokens, and the state is always known."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ml_mamba_jax.batching import stack_images
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.decoding import Decoding, check_finite, checked_max_new_tokens, nothing_seen, pad_rows, read, write
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.state import MambaState
from ml_mamba_jax.text_stream import TextStream
from ml_mamba_jax.timing import Timing
from ml_mamba_jax.tokenizer import Tokenizer


class Answer:
    """One answer while it is written: iterate for its text. `ids` and `text` are what was handed out so far.

    The device writes the first token alone, then `BLOCK` at a time, which are handed out one by one. Who stops in
    between gets the state after the last one that was handed out.
    """

    BLOCK = 8

    def __init__(
        self,
        model: MLMamba,
        params: dict,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        image=None,
        *,
        state: MambaState | None = None,
        before: Sequence[int] = (),
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_ids: Sequence[int] | None,
        stop_strings: Sequence[str] | None = (),
        timing: Timing | None = None,
        name: str = "stream",
    ):
        """Reads the prompt `ids`.

        The arguments are those of `generate`, for one row. `before`: the tokens that `state` has read, which a
        repetition penalty counts. `timing` is running already. `name` is that of the function that errors are about.
        """
        self.ids: list[int] = []
        self.text = ""
        self._max_new_tokens = checked_max_new_tokens(max_new_tokens)
        self._timing, self._name = timing, name
        self._pieces = TextStream(tokenizer, stop_strings)
        self._write = functools.partial(
            write,
            model,
            params,
            key=random_key(seed),
            capacity=self.BLOCK,
            **writing_options(tokenizer, model.config, sampling, stop_ids),
        )
        seen = nothing_seen(model, 1, sampling)
        if seen is not None:
            already = np.zeros(seen.shape, bool)  # by NumPy: another number of tokens compiles nothing
            already[0, list(before)] = True
            seen = jnp.asarray(already)
        rows, pixels = pad_rows([ids], tokenizer.eos_id), stack_images([image], model.config)
        self._decoding: Decoding = read(model, params, *rows, *pixels, state=state, seen=seen)

    @property
    def state(self) -> MambaState:
        """Once the iteration has ended or was closed: the state after the last token that was handed out."""
        return self._decoding.state

    def __iter__(self) -> Iterator[str]:
        wanted = 1
        while len(self.ids) < self._max_new_tokens:
            wanted = min(wanted, self._max_new_tokens - len(self.ids))
            before, start = self._decoding, len(self.ids)
            tokens, count, after = self._write(before, limit=wanted)
            # Here an interrupt leaves everything as it was.
            tokens, count, finite = (a[0] for a in jax.device_get((tokens, count, after.finite)))
            if not finite:
                check_finite(self._name, after.state, after.finite)
            if self._timing:
                self._timing.came(0)
            try:
                for token in tokens[:count].tolist():
                    self.ids.append(token)
                    yield from self._shown(self._pieces.push(token))
                    if self._pieces.stopped:
                        break
            finally:
                used = len(self.ids) - start
                if self._timing:
                    self._timing.came(used)
                self._decoding = after if used == count else self._write(before, limit=used)[-1]
            if count < wanted or self._pieces.stopped:
                break
            wanted = self.BLOCK
        check_finite(self._name, self.state)
        yield from self._shown(self._pieces.flush())

    def _shown(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


def writing_options(
    tokenizer: Tokenizer, config: MLMambaConfig, sampling: Sampling, stop_ids: Sequence[int] | None
) -> dict:
    """Arguments of `decoding.write`. Raises InputError for those that cannot be used."""
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling: got {type(sampling).__name__}, expected a Sampling")
    vocab_size = checked_vocab_size(tokenizer, config)
    if stop_ids is None:
        stop_ids = (tokenizer.end_id(config.prompt_format),)
    elif not isinstance(stop_ids, Iterable) or isinstance(stop_ids, str):
        raise InputError(f"stop_ids: got {stop_ids!r}, expected a list of token ids")
    stop_ids = tuple(stop_ids)
    if not all(hasattr(i, "__index__") for i in stop_ids):
        raise InputError(f"stop_ids: got {list(stop_ids)!r}, expected whole numbers; texts are for stop_strings")
    return {"sampling": sampling, "stop_ids": tuple(int(i) for i in stop_ids), "vocab_size": vocab_size}


def checked_vocab_size(tokenizer: Tokenizer, config: MLMambaConfig) -> int:
    """Ids that can be chosen: those of the tokenizer, all of which the model must know."""
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"tokenizer: got {type(tokenizer).__name__}, expected a Tokenizer; a folder without tokenizer.json gives none"
        )
    if config.language is None:
        raise InputError("model: got image encoders alone, expected a model with a language part")
    if tokenizer.vocab_size > config.language.vocab_size:
        raise InputError(
            f"tokenizer: got {tokenizer.vocab_size} entries, expected at most the {config.language.vocab_size} "
            "of the model; use the tokenizer it was trained with"
        )
    return tokenizer.vocab_size


def random_key(seed: int) -> Array:
    """Raises InputError for what is no whole number of 64 bits."""
    if not hasattr(seed, "__index__") or not -(2**63) <= int(seed) < 2**63:
        raise InputError(f"seed: got {seed!r}, expected a whole number of at most 64 bits")
    return jax.random.key(int(seed))
