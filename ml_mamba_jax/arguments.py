"""Command lines whose errors are one line, like all others."""

import argparse
from collections.abc import Sequence

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.names import unknown


class OneLineParser(argparse.ArgumentParser):
    def parse_args(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Raises InputError for an unknown option, with the nearest one that exists."""
        args, rest = self.parse_known_args(arguments)
        for argument in rest:
            if argument.startswith("-"):
                raise unknown(
                    "option", argument.partition("=")[0], (o for o in self._option_string_actions if o != "-h")
                )
        if rest:
            self.error(f"got too many arguments: {' '.join(rest)}")
        return args

    def error(self, message: str):
        raise InputError(f"{message}; see --help")
