"""The command line of a recipe: PRESET [--field value ...]."""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.names import unknown
from ml_mamba_jax.training.config import TrainConfig

_BORDER = "─│╭╮╰╯ "
_LEFT_OUT = ("For full helptext", "Argument helptext", "in train.py", "(default:")


def parse(presets: Mapping[str, tuple[str, TrainConfig]], arguments: Sequence[str]) -> TrainConfig:
    """The preset that is named first, with the fields that the options override. `presets`: summary and recipe by name.

    Raises:
        InputError: an unknown preset or option, with the nearest one that exists, or a value of another type.
        SystemExit: with code 0, after printing the help that was asked for.
    """
    import tyro

    if arguments and not arguments[0].startswith("-") and arguments[0] not in presets:
        raise unknown("preset", arguments[0], presets)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.extras.overridable_config_cli(presets, args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{_in_one_line(printed.getvalue())}; see --help") from None


def _in_one_line(box: str) -> str:
    """tyro draws its errors in a box: what was wrong, and what it thinks was meant."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in box.splitlines()]
    texts = [line.strip(_BORDER) for line in lines if line.lstrip().startswith("│")]
    said = [text for text in texts if text and not text.startswith(_LEFT_OUT)]
    return re.sub(r"\s+", " ", " ".join(said)).replace(" Perhaps you meant:", "; did you mean")
