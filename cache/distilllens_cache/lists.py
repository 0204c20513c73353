"""Columns that hold one list for each example of a shard."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distilllens_cache.errors import CacheError
from distilllens_cache.targets import CachedExample


def bounds_of(lengths: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """(n + 1,) where runs of these lengths start and end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def lists_of(items: pa.Array, bounds: NDArray[np.int64], field: pa.Field) -> pa.ListArray:
    """``items`` cut at ``bounds``, as a column of ``field``."""
    if bounds[-1] >= 2**31:
        raise CacheError(
            f"a shard has {bounds[-1]} values in {field.name}, too many for one file. Lower --examples-per-shard."
        )
    return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), items, type=field.type)


def place_of(examples: Sequence[CachedExample], name: str, layer: int) -> Callable[[int], str]:
    """Names the place of a row, for error messages: file, layer, example, position."""

    def where(row: int) -> str:
        for example in examples:
            if row < len(example.target_positions):
                place = f"example {example.index} ({example.id[:80]!r}), position {example.target_positions[row]}"
                return f"{name}, layer {layer}, {place}"
            row -= len(example.target_positions)
        return f"{name}, layer {layer}"

    return where
