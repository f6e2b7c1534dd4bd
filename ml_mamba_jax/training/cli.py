"""The command line of a recipe: PRESET [--field value ...], the fields of a stage as --STAGE.field if there are several."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.names import unknown
from ml_mamba_jax.training.config import StageConfig, TrainConfig

_BORDER = "─│╭╮╰╯ "
_LEFT_OUT = ("For full helptext", "Argument helptext", "in train.py", "(default:")


def parse(presets: Mapping[str, tuple[str, TrainConfig]], arguments: Sequence[str]) -> TrainConfig:
    """The preset that is named first, with the fields that the options override. `presets`: summary and recipe by name.

    Raises:
        InputError: an unknown preset or option, with the nearest one that exists, or a value of another type.
        SystemExit: with code 0, after printing the help that was asked for.
    """
    import tyro

    options = {name: (summary, _options(preset)) for name, (summary, preset) in presets.items()}
    name = arguments[0] if arguments and arguments[0] in presets else None
    if arguments and not arguments[0].startswith("-") and arguments[0] not in presets:
        raise unknown("preset", arguments[0], presets)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            if name is None:
                chosen = tyro.extras.overridable_config_cli(options, args=arguments)
            else:
                summary, chosen = options[name]
                chosen = tyro.cli(
                    type(chosen),
                    default=chosen,
                    description=summary,
                    args=arguments[1:],
                    config=(tyro.conf.AvoidSubcommands,),
                    prog=f"train.py {name}",
                )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{_in_one_line(printed.getvalue())}; see --help") from None
    run, *stages = (getattr(chosen, field.name) for field in dataclasses.fields(chosen))
    return dataclasses.replace(run, stages=tuple(stages))


def _options(preset: TrainConfig):
    """A value whose fields are the options: those of the run, and those of each stage, behind its name if there are several.

    Its class is made for the preset, so that help and errors know the stages by their names.
    """
    from tyro.conf import arg

    alone = Annotated[StageConfig, arg(name="")]
    fields = [("run", Annotated[TrainConfig, arg(name="")], preset)]
    fields += [(stage.name, alone if len(preset.stages) == 1 else StageConfig, stage) for stage in preset.stages]
    return dataclasses.make_dataclass(
        "Options", [(name, kind, dataclasses.field(default=value)) for name, kind, value in fields], frozen=True
    )()


def _in_one_line(box: str) -> str:
    """tyro draws its errors in a box: what was wrong, and what it thinks was meant."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in box.splitlines()]
    texts = [line.strip(_BORDER) for line in lines if line.lstrip().startswith("│")]
    said = [text for text in texts if text and not text.startswith(_LEFT_OUT)]
    return re.sub(r"\s+", " ", " ".join(said)).replace(" Perhaps you meant:", "; did you mean")
