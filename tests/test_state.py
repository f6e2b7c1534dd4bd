"""The recurrent state as a value: rows, forks, joins, and a file that survives what happens to files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.state import MambaState, check_state, fork, init_state, insert_rows, join, take_rows
from ml_mamba_jax.state_file import load_state, save_state
from tests import tiny_model

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


def test_rows_may_be_named_in_any_way_but_must_be_there():
    whole = state(3)
    for rows in ([0, 2], (0, -1), np.asarray([0, 2]), jnp.asarray([0, 2])):
        assert_equal(take_rows(whole, rows), take_rows(whole, [0, 2]))
    np.testing.assert_array_equal(take_rows(whole, [0, 2]).ssm, np.asarray(whole.ssm)[:, [0, 2]])
    assert_equal(take_rows(whole, 1), take_rows(whole, [1]))
    assert_equal(insert_rows(whole, [1], take_rows(whole, 1)), whole)
    assert take_rows(whole, []).batch_size == 0
    jitted = jax.jit(take_rows)(whole, jnp.asarray([2, 0]))
    assert_equal(jitted, take_rows(whole, [2, 0]))
    for rows in ([3], [-4], jnp.asarray([0, 9])):
        for call in (take_rows, lambda s, rows: insert_rows(s, rows, take_rows(s, [0]))):
            with pytest.raises(InputError, match=r"rows: got .*, expected indices from 0 to 2, those of the 3 rows"):
                call(whole, rows)
    with pytest.raises(InputError, match=r"rows: got 2 indices for 1 rows"):
        insert_rows(whole, [0, 1], take_rows(whole, 0))
    with pytest.raises(InputError, match="n: got 0, expected at least 1"):
        fork(take_rows(whole, 0), 0)


def test_only_states_of_one_model_are_put_together():
    language = CONFIG.language
    deeper = init_state(language.__class__(language.mixer, n_layers=3, vocab_size=300), 1)
    assert_equal(join(state(2)), state(2))  # one is as good as a list of one
    for other in (deeper, state(1, "bfloat16")):
        with pytest.raises(
            InputError, match=r"states: got conv float32.* and .*, expected the same but for the number"
        ):
            join([state(2), other])
        with pytest.raises(InputError, match=r"states: got conv float32"):
            insert_rows(state(2), [0], other)


def test_a_file_may_know_the_parameters_that_its_state_was_reached_with(tmp_path):
    path, params = tmp_path / "a.state", tiny_model.params()
    mixer = params["language"]["blocks"]["mixer"]
    for trained in (
        {**mixer, "D": mixer["D"] * 1.001},
        {**mixer, "norm_weight": mixer["norm_weight"].astype("bfloat16")},
    ):
        other = {"language": {**params["language"], "blocks": {**params["language"]["blocks"], "mixer": trained}}}
        save_state(path, state(1), CONFIG, params)
        assert_equal(load_state(path, CONFIG, params), state(1))
        assert_equal(load_state(path, CONFIG, {"language": jax.tree.map(np.asarray, params["language"])}), state(1))
        assert_equal(load_state(path, CONFIG), state(1))
        with pytest.raises(InputError, match=r"a\.state: got a state that other parameters reached"):
            load_state(path, CONFIG, other)
    with pytest.raises(InputError, match=r"other parameters reached, or that was saved without params"):
        save_state(path, state(1), CONFIG)
        load_state(path, CONFIG, params)


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
