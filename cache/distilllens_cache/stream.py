"""A cache as an endless sequence of batches, in the order of a run, shared by ranks, restored exactly."""

from collections.abc import Iterator
from typing import Any, Self

from distilllens_cache.errors import CacheError
from distilllens_cache.order import WINDOW_SHARDS, Order
from distilllens_cache.read_ahead import ReadAhead
from distilllens_cache.reader import CacheReader
from distilllens_cache.targets import CachedExample


class CacheStream:
    """Batches of a cache's examples in the order of ``(seed, epoch, index)``.

    The run is cut into batches, one after another: of ``batch_size`` examples each, or, with a ``token_budget``, of
    as many as stay within that many tokens when padded to the longest (at least one; such a batch ends with its
    epoch). Of every ``world_size`` batches, ``rank`` gets its one. Ranks get equally many: with ``epochs`` the last
    batches are filled from the epoch after. So at a constant global batch the ids of a step, rank after rank, are the
    same for any number of ranks.

    Shards are decoded ahead of their use, see `ReadAhead`; `close`, or the end of a ``with`` block, ends that.
    """

    def __init__(
        self,
        reader: CacheReader,
        *,
        seed: int = 0,
        batch_size: int = 1,
        token_budget: int | None = None,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        shards_ahead: int = WINDOW_SHARDS,
        threads: int = 2,
    ) -> None:
        if batch_size < 1 or (token_budget is not None and token_budget < 1):
            raise ValueError(f"batch_size {batch_size} and token_budget {token_budget} must be at least 1.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of a world of {world_size}: ranks count from 0.")
        self.reader = reader
        self.order = Order(reader.shard_of, seed=seed)
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.epochs = epochs
        self.rank = rank
        self.world_size = world_size
        self._place = 0
        stop = None if epochs is None else epochs * len(reader)
        self._ahead = ReadAhead(reader, self.order, stop=stop, shards_ahead=shards_ahead, threads=threads)

    @property
    def epoch(self) -> int:
        """Passes over the cache that are complete."""
        return self._place // len(self.reader)

    def __iter__(self) -> Iterator[list[CachedExample]]:
        return self

    def __next__(self) -> list[CachedExample]:
        if self.epochs is not None and self._place >= self.epochs * len(self.reader):
            raise StopIteration
        cuts = [self._place]
        for _ in range(self.world_size):
            cuts.append(self._end_of_batch(cuts[-1]))
        batch = [self._ahead[place] for place in range(cuts[self.rank], cuts[self.rank + 1])]
        self._place = cuts[-1]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON. Ranks that are at the same step have the same state."""
        return {
            "cache": self.reader.digest,
            "seed": self.order.seed,
            "token_budget": self.token_budget,
            "place": self._place,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream was, with any rank, world size and batch size.

        A `CacheError` where cache, seed or token budget are others: its batches would not be those left over.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys() or not isinstance(state["place"], int) or state["place"] < 0:
            raise CacheError(f"this is no state of a stream: expected are the keys {', '.join(expected)}.")
        differences = [
            f"{name}: the state has {state[name]!r}, this stream has {expected[name]!r}"
            for name in ("cache", "seed", "token_budget")
            if state[name] != expected[name]
        ]
        if differences:
            raise CacheError(
                f"the state belongs to another stream: {'; '.join(differences)}. "
                f"Open the cache, seed and token budget that it was taken with."
            )
        self._place = state["place"]

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _end_of_batch(self, place: int) -> int:
        """One past the last place of the batch that starts at ``place``."""
        if self.token_budget is None:
            return place + self.batch_size
        number, offset = divmod(place, len(self.reader))
        longest, size = 0, 0
        for index in self.order.epoch(number).indices[offset:]:
            longest = max(longest, int(self.reader.num_tokens[index]))
            if size and (size + 1) * longest > self.token_budget:
                break
            size += 1
        return place + size
