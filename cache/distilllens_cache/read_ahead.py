"""Examples by their place in a run, while the shards of the next places are decoded in the background."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from distilllens_cache.order import WINDOW_SHARDS, Order
from distilllens_cache.targets import CachedExample


class Shard(Protocol):
    """Examples by their place in a shard."""

    def __getitem__(self, place: int, /) -> CachedExample: ...


class ShardSource(Protocol):
    """Examples that are read a shard at a time: a `CacheReader`, or anything like it."""

    shard_of: NDArray[np.int64]
    """(N,) the shard of each example, 0, 1, … ascending."""

    def __len__(self) -> int: ...

    def read_shard(self, number: int, /) -> Shard: ...


class ReadAhead:
    """The examples of a run by place, over the ends of epochs.

    Going forward is cheap: the window of shards that is being read is held decoded, and ``shards_ahead`` shards of
    the windows that follow are decoded by ``threads`` threads meanwhile. No more than ``WINDOW_SHARDS +
    shards_ahead`` shards are in memory. Going back, or far ahead, reads a window anew.

    What a shard raises is raised where its first example is asked for. `close`, or the end of a ``with`` block,
    stops the threads. A copy in another process starts threads of its own.
    """

    def __init__(
        self,
        source: ShardSource,
        order: Order,
        *,
        stop: int | None = None,
        shards_ahead: int = WINDOW_SHARDS,
        threads: int = 2,
    ) -> None:
        if shards_ahead < 0 or threads < 1:
            raise ValueError(
                f"shards_ahead is {shards_ahead} and threads is {threads}; expected are at least 0 and at least 1."
            )
        self.source = source
        self.order = order
        self.stop = stop
        """The place where the run ends, if it does: no window from there on is read ahead."""
        self.shards_ahead = shards_ahead
        self.threads = threads
        self._start_anew()

    def __getitem__(self, place: int) -> CachedExample:
        """The example at ``place`` of the run, from 0 on without end."""
        if place < 0:
            raise IndexError(f"place {place} of a run; places count from 0")
        if self._process != os.getpid():  # a forked process has the futures of its parent, but not the threads
            self._start_anew()
        number, offset = divmod(place, self.order.num_examples)
        epoch = self.order.epoch(number)
        window = number, epoch.window_at(offset)
        if window != self._window:
            self._move_to(*window)
        index = int(epoch.indices[offset])
        shard = int(self.source.shard_of[index])
        return self._decoded[shard].result()[index - self.order.bounds[shard]]

    def close(self) -> None:
        """Stop the threads, after the shards that they are at. What is asked for next starts them again."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._start_anew()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None, "_decoded": {}, "_window": None}

    def _start_anew(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._decoded: dict[int, Future[Shard]] = {}
        self._window: tuple[int, int] | None = None
        self._process = os.getpid()

    def _move_to(self, number: int, window: int) -> None:
        """Forget the shards that are not needed soon, and start to decode those that are."""
        wanted = self._soon(number, window)
        for shard in [shard for shard in self._decoded if shard not in wanted]:
            self._decoded.pop(shard).cancel()
        self._pool = self._pool or ThreadPoolExecutor(self.threads, thread_name_prefix="read-ahead")
        for shard in wanted:
            if shard not in self._decoded:
                self._decoded[shard] = self._pool.submit(self.source.read_shard, shard)
        self._window = number, window

    def _soon(self, number: int, window: int) -> list[int]:
        """The shards of a window, then those that come after it, as many as are read ahead, each once."""
        epoch = self.order.epoch(number)
        wanted, enough = list(epoch.shards[window]), len(epoch.shards[window]) + self.shards_ahead
        while len(wanted) < enough and len(wanted) < len(self.order.bounds) - 1:
            window += 1
            if window == len(epoch.shards):
                number, window = number + 1, 0
                epoch = self.order.epoch(number)
            if self.stop is not None and number * self.order.num_examples + epoch.starts[window] >= self.stop:
                break
            wanted += [shard for shard in epoch.shards[window] if shard not in wanted]
        return wanted[:enough]
