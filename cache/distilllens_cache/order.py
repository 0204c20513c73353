"""The order of a run: which example comes when, a pure function of (seed, epoch, index)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_SHARDS = 4
"""Examples are shuffled among this many shards at a time, so that a reader holds few of them in memory."""
_EPOCHS_KEPT = 2


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """One epoch: its windows of shards one after another, each with its examples in the order they come."""

    shards: tuple[tuple[int, ...], ...]
    """The shards of each window."""
    starts: NDArray[np.int64]
    """(windows + 1,) where in the epoch each window starts; the last entry is where the epoch ends."""
    indices: NDArray[np.int64]
    """(N,) example indices in the order of the epoch."""

    def window_at(self, offset: int) -> int:
        """The window that holds place ``offset`` of the epoch."""
        return int(np.searchsorted(self.starts, offset, side="right")) - 1


class Order:
    """The order of a run that goes over N examples epoch after epoch.

    The run counts examples from 0: place p of the run is place ``p % N`` of epoch ``p // N``. An epoch takes the
    shards in a shuffled order, a window of `WINDOW_SHARDS` at a time, and the examples of a window in a shuffled order.
    """

    def __init__(self, shard_of: NDArray[np.int64], *, seed: int) -> None:
        """``shard_of``: (N,) the shard of each example, 0, 1, … ascending."""
        self.seed = seed
        self.num_examples = len(shard_of)
        self.bounds: tuple[int, ...] = (0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(shard_of))
        """Shard s holds the examples ``bounds[s]`` to ``bounds[s + 1] - 1``."""
        self._epochs: dict[int, EpochOrder] = {}

    def epoch(self, number: int) -> EpochOrder:
        """The order of one epoch; the last few are kept."""
        if number not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = self._shuffle(number)
        return self._epochs[number]

    def indices(self, first: int, stop: int) -> list[int]:
        """Example indices at the places ``first`` to ``stop - 1`` of the run, over the ends of epochs."""
        found: list[int] = []
        while first < stop:
            number, offset = divmod(first, self.num_examples)
            part = self.epoch(number).indices[offset : offset + stop - first].tolist()
            found += part
            first += len(part)
        return found

    def _shuffle(self, number: int) -> EpochOrder:
        random = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        shards = random.permutation(len(self.bounds) - 1)
        windows = [shards[start : start + WINDOW_SHARDS] for start in range(0, len(shards), WINDOW_SHARDS)]
        members = [np.concatenate([np.arange(*self.bounds[s : s + 2]) for s in window]) for window in windows]
        return EpochOrder(
            shards=tuple(tuple(window.tolist()) for window in windows),
            starts=np.cumsum([0, *map(len, members)]),
            indices=np.concatenate([random.permutation(window) for window in members]),
        )
