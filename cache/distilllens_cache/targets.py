"""What a cache holds: examples, and sparse distributions at their target positions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LOG_FLOOR = -100.0
"""Smallest log-mass of a rest, and the log-probability of padding. Its exponential is 0 in float32 sums."""


@dataclass(frozen=True, eq=False)
class TailSamples:
    """Draws, with replacement, from the tails of one example at one layer: T ragged rows, stored flat."""

    counts: NDArray[np.int32]
    """(T,) how many different ids were drawn in each row; 0 where there is next to no tail."""
    ids: NDArray[np.uint32]
    """(sum of counts,) the ids, ascending in each row; none is kept by its row."""
    draws: NDArray[np.uint16]
    """(sum of counts,) how often each was drawn, at least once."""
    log_probs: NDArray[np.float32]
    """(sum of counts,) the teacher's log-probability of the id in nats, over the whole vocabulary."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(T + 1,) row t lies in ``ids[offsets[t]:offsets[t + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class LayerTargets:
    """Sparse distributions of one example at one layer: T ragged rows, stored flat.

    Arrays that come from a cache are read-only, since readers share them.
    """

    counts: NDArray[np.int32]
    """(T,) how many ids each row keeps, at least 1."""
    ids: NDArray[np.uint32]
    """(sum of counts,) token ids, likeliest first in each row, unique in each row."""
    log_probs: NDArray[np.float32]
    """(sum of counts,) their log-probabilities in nats, over the whole vocabulary, not over the row."""
    log_rest: NDArray[np.float32]
    """(T,) log of the probability of all other tokens together, in nats, finite, at least -100."""
    codes: NDArray[np.int8] | None = None
    """(T, r) each row's codes of the layer's sketch, where the cache stores one."""
    samples: TailSamples | None = None
    """Draws from each row's tail, where the cache stores them."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(T + 1,) row t lies in ``ids[offsets[t]:offsets[t + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def padded(self, width: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """New, writable arrays (T, K) of ids and log-probabilities; padding is id 0 with -100 nats.

        ``width`` is K, by default the longest row; it must not be shorter. Tell padding by ``counts``,
        never by id.
        """
        longest = int(self.counts.max(initial=0))
        width = longest if width is None else width
        if width < longest:
            raise ValueError(f"rows keep up to {longest} ids, which do not fit a width of {width}")
        is_kept = np.arange(width)[None, :] < self.counts[:, None]
        ids = np.zeros(is_kept.shape, np.int64)
        log_probs = np.full(is_kept.shape, LOG_FLOOR, np.float32)
        ids[is_kept] = self.ids
        log_probs[is_kept] = self.log_probs
        return ids, log_probs


@dataclass(frozen=True, eq=False)
class CachedExample:
    """One example with the teacher's targets at every layer of the cache."""

    index: int
    """Place in the plan, from 0."""
    id: str
    """The data set's own name of it, or its row number."""
    token_ids: NDArray[np.uint32]
    """(L,) the whole sequence, prompt included."""
    target_positions: NDArray[np.uint32]
    """(T,) ascending; position t predicts token t + 1, so the last position of the sequence is never one."""
    targets: dict[int, LayerTargets]
    """By layer, from 1; each has T rows, in the order of ``target_positions``."""


@dataclass(frozen=True)
class PlannedExample:
    """What the plan knows of an example before the teacher has seen it."""

    id: str
    digest: str
    """`example_digest` of its token ids and target positions."""
    num_tokens: int
    num_targets: int


def example_digest(
    token_ids: Sequence[int] | NDArray[np.integer], target_positions: Sequence[int] | NDArray[np.integer]
) -> str:
    """SHA-256, in hex, of an example's tokens and target positions.

    Over uint32 in little-endian order: number of tokens, token ids, number of targets, target positions. A
    value outside 0..2^32-1 is a `ValueError`.
    """
    digest = hashlib.sha256()
    for values in (token_ids, target_positions):
        array = np.asarray(values)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"token ids and positions are flat lists of whole numbers, not {array.dtype} {array.shape}"
            )
        if array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
            raise ValueError("token ids and positions must lie between 0 and 2^32 - 1")
        digest.update(np.uint32(array.size).astype("<u4").tobytes())
        digest.update(array.astype("<u4").tobytes())
    return digest.hexdigest()
