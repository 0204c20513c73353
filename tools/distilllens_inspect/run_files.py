"""What a training run left in its folder, as far as the page shows it: metrics, where it stands, lens samples."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
STATE = "trainer_state.json"
SAMPLES = "lens_samples.json"
SAMPLES_VERSION = 1

Points = list[tuple[int, float]]
"""Step (from 1) and value, in the order of the steps."""


@dataclass(frozen=True)
class RunFiles:
    """A run's files, read."""

    folder: Path
    lines: tuple[dict[str, float], ...]
    """Lines of metrics.jsonl: ``step`` and finite numbers by name."""
    state: dict[str, Any]
    """trainer_state.json of the newest checkpoint; empty where there is none."""
    samples: dict[str, Any] | None
    """lens_samples.json, where there is one."""
    tokenizer_folder: Path
    """Where the student's tokenizer is: the run's folder, or its newest checkpoint while it still trains."""

    def names(self) -> list[str]:
        """Names of all values, as they first come."""
        return list(dict.fromkeys(name for line in self.lines for name in line))

    def points(self, name: str) -> Points:
        """The values of a name over the steps."""
        return [(int(line["step"]), line[name]) for line in self.lines if name in line]

    def last(self, name: str) -> float | None:
        """The newest value of a name."""
        points = self.points(name)
        return points[-1][1] if points else None


def read_run(folder: Path) -> RunFiles:
    """The files of a run, which may still go on. ValueError where ``folder`` is none."""
    file = folder / METRICS
    if not file.is_file():
        raise ValueError(f"{folder} has no {METRICS}: --run takes the output folder of `distilllens train`.")
    whole = checkpoints(folder)
    newest = whole[-1] if whole else folder
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return RunFiles(
        folder=folder,
        lines=tuple(_lines(file)),
        state=_json(newest / STATE) if whole else {},
        samples=_samples(folder / SAMPLES),
        tokenizer_folder=folder if has_tokenizer else newest,
    )


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _lines(file: Path) -> list[dict[str, float]]:
    """The numbers of each line; the last line may be half-written while the run goes on."""
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            content = json.loads(text)
            step = int(content["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError(f"{file}, line {number} is no line of metrics: `distilllens train` writes it.") from None
        numbers = {name: float(value) for name, value in content.items() if _is_number(value)}
        lines.append({**numbers, "step": step})
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _samples(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content = _json(file)
    if content.get("format_version") != SAMPLES_VERSION:
        raise ValueError(
            f"{file} has format version {content.get('format_version')!r}, this program reads {SAMPLES_VERSION}."
        )
    return content


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content
