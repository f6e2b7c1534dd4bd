"""Text to token ids and back: a byte-level BPE, as GPT-NeoX's, in a `tokenizer.json`."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import END_OF_TEXT, Piece, prompt_format

FILE_NAME = "tokenizer.json"
WORDS = r"\n?<\|[a-z]+\|>\n?| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
"""Between these no merge is learnt: marks of the chat format with their line ends, words, digits, punctuation, white space."""


class Tokenizer:
    """A thin face over the `tokenizers` library; nothing is added to a text by itself."""

    def __init__(self, backend):
        """`backend` is a `tokenizers.Tokenizer` that knows `<|endoftext|>`; raises InputError if it does not."""
        self.backend = backend
        eos_id = backend.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise InputError(
                f"tokenizer: got a vocabulary without {END_OF_TEXT}, expected one that marks the end of a text with it"
            )
        self.eos_id: int = eos_id
        """Id of `<|endoftext|>`; also pads."""

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`: its path, a folder that holds one, or the id of a model on the Hugging Face hub.

        Raises:
            InputError: nothing there, or not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        path = Path(source)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            if path.is_file():
                return cls(Backend.from_file(str(path)))
            if _looks_like_a_path(str(source)):
                raise InputError(
                    f"tokenizer: found no {path}, expected a {FILE_NAME}, a folder that holds one, or a hub id"
                )
            return cls(Backend.from_pretrained(str(source)))
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception for whatever goes wrong
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"tokenizer: cannot read {source}: {reason}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, format: str = "zephyr") -> "Tokenizer":
        """Learn a byte-level BPE of at most `vocab_size` entries, for texts in a prompt format.

        `<|endoftext|>` is id 0, and the format's end of turn is one token. Raises InputError where these and all bytes do
        not fit.
        """
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        marks = list(dict.fromkeys([END_OF_TEXT, prompt_format(format).end]))
        if vocab_size < 256 + len(marks):
            raise InputError(
                f"vocab_size: got {vocab_size}, expected at least {256 + len(marks)} (every byte and {', '.join(marks)})"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder`, whole or not at all, and return its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, aside = folder / FILE_NAME, folder / f".{FILE_NAME}.partial"
        self.backend.save(str(aside))
        aside.replace(path)
        return path

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of marks, which `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Raises InputError for text that UTF-8 cannot write: half of a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: got {text[error.start]!r} at character {error.start}, half of a pair, expected whole characters"
            ) from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """The ids of pieces, each encoded on its own, and for each id whether it is one to learn."""
        ids, is_target = [], []
        for piece in pieces:
            piece_ids = self.encode(piece.text)
            ids += piece_ids
            is_target += [piece.is_target] * len(piece_ids)
        return ids, is_target

    def end_id(self, format: str) -> int:
        """Id of the mark that ends a turn in a prompt format.

        Raises:
            InputError: an unknown format, or a vocabulary that does not have the mark as one token.
        """
        mark = prompt_format(format).end
        ids = self.encode(mark)
        if len(ids) != 1:
            raise InputError(
                f"tokenizer: got a vocabulary without {mark}, expected one that has the end of a turn of the prompt format "
                f"{format!r} as a token; add it to the special tokens, or choose another prompt_format"
            )
        return ids[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens. Bytes that form no character yet become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def _looks_like_a_path(source: str) -> bool:
    return source.endswith(".json") or source.startswith((".", "/", "~")) or source.count("/") > 1
