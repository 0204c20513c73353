"""Which examples make step n: partition over ranks and micro-batches, and packing by length.

The order of the examples is `distilllens_cache.Order`, a pure function of (seed, epoch, index); ranks and micro-batches
only partition a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distilllens.example_source import ExampleSource
from distilllens.mixture import DataMixture, MixedOrder, MixedReadAhead
from distilllens.positions import num_taken
from distilllens_cache import Order, ReadAhead


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run: step n (from 0) takes the places n * G to (n + 1) * G - 1 of its order."""

    source: ExampleSource | DataMixture
    seed: int
    examples_per_micro_batch: int
    micro_batches: int
    world_size: int = 1
    positions_share: float = 1.0
    """Share of each example's target positions that is trained on."""
    group_by_length: bool = False
    """Whether a step's examples are of like length."""

    @cached_property
    def order(self) -> Order | MixedOrder:
        """The order of the run's examples."""
        if isinstance(self.source, DataMixture):
            return self.source.order(self.seed)
        lengths = self.source.num_tokens if self.group_by_length else None
        return Order(self.source.shard_of, seed=self.seed, lengths=lengths, group_size=self.examples_per_step)

    def read_ahead(self, *, stop: int | None = None) -> ReadAhead | MixedReadAhead:
        """The run's examples by place; the run ends at place ``stop``, if it does."""
        if isinstance(self.order, MixedOrder):
            return self.order.read_ahead(stop)
        assert not isinstance(self.source, DataMixture)
        return ReadAhead(self.source, self.order, stop=stop)

    @property
    def examples_per_step(self) -> int:
        """G: examples in a step, over all ranks and micro-batches."""
        return self.examples_per_micro_batch * self.micro_batches * self.world_size

    def indices(self, step: int) -> list[int]:
        """Example indices of a step. A step may span two epochs; no example is dropped."""
        return self.order.indices(step * self.examples_per_step, (step + 1) * self.examples_per_step)

    def num_targets(self, step: int) -> int:
        """Target positions that a step trains on, from the index alone: the denominator of its loss."""
        return int(num_taken(self.source.num_targets[self.indices(step)], self.positions_share).sum())

    def places(self, step: int, number: int, rank: int) -> range:
        """The places of the run that ``rank`` computes in micro-batch ``number`` of a step."""
        start = step * self.examples_per_step + (number * self.world_size + rank) * self.examples_per_micro_batch
        return range(start, start + self.examples_per_micro_batch)

    def micro_batch(self, step: int, number: int, rank: int) -> list[int]:
        """Example indices that ``rank`` computes in micro-batch ``number`` of a step."""
        places = self.places(step, number, rank)
        return self.order.indices(places.start, places.stop)

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
