"""What a run says while it goes: ``metrics.jsonl``, trackers, a line on stderr; nothing from other ranks."""

import json
import resource
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from distilllens.config import TrainConfig
from distilllens.console import say
from distilllens.engine import Engine
from distilllens.progress import StepProgress
from distilllens.text_file import write_text
from distilllens.trackers import TrackedRun, Trackers
from distilllens.watch_config import tracker_names
from distilllens_inspect.run_files import METRICS

SHOWN = (
    "train/loss", "train/task", "train/lens", "train/tokens_per_s", "eval/loss", "eval/kl", "eval/lens_jsd",
    "eval/rouge_l",
)  # fmt: skip
"""What a line on stderr has; metrics.jsonl and the trackers have everything."""


class Metrics:
    """Appends one JSON line per logged step, sends it to the trackers and prints it on stderr; on the main rank."""

    def __init__(self, config: TrainConfig, engine: Engine, *, num_steps: int, resumed_step: int) -> None:
        """ValueError when a tracker cannot be started."""
        run = config.output_dir
        self._num_steps = num_steps
        self._progress = StepProgress(num_steps, done=resumed_step, is_shown=engine.is_main)
        self._file: TextIO | None = None
        self._trackers: Trackers | None = None
        if engine.is_main:
            name = config.run_name or run.resolve().name
            tracked = TrackedRun(run, name, config.model_dump(mode="json"), resumed_step)
            self._trackers = Trackers(tracker_names(config.report_to), tracked)
            drop_after(run / METRICS, resumed_step)
            self._file = (run / METRICS).open("a", encoding="utf-8")

    def advance(self, step: int) -> None:
        """Step ``step``, counted from 1, is done."""
        self._progress.advance(step)

    def log(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Record ``values`` at a step."""
        line = {"step": step, **values}
        if self._file is not None and self._trackers is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._trackers.log(step, values)
            say(self._text(step, values))
        return line

    def __enter__(self) -> "Metrics":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)
        if self._trackers is not None:
            self._trackers.close()
        if self._file is not None:
            self._file.close()

    def _text(self, step: int, values: dict[str, float]) -> str:
        shown = [f"{name.removeprefix('train/')} {values[name]:.4g}" for name in SHOWN if name in values]
        return f"step {step}/{self._num_steps}  " + "  ".join(shown) + f"  ETA {self._progress.time_left()}"


class RunningSums:
    """Sums since the last logged step; read on the host only when they are logged."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens, self._waited, self._seconds = 0, 0.0, 0.0
        self.num_targets = 0

    def add_step(self, *, num_targets: int, seconds: float) -> None:
        """Add a step: its target positions over all ranks and its seconds, without evaluation or checkpoint."""
        self.num_targets += num_targets
        self._seconds += seconds

    def add(self, sums: dict[str, Tensor], *, tokens: int, waited: float) -> None:
        """Add one micro-batch of this rank: its loss sums, its tokens, and the seconds it waited for data."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._tokens += tokens
        self._waited += waited

    def pending(self) -> dict[str, float]:
        """Sums over all ranks that wait for the next logged step, for a checkpoint. Every rank calls it."""
        return {
            "num_targets": self.num_targets,
            **{name: self._engine.all_sum(value).item() for name, value in sorted(self._sums.items())},
        }

    def restore(self, pending: dict[str, float]) -> None:
        """Go on from what ``pending`` gave; the main rank holds it for all."""
        self.num_targets = int(pending.get("num_targets", 0))
        share = 1.0 if self._engine.is_main else 0.0
        self._sums = {
            name: torch.tensor(share * value, dtype=torch.float64, device=self._engine.device)
            for name, value in pending.items()
            if name != "num_targets"
        }

    def flush(self) -> dict[str, float]:
        """Since the last call: averages per target position over all ranks (nats; ``*_mass`` probabilities), tokens
        per second of all ranks, and of this rank the share of its time that it waited for data (``data_wait``) and its
        peak memory in GB.
        """
        names = sorted(self._sums)
        tokens = torch.tensor(float(self._tokens), dtype=torch.float64, device=self._sums["total"].device)
        totals = self._engine.all_sum(torch.stack([*(self._sums[name] for name in names), tokens])).tolist()
        values = {f"train/{name}": total / self.num_targets for name, total in zip(names, totals, strict=False)}
        values = {"train/loss": values.pop("train/total"), **values}
        values |= {
            "train/tokens_per_s": totals[-1] / self._seconds,
            "train/data_wait": self._waited / self._seconds,
            "train/peak_memory_gb": peak_memory(self._engine.device) / 1e9,
        }
        self._clear()
        return values


def history_entry(line: dict[str, float], *, epoch: float) -> dict[str, float]:
    """A line of metrics.jsonl as ``log_history`` holds it: with the names that plot tools know beside ours."""
    theirs = {"epoch": epoch}
    for name, value in line.items():
        group, _, short = name.partition("/")
        if group == "eval":
            theirs[f"eval_{short}"] = value
        elif name in ("train/loss", "train/grad_norm", "train/learning_rate"):
            theirs[short] = value
    return {**line, **theirs}


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process ever had: of the GPU's memory as torch counts it, or of the machine's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]


def drop_after(file: Path, step: int) -> None:
    """A resumed run repeats the steps after its checkpoint: their old lines go."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text("utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line that a killed run left half-written
    write_text(file, "".join(kept))
