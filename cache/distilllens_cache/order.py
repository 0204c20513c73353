"""The order of a run: which example comes when, a pure function of (seed, epoch, index)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_SHARDS = 4
"""Examples are shuffled among this many shards at a time, so that a reader holds few of them in memory."""
SPAN_GROUPS = 16
"""Groups of examples of like length are made from this many groups' worth of examples at a time."""
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
    With ``lengths``, examples of like length then come together in groups, and the groups in a shuffled order.
    """

    def __init__(
        self, shard_of: NDArray[np.int64], *, seed: int, lengths: NDArray[np.int64] | None = None, group_size: int = 1
    ) -> None:
        """``shard_of``: (N,) the shard of each example, 0, 1, … ascending.

        ``lengths``: (N,) lengths of the examples. Groups of ``group_size`` begin where steps of so many examples do.
        """
        self.seed = seed
        self._lengths = lengths
        self._group_size = group_size
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
        starts = np.cumsum([0, *map(len, members)])
        shuffled = [random.permutation(window) for window in members]
        if self._lengths is not None:
            first = number * self.num_examples
            shuffled = [
                self._grouped(window, first + int(start), random)
                for window, start in zip(shuffled, starts, strict=False)
            ]
        return EpochOrder(
            shards=tuple(tuple(window.tolist()) for window in windows),
            starts=starts,
            indices=np.concatenate(shuffled),
        )

    def _grouped(self, window: NDArray[np.int64], place: int, random: np.random.Generator) -> NDArray[np.int64]:
        """A window that begins at ``place`` of the run, in groups of like length, the longest first in each."""
        size, head = self._group_size, min(-place % self._group_size, len(window))
        parts = [self._longest_first(window[:head])]
        for start in range(head, len(window), size * SPAN_GROUPS):
            span = self._longest_first(window[start : start + size * SPAN_GROUPS])
            whole = len(span) // size
            parts += [span[n * size : (n + 1) * size] for n in random.permutation(whole)]
            parts.append(span[whole * size :])
        return np.concatenate(parts)

    def _longest_first(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._lengths is not None
        return indices[np.argsort(-self._lengths[indices], kind="stable")]
