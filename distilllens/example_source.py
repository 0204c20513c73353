"""What a run trains on."""

from typing import Protocol

import numpy as np

from distilllens_cache import CachedExample
from distilllens_cache.read_ahead import Shard


class ExampleSource(Protocol):
    """Anything that a run can train on: a cache's reader, or a tokenized dataset."""

    num_tokens: np.ndarray
    """Tokens of each example."""
    num_targets: np.ndarray
    """Target positions of each example."""
    shard_of: np.ndarray
    """Shard of each example; examples of one shard are cheap to read together."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CachedExample: ...

    def read_shard(self, number: int, /) -> Shard: ...
