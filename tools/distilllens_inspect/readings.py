"""What the teacher says at a target: the kept tokens, the rest, and how likely the true next token is."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from distilllens_cache import CachedExample


@dataclass(frozen=True)
class Reading:
    """One layer's sparse distribution at one target position, likeliest token first."""

    position: int
    """Index of the token that is read; the distribution is over the token after it."""
    layer: int
    """Teacher layer, counted from 1."""
    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    rest: float
    """Probability of all tokens that were not kept, together."""
    next_id: int
    """The true next token."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """The likeliest ``count`` tokens with their probabilities."""
        return list(zip(self.token_ids[:count], self.probabilities[:count], strict=True))

    @property
    def next_rank(self) -> int | None:
        """1 when the true next token is the likeliest, None when it is not among the kept."""
        return self.token_ids.index(self.next_id) + 1 if self.next_id in self.token_ids else None

    @property
    def next_probability(self) -> float | None:
        """Probability of the true next token, None when it is not among the kept."""
        rank = self.next_rank
        return None if rank is None else self.probabilities[rank - 1]

    @property
    def next_bound(self) -> float:
        """Most that the true next token can have: its probability, or what is left for one not kept."""
        probability = self.next_probability
        if probability is not None:
            return probability
        return min([self.rest, *self.probabilities[-1:]])

    def entry(self, count: int) -> dict[str, Any]:
        """The likeliest ``count`` tokens and the numbers behind a cell, as JSON; ids stand for tokens."""
        entry: dict[str, Any] = {
            "top": [[token, short(probability)] for token, probability in self.top(count)],
            "rest": short(self.rest),
            "entropy": round(self.entropy, 3),
            "next": short(self.next_bound),
        }
        if self.next_rank is not None:
            entry["rank"] = self.next_rank
        if len(self.token_ids) > count:
            others = self.probabilities[count:]
            entry["others"] = [len(others), short(sum(others))]
        return entry

    @property
    def entropy(self) -> float:
        """Entropy of the kept tokens and the rest as one cell, in nats: a lower bound of the full entropy."""
        cells = [*self.probabilities, self.rest]
        return max(0.0, -math.fsum(p * math.log(p) for p in cells if p > 0))


def short(value: float) -> float:
    """Enough digits to read, few enough to keep a page small."""
    return float(f"{value:.3g}")


def read_layer(example: CachedExample, layer: int) -> list[Reading]:
    """The readings of one layer at all target positions of an example, in order of position."""
    targets = example.targets[layer]
    readings = []
    for row, position in enumerate(example.target_positions.tolist()):
        kept = slice(int(targets.offsets[row]), int(targets.offsets[row + 1]))
        readings.append(
            Reading(
                position=position,
                layer=layer,
                token_ids=tuple(targets.ids[kept].tolist()),
                probabilities=tuple(np.exp(targets.log_probs[kept].astype(np.float64)).tolist()),
                rest=math.exp(float(targets.log_rest[row])),
                next_id=int(example.token_ids[position + 1]),
            )
        )
    return readings


def is_supervised(example: CachedExample) -> list[bool]:
    """For each token whether the student learns it: it is the true next token of a target."""
    supervised = np.zeros(len(example.token_ids), dtype=bool)
    supervised[example.target_positions.astype(np.int64) + 1] = True
    return supervised.tolist()
