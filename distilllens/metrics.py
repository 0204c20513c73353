"""What a run says while it goes: ``metrics.jsonl``, one line on a terminal, nothing from other ranks."""

import json
import os
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from distilllens.console import say
from distilllens.engine import Engine

FILE = "metrics.jsonl"


class Metrics:
    """Appends one JSON line per logged step and prints it on stderr; only on the main rank."""

    def __init__(self, run: Path, engine: Engine, *, num_steps: int, resumed_step: int) -> None:
        self._num_steps = num_steps
        self._started = time.monotonic()
        self._first_step = resumed_step
        self._file: TextIO | None = None
        if engine.is_main:
            drop_after(run / FILE, resumed_step)
            self._file = (run / FILE).open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Record ``values`` at a step (counted from 1)."""
        line = {"step": step, **values}
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            say(self._text(step, values))
        return line

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def _text(self, step: int, values: dict[str, float]) -> str:
        names = (
            "train/loss",
            "train/task",
            "train/lens",
            "train/tokens_per_s",
            "eval/kl",
            "eval/reference_loss",
        )
        shown = [f"{name.split('/', 1)[-1]} {values[name]:.4g}" for name in names if name in values]
        done = step - self._first_step
        left = (time.monotonic() - self._started) / max(1, done) * (self._num_steps - step)
        return f"step {step}/{self._num_steps}  " + "  ".join(shown) + f"  ETA {_duration(left)}"


class RunningSums:
    """Sums since the last logged step; read on the host only when they are logged."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens, self._waited, self._started = 0, 0.0, time.perf_counter()
        self.num_targets = 0

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
        """Averages per target position over all ranks since the last call, in nats."""
        names = sorted(self._sums)
        tokens = torch.tensor(float(self._tokens), dtype=torch.float64, device=self._sums["total"].device)
        totals = self._engine.all_sum(torch.stack([*(self._sums[name] for name in names), tokens])).tolist()
        elapsed = time.perf_counter() - self._started
        values = {f"train/{name}": total / self.num_targets for name, total in zip(names, totals, strict=False)}
        values = {"train/loss": values.pop("train/total"), **values}
        lens = [value for name, value in values.items() if name.startswith("train/lens/")]
        if lens:
            values["train/lens"] = sum(lens) / len(lens)
        values |= {"train/tokens_per_s": totals[-1] / elapsed, "train/data_wait": self._waited / elapsed}
        self._clear()
        return values


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / FILE).read_text("utf-8").splitlines()]


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
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, file)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
