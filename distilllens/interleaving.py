"""Which of several parts is drawn from at each place of a run, so that their weights hold at any moment.

A pure function of weights and place: ranks, resumes and the sizes of steps change nothing.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

_BLOCK = 1024
"""Places between two marks, from which draws are counted."""


class Interleaving:
    """The endless sequence of parts in which part i has ``weights[i]`` of every beginning, to within one draw.

    Each draw of a part has a first and a last place at which it keeps the part within one draw of its weight; the draw
    whose last place comes soonest is taken. That this always works out is the theorem of proportionate fairness
    (Baruah et al., Algorithmica 15, 1996). Sums are of whole numbers, so nothing drifts.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        """``weights``: above 0, at most 255 of them; only their proportions matter. Decimals count as written."""
        shares = [weight if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
        if not 1 <= len(shares) <= 255 or min(shares) <= 0:
            raise ValueError(f"weights {list(map(str, weights))}: expected 1 to 255 numbers above 0")
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        divisor = math.gcd(*whole)
        self.draws_per_period: tuple[int, ...] = tuple(part // divisor for part in whole)
        """Of each part; the sequence repeats after as many places as they sum to."""
        self.period = sum(self.draws_per_period)
        self._parts = bytearray()
        self._drawn = [0] * len(shares)
        self._marks: list[tuple[int, ...]] = []

    def __getitem__(self, place: int) -> tuple[int, int]:
        """The part that is drawn from at ``place``, and how often it was drawn from before. Both count from 0."""
        periods, place = divmod(place, self.period)
        self._extend_to(place)
        part = self._parts[place]
        return part, periods * self.draws_per_period[part] + self._before(place, part)

    def drawn(self, place: int) -> tuple[int, ...]:
        """How often each part is drawn from before ``place``."""
        periods, place = divmod(place, self.period)
        self._extend_to(place)
        return tuple(periods * each + self._before(place, part) for part, each in enumerate(self.draws_per_period))

    def _before(self, place: int, part: int) -> int:
        block = place // _BLOCK
        return self._marks[block][part] + self._parts.count(part, block * _BLOCK, place)

    def _extend_to(self, place: int) -> None:
        while len(self._parts) <= place:
            self._append()

    def _append(self) -> None:
        place = len(self._parts)
        if place % _BLOCK == 0:
            self._marks.append(tuple(self._drawn))
        part = min(self._open_parts(place), key=self._last_place)
        self._drawn[part] += 1
        self._parts.append(part)

    def _open_parts(self, place: int) -> list[int]:
        """Parts that a draw at ``place`` leaves less than one draw above their weight."""
        pairs = enumerate(zip(self._drawn, self.draws_per_period, strict=True))
        return [part for part, (drawn, weight) in pairs if drawn * self.period < (place + 1) * weight]

    def _last_place(self, part: int) -> int:
        """One past the last place at which the next draw keeps a part less than one draw below its weight."""
        return -(-(self._drawn[part] + 1) * self.period // self.draws_per_period[part])
