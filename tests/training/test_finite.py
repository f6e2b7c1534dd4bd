"""NaN and infinity, wherever they appear, reach no parameter, no moment and no checkpoint, and are named."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from ml_mamba_jax import checkpoint
from ml_mamba_jax.errors import NonFiniteError
from ml_mamba_jax.training import loop, step
from ml_mamba_jax.training.finite import MAX_LEFT_OUT, not_finite
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.metrics import read_metrics
from ml_mamba_jax.training.stop import Stopped
from ml_mamba_jax.training.writers import RunLog
from tests.training import short_run

KINDS = ("params", "frozen", "moments", "loss or gradient")
BAD = (np.nan, np.inf, -np.inf)


def test_arrays_that_are_not_finite_are_named():
    tree = {
        "a": [jnp.zeros(3), jnp.array([1.0, jnp.inf])],
        "b": {"c": jnp.array(jnp.nan, jnp.bfloat16)},
        "n": jnp.ones(2, int),
    }
    assert not_finite(tree) == ["a/1", "b/c"]
    assert not_finite({"a": jnp.zeros(3)}) == []


class Poison:
    """Puts a bad number into one place of a run: once into what the step starts from, or into the loss and gradient of steps."""

    def __init__(self, number: int, config):
        rng = np.random.default_rng(number)
        self.kind = KINDS[number % len(KINDS)]
        self.value = BAD[rng.integers(len(BAD))]
        self.step = int(rng.integers(1, config.stages[0].steps + 1))
        self.n_steps = int(rng.integers(1, MAX_LEFT_OUT + 3))
        self._rng, self.path, self._number = rng, "", 0
        self._into_gradient = None

    def __str__(self) -> str:
        return f"{self.value} in {self.kind} {self.path} at step {self.step} for {self.n_steps}"

    def before_step(self, state, frozen) -> None:
        self._number += 1
        if self._number == self.step and self.kind in ("params", "frozen", "moments"):
            moments = {name: getattr(state.optimizer[1][0], name) for name in ("mu", "nu")}
            self._into({"params": state.params, "frozen": frozen, "moments": moments}[self.kind])

    def _into(self, tree: dict) -> None:
        """In place, as a bad chip would."""
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        path = paths[self._rng.integers(len(paths))]
        for key in path[:-1]:
            tree = tree[key.key]
        name = path[-1].key
        self.path = jax.tree_util.keystr(path, simple=True, separator="/")
        at = np.unravel_index(self._rng.integers(tree[name].size), tree[name].shape)
        tree[name] = tree[name].at[at].set(self.value)

    def into_gradient(self, n: int) -> np.ndarray:
        """What is added to the first number of the loss and of each array of the gradient, float32 [n]."""
        added = np.zeros(n, np.float32)
        if self.kind == "loss or gradient" and self.step <= self._number < self.step + self.n_steps:
            self._into_gradient = self._rng.integers(n) if self._into_gradient is None else self._into_gradient
            added[self._into_gradient] = self.value
        return added


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A function that takes all steps of a short run in a folder of its own, with a poison."""
    config = short_run.recipe(tmp_path_factory.mktemp("short"))
    current: list[Poison] = []

    def poisoned(*args, **kwargs):
        loss, gradient, targets = mean_loss_and_gradient(*args, **kwargs)
        leaves, tree = jax.tree.flatten((loss, gradient))
        n = len(leaves)
        added = jax.pure_callback(lambda: current[-1].into_gradient(n), jax.ShapeDtypeStruct((n,), jnp.float32))
        loss, gradient = tree.unflatten([a.at[(0,) * a.ndim].add(b) for a, b in zip(leaves, added, strict=True)])
        return loss, gradient, targets

    def make(*args):
        train_step = step.make_train_step(*args)

        def take(state, frozen, batch):
            current[-1].before_step(state, frozen)
            return train_step(state, frozen, batch)

        return take

    begun = []

    def keep(run, log, number, params, resumed):
        begun.append((run, jax.tree.map(np.asarray, params)))
        raise Stopped

    with mock.patch.object(loop, "make_train_step", make), short_run.quickly():
        with mock.patch.object(train, "take_stage", keep):
            short_run.take(config)
        ((run, params),) = begun
        place = jax.tree.map(lambda a: a.sharding, step.abstract_params(run.model, run.mesh))

        def take(folder, poison):
            current.append(poison)
            log = RunLog(folder, config, 0)
            try:
                loop.take_stage(dataclasses.replace(run, folder=folder), log, 0, jax.device_put(params, place))
            finally:
                log.close()

        with mock.patch.object(step, "mean_loss_and_gradient", poisoned):
            yield config, take


@pytest.mark.parametrize("numbers", [range(4), pytest.param(range(4, 104), marks=pytest.mark.full)])
def test_nothing_bad_is_learnt_or_saved(stage, tmp_path, capsys, numbers):
    config, take = stage
    for number in numbers:
        poison = Poison(number, config)
        folder, error = tmp_path / str(number), ""
        capsys.readouterr()
        try:
            take(folder, poison)
        except NonFiniteError as raised:
            error = str(raised)
        told = capsys.readouterr().err
        lines = read_metrics(folder / "metrics.jsonl")
        left_out = [line["step"] for line in lines if "left_out" in line]

        for saved in checkpoint.steps(folder):
            arrays = short_run.arrays(dataclasses.replace(config, runs=tmp_path, name=str(number)), saved)
            assert not_finite(arrays) == [], f"{poison}: step {saved}"
        assert len(left_out) <= MAX_LEFT_OUT - 1, poison
        assert told.count("; left out") == len(left_out)
        if poison.kind == "loss or gradient":
            last = min(poison.step + poison.n_steps - 1, config.stages[0].steps)
            n_bad = last - poison.step + 1
            assert bool(error) == (n_bad >= MAX_LEFT_OUT), poison
            assert left_out == list(range(poison.step, poison.step + min(n_bad, MAX_LEFT_OUT - 1)))
            assert not error or error.startswith(f"step {poison.step + MAX_LEFT_OUT - 1}: got loss ")
            assert not error or "from the records train-0000" in error
            if not error:
                assert len(lines) == config.stages[0].steps
                n_updates = len([line for line in lines if "learning_rate" in line])
                assert n_updates == config.stages[0].steps - n_bad
        else:
            named = {"params": "params/", "frozen": "params/", "moments": "optimizer/1/0/"}[poison.kind] + poison.path
            assert error.startswith("step "), poison
            assert named in error or " more" in error, f"{poison}: {error}"
            assert int(error.split(":")[0].split()[1]) >= poison.step
