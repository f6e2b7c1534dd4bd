"""Exact-match scores of a model's answers, by kind of question."""

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import jax

from ml_mamba_jax import processes
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import Form
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.generation import generate
from ml_mamba_jax.image import read_image
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import without_mark
from ml_mamba_jax.tokenizer import Tokenizer


class Answer(NamedTuple):
    """A record whose last turn is the expected answer, and what the model said instead of it."""

    record: Record
    prediction: str

    @property
    def question(self) -> str:
        return without_mark(self.record.turns[-2].text)

    @property
    def expected(self) -> str:
        return self.record.turns[-1].text

    @property
    def is_right(self) -> bool:
        return self.prediction.strip() == self.expected.strip()


class Score(NamedTuple):
    """`accuracy` of `count` answers; `majority_baseline`: that of always giving the most frequent expected answer."""

    accuracy: float
    count: int
    majority_baseline: float


def answer(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    batch_size: int,
    max_new_tokens: int = 16,
    form: Form = "chat",
    skip: bool = False,
) -> list[Answer]:
    """Ask the last question of each record, greedily, `batch_size` at a time.

    Of the form "caption" only the image is seen, as in training; without one nothing is said. Where `skip` is true, nothing is said
    about an image that cannot be used either, but on stderr.

    Raises:
        InputError: an image that cannot be used; names the record.
    """
    answers = []
    for start in range(0, len(records), batch_size):
        part = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        pictures = [_picture(record, skip) for record in part]
        asked = [p is not None or (form == "chat" and r.image is None) for r, p in zip(part, pictures, strict=True)]
        rows, images = list(compress(part, asked)), list(compress(pictures, asked))
        filling = batch_size - len(rows)  # a full last batch needs no compilation of its own
        rows, images = rows + rows[:1] * filling, images + images[:1] * filling
        prompts = None if form == "caption" else [record.turns[:-1] for record in rows]
        options = {"max_new_tokens": max_new_tokens}
        said = iter(generate(model, params, tokenizer, prompts, images, **options) if rows else ())
        answers += [
            Answer(record, next(said) if is_asked else "") for record, is_asked in zip(part, asked, strict=True)
        ]
    return answers


def _picture(record: Record, skip: bool):
    if record.image is None:
        return None
    try:
        return read_image(record.image, record.id)
    except InputError as error:
        if not skip:
            raise
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        return None


def answer_together(
    model: MLMamba, params: dict, tokenizer: Tokenizer, records: Sequence[Record], **options
) -> list[Answer]:
    """`answer` by all processes of a run, with parameters that each has whole: each asks its part of the records, and all get
    all answers."""
    n, mine = jax.process_count(), jax.process_index()
    if n == 1:
        return answer(model, params, tokenizer, records, **options)
    own = [records[i] for i in range(mine, len(records), n)]
    texts = processes.gather([item.prediction for item in answer(model, params, tokenizer, own, **options)])
    return [Answer(records[i], texts[i % n][i // n]) for i in range(len(records))]


def by_kind(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers to each kind of question, in order of appearance; those without a kind are "question"."""
    kinds: dict[str, list[Answer]] = {}
    for item in answers:
        kinds.setdefault(item.record.kind or "question", []).append(item)
    return kinds


def score(answers: Sequence[Answer]) -> dict[str, Score]:
    """Scores by kind and `overall`, whose baseline knows the most frequent answer of each kind."""
    scores = {kind: _score(items) for kind, items in sorted(by_kind(answers).items())}
    total = sum(s.count for s in scores.values())
    overall = Score(
        accuracy=sum(s.accuracy * s.count for s in scores.values()) / total,
        count=total,
        majority_baseline=sum(s.majority_baseline * s.count for s in scores.values()) / total,
    )
    return {"overall": overall, **scores}


def _score(answers: Sequence[Answer]) -> Score:
    (_, most), *_ = Counter(item.expected for item in answers).most_common(1)
    right = sum(item.is_right for item in answers)
    return Score(right / len(answers), len(answers), most / len(answers))


def table(scores: dict[str, Score]) -> str:
    """The scores as an aligned text table."""
    lines = [f"{'kind':<14} {'accuracy':>9} {'majority':>9} {'questions':>10}"]
    for kind, s in scores.items():
        lines.append(f"{kind:<14} {s.accuracy:>9.1%} {s.majority_baseline:>9.1%} {s.count:>10,}")
    return "\n".join(lines)
