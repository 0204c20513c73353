"""Common ids: the vocabulary renumbered so that the ids of a shard's rows lie close together.

A layer keeps a few thousand ids over and over. Renumbered by how often they occur, the ids of a row are small
numbers with small gaps between them: 10 to 17 % fewer bytes at middle layers, 6 % at the last. What is common
is counted in the shard itself and stored with it, which is within 2 % of a free table counted over all targets, and
a shard can be written, resumed and read without any other. The dataset's own token frequencies save 1 to 5 %
(`scripts/bench/storage.py --studies`).
"""

import numpy as np
from numpy.typing import NDArray

MOST = 4096
"""Most common ids of a layer and shard. 16,384 save as much at the last layer as they cost."""
LEAST = 8
"""Times that an id must occur to be common: it takes two bytes or so in the list."""


def common_ids(ids: NDArray[np.uint32], vocab_size: int) -> NDArray[np.uint32]:
    """The ids that occur often in ``ids``, most often first, then by number."""
    times = np.bincount(ids, minlength=vocab_size)
    often = np.flatnonzero(times >= LEAST)
    return often[np.argsort(-times[often], kind="stable")][:MOST].astype(np.uint32)


def ids_by_rank(common: NDArray[np.uint32], vocab_size: int) -> NDArray[np.uint32]:
    """The id of each rank: the common ones, then all others by number. Longer than V if an id is there twice."""
    is_rare = np.ones(vocab_size, np.bool_)
    is_rare[common] = False
    return np.concatenate([common, np.flatnonzero(is_rare).astype(np.uint32)])


def ranks_by_id(common: NDArray[np.uint32], vocab_size: int) -> NDArray[np.uint32]:
    """(V,) the rank of each id: the opposite of `ids_by_rank`."""
    ranks = np.empty(vocab_size, np.uint32)
    ranks[ids_by_rank(common, vocab_size)] = np.arange(vocab_size, dtype=np.uint32)
    return ranks
