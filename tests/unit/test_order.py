"""The order of a run is a pure function of (seed, epoch, index), and shuffles well enough."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilllens_cache import WINDOW_SHARDS, Order

sizes, seeds, epochs = st.integers(1, 60), st.integers(0, 10_000), st.integers(0, 5)


def shards(size: int, per_shard: int = 3) -> np.ndarray:
    return np.arange(size) // per_shard


@given(sizes, seeds, epochs)
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(size: int, seed: int, epoch: int) -> None:
    order = Order(shards(size), seed=seed).epoch(epoch)
    assert sorted(order.indices) == list(range(size))
    later = Order(shards(size), seed=seed)
    for other in (7, 3, 0):
        later.epoch(other)
    assert (order.indices == later.epoch(epoch).indices).all()


def test_this_order_stays_what_it_was() -> None:
    """Runs that were stopped go on with it, on any machine and in any later version."""
    order = Order(shards(24), seed=7).epoch(1)
    assert order.shards == ((1, 7, 4, 0), (3, 2, 6, 5))
    assert order.indices.tolist() == [
        *(14, 23, 22, 5, 13, 1, 2, 4, 0, 3, 21, 12),
        *(8, 6, 15, 19, 20, 18, 17, 9, 11, 16, 7, 10),
    ]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(Order(shards(50), seed=seed).epoch(epoch).indices) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(sizes, seeds, epochs)
def test_the_examples_of_a_window_are_those_of_its_shards(size: int, seed: int, epoch: int) -> None:
    order = Order(shards(size), seed=seed).epoch(epoch)
    assert sorted(shard for window in order.shards for shard in window) == sorted(set(shards(size)))
    for number, window in enumerate(order.shards):
        assert len(window) <= WINDOW_SHARDS
        places = range(order.starts[number], order.starts[number + 1])
        assert {order.window_at(place) for place in places} == {number}
        assert sorted(order.indices[places]) == sorted(np.flatnonzero(np.isin(shards(size), window)))


@given(sizes, seeds, st.integers(0, 200), st.integers(0, 150))
def test_a_run_is_its_epochs_after_one_another(size: int, seed: int, first: int, length: int) -> None:
    order = Order(shards(size), seed=seed)
    whole = [int(index) for epoch in range(351 // size + 1) for index in order.epoch(epoch).indices]
    assert order.indices(first, first + length) == whole[first : first + length]


@given(sizes, seeds, epochs, st.integers(1, 9))
def test_groups_of_like_length_hold_the_examples_of_each_window_and_begin_where_steps_do(
    size: int, seed: int, epoch: int, group: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 500, size)
    plain = Order(shards(size), seed=seed).epoch(epoch)
    grouped = Order(shards(size), seed=seed, lengths=lengths, group_size=group).epoch(epoch)
    assert grouped.shards == plain.shards
    for start, stop in zip(grouped.starts, grouped.starts[1:], strict=False):
        assert sorted(grouped.indices[start:stop]) == sorted(plain.indices[start:stop])
        places = np.arange(start, stop) + epoch * size
        for step in np.unique(places // group):
            inside = grouped.indices[start:stop][places // group == step]
            assert (np.diff(lengths[inside]) <= 0).all()


def test_groups_of_like_length_pad_little_and_come_in_a_shuffled_order() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 512)

    def padded(order: Order) -> int:
        return int((lengths[order.epoch(0).indices].reshape(-1, 8).max(1) * 8).sum())

    plain, grouped = Order(shards(512, 64), seed=1), Order(shards(512, 64), seed=1, lengths=lengths, group_size=8)
    assert padded(plain) > 1.6 * lengths.sum()
    assert padded(grouped) < 1.1 * lengths.sum()
    longest = lengths[grouped.epoch(0).indices].reshape(-1, 8).max(1)
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


@pytest.mark.parametrize(("num_shards", "per_shard", "batch"), [(64, 32, 16), (16, 128, 32)])
def test_batches_are_as_even_as_a_full_shuffle_makes_them_where_shards_are_alike(
    num_shards: int, per_shard: int, batch: int
) -> None:
    """The variance of a batch's mean, for a property of the examples that does not depend on their shard."""
    size = num_shards * per_shard
    values = np.random.default_rng(0).normal(size=size)
    order = Order(shards(size, per_shard), seed=0)
    means = [values[order.epoch(epoch).indices].reshape(-1, batch).mean(1) for epoch in range(20)]
    expected = values.var() / batch * (size - batch) / (size - 1)
    assert np.var(means) == pytest.approx(expected, rel=0.1)


def test_neighbours_of_the_plan_are_parted() -> None:
    size, per_shard = 4096, 128
    order = Order(shards(size, per_shard), seed=0)
    steps = np.concatenate([np.diff(order.epoch(epoch).indices) for epoch in range(10)])
    # Within a window of n examples a full shuffle puts i + 1 after i with probability 1 / n.
    window = WINDOW_SHARDS * per_shard
    assert (steps == 1).mean() == pytest.approx(1 / window, rel=0.3)
