"""Which examples make step n, and how they become tensors: order, partition over ranks, padding.

Everything here is a pure function of (seed, epoch, index); ranks and micro-batches only partition a step.

Dimension key: B batch, T tokens, N target positions of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distilllens.tails import Tail
from distilllens.targets import SparseTargets, stack_targets
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


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to their longest, with the targets of all of them, example after example."""

    ids: tuple[str, ...]
    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    is_target: Bool[Tensor, "B T"]
    next_ids: Int[Tensor, " N"]
    targets: dict[int, SparseTargets]
    tails: dict[int, Tail]
    """What stands for the rest, by layer; the layers are those of ``targets``, the teacher's final one last."""

    @property
    def final_layer(self) -> int:
        """The teacher's final layer."""
        return max(self.targets)

    def to(self, device: torch.device) -> "Batch":
        """This batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            is_target=self.is_target.to(device, non_blocking=True),
            next_ids=self.next_ids.to(device, non_blocking=True),
            targets={layer: targets.to(device) for layer, targets in self.targets.items()},
            tails={layer: tail.to(device) for layer, tail in self.tails.items()},
        )


def collate(examples: Sequence[CachedExample], tails: dict[int, Tail]) -> Batch:
    """One batch from some examples, with their targets at the layers of ``tails``.

    Padding is masked by length, never by id.
    """
    width = max(len(example.token_ids) for example in examples)
    input_ids = np.zeros((len(examples), width), dtype=np.int64)
    attention_mask = np.zeros((len(examples), width), dtype=np.int64)
    is_target = np.zeros((len(examples), width), dtype=bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.token_ids)] = example.token_ids
        attention_mask[row, : len(example.token_ids)] = 1
        is_target[row, example.target_positions] = True
    next_ids = np.concatenate([example.token_ids[example.target_positions + 1] for example in examples])
    return Batch(
        ids=tuple(example.id for example in examples),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        is_target=torch.from_numpy(is_target),
        next_ids=torch.from_numpy(next_ids.astype(np.int64)),
        targets={layer: stack_targets([example.targets[layer] for example in examples]) for layer in tails},
        tails=tails,
    )


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
        """Target positions of a step, from the index alone: the denominator of its loss."""
        return int(self.source.num_targets[self.indices(step)].sum())

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
