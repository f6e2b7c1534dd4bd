"""The recurrent state as a value: rows, forks, joins, and a file that survives what happens to files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.state import MambaState, check_state, fork, init_state, insert_rows, join, take_rows
from ml_mamba_jax.state_file import load_state, save_state

CONFIG = MLMambaConfig.named("tiny")


def state(batch_size: int = 3, dtype: str = "float32", seed: int = 0) -> MambaState:
    rng = np.random.default_rng(seed)
    zeros = init_state(CONFIG.language, batch_size, dtype)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), zeros)


def assert_equal(a: MambaState, b: MambaState) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_rows_are_taken_put_back_forked_and_joined():
    whole = state(3)
    first, last = take_rows(whole, jnp.asarray([0])), take_rows(whole, jnp.asarray([2]))
    assert_equal(join([first, take_rows(whole, jnp.asarray([1])), last]), whole)
    assert_equal(fork(last, 4), take_rows(whole, jnp.asarray([2, 2, 2, 2])))
    assert_equal(insert_rows(state(3, seed=1), jnp.asarray([0, 1, 2]), whole), whole)
    with pytest.raises(InputError, match="state: got 3 rows, expected one to fork"):
        fork(whole, 2)
    with pytest.raises(InputError, match="states: got none"):
        join([])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_gives_back_every_bit(tmp_path, dtype):
    saved, config = state(2, dtype), CONFIG.replace(dtype=dtype)
    save_state(tmp_path / "a.state", saved, config)
    assert_equal(load_state(tmp_path / "a.state", config), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


def test_a_damaged_file_is_noticed_wherever_it_is_damaged(tmp_path):
    path = tmp_path / "a.state"
    save_state(path, state(1), CONFIG)
    data = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.state"):
            load_state(path, CONFIG)
    for length in (0, 5, 200, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"a\.state: got no file of save_state, or a damaged one"):
            load_state(path, CONFIG)


def test_what_does_not_belong_together_is_refused(tmp_path):
    path, other = tmp_path / "a.state", MLMambaConfig.named("tiny")
    save_state(path, state(1), CONFIG)
    language = other.language.__class__(other.language.mixer, n_layers=5, vocab_size=other.language.vocab_size)
    with pytest.raises(InputError, match=r"got the state of another model \(.*n_layers: 2 -> 5.*\)"):
        load_state(path, other.replace(language=language))
    with pytest.raises(InputError, match="dtype: float32 -> bfloat16"):
        load_state(path, CONFIG.replace(dtype="bfloat16"))
    with pytest.raises(InputError, match=r"b\.state: found no such file"):
        load_state(tmp_path / "b.state", CONFIG)
    with pytest.raises(InputError, match=r"nowhere/a\.state: the state cannot be written"):
        save_state(tmp_path / "nowhere" / "a.state", state(1), CONFIG)
    with pytest.raises(InputError, match="state: got conv bfloat16"):
        save_state(path, state(1, "bfloat16"), CONFIG)
    assert_equal(load_state(path, CONFIG), state(1))  # what was there before is still there
    with pytest.raises(InputError, match=r"state: got ssm float32\[2, 1, .*, expected float32\[2, 4, .* for 4 rows"):
        check_state(MambaState(state(4).conv, state(1).ssm), CONFIG.language, "float32", 4)
