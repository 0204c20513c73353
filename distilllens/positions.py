"""Which target positions a step trains on: a share of each example's, where the student has most to learn.

The number taken is a function of the example alone, so that a step's denominator is known before its forward pass and
neither ranks nor micro-batches change it.

Dimension key: N target positions of a batch, n those taken.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = 1e-9
"""0.28 * 25 is 7.000000000000001 in floating point, and 7 are meant."""


def num_taken(num_targets: NDArray[np.integer], share: float) -> NDArray[np.int64]:
    """How many of ``num_targets`` positions are taken: ``share`` of them, rounded up."""
    return np.ceil(num_targets * share - ROUNDING).astype(np.int64)


def take_highest(scores: Float[Tensor, " N"], lengths: Sequence[int], share: float) -> Int[Tensor, " n"]:
    """The positions with the highest scores of each example, ascending; of equal ones the first.

    ``lengths`` are the target positions of each example, which stand one after another.
    """
    taken, first = [], 0
    counts = num_taken(np.asarray(lengths), share).tolist()
    for part, count in zip(scores.split(list(lengths)), counts, strict=True):
        order = part.argsort(descending=True, stable=True)
        taken.append(first + order[:count].sort().values)
        first += len(part)
    return torch.cat(taken)
