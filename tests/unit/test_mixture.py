"""Several sources as one: weights hold in what is drawn, examples keep their names, and twins are found by content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.batches import Steps
from distilllens.interleaving import Interleaving
from distilllens.mixture import DataMixture, MixedExample, SameExamples
from distilllens_cache import CachedExample, LayerTargets


class Source:
    """``size`` examples in shards of ``per_shard``, whose number is the teacher's one likely token."""

    def __init__(self, size: int, *, per_shard: int = 3, order: list[int] | None = None) -> None:
        self.contents = order or list(range(size))
        self.num_targets = np.array([1 + content for content in self.contents])
        self.num_tokens = np.full(size, 2)
        self.shard_of = np.arange(size) // per_shard
        self.shards_read: list[int] = []

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> CachedExample:
        content = self.contents[index]
        targets = LayerTargets(
            np.ones(1, np.int32), np.array([content], np.uint32), np.zeros(1, np.float32), np.zeros(1, np.float32)
        )
        ids = np.array([content, 0], np.uint32)
        return CachedExample(index, str(content), ids, np.zeros(1, np.uint32), {4: targets})

    def read_shard(self, number: int) -> list[CachedExample]:
        self.shards_read.append(number)
        return [self[int(index)] for index in np.flatnonzero(self.shard_of == number)]


def steps(sizes: list[int], weights: list[float], *, shape: tuple[int, int, int] = (4, 1, 1), seed: int = 7) -> Steps:
    names = [f"cache-{n}" for n in range(len(sizes))]
    mixture = DataMixture([Source(size) for size in sizes], names=names, weights=weights)
    return Steps(mixture, seed, *shape)


sizes = st.lists(st.integers(1, 30), min_size=2, max_size=4)


@given(sizes, st.data())
@settings(deadline=None)
def test_weights_hold_after_every_step_and_each_source_goes_through_its_epochs(some: list[int], data) -> None:
    parts = data.draw(st.lists(st.integers(1, 9), min_size=len(some), max_size=len(some)))
    run = steps(some, [float(part) for part in parts])
    starts, drawn = run.source.starts, [[] for _ in some]
    for step in range(40):
        for index in run.indices(step):
            source = int(np.searchsorted(starts, index, side="right")) - 1
            drawn[source].append(index - int(starts[source]))
        for part, own in zip(parts, drawn, strict=True):
            assert abs(len(own) - part / sum(parts) * 4 * (step + 1)) < 1
    for size, own in zip(some, drawn, strict=True):
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(sizes, st.sampled_from([(1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)]), st.integers(0, 30))
@settings(deadline=None)
def test_ranks_and_micro_batches_only_partition_a_mixed_step(some: list[int], shape, step: int) -> None:
    weights = [1.0] * len(some)
    run = steps(some, weights, shape=shape)
    parts = [run.micro_batch(step, n, rank) for n in range(shape[1]) for rank in range(shape[2])]
    assert [index for part in parts for index in part] == steps(some, weights).indices(step)
    assert run.num_targets(step) == sum(int(run.source.num_targets[i]) for part in parts for i in part)


def test_what_is_read_ahead_is_what_the_order_names_from_any_place_on() -> None:
    run = steps([20, 7], [0.7, 0.3])
    for first in (0, 13, 50):
        with run.read_ahead() as examples:
            found = [examples[place] for place in range(first, first + 30)]
        assert [one.index for one in found] == run.order.indices(first, first + 30)
        assert [one.id for one in found] == [run.source[one.index].id for one in found]


def test_a_run_that_ends_is_read_ahead_to_its_last_place_and_no_further() -> None:
    run = steps([20, 7], [0.7, 0.3])
    for stop in (1, 2, 9, 10, 30):
        with run.read_ahead(stop=stop) as examples:
            assert [examples[place].index for place in range(stop)] == run.order.indices(0, stop)
            assert sum(part.stop for part in examples._parts) == stop


def test_the_order_of_a_mixture_is_the_same_in_every_version() -> None:
    assert "".join(str(Interleaving([0.7, 0.3])[place][0]) for place in range(10)) == "0010010001"
    assert "".join(str(Interleaving([5, 3, 1, 1])[place][0]) for place in range(20)) == "01010201030101020103"
    assert steps([9, 4], [0.7, 0.3], seed=42).order.indices(0, 14) == [6, 4, 9, 8, 2, 10, 0, 7, 5, 11, 3, 1, 12, 5]


def test_an_example_is_named_with_its_cache_and_numbered_once() -> None:
    mixture = steps([20, 7], [0.7, 0.3]).source
    assert [mixture[index].id for index in (0, 19, 20, 26)] == ["cache-0/0", "cache-0/19", "cache-1/0", "cache-1/6"]
    assert [mixture[index].index for index in range(27)] == list(range(27))
    assert [list(mixture[index].by_source) for index in (19, 20)] == [[0], [1]]


def test_equal_sources_and_other_seeds_have_orders_of_their_own() -> None:
    run = steps([30, 30], [0.5, 0.5])
    drawn = run.order.indices(0, 60)
    first, second = [i for i in drawn if i < 30], [i - 30 for i in drawn if i >= 30]
    assert sorted(first) == sorted(second)
    assert first != second
    assert drawn != steps([30, 30], [0.5, 0.5], seed=8).order.indices(0, 60)


def test_sizes_for_weights_draw_every_example_once_in_an_epoch() -> None:
    run = steps([20, 7], [20, 7])
    assert sorted(run.order.indices(0, 27)) == list(range(27))
    assert run.for_epochs(2) == 14


def contents(example: MixedExample) -> list[int]:
    return [int(targets[4].ids[0]) for targets in example.by_source.values()]


@pytest.mark.parametrize("per_shard", [1, 3, 4, 100])
@given(order=st.permutations(list(range(11))))
@settings(deadline=None, max_examples=20)
def test_every_example_stands_beside_its_twins_however_a_cache_is_ordered_and_divided(per_shard: int, order) -> None:
    first, other = Source(11), Source(11, per_shard=per_shard, order=list(order))
    same = SameExamples([first, other], [np.argsort(order)])
    read = [example for number in range(4) for example in same.read_shard(number)]
    for index, example in enumerate(read):
        assert contents(example) == contents(same[index]) == [index, index]
        assert (example.index, example.id) == (index, str(index))
    assert (same.num_targets == first.num_targets).all()


def test_caches_divided_alike_are_read_once() -> None:
    first, other = Source(11), Source(11)
    same = SameExamples([first, other], [np.arange(11)])
    for number in range(4):
        same.read_shard(number)
    assert first.shards_read == other.shards_read == [0, 1, 2, 3]
