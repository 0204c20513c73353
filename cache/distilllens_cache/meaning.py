"""Checks of what targets mean, over a whole shard at once; shared by writer and reader."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distilllens_cache.errors import CacheError
from distilllens_cache.targets import LOG_FLOOR

SOURCE_TOLERANCE = 1e-4
"""How far the mass of a row may be from 1 when a writer gets it: float32 rounding over a large vocabulary."""


@dataclass(frozen=True, eq=False)
class FlatLayer:
    """One layer of a shard: the rows of all its examples after one another."""

    counts: NDArray[np.int64]
    """(R,) ids kept by each row."""
    ids: NDArray[np.uint32]
    """(sum of counts,)."""
    log_probs: NDArray[np.float32]
    """(sum of counts,) in nats."""
    log_rest: NDArray[np.float32]
    """(R,) in nats."""


@dataclass(frozen=True, eq=False)
class CheckedLayer:
    """A layer whose rows make sense, and by-products of finding that out."""

    starts: NDArray[np.int64]
    """(R,) where each row starts."""
    mass: NDArray[np.float64]
    """(R,) probability of the kept ids and the rest together."""
    kept: NDArray[np.float64]
    """(R,) probability of the kept ids."""


def check_layer(
    flat: FlatLayer,
    *,
    top_k: int,
    vocab_size: int,
    mass_tolerance: float,
    where: Callable[[int], str],
) -> CheckedLayer:
    """Refuse rows that are no sparse distribution: `CacheError` with ``where(row)`` and what is wrong there.

    Counts lie in 1..top_k, ids are below ``vocab_size`` and unique in their row, log-probabilities are
    finite, at most 0 and descend, the rest is finite, and the mass of a row is 1 within ``mass_tolerance``.
    """
    counts, ids, log_probs, log_rest = flat.counts, flat.ids, flat.log_probs, flat.log_rest

    def refuse(row: int, what: str) -> CacheError:
        return CacheError(f"{where(row)}: {what}.")

    check_counts(counts, top_k=top_k, where=where)
    ends = np.cumsum(counts)
    starts = ends - counts
    total = int(ends[-1]) if len(ends) else 0
    if not len(ids) == len(log_probs) == total or len(log_rest) != len(counts):
        raise CacheError(
            f"{where(0)}: counts add up to {total}, but there are {len(ids)} ids, {len(log_probs)} "
            f"log-probabilities and, for {len(counts)} rows, {len(log_rest)} rests."
        )

    def row_of(at: int) -> int:
        return int(np.searchsorted(ends, at, side="right"))

    if total and int(ids.max()) >= vocab_size:
        at = int(ids.argmax())
        raise refuse(row_of(at), f"token id {int(ids[at])}, but the vocabulary has {vocab_size} ids")
    bad = first(~((log_probs <= 0) & (log_probs > -np.inf)))
    if bad is not None:
        raise refuse(row_of(bad), f"a log-probability of {log_probs[bad]}; expected are finite numbers up to 0")
    rises = log_probs[1:] > log_probs[:-1]
    rises[starts[1:] - 1] = False
    bad = first(rises)
    if bad is not None:
        raise refuse(row_of(bad), "the ids are not sorted by falling probability")
    bad = first(~((log_rest <= 0) & (log_rest >= LOG_FLOOR)))
    if bad is not None:
        raise refuse(bad, f"the log of the rest is {log_rest[bad]}; expected is a number from {LOG_FLOOR:g} to 0")
    kept = np.add.reduceat(np.exp(log_probs), starts, dtype=np.float64) if total else np.zeros(0)
    mass = kept + np.exp(log_rest, dtype=np.float64)
    check_mass(mass, tolerance=mass_tolerance, where=where)
    bad = first_repeat(counts, starts, ids)
    if bad is not None:
        raise refuse(bad, "a token id occurs twice in the row")
    return CheckedLayer(starts, mass, kept)


def check_counts(counts: NDArray[np.int64], *, top_k: int, where: Callable[[int], str]) -> None:
    """Refuse rows that keep nothing, or more than ``top_k`` ids."""
    bad = first((counts < 1) | (counts > top_k))
    if bad is not None:
        raise CacheError(f"{where(bad)}: the row keeps {int(counts[bad])} ids; expected are 1 to {top_k}.")


def check_mass(mass: NDArray[np.float64], *, tolerance: float, where: Callable[[int], str]) -> None:
    """Refuse rows whose mass is not 1 within ``tolerance``."""
    bad = first(~(np.abs(mass - 1) <= tolerance))
    if bad is not None:
        raise CacheError(f"{where(bad)}: the row's probabilities and its rest add up to {mass[bad]:.6f} instead of 1.")


def entropy_bound(flat: FlatLayer, checked: CheckedLayer) -> float:
    """Sum over rows of the entropy of the kept ids and the rest as one cell, in nats."""
    if not len(flat.counts):
        return 0.0
    rest = np.exp(flat.log_rest, dtype=np.float64) * flat.log_rest
    kept = np.exp(flat.log_probs) * np.maximum(flat.log_probs, LOG_FLOOR)
    return max(0.0, float(-(kept.sum(dtype=np.float64) + rest.sum())))


def first(is_bad: NDArray[np.bool_]) -> int | None:
    """Where the first True is."""
    at = int(is_bad.argmax()) if len(is_bad) else 0
    return at if len(is_bad) and is_bad[at] else None


def first_repeat(counts: NDArray[np.int64], starts: NDArray[np.int64], ids: NDArray[np.uint32]) -> int | None:
    """A row with the same id twice. Rows of like length are sorted together: padding at most doubles them."""
    size_class = np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)
    for size in np.unique(size_class):
        rows = np.flatnonzero(size_class == size)
        width = int(counts[rows].max())
        if width == 1:
            continue
        if len(rows) == len(counts) and len(ids) == width * len(rows):
            block = ids.reshape(len(rows), width).copy()
            is_kept = None
        else:
            columns = np.arange(width)
            is_kept = columns[None, :] < counts[rows][:, None]
            block = ids[np.where(is_kept, starts[rows][:, None] + columns, starts[rows][:, None])]
            # Padding sorts to the end: no id reaches 2^32 - 1, since the vocabulary is smaller than that.
            block[~is_kept] = 0xFFFFFFFF
        block.sort(axis=1)
        repeats = (block[:, 1:] == block[:, :-1]) & (block[:, 1:] != 0xFFFFFFFF)
        bad = first(repeats.any(axis=1))
        if bad is not None:
            return int(rows[bad])
    return None
