"""Samples for people to look at: what of a conversation is learnt, and what is only read, in grey."""

import base64
import html
import io
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import Form, pieces_of
from ml_mamba_jax.image import prepare_images, read_image
from ml_mamba_jax.tokenizer import Tokenizer

READ, LEARNT, CUT = "read", "learnt", "cut"
GREY, STRUCK, RESET = "\x1b[90m", "\x1b[90;9m", "\x1b[0m"
MARKS = {READ: ("", ""), LEARNT: ("⟦", "⟧"), CUT: ("✂", "")}
STYLE = """body{font:15px/1.5 system-ui;margin:2em auto;max-width:64em;color:#111;background:#fff}
section{display:flex;gap:1.5em;margin:2em 0}img{width:224px;height:224px}h2{font-size:1em;margin:0}
pre{white-space:pre-wrap;margin:.5em 0}.read{color:#999}.cut{color:#ccc;text-decoration:line-through}"""


class Span(NamedTuple):
    """A part of a sample's text, what happens to it, and its number of tokens, None where nobody counted."""

    text: str
    fate: str
    tokens: int | None


def spans(
    record: Record, tokenizer: Tokenizer | None, max_tokens: int, prompt_format: str, form: Form = "chat"
) -> list[Span]:
    """The text of a record as the model gets it, in parts that are read, learnt, or cut off. Without a tokenizer none is cut."""
    pieces = pieces_of(record.turns, record.id, prompt_format, form)
    if tokenizer is None:
        return [Span(piece.text, LEARNT if piece.is_target else READ, None) for piece in pieces]
    ids, is_target = tokenizer.encode_pieces(pieces)
    fates = [(LEARNT if target else READ) if i < max_tokens else CUT for i, target in enumerate(is_target)]
    found = []
    for fate, group in groupby(zip(fates, ids, strict=True), key=lambda pair: pair[0]):
        some = [token for _, token in group]
        found.append(Span(tokenizer.backend.decode(some, skip_special_tokens=False), fate, len(some)))
    return found


def headline(record: Record, parts: Sequence[Span], config: MLMambaConfig) -> str:
    """One line: the record, its image, and how many tokens are read and learnt."""
    image = "text alone"
    if record.image is not None:
        picture = read_image(record.image, record.id)
        image = f"image {picture.width} x {picture.height}, {config.n_visual_tokens} visual tokens"
    if any(part.tokens is None for part in parts):
        return f"{record.id}: {image}"
    counts = {fate: sum(part.tokens or 0 for part in parts if part.fate == fate) for fate in MARKS}
    cut = f", {counts[CUT]} cut off" if counts[CUT] else ""
    return f"{record.id}: {image}, {counts[READ]} tokens read, {counts[LEARNT]} learnt{cut}"


def terminal(parts: Sequence[Span], colour: bool) -> str:
    """The parts for a terminal: what is not learnt in grey; without colour, what is learnt in ⟦ ⟧."""
    if colour:
        codes = {READ: GREY, LEARNT: RESET, CUT: STRUCK}
        return "".join(f"{codes[part.fate]}{_printable(part.text)}" for part in parts) + RESET
    return "".join(f"{MARKS[part.fate][0]}{_printable(part.text)}{MARKS[part.fate][1]}" for part in parts)


def page(records: Sequence[Record], shown: Sequence[Sequence[Span]], config: MLMambaConfig) -> str:
    """The same as a page of HTML, each sample beside what the first encoder sees of its image."""
    sections = []
    for record, parts in zip(records, shown, strict=True):
        picture = ""
        if record.image is not None and config.vision:
            pixels = prepare_images(read_image(record.image, record.id), config, record.id)[config.vision[0].name]
            picture = f'<img alt="" src="data:image/png;base64,{_png(pixels)}">'
        text = "".join(f'<span class="{part.fate}">{html.escape(_printable(part.text))}</span>' for part in parts)
        title = html.escape(headline(record, parts, config))
        sections.append(f"<section>{picture}<div><h2>{title}</h2><pre>{text}</pre></div></section>")
    body = "\n".join(sections)
    return f'<!doctype html><meta charset="utf-8"><title>Samples</title><style>{STYLE}</style>\n{body}\n'


def _printable(text: str) -> str:
    """Without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
