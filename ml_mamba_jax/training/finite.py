"""NaN and infinity: where they are, and what a run does about them.

A step whose numbers are not finite changes nothing and is left out. What was wrong before the step cannot get better, and a few
steps in a row are no accident: both end the run, and say where it began.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml_mamba_jax.errors import NonFiniteError

MAX_LEFT_OUT = 3
"""Steps in a row that may be left out; the last of them ends the run."""
SHOWN = 8
"""Arrays and samples that are named."""


def are_finite(tree: Any) -> Any:
    """The same tree with a bool [] for each array: none of its values is NaN or infinite. May be traced."""
    return jax.tree.map(lambda a: jnp.isfinite(a).all(), tree)


def not_finite(tree: Any) -> list[str]:
    """The paths of arrays with a value that is NaN or infinite."""
    return false_in(_are_finite(tree))


def false_in(flags: Any) -> list[str]:
    """The paths of what is false in a tree of bool []."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(flags))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in leaves if not flag]


_are_finite = jax.jit(are_finite)


class LeftOut:
    """The steps in a row that were left out."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def none(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def one(self, step: int, metrics: Mapping[str, float], gradient: Any, held: Any, ids: Sequence[str]) -> None:
        """A step was left out. `gradient`: of which arrays it was finite; `held`: parameters and moments, which the step has not
        changed; `ids`: of the records in its batch.

        Raises:
            NonFiniteError: it cannot go on; names step, arrays and records.
        """
        self._in_a_row += 1
        numbers = f"loss {metrics['loss']} and gradient norm {metrics['gradient_norm']}"
        said = f"step {step}: got {numbers}, expected finite numbers, from the records {shortened(ids)}"
        if before := not_finite(held):
            raise NonFiniteError(
                f"{said}; NaN or infinity was there before the step: {shortened(before)}; "
                "go on from the newest checkpoint with --resume"
            )
        said += f"; not finite: {shortened([f'gradient/{path}' for path in false_in(gradient)]) or 'the update'}"
        if self._in_a_row == MAX_LEFT_OUT:
            raise NonFiniteError(
                f"{said}; {self._in_a_row} steps in a row were not finite, and changed nothing; "
                "look at the records, or start again with a lower optim.peak-lr"
            )
        print(f"{said}; left out", file=sys.stderr, flush=True)


def shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
