"""Notices a loss that has left for good: far above its running median, step after step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW = 100
"""Steps of which the running median is taken."""
FEWEST = 50
"""Steps, after the warm-up, before anything can be judged."""
PATIENCE = 16
"""Steps in a row that have to be above. A single batch may be anything; were every seventh step of an ordinary run
above, sixteen in a row would come once in 10^13 steps."""
SMALLEST_MEDIAN = 0.05
"""Nats per target. Below it, a student is so close to its teacher that ratios say nothing."""


@dataclass
class LossWatch:
    """The losses of the last steps; a pure function of all losses so far, so that a resumed run decides alike."""

    recent: list[float] = field(default_factory=list)
    num_above: int = 0
    """Steps in a row, up to the last one, whose loss was above."""

    def add(self, loss: float, *, ratio: float) -> bool:
        """Take the loss of a step after the warm-up, in nats per target; whether the run has diverged.

        A loss is above when it exceeds ``ratio`` times the running median; ``ratio`` 0 switches the watch off.
        """
        if not ratio:
            return False
        is_above = len(self.recent) >= FEWEST and loss > ratio * running_median(self.recent)
        self.num_above = self.num_above + 1 if is_above else 0
        if not is_above:
            # What is above is kept out, or it would soon be the median.
            self.recent = [*self.recent[-WINDOW + 1 :], loss]
        return self.num_above >= PATIENCE


def running_median(losses: Sequence[float]) -> float:
    """The median that a loss is held against, in nats per target."""
    return max(median(losses), SMALLEST_MEDIAN)
