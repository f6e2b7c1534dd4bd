"""The errors that users cause, and the exit codes that command lines give them.

A message is one line: what was got, what was expected, what to do, with the file, tensor, record or step it is about.
"""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """A file, option or record that cannot be used. Exit code 2."""

    exit_code = 2


class ConvertError(InputError):
    """Weights that cannot be converted. Exit code 2."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite. Exit code 3."""

    exit_code = 3


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or belongs to something else. Exit code 4."""

    exit_code = 4


class WorkerError(RuntimeError):
    """A process of a run that died or hangs. Exit code 5."""

    exit_code = 5


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors of this module, and those of the file system, into `error: ...` on stderr and an exit code.

    Everything else keeps its traceback.
    """
    try:
        yield
    except (InputError, NonFiniteError, CheckpointError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:  # no file of a user
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(InputError.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
