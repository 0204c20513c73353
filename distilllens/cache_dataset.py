"""A cache as a dataset of torch.utils.data, in the order of training, for other trainers than ours."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from distilllens_cache import WINDOW_SHARDS, CachedExample, CacheError, CacheReader, Order, ReadAhead

_STEPS_BACK = 64
"""This often in one pass an item before the last one is asked for until it looks like somebody's shuffling."""


class CacheDataset(Dataset[CachedExample]):
    """The examples of a cache in the order of one epoch: item n of epoch e is what ``train`` takes n-th in epoch e.

    The order is the dataset's own, so take its items as they come: ``DataLoader(dataset, shuffle=False)``,
    ``DistributedSampler(dataset, shuffle=False)``, and in transformers' ``TrainingArguments`` the option
    ``train_sampling_strategy="sequential"``. Any number of workers and ranks then gives the same ids to the same step.
    ``set_epoch``, which ``Trainer`` calls by itself, goes on to the next epoch's order.

    Shards are decoded ahead by ``threads`` threads. Each worker of a ``DataLoader`` does that for itself, so workers
    pay only where collating is the bottleneck.
    """

    def __init__(
        self,
        cache: CacheReader | Path | str,
        *,
        seed: int = 42,
        shards_ahead: int = WINDOW_SHARDS,
        threads: int = 2,
    ) -> None:
        self.reader = cache if isinstance(cache, CacheReader) else CacheReader(cache)
        self.order = Order(self.reader.shard_of, seed=seed)
        # Workers that live through several epochs share this number with the process that sets it.
        self._first = torch.zeros((), dtype=torch.int64).share_memory_()
        self._ahead = ReadAhead(self.reader, self.order, shards_ahead=shards_ahead, threads=threads)
        self._last, self._steps_back = -1, 0

    def __len__(self) -> int:
        """Examples of this epoch, without those that a restored state has behind it."""
        return len(self.reader) - int(self._first) % len(self.reader)

    def __getitem__(self, item: int) -> CachedExample:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of an epoch with {len(self)} left")
        first = int(self._first)
        self._warn_of_shuffling(item)
        self._ahead.stop = (first // len(self.reader) + 1) * len(self.reader)
        return self._ahead[first + item]

    @property
    def epoch(self) -> int:
        """The epoch whose order this is, from 0."""
        return int(self._first) // len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch``, from its beginning; where it is set already, go on as restored."""
        if epoch != self.epoch:
            self._first.fill_(epoch * len(self.reader))

    def state_dict(self, taken: int = 0) -> dict[str, Any]:
        """The state after ``taken`` items of this epoch, as JSON. Loaders fetch ahead, so you have to count them."""
        return {"cache": self.reader.digest, "seed": self.order.seed, "place": int(self._first) + taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a dataset was: item 0 is the first that was not taken. CacheError if cache or seed are others."""
        expected = self.state_dict()
        for name in ("cache", "seed"):
            if state.get(name) != expected[name]:
                raise CacheError(
                    f"{name}: the state has {state.get(name)!r}, this dataset has {expected[name]!r}. "
                    f"Open the cache and the seed that it was taken with."
                )
        self._first.fill_(int(state["place"]))

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()

    def _warn_of_shuffling(self, item: int) -> None:
        self._steps_back += item < self._last
        self._last = item
        if self._steps_back == _STEPS_BACK:
            warnings.warn(
                "the items of a CacheDataset are asked for in a shuffled order, which reads shards over and over; it "
                'has a shuffled order of its own: take shuffle=False, or train_sampling_strategy="sequential" in '
                "TrainingArguments",
                stacklevel=3,
            )
