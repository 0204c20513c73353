"""Draws from the tail of a teacher's distribution, a pure function of (seed, example, position, layer).

Dimension key: N rows, V vocabulary, S draws.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distilllens.targets import SparseTargets, TailSamples
from distilllens_cache import LOG_FLOOR

NO_TAIL = -30.0
"""A log-rest up to this is no tail to draw from: float32 probabilities there are noise."""


def tail_uniforms(*, seed: int, layer: int, example: int, positions: np.ndarray, draws: int) -> np.ndarray:
    """(T, draws) uniform numbers in [0, 1) for the target ``positions`` (T) of an example.

    Each row has a counter of its own, so it depends on nothing that is drawn before it: not on order, sharding
    or resume.
    """
    key = np.array([seed % 2**64, layer], dtype=np.uint64)
    rows = [
        np.random.Generator(np.random.Philox(key=key, counter=[0, int(position), example, 0])).random(draws)
        for position in positions
    ]
    return np.stack(rows) if rows else np.zeros((0, draws))


def draw_tail(tail: Float[Tensor, "N V"], targets: SparseTargets, uniforms: Float[Tensor, "N S"]) -> TailSamples:
    """The tokens at ``uniforms`` on the cumulated probabilities of each row's tail, as unique ids with counts.

    ``tail`` holds probabilities over the vocabulary, 0 at the kept tokens. Rows without a tail get no draw.
    """
    cumulated = tail.double().cumsum(-1)
    total = cumulated[:, -1:]
    # Strictly below the total, so that a token of probability 0 at the end is never found.
    at = torch.minimum(uniforms.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulated, at, right=True).clamp_max(tail.shape[-1] - 1).sort(-1).values
    is_first = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], -1)
    slots = is_first.long().cumsum(-1) - 1
    has_tail = (targets.log_rest > NO_TAIL)[:, None]
    draws = torch.zeros_like(ids).scatter_add_(-1, slots, has_tail.long().expand_as(ids).contiguous())
    unique = torch.zeros_like(ids).scatter_(-1, slots, ids)
    log_probs = tail.gather(-1, unique).log().masked_fill(draws == 0, LOG_FLOOR).clamp_min(LOG_FLOOR)
    return TailSamples(unique.masked_fill(draws == 0, 0), log_probs, draws)
