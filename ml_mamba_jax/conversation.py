"""A conversation whose turns are each read once: the recurrent state carries it on."""

import copy
from collections.abc import Generator, Iterator, Sequence

from ml_mamba_jax.answer import Answer, checked_vocab_size
from ml_mamba_jax.decoding import pad_rows, read
from ml_mamba_jax.errors import NonFiniteError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn, render
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.state import MambaState
from ml_mamba_jax.timing import Timing
from ml_mamba_jax.tokenizer import Tokenizer


class Chat:
    """A conversation in several turns, about images or about nothing in particular.

        chat = Chat(model, params, tokenizer)
        chat.ask("What is in the picture?", "cat.png")
        chat.ask("What colour is it?")
        chat.ask("And what is in this one?", "dog.png")

    Only the new turn is read each time: what came before is in the recurrent state, whose size never grows. The answers
    are those of the whole conversation read afresh.
    """

    def __init__(self, model: MLMamba, params: dict, tokenizer: Tokenizer):
        checked_vocab_size(tokenizer, model.config)
        self._end_id = tokenizer.end_id(model.config.prompt_format)
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._writing: Generator[str, None, None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next question starts a conversation. An answer that is being written ends."""
        self._stop_writing()
        self.turns: list[Turn] = []
        self.answer_ids: list[int] = []
        """Tokens of the last answer."""
        self.ids: list[int] = []
        """All tokens of the conversation so far."""
        self.state: MambaState | None = None
        """After the last token of the last answer; None before the first question."""

    def fork(self) -> "Chat":
        """Another conversation that goes on from here; what is said in one does not reach the other.

        An answer that is being written ends, and both have it as far as it got.
        """
        self._stop_writing()
        other = copy.copy(self)
        other.turns, other.ids, other.answer_ids = list(self.turns), list(self.ids), list(self.answer_ids)
        return other

    def ask(self, text: str, image=None, **options) -> str:
        """The answer to `text`. The arguments are those of `Chat.stream`."""
        return "".join(self.stream(text, image, **options))

    def stream(
        self,
        text: str,
        image=None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = (),
        timing: Timing | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece. One that is abandoned half-way stays in the conversation as far as it got.

        The next question, `fork` and `reset` end an answer that is still being written. A stop string is no part of the
        answer, but the conversation has read it.

        Args:
            image: file name, `PIL.Image` or uint8 pixels [y x 3]; its visual tokens stand before the question.
            max_new_tokens, sampling, seed, stop_ids, stop_strings, timing: as in `generate`.

        Raises:
            InputError: an image that cannot be read or that the model cannot see, options that cannot be used.
            NonFiniteError: NaN or infinity. After either the conversation is as it was before the question.
        """
        self._stop_writing()
        self._writing = self._write(
            text,
            image,
            Timing() if timing is None else timing,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
        )
        yield from self._writing

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.close()
        self._writing = None

    def _write(self, text: str, image, timing: Timing, **options) -> Generator[str, None, None]:
        turns = [*self.turns, Turn("human", text)]
        ids, state = self._tokenizer.encode(render(turns, self._model.config.prompt_format)[-1].text), self.state
        end = self._end_of_answer()
        with timing.running():
            if image is not None and end:
                state = read(self._model, self._params, *pad_rows([end], self._end_id), state=state).state
                before = [*self.ids, *end]
            else:
                ids, before = [*end, *ids], self.ids
            answer = Answer(
                self._model,
                self._params,
                self._tokenizer,
                ids,
                image,
                state=state,
                before=before,
                timing=timing,
                name="Chat",
                **options,
            )
            broken = False
            try:
                yield from answer
            except NonFiniteError:
                broken = True
                raise
            finally:
                if not broken:
                    self.turns = [*turns, Turn("gpt", answer.text)]
                    self.ids = [*before, *ids, *answer.ids]
                    self.answer_ids, self.state = answer.ids, answer.state

    def _end_of_answer(self) -> list[int]:
        """What follows the last answer and was not read yet: at best the end of a turn was chosen, but never read."""
        if not self.turns:
            return []
        if self.answer_ids:
            return [self._end_id]
        return self._tokenizer.encode(render(self.turns, self._model.config.prompt_format)[-1].text)  # of an empty one
