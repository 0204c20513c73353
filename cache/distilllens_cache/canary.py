"""The canary: do the cached targets belong to the tokens they are stored with? Needs no teacher."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distilllens_cache.targets import CachedExample

CLEAR = 4.0
"""z of a two-proportion test above which one reading clearly beats another."""
MIN_TARGETS = 100
"""With fewer target positions nothing is clear."""


@dataclass(frozen=True)
class CanaryResult:
    """How often the teacher's likeliest token at the final layer is a certain token of the text."""

    aligned: float
    """The next token of the same example: what a sound cache predicts."""
    left: float
    """The token at the position itself, as if targets were stored one position too late."""
    right: float
    """The token after the next, as if targets were stored one position too early."""
    foreign: float
    """The next token at the same target of the neighbouring examples, as if examples were mixed up."""
    num: int
    """Target positions read."""
    verdict: Literal["passed", "inconclusive", "failed"]
    sentence: str
    """The verdict in words."""


@dataclass
class _Tally:
    hits: int = 0
    num: int = 0

    def add(self, top: NDArray[np.uint32], text: NDArray[np.uint32]) -> None:
        self.hits += int((top == text).sum())
        self.num += len(text)

    @property
    def rate(self) -> float:
        return self.hits / self.num if self.num else 0.0

    def beats(self, other: "_Tally") -> bool:
        """Whether this rate is clearly the higher one."""
        if not self.num or not other.num:
            return False
        pooled = (self.hits + other.hits) / (self.num + other.num)
        spread = math.sqrt(pooled * (1 - pooled) * (1 / self.num + 1 / other.num))
        return spread > 0 and (self.rate - other.rate) / spread > CLEAR


def canary(examples: Iterable[CachedExample], final_layer: int) -> CanaryResult:
    """Compare the final layer's likeliest tokens with the text: as stored, shifted, and in other examples.

    Fails only if a shifted or foreign reading clearly beats the aligned one. It passes if the aligned one
    clearly beats all others, and is inconclusive otherwise: with too few targets, or with a teacher that
    does not know the text. A teacher much less sure than it is right does not read but echo (a random one
    with tied embeddings repeats its input), so such a reading proves nothing.
    """
    aligned, left, right, foreign = _Tally(), _Tally(), _Tally(), _Tally()
    confidence = 0.0
    first: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None = None
    previous: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None = None
    num_examples = 0
    for example in examples:
        positions = example.target_positions.astype(np.int64)
        if not len(positions):
            continue
        targets, tokens = example.targets[final_layer], example.token_ids
        starts = targets.offsets[:-1]
        top, following = targets.ids[starts], tokens[positions + 1]
        confidence += float(np.exp(targets.log_probs[starts], dtype=np.float64).sum())
        aligned.add(top, following)
        left.add(top, tokens[positions])
        has_right = positions + 2 < len(tokens)
        right.add(top[has_right], tokens[positions[has_right] + 2])
        if previous is not None:
            _add_foreign(foreign, previous, (top, following))
        previous = top, following
        first = first or previous
        num_examples += 1
    if num_examples > 2 and first is not None and previous is not None:
        _add_foreign(foreign, previous, first)
    verdict, sentence = _judge(aligned, left, right, foreign, confidence / max(1, aligned.num))
    return CanaryResult(aligned.rate, left.rate, right.rate, foreign.rate, aligned.num, verdict, sentence)


def _add_foreign(
    tally: _Tally,
    one: tuple[NDArray[np.uint32], NDArray[np.uint32]],
    other: tuple[NDArray[np.uint32], NDArray[np.uint32]],
) -> None:
    shared = min(len(one[0]), len(other[0]))
    tally.add(one[0][:shared], other[1][:shared])
    tally.add(other[0][:shared], one[1][:shared])


def _judge(
    aligned: _Tally, left: _Tally, right: _Tally, foreign: _Tally, confidence: float
) -> tuple[Literal["passed", "inconclusive", "failed"], str]:
    rates = f"the teacher's likeliest token is the next token in {aligned.rate:.1%} of {aligned.num} targets"
    if aligned.num < MIN_TARGETS:
        return (
            "inconclusive",
            f"Too little to tell: {aligned.num} targets, at least {MIN_TARGETS} are needed.",
        )
    others = (
        (left, "the token before it", "targets seem to be stored one position too late"),
        (right, "the token after it", "targets seem to be stored one position too early"),
        (foreign, "the next token of a neighbouring example", "examples seem to be mixed up"),
    )
    for tally, what, why in others:
        if tally.beats(aligned):
            found = f"{rates}, but {what} in {tally.rate:.1%}"
            if tally.rate > 4 * confidence + 0.05:
                return "inconclusive", (
                    f"Nothing to tell: {found}, with a mean probability of only {confidence:.1%}: "
                    f"a teacher that echoes, perhaps an untrained one."
                )
            return "failed", f"The targets do not belong to the text: {found}; {why}. Write the cache again."
    weak = [what for tally, what, _ in others if tally.num and not aligned.beats(tally)]
    if weak:
        return "inconclusive", f"Nothing to tell: {rates}, not clearly more often than {' or '.join(weak)}."
    return "passed", (
        f"The targets belong to the text: {rates}, against {left.rate:.1%} and {right.rate:.1%} "
        f"one position off and {foreign.rate:.1%} in neighbouring examples."
    )
