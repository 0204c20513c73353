"""Which examples make step n: order, packing, partition over ranks.

Everything here is a pure function of (seed, epoch, index); ranks and micro-batches only partition a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from distilllens.positions import num_taken
from distilllens_cache import CachedExample

WINDOW_SHARDS = 4
"""Examples are shuffled among this many shards at a time, so that a reader holds few of them in memory."""


class ExampleSource(Protocol):
    """Anything that a run can train on: a cache's reader, or a tokenized dataset."""

    num_targets: np.ndarray
    """Target positions of each example."""
    shard_of: np.ndarray
    """Shard of each example; examples of one shard are cheap to read together."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CachedExample: ...


@lru_cache(maxsize=2)
def _epoch_order(shard_bounds: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = random.permutation(len(shard_bounds) - 1)
    windows = [shards[start : start + WINDOW_SHARDS] for start in range(0, len(shards), WINDOW_SHARDS)]
    members = [np.concatenate([np.arange(shard_bounds[s], shard_bounds[s + 1]) for s in w]) for w in windows]
    return np.concatenate([random.permutation(window) for window in members])


def epoch_order(shard_of: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Example indices in the order of one epoch: shards shuffled, then examples within windows of shards."""
    bounds = (0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(shard_of))
    return _epoch_order(bounds, seed, epoch)


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run: step n (from 0) takes examples n * G to (n + 1) * G of the epochs' orders."""

    source: ExampleSource
    seed: int
    examples_per_micro_batch: int
    micro_batches: int
    world_size: int = 1
    positions_share: float = 1.0
    """Share of each example's target positions that is trained on."""

    @property
    def examples_per_step(self) -> int:
        """G: examples in a step, over all ranks and micro-batches."""
        return self.examples_per_micro_batch * self.micro_batches * self.world_size

    def indices(self, step: int) -> list[int]:
        """Example indices of a step. A step may span two epochs; no example is dropped."""
        size = len(self.source)
        first = step * self.examples_per_step
        positions = range(first, first + self.examples_per_step)
        orders = {p // size: epoch_order(self.source.shard_of, seed=self.seed, epoch=p // size) for p in positions}
        return [int(orders[position // size][position % size]) for position in positions]

    def num_targets(self, step: int) -> int:
        """Target positions that a step trains on, from the index alone: the denominator of its loss."""
        return int(num_taken(self.source.num_targets[self.indices(step)], self.positions_share).sum())

    def micro_batch(self, step: int, number: int, rank: int) -> list[int]:
        """Example indices that ``rank`` computes in micro-batch ``number`` of a step."""
        start = (number * self.world_size + rank) * self.examples_per_micro_batch
        return self.indices(step)[start : start + self.examples_per_micro_batch]

    def for_epochs(self, epochs: float) -> int:
        """Steps that ``epochs`` passes over the source take."""
        return max(1, int(np.ceil(epochs * len(self.source) / self.examples_per_step)))


def pack_by_length(num_tokens: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Positions grouped into batches of like length, whose padded size stays within ``token_budget`` where it can."""
    order = sorted(range(len(num_tokens)), key=lambda position: (-num_tokens[position], position))
    batches: list[list[int]] = []
    for position in order:
        # The first of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * num_tokens[batches[-1][0]] <= token_budget:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches
