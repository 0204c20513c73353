"""What is stored of a layer's tail beside the kept ids, as a short text: `profile+sketch:64+sampled:16`."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

MAX_RANK = 4096
"""Most directions of a sketch; never more than the teacher's hidden size."""
MAX_DRAWS = 65535
"""Most draws from the tail of one target."""
DEFAULT_BITS = 4

_SKETCH = re.compile(r"sketch:([1-9][0-9]{0,3})(?::([48]))?", re.ASCII)
_SAMPLED = re.compile(r"sampled:([1-9][0-9]{0,4})", re.ASCII)


@dataclass(frozen=True)
class SketchSpec:
    """The tail's logits in low rank."""

    rank: int
    """Directions, 1 to `MAX_RANK`."""
    bits: Literal[4, 8] = DEFAULT_BITS
    """Of each code."""

    @property
    def limit(self) -> int:
        """Codes lie in -limit..limit: the lowest number of the two's complement is not used."""
        return (1 << (self.bits - 1)) - 1

    @property
    def code_bytes(self) -> int:
        """Bytes that the codes of one target take before compression."""
        return (self.rank * self.bits + 7) // 8

    def __str__(self) -> str:
        return f"sketch:{self.rank}" + ("" if self.bits == DEFAULT_BITS else f":{self.bits}")


@dataclass(frozen=True)
class TailSpec:
    """What is stored of the tail of one layer; its text is canonical."""

    profile: bool = False
    """Tail sums: the mean tail over the whole dataset."""
    sketch: SketchSpec | None = None
    """Codes of a low-rank sketch for each target."""
    draws: int | None = None
    """Draws from each target's tail, 1 to `MAX_DRAWS`."""

    @property
    def has_rows(self) -> bool:
        """Whether something is stored for each target."""
        return self.sketch is not None or self.draws is not None

    def row_bytes(self, value_bytes: int) -> int:
        """Most bytes that one target takes before compression; a log-probability takes ``value_bytes``."""
        codes = 0 if self.sketch is None else self.sketch.code_bytes
        return codes + (0 if self.draws is None else 2 + self.draws * (4 + 2 + value_bytes))

    def __str__(self) -> str:
        parts = ["profile"] if self.profile else []
        parts += [] if self.sketch is None else [str(self.sketch)]
        parts += [] if self.draws is None else [f"sampled:{self.draws}"]
        return "+".join(parts) or "none"


@lru_cache
def parse_tail_spec(text: str) -> TailSpec:
    """The tail that ``text`` stands for; a `ValueError` says which forms there are."""
    if text == "none":
        return TailSpec()
    rest = text.split("+")
    has_profile = rest[0] == "profile"
    rest = rest[1:] if has_profile else rest
    sketch, draws = None, None
    if rest and (found := _SKETCH.fullmatch(rest[0])) and int(found[1]) <= MAX_RANK:
        sketch, rest = SketchSpec(int(found[1]), 8 if found[2] == "8" else 4), rest[1:]
    if rest and (found := _SAMPLED.fullmatch(rest[0])) and int(found[1]) <= MAX_DRAWS:
        draws, rest = int(found[1]), rest[1:]
    if rest:
        raise ValueError(
            f"{text[:60]!r} is no stored tail: expected 'none', or some of 'profile', 'sketch:RANK' or "
            f"'sketch:RANK:BITS' (RANK 1 to {MAX_RANK}, BITS 4 or 8, default {DEFAULT_BITS}) and 'sampled:DRAWS' "
            f"(1 to {MAX_DRAWS}), each at most once, in this order, joined by '+'"
        )
    return TailSpec(has_profile, sketch, draws)
