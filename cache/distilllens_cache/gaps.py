"""Gaps: the ascending numbers of a row as the distances between them, in planes of bytes.

A row is a set, so its order carries nothing. Ascending, its numbers are told by small gaps, and whatever gaps a
file holds, they make ascending numbers: no row can have one twice. Low bytes and high bytes lie apart, since
the high ones are nearly all 0 and next to nothing for zstd, whose compression works on whole bytes. A number of 17
bits is three bytes here, not 17 packed bits: those would leave zstd nothing to find.
"""

import numpy as np
from numpy.typing import NDArray

from distilllens_cache.ragged import Rows


def to_gaps(numbers: NDArray[np.uint32], rows: Rows) -> NDArray[np.uint32]:
    """How many numbers lie between each and the one before it in its row; the first of a row stays as it is."""
    gaps = np.diff(numbers, prepend=np.uint32(0))
    gaps -= np.uint32(1)
    gaps[rows.starts] = numbers[rows.starts]
    return gaps


def from_gaps(gaps: NDArray[np.uint32], rows: Rows) -> NDArray[np.uint32] | NDArray[np.uint64]:
    """The opposite of `to_gaps`. Always ascending in each row, whatever the gaps are, if below 2^32 - 1.

    In 32 bits if every row fits them: that is twice as fast.
    """
    # The sum over all rows may pass 2^32 and wrap around. Differences within a row come out right all the same.
    steps = gaps + np.uint32(1)
    if rows.num_cells and int(steps.max()) * int(rows.counts.max()) >= 1 << 32:
        steps = steps.astype(np.uint64)
    sums = np.cumsum(steps, out=steps)
    before = np.zeros(len(rows.ends), sums.dtype)
    before[1:] = sums[rows.ends[:-1] - 1]
    before += 1
    sums -= rows.spread(before)
    return sums


def num_planes(size: int) -> int:
    """Bytes of a number below ``size``."""
    return max(1, ((size - 1).bit_length() + 7) // 8)


def to_planes(numbers: NDArray[np.uint32], count: int) -> list[NDArray[np.uint8]]:
    """The lowest bytes of all numbers, the next ones, and so on."""
    return [(numbers >> np.uint32(8 * plane)).astype(np.uint8) for plane in range(count)]


def from_planes(planes: list[NDArray[np.uint8]]) -> NDArray[np.uint32]:
    """The opposite of `to_planes`."""
    numbers = planes[-1].astype(np.uint32)
    for plane in reversed(planes[:-1]):
        numbers <<= np.uint32(8)
        numbers |= plane
    return numbers
