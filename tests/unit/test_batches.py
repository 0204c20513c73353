"""Order and composition of steps are pure functions of (seed, epoch, index)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distilllens.batches import Steps, pack_by_length
from distilllens.collate import collate
from distilllens.tails import BucketTail
from distilllens_cache import CachedExample, LayerTargets


class Source:
    """Examples of 1, 2, 3, ... targets in shards of three."""

    def __init__(self, size: int) -> None:
        self.num_targets = np.arange(1, size + 1)
        self.shard_of = np.arange(size) // 3

    def __len__(self) -> int:
        return len(self.num_targets)


sizes, seeds = st.integers(1, 50), st.integers(0, 10_000)


@given(
    sizes,
    st.sampled_from([(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)]),
    st.integers(0, 9),
)
def test_ranks_and_micro_batches_only_partition_a_step(size: int, shape: tuple[int, int, int], step: int) -> None:
    micro_batch, micro_batches, world_size = shape
    steps = Steps(Source(size), 7, micro_batch, micro_batches, world_size)
    parts = [steps.micro_batch(step, n, rank) for n in range(micro_batches) for rank in range(world_size)]
    assert [index for part in parts for index in part] == Steps(Source(size), 7, 4, 1).indices(step)
    assert steps.num_targets(step) == sum(int(index) + 1 for part in parts for index in part)


@given(sizes, seeds)
def test_every_example_is_drawn_once_before_any_is_drawn_again(size: int, seed: int) -> None:
    steps = Steps(Source(size), seed, 3, 1)
    drawn = [index for step in range(2 * size) for index in steps.indices(step)]
    for epoch in range(len(drawn) // size):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 400))
def test_packed_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = pack_by_length(lengths, token_budget=budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[position] for position in batch) <= budget


def example(index: int, length: int, positions: list[int]) -> CachedExample:
    count = len(positions)
    targets = LayerTargets(
        counts=np.full(count, 1, np.int32),
        ids=np.full(count, index, np.uint32),
        log_probs=np.zeros(count, np.float32),
        log_rest=np.full(count, -100, np.float32),
    )
    ids = np.arange(length, dtype=np.uint32) + 10 * index
    return CachedExample(index, str(index), ids, np.array(positions, np.uint32), {4: targets})


def test_each_target_stands_beside_the_token_after_its_position_and_its_own_distribution() -> None:
    batch = collate([example(1, 4, [1, 2]), example(2, 6, [4])], {4: BucketTail()})
    assert batch.next_ids.tolist() == [12, 13, 25]
    assert batch.is_target.nonzero().tolist() == [[0, 1], [0, 2], [1, 4]]
    assert batch.targets[4].ids[:, 0].tolist() == [1, 1, 2]


def test_padding_is_masked_by_length_and_never_by_id() -> None:
    """Token id 0 is real text here; a mask by id would lose it."""
    zeros = CachedExample(0, "0", np.zeros(3, np.uint32), np.array([1], np.uint32), example(0, 3, [1]).targets)
    batch = collate([zeros, example(2, 5, [0])], {4: BucketTail()})
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("budget", [8, 64])
def test_longer_examples_come_first_so_that_memory_is_tried_early(budget: int) -> None:
    batches = pack_by_length([2, 7, 5, 3], token_budget=budget)
    assert batches[0][0] == 1
    assert torch.tensor([7, 5, 3, 2]).tolist() == [[2, 7, 5, 3][position] for batch in batches for position in batch]
