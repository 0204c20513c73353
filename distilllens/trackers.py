"""Where a run's metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio, by their public API."""

import importlib.util
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens.console import say
from distilllens.text_file import write_text

IDS = "trackers.json"
"""In the run's folder: under which name each service knows the run, so that a resumed run continues there."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run."""

    folder: Path
    name: str
    config: dict[str, Any]
    resumed_step: int
    """Steps done before this process; 0 for a new run."""

    def known_as(self, tracker: str, new: Callable[[], str]) -> str:
        """The name under which ``tracker`` knows this run: the one in its folder, or a ``new`` one, kept there."""
        file = self.folder / IDS
        try:
            ids = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except ValueError:
            raise ValueError(f"{file} cannot be read: remove it, and the run is tracked under a new name") from None
        if tracker not in ids:
            ids[tracker] = new()
            write_text(file, json.dumps(ids, indent=1) + "\n")
        return ids[tracker]


class Tracker(ABC):
    """One service. Anything may go wrong in it; ``Trackers`` sees to that."""

    @abstractmethod
    def __init__(self, run: TrackedRun) -> None: ...

    @abstractmethod
    def log(self, step: int, values: dict[str, float]) -> None:
        """Send ``values`` of a step, counted from 1."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


class TensorBoard(Tracker):
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint is dropped by the reader: those steps come again.
        purge_step = run.resumed_step + 1 if run.resumed_step else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)
        if not run.resumed_step:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=1)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_MODE and its other variables mean what they mean there."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "distilllens"),
            name=run.name,
            id=run.known_as("wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(run.folder),
            config=run.config,
        )
        # Its own step may not go back, and after a resume ours does.
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "train/global_step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """A run of Trackio. TRACKIO_PROJECT names the project; its other variables mean what they mean there."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "distilllens"),
            name=run.known_as("trackio", lambda: f"{run.name}-{uuid.uuid4().hex[:8]}"),
            resume="allow",
            config=run.config,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Trackers:
    """All trackers of a run. One that fails on the way is left out from there on, with one warning."""

    def __init__(self, names: tuple[str, ...], run: TrackedRun) -> None:
        """ValueError when one cannot be started: better now than after a week without curves."""
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            try:
                self._trackers[name] = KINDS[name](run)
            except Exception as error:
                self.close()
                raise ValueError(f"--report-to {name} could not be started: {_first_line(error)}") from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send ``values`` of a step everywhere."""
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Send what is left."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._trackers[name]
                say(f"{name} failed and gets no more metrics ({_first_line(error)}); metrics.jsonl has all of them")


def check_trackers(names: tuple[str, ...]) -> None:
    """ValueError naming the pip extra when a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {name} needs the package {name}, which is not installed: "
                f"pip install 'distilllens[track]', or drop it"
            )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
