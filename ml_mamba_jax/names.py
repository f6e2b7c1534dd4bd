"""Errors for names that do not exist, with the nearest one that does."""

import difflib
from collections.abc import Iterable

from ml_mamba_jax.errors import InputError


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error to raise: unknown `kind`, the nearest known name as a suggestion, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
