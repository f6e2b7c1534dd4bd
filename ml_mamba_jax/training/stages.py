"""The stages of a run: how long each is, where a step of the run falls, and which parameters it trains."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax.data.order import Order
from ml_mamba_jax.layers import LORA_NAMES
from ml_mamba_jax.training.config import StageConfig


class Position(NamedTuple):
    """After `step` steps of stage number `stage`; the stage after the last one is the end of the run."""

    stage: int
    step: int


def length(stage: StageConfig, order: Order) -> int:
    """Optimizer steps of a stage whose batches come in that order."""
    return order.n_batches(stage.epochs) if stage.steps is None else stage.steps


def locate(step: int, lengths: Sequence[int], stays: bool = False) -> Position:
    """Where a run stands after `step` steps. After the last step of a stage it stands before the first of the next, or `stays`."""
    for number, n in enumerate(lengths):
        if step < n or (stays and step == n):
            return Position(number, step)
        step -= n
    return Position(len(lengths), 0)


def split(tree: dict, stage: StageConfig) -> tuple[dict, dict]:
    """A tree like the parameters -> what the stage trains, and what it leaves frozen; `join` puts them together again.

    Of a part with low-rank additions only these are trained.
    """
    trained, frozen, flat = {}, {}, flatten_dict(tree)
    parts_of_lora = {path[0] for path in flat if path[-1] in LORA_NAMES}
    for path, leaf in flat.items():
        learns = path[0] in stage.trains and (path[0] not in parts_of_lora or path[-1] in LORA_NAMES)
        (trained if learns else frozen)[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def join(*trees: dict) -> dict[str, Any]:
    """One tree of several that share no leaf."""
    flat: dict[tuple[str, ...], Any] = {}
    for tree in trees:
        flat |= flatten_dict(tree)
    return unflatten_dict(flat)
