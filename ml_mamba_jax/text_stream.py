"""Token ids become text while they come: whole characters, no white space around, an end at a stop string."""

from collections.abc import Sequence

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, piece by piece.

    A token may hold part of a character: it waits for the rest. White space waits for what follows, so that the pieces
    join to the stripped text. What may be the beginning of a stop string waits until it is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Raises InputError for an empty stop string, which would stop everything."""
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise InputError(f"stop_strings: got {stop_strings!r}, expected a list of texts of at least one character")
        self.stopped = False
        """A stop string has come: it and what follows are no part of the text."""
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._ids: list[int] = []
        self._held = ""  # perhaps the beginning of a stop string
        self._space: str | None = None  # None before the first visible character

    def push(self, token: int) -> str:
        """The text that is certain with this token; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        self._ids = []
        return self._visible(self._before_stop(text))

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD, and what no stop string followed."""
        text, self._ids = self._tokenizer.decode(self._ids), []
        text, self._held = self._before_stop(text) + self._held, ""
        return self._visible(text)

    def _before_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [text.index(stop) for stop in self._stop_strings if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)]
        begun = [n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])]
        certain = len(text) - max(begun, default=0)
        text, self._held = text[:certain], text[certain:]
        return text

    def _visible(self, text: str) -> str:
        text = text.lstrip() if self._space is None else self._space + text
        visible = text.rstrip()
        if visible or self._space is not None:
            self._space = text[len(visible) :]
        return visible


def text_of(ids: Sequence[int], tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> str:
    """The text that the stream of these tokens joins to."""
    pieces = TextStream(tokenizer, stop_strings)
    return "".join([*(pieces.push(int(i)) for i in ids), pieces.flush()])
