"""Companding: a log-probability as one of 256 levels, fine where a token is likely and coarser where it is not.

With x = -log_prob in nats, ``level = round(64 ln(1 + x / 2))``. Levels are 1/32 nat apart at x = 0, 1/8 nat at
x = 6, and reach down to -105 nats, so that every log-probability with a weight in float32 has its own.

Storing costs about ``E[(2 + x)^2] / (24 * 64^2)`` nats of KL: 1e-4 on real layers (`scripts/bench/storage.py`).
Bytes are those of the levels' entropy: 48 levels to the unit instead of 64 would save 3 to 5 % of a shard and
double that error.
"""

import math

import numpy as np
from numpy.typing import NDArray

SCALE = 64.0
"""Levels to a unit of ln(1 + x / 2)."""
KNEE = 2.0
"""In nats. Levels lie evenly in x much below it, and evenly in ln x much above it."""

_DEPTHS = KNEE * np.expm1(np.arange(256) / SCALE)
_LIMITS = (KNEE * np.expm1((np.arange(255) + 0.5) / SCALE)).astype(np.float32)
_LOWER = np.concatenate([[-np.inf], _LIMITS]).astype(np.float32)
_UPPER = np.concatenate([_LIMITS, [np.inf]]).astype(np.float32)

LOG_PROBS: NDArray[np.float32] = (0.0 - _DEPTHS).astype(np.float32)
"""(256,) the log-probability, in nats, that each level stands for."""
PROBS: NDArray[np.float64] = np.exp(LOG_PROBS, dtype=np.float64)
"""(256,) and its exponential."""


def levels_of(log_probs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest level of each log-probability, finite and at most 0; what lies below -105 nats becomes -105."""
    depths = -log_probs
    levels = np.minimum(np.rint(SCALE * np.log1p(depths / KNEE)), 255).astype(np.uint8)
    # A logarithm may round differently elsewhere. The limits do not, and so the bytes of a cache don't either.
    levels += depths >= _UPPER.take(levels)
    levels -= depths < _LOWER.take(levels)
    return levels


def mass_error(num_cells: int) -> float:
    """How far from 1 the mass of ``num_cells`` cells may be that had mass 1 before they were rounded to levels.

    Rounding moves x by at most (2 + x) / 128. The mass p (e^((2 + x) / 128) - 1) that a cell gains is concave
    in p, so the gain of a row is largest where its cells are alike, and then x is ln num_cells.
    """
    return math.expm1((KNEE + math.log(num_cells)) / (2 * SCALE))
