"""What an evaluation found, as results.json and as a table."""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table


class RougeScore(BaseModel):
    """ROUGE-L of one model, F-measure x 100: first averaged over the rows, then over the seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float | None
    """Sample standard deviation over seeds of the mean over rows; None for one seed."""
    per_seed: dict[int, float]


class WrittenText(BaseModel):
    """What a model wrote for the rows, over all seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_predictions: int
    rouge_l: RougeScore
    num_tokens: float
    """Mean length of an answer in tokens, the end token not counted."""
    ended: float
    """Share of answers that the model ended itself."""


class ReferenceLoss(BaseModel):
    """How likely the references are to a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: float
    """Mean cross-entropy per target token, in nats."""
    perplexity: float | None
    """None where it exceeds what a float holds."""
    num_rows: int
    num_targets: int


class ModelScores(BaseModel):
    """Everything measured of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """As it was named on the command line."""
    num_rows: int | None = None
    """Rows generated for."""
    unusable: dict[str, int] = {}
    """Rows left out, by reason."""
    written: WrittenText | None = None
    references: ReferenceLoss | None = None
    teacher_forced: dict[str, float | None] = {}
    """Distance to the teacher in the cache: divergences in nats, rates between 0 and 1."""


class EvaluateResults(BaseModel):
    """The content of results.json: numbers, and everything that they depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    settings: dict[str, Any]
    """The run, the digests of models, rows and cache, the versions, and how ROUGE is computed."""
    settings_digest: str
    batch_size: int
    """Rows generated at a time: no setting, since samples do not depend on it."""
    models: list[ModelScores]


def rouge_score(scores: dict[int, Sequence[float]]) -> RougeScore:
    """From the scores of the rows under each seed."""
    per_seed = {seed: statistics.fmean(rows) for seed, rows in scores.items()}
    means = list(per_seed.values())
    return RougeScore(
        mean=statistics.fmean(means),
        std=statistics.stdev(means) if len(means) > 1 else None,
        per_seed=per_seed,
    )


def references_score(loss_sum: float, *, num_targets: int, num_rows: int) -> ReferenceLoss:
    """From a sum of cross-entropies over target positions, in nats."""
    loss = loss_sum / num_targets
    perplexity = math.exp(loss) if loss < math.log(sys.float_info.max) else None
    return ReferenceLoss(loss=loss, perplexity=perplexity, num_rows=num_rows, num_targets=num_targets)


def results_table(results: EvaluateResults) -> Table:
    """One line per metric, one column per model; what was not measured has no line."""
    columns = [dict(_lines(scores)) for scores in results.models]
    names = list(dict.fromkeys(name for column in columns for name in column))
    has_limits = any(key.startswith(LOW) for scores in results.models for key in scores.teacher_forced)
    table = Table("metric", caption=LIMITS if has_limits else None)
    for label in _labels([scores.model for scores in results.models]):
        table.add_column(label, justify="right", overflow="fold")
    for name in names:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    return table


LOW, HIGH = "lens_jsd_low/", "lens_jsd_high/"
"""Before a pair: the limits that the cache certifies for its JSD over the whole vocabulary."""
LIMITS = "(low - high): limits of the JSD over the whole vocabulary"

_TEACHER_FORCED_NAMES = {
    "kl": "KL to the teacher (nats)",
    "lens_jsd": "lens JSD, mean of pairs (nats)",
    "top1_agreement": "top-1 agreement with the teacher",
    "calibration_error": "calibration error",
    "reference_loss": "loss on the cache's tokens (nats)",
    "num_targets": "target positions of the cache",
}


def _lines(scores: ModelScores) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if scores.written is not None:
        rouge = scores.written.rouge_l
        spread = "" if rouge.std is None else f" ± {rouge.std:.2f}"
        lines += [
            ("rows", str(scores.num_rows)),
            (f"ROUGE-L ({_seeds(len(rouge.per_seed))})", f"{rouge.mean:.2f}{spread}"),
            ("tokens per answer", f"{scores.written.num_tokens:.1f}"),
            ("answers ended by the model", f"{scores.written.ended:.0%}"),
        ]
    if scores.references is not None:
        perplexity = scores.references.perplexity
        lines += [
            ("loss on the references (nats)", f"{scores.references.loss:.4f}"),
            ("perplexity of the references", "-" if perplexity is None else f"{perplexity:.2f}"),
        ]
    forced = scores.teacher_forced
    for key, value in forced.items():
        if key.startswith((LOW, HIGH)) or "mass/" in key:
            continue
        pair = key.removeprefix("lens_jsd/")
        name = f"lens JSD {pair} (nats)" if pair != key else _TEACHER_FORCED_NAMES.get(key, key)
        text = f"{value:.0f}" if value is not None and key.startswith("num_") else _number(value)
        if LOW + pair in forced:
            text += f" ({_number(forced[LOW + pair])} - {_number(forced[HIGH + pair])})"
        lines.append((name, text))
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _labels(models: Sequence[str]) -> list[str]:
    """The ends of the models' paths, as long as it takes to tell them apart."""
    parts = [PurePath(model).parts for model in models]
    longest = max(map(len, parts))
    endings = ([str(PurePath(*part[-depth:])) for part in parts] for depth in range(1, longest + 1))
    return next((labels for labels in endings if len(set(labels)) == len(labels)), list(models))


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
