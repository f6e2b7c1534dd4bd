"""Orders of batches: every record once an epoch, lengths together, rows full, and nothing but the seed decides."""

import pickle
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_mamba_jax.data.order import GroupedOrder, Lengths, PackedOrder, Plan, RandomOrder, buckets
from ml_mamba_jax.errors import InputError

MAX_TOKENS, N_VISUAL, ROW = 64, 16, 160


def lengths(n: int, seed: int = 0, part_with_image: float = 0.8) -> Lengths:
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.lognormal(3, 0.8, n).astype(np.int32) + 2, 200).astype(np.int32)
    return Lengths(tokens, rng.random(n) < part_with_image)


def orders(some: Lengths, batch_size: int = 4, seed: int = 0) -> dict:
    return {
        "random": RandomOrder(len(some.tokens), batch_size, MAX_TOKENS, seed),
        "grouped": GroupedOrder(some, batch_size, buckets(MAX_TOKENS, 4), seed),
        "packed": PackedOrder(some, batch_size, ROW, MAX_TOKENS, N_VISUAL, seed),
    }


def records(plans: list[Plan]) -> list[int]:
    return [record for plan in plans for row in plan.rows for record in row]


@given(
    n=st.integers(1, 60), batch_size=st.integers(1, 7), seed=st.integers(0, 9), images=st.sampled_from([0.0, 0.5, 1.0])
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_has_every_record_once(n, batch_size, seed, images):
    some = lengths(n, seed, images)
    for name, order in orders(some, batch_size, seed).items():
        if name == "random":
            if n % batch_size:
                continue
            ends = [0, n // batch_size, 2 * n // batch_size]
        else:
            ends = [0, order.n_batches(1), order.n_batches(2)]
        epochs = [[order.batch(i) for i in range(*pair)] for pair in (ends[:2], ends[1:])]
        for plans in epochs:
            assert sorted(records(plans)) == list(range(n))
            assert all(len(plan.rows) == batch_size for plan in plans)
        if n > 40 and batch_size < 4:
            assert records(epochs[0]) != records(epochs[1])


@given(n=st.integers(1, 60), batch_size=st.integers(1, 7), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_every_row_fits_into_what_it_is_padded_to(n, batch_size, seed):
    some = lengths(n, seed)
    cut = np.minimum(some.tokens, MAX_TOKENS)
    grouped, packed = (orders(some, batch_size, seed)[name] for name in ("grouped", "packed"))
    for i in range(grouped.n_batches(1)):
        plan = grouped.batch(i)
        assert plan.length in (8, 16, 32, 64)
        longest = max(cut[record] for record in records([plan]))
        assert plan.length // 2 < max(longest, 5) <= plan.length
        assert {bool(some.has_image[record]) for record in records([plan])} == {plan.has_image}
    for i in range(packed.n_batches(1)):
        for row in packed.batch(i).rows:
            n_images = sum(some.has_image[list(row)])
            assert sum(cut[list(row)]) + N_VISUAL * n_images <= ROW
            assert n_images <= packed.image_slots


def test_grouping_and_packing_leave_little_padding():
    some = lengths(4000)
    cut = np.minimum(some.tokens, MAX_TOKENS)
    text, read = cut.sum(), (cut + N_VISUAL * some.has_image).sum()
    by_name = orders(some, batch_size=8)
    filled = {}
    for name, order in by_name.items():
        positions = sum(plan.length * len(plan.rows) for plan in (order.batch(i) for i in range(order.n_batches(1))))
        filled[name] = (read if name == "packed" else text) / positions
    assert filled["random"] < 0.45
    assert filled["grouped"] > 0.7
    assert filled["packed"] > 0.95


def test_the_first_batch_is_the_longest_and_epochs_are_not_sorted():
    order = orders(lengths(1000))["grouped"]
    n = order.n_batches(1)
    plans = [order.batch(i) for i in range(2 * n)]
    assert (plans[0].length, plans[0].has_image) == (MAX_TOKENS, True)
    found = [plan.length for plan in plans[n:]]
    assert found != sorted(found) and found != sorted(found, reverse=True)
    assert sum(plan.has_image for plan in plans[: n // 2]) < n // 2


def test_batches_do_not_depend_on_when_or_where_they_are_asked_for():
    some = lengths(300)
    for name, order in orders(some).items():
        expected = [order.batch(i) for i in range(500)]  # more epochs than are kept
        assert order.batch(3) == expected[3]
        backwards = orders(some)[name]
        assert [backwards.batch(i) for i in reversed(range(500))] == expected[::-1]
        sent = pickle.loads(pickle.dumps(orders(some)[name])) if name != "random" else orders(some)[name]
        got: dict[int, Plan] = {}
        threads = [
            threading.Thread(target=lambda k=k, o=sent, got=got: got.update({i: o.batch(i) for i in range(k, 500, 4)}))
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[i] for i in range(500)] == expected
        other = orders(some, seed=1)[name]
        assert [other.batch(i) for i in range(20)] != expected[:20]


def test_seeds_and_epochs_do_not_share_orders():
    """Seed 7 in its second epoch is not seed 8 in its first."""
    some = lengths(200, part_with_image=1.0)
    for name in ("grouped", "packed"):
        first, second = (orders(some, seed=seed)[name] for seed in (7, 8))
        n = first.n_batches(1)
        assert Counter(first.batch(n + i) for i in range(5)) != Counter(second.batch(i) for i in range(5))


def test_steps_are_counted_in_epochs():
    some = lengths(10, part_with_image=0.5)
    n_images = int(some.has_image.sum())
    by_name = orders(some)
    assert by_name["random"].n_batches(1) == 3 and by_name["random"].n_batches(0.01) == 1
    per_epoch = -(-n_images // 4) + -(-(10 - n_images) // 4)
    assert by_name["grouped"].n_batches(2) == 2 * per_epoch
    assert by_name["packed"].n_batches(1.5) > by_name["packed"].n_batches(1)


def test_buckets_are_halves():
    assert buckets(2048, 4) == [256, 512, 1024, 2048]
    assert buckets(30, 4) == [8, 16, 30]
    assert buckets(8, 4) == [8] and buckets(5, 2) == [5] and buckets(96, 1) == [96]


def test_a_row_shorter_than_a_record_is_refused():
    with pytest.raises(InputError, match=r"data\.row_length: got 79, expected at least 80 = max_tokens 64 \+ 16"):
        PackedOrder(lengths(5), 2, 79, MAX_TOKENS, N_VISUAL, 0)
