"""How far a run is: time left, and a bar on a terminal; in a log only the lines that are said."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class StepProgress:
    """Steps done of those to do. The bar stays below what is said meanwhile; where there is no terminal, none is."""

    def __init__(self, num_steps: int, *, done: int, is_shown: bool) -> None:
        self._num_steps, self._first, self._done = num_steps, done, done
        self._started, self._time_of_first = time.monotonic(), 0.0
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (is_shown and console.is_terminal),
            transient=True,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=done, note="")

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Step ``step``, counted from 1, is done."""
        self._done = step
        if step == self._first + 1:
            # The first step also warms up: once there are others, its time is left out.
            self._time_of_first = time.monotonic() - self._started
            self._started = time.monotonic()
        self._bar.update(self._task, completed=step, note=f"ETA {self.time_left()}")

    def time_left(self) -> str:
        """At the pace so far, evaluations and checkpoints included: ``4:05`` (minutes) or ``1:04:05``."""
        steps = self._done - self._first - 1
        pace = (time.monotonic() - self._started) / steps if steps > 0 else self._time_of_first
        return duration(pace * (self._num_steps - self._done))


def duration(seconds: float) -> str:
    """Hours where there are any, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
