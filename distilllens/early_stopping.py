"""Which evaluation was the best, and whether there has been progress lately."""

import math
from dataclasses import dataclass

from distilllens.watch_config import HIGHER_IS_BETTER, WatchConfig


@dataclass
class BestSoFar:
    """What a run has to remember of its evaluations."""

    metric: str | None = None
    """What was compared; another metric begins anew."""
    value: float | None = None
    step: int | None = None
    """Step of the best evaluation; its checkpoint is kept."""
    num_without_progress: int = 0
    """Evaluations since the last one that counted as progress."""


@dataclass(frozen=True)
class Selection:
    """How evaluations are compared; the rules are those of Hugging Face's trainer and its EarlyStoppingCallback."""

    metric: str
    """Name of a measured value, without ``eval/``."""
    patience: int | None
    threshold: float

    def look(self, best: BestSoFar, values: dict[str, float], *, step: int) -> bool:
        """Take an evaluation into ``best``; whether it is the best. A value that is no number never is.

        Progress is an improvement by more than ``threshold``; the best is the best, by however little.
        """
        if best.metric != self.metric:
            vars(best).update(vars(BestSoFar(self.metric)))
        value = values[f"eval/{self.metric}"]
        if best.value is None:
            gain = -math.inf if math.isnan(value) else math.inf
        else:
            gain = value - best.value if self.metric in HIGHER_IS_BETTER else best.value - value
        best.num_without_progress = 0 if gain > self.threshold else best.num_without_progress + 1
        if gain > 0:
            best.value, best.step = value, step
        return gain > 0

    def is_over(self, best: BestSoFar) -> bool:
        """Whether the run is to stop here."""
        is_same = best.metric == self.metric
        return is_same and self.patience is not None and best.num_without_progress >= self.patience

    def verdict(self, best: BestSoFar) -> str:
        """Why it stops, as a sentence."""
        found = "was never a number" if best.value is None else f"was best at step {best.step} ({best.value:.4g})"
        by = f" by more than {self.threshold:g}" if self.threshold else ""
        times = f"the last {self.patience} evaluations" if self.patience != 1 else "the last evaluation"
        return f"Stopped early: eval/{self.metric} {found}, and {times} did not improve on the best{by}"


def selection_of(config: WatchConfig) -> Selection | None:
    """The selection that a run's settings ask for."""
    if not config.selects:
        return None
    return Selection(config.best_metric, config.early_stopping_patience, config.early_stopping_threshold)
