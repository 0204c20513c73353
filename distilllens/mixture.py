"""Several sources of examples as one: different data by weight, or several teachers over the same data."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distilllens.example_source import ExampleSource
from distilllens.interleaving import Interleaving
from distilllens_cache import CachedExample, LayerTargets, Order, ReadAhead


@dataclass(frozen=True, eq=False)
class MixedExample(CachedExample):
    """An example with the targets that each source has for it."""

    by_source: dict[int, dict[int, LayerTargets]]
    """By number of the source, then by layer; a source that doesn't hold the example is absent."""


class DataMixture:
    """Examples of several sources, numbered one source after another, and drawn by weight.

    Every beginning of a run has each source's weight of the examples to within one (see `Interleaving`); within a
    source examples come epoch after epoch in an order of its own. An epoch of the mixture is as many examples as all
    sources hold together: with the sources' sizes for weights each of their examples once.
    """

    def __init__(
        self, sources: Sequence[ExampleSource], *, names: Sequence[str], weights: Sequence[float | Fraction]
    ) -> None:
        self.sources = tuple(sources)
        self.names = tuple(names)
        self.interleaving = Interleaving(weights)
        self.starts = np.cumsum([0, *map(len, sources)])
        """(sources + 1,) number of each source's first example."""
        shards = np.cumsum([0, *(int(source.shard_of[-1]) + 1 for source in sources)])
        self.num_targets = np.concatenate([source.num_targets for source in sources])
        self.shard_of = np.concatenate(
            [source.shard_of + first for source, first in zip(sources, shards, strict=False)]
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> MixedExample:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.named(number, self.sources[number][index - int(self.starts[number])])

    def named(self, number: int, example: CachedExample) -> MixedExample:
        """An example of source ``number`` as one of the mixture, with the source's name in its id."""
        index, id = example.index + int(self.starts[number]), f"{self.names[number]}/{example.id}"
        return MixedExample(index, id, example.token_ids, example.target_positions, {}, {number: example.targets})

    def order(self, seed: int) -> "MixedOrder":
        """The order of a run."""
        return MixedOrder(self, seed)


class MixedOrder:
    """Which example of a mixture comes at each place of a run: a pure function of seed, weights and place."""

    def __init__(self, mixture: DataMixture, seed: int) -> None:
        self.mixture = mixture
        seeds = (np.random.SeedSequence([seed, n]).generate_state(1, np.uint64)[0] for n in range(len(mixture.sources)))
        self.parts = tuple(Order(s.shard_of, seed=int(n >> 1)) for s, n in zip(mixture.sources, seeds, strict=True))

    def indices(self, first: int, stop: int) -> list[int]:
        """Example numbers at the places ``first`` to ``stop - 1`` of the run."""
        drawn = (self.mixture.interleaving[place] for place in range(first, stop))
        return [int(self.mixture.starts[part]) + self.parts[part].indices(n, n + 1)[0] for part, n in drawn]

    def read_ahead(self, stop: int | None = None) -> "MixedReadAhead":
        """The examples by place, of a run that ends at ``stop``, if it does."""
        return MixedReadAhead(self, stop)


class MixedReadAhead:
    """The examples of a mixture by place: each source is read ahead on its own."""

    def __init__(self, order: MixedOrder, stop: int | None) -> None:
        self._mixture = mixture = order.mixture
        stops = (None,) * len(order.parts) if stop is None else mixture.interleaving.drawn(stop)
        each = zip(mixture.sources, order.parts, stops, strict=True)
        self._parts = [ReadAhead(source, part, stop=last, threads=1) for source, part, last in each]

    def __getitem__(self, place: int) -> MixedExample:
        part, before = self._mixture.interleaving[place]
        return self._mixture.named(part, self._parts[part][before])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for part in self._parts:
            part.close()


class SameExamples:
    """The examples of the first source, with the targets that all sources have for them.

    Order and shards are those of the first source. A shard of it is read with the shards of the others that hold its
    examples, of which it keeps only those; where all caches divide the data alike, each shard is read once an epoch.
    """

    def __init__(self, sources: Sequence[ExampleSource], places: Sequence[NDArray[np.int64]]) -> None:
        """``places``: for each source after the first, where it holds each of the first's examples."""
        self.first, *self.others = sources
        self.places = tuple(places)
        self.num_tokens, self.num_targets = self.first.num_tokens, self.first.num_targets
        self.shard_of = self.first.shard_of
        self._firsts = [np.searchsorted(other.shard_of, np.arange(other.shard_of[-1] + 1)) for other in self.others]

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> MixedExample:
        twins = [other[int(places[index])] for other, places in zip(self.others, self.places, strict=True)]
        return _joined(self.first[index], twins)

    def read_shard(self, number: int) -> list[MixedExample]:
        """The examples of one shard of the first source, each with its twins."""
        members = np.flatnonzero(self.shard_of == number)
        shard = self.first.read_shard(number)
        twins: list[dict[int, CachedExample]] = []
        for other, places, firsts in zip(self.others, self.places, self._firsts, strict=True):
            found: dict[int, CachedExample] = {}
            wanted = places[members]
            for holder in np.unique(other.shard_of[wanted]):
                held = other.read_shard(int(holder))
                mine = wanted[other.shard_of[wanted] == holder]
                found |= {int(place): held[int(place - firsts[holder])] for place in mine}
            twins.append({n: found[int(place)] for n, place in enumerate(wanted)})
        return [_joined(shard[n], [one[n] for one in twins]) for n in range(len(members))]


def _joined(example: CachedExample, twins: Sequence[CachedExample]) -> MixedExample:
    by_source = {number: one.targets for number, one in enumerate((example, *twins))}
    return MixedExample(example.index, example.id, example.token_ids, example.target_positions, {}, by_source)
