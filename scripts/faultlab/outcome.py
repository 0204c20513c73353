"""What came of a trial, and of many."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_SHOWN = 5


class Outcome(NamedTuple):
    """What came of one trial."""

    what: str
    """A word or two that trials are counted by, such as "refused"."""
    fault: str = ""
    """What was wrong; empty where the cache kept its promise."""


@dataclass
class Tally:
    """What came of many trials."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """The first few sentences about broken promises."""
    num_faults: int = 0
    slowest: float = 0.0
    """Seconds of the longest trial."""
    peak_mb: int = 0
    """Most resident memory of a process that ran trials, in MB."""

    @property
    def trials(self) -> int:
        return sum(self.counts.values())

    def add(self, outcome: Outcome, where: str, seconds: float = 0.0) -> None:
        self.counts[outcome.what] += 1
        self.slowest = max(self.slowest, seconds)
        if outcome.fault:
            self.num_faults += 1
            if len(self.faults) < MOST_SHOWN:
                self.faults.append(f"{where}: {outcome.what}: {outcome.fault}")

    def __str__(self) -> str:
        return ", ".join(f"{number} {what}" for what, number in sorted(self.counts.items(), key=lambda one: -one[1]))
