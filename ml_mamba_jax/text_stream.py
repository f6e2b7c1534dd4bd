"""Token ids become text while they come: whole characters, no white space around, an end at a stop string."""

from collections.abc import Iterable, Sequence

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.tokenizer import Tokenizer

UNFINISHED = 3
"""Bytes of a character that may wait for the rest of it, and the most U+FFFD that a decoder makes of them."""
ENOUGH = 4 * UNFINISHED
"""The last characters of a text, as many as may be unfinished, are the same when only these last tokens are decoded: each has a
byte at least, the first ones may be torn from their character, and at most three bytes become one U+FFFD."""


def checked_stop_strings(stop_strings: Sequence[str] | None) -> tuple[str, ...]:
    """Raises InputError for what is no list of texts, and for an empty text, which would stop everything."""
    expected = "expected a list of texts of at least one character"
    if isinstance(stop_strings, str) or not isinstance(stop_strings, Iterable | None):
        raise InputError(f"stop_strings: got {stop_strings!r}, {expected}")
    stops = tuple(stop_strings or ())
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError(f"stop_strings: got {list(stops)!r}, {expected}")
    return stops


class TextStream:
    """The text of one answer, piece by piece.

    A token may hold part of a character: it waits for the rest. White space waits for what follows, so that the pieces
    join to the stripped text. What may be the beginning of a stop string waits until it is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Raises InputError as `checked_stop_strings`."""
        self.stopped = False
        """A stop string has come: it and what follows are no part of the text."""
        self._tokenizer, self._stop_strings = tokenizer, checked_stop_strings(stop_strings)
        self._ids: list[int] = []  # the last tokens, which may end within a character
        self._known = 0  # characters of their text that were handed on
        self._held = ""  # perhaps the beginning of a stop string
        self._begun = False  # a visible character has come
        self._space: list[str] = []

    @property
    def looks_for_stops(self) -> bool:
        return bool(self._stop_strings)

    def push(self, token: int) -> str:
        """The text that is certain with this token; may be empty."""
        if token in self._tokenizer.special_ids:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        open_ = min(len(text) - len(text.rstrip("\ufffd")), UNFINISHED)  # what stands before can no longer change
        new, self._known = text[self._known : len(text) - open_], len(text) - open_
        if not open_:
            self._ids, self._known = [], 0
        elif len(self._ids) > ENOUGH:
            self._ids = self._ids[-ENOUGH:]
            self._known = len(self._tokenizer.decode(self._ids)) - open_
        return self._visible(self._before_stop(new))

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD, and what no stop string followed."""
        text, self._ids = self._tokenizer.decode(self._ids)[self._known :], []
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
        if not self._begun:
            text = text.lstrip()
        visible = text.rstrip()
        space = text[len(visible) :]
        if not visible:
            self._space += [space] if self._begun else []
            return ""
        visible = "".join([*self._space, visible])
        self._begun, self._space = True, [space]
        return visible


def text_of(ids: Sequence[int], tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> str:
    """The text that the stream of these tokens joins to."""
    pieces = TextStream(tokenizer, stop_strings)
    return "".join([*(pieces.push(int(i)) for i in ids), pieces.flush()])
