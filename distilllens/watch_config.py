"""How a training run is watched: what it logs, measures on held-out rows and keeps, and when it stops."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from distilllens.locations import Location
from distilllens.run_config import PositiveInt

TRACKERS = ("tensorboard", "wandb", "trackio")
"""What --report-to can name."""
HIGHER_IS_BETTER = ("rouge_l", "top1_agreement")
LOWER_IS_BETTER = ("loss", "reference_loss", "kl", "lens_jsd", "calibration_error")
METRICS = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
"""What --metric-for-best-model can name, beside one pair's lens_jsd/S:T."""


def tracker_names(report_to: str) -> tuple[str, ...]:
    """The trackers that ``--report-to`` names, each once. ValueError for one that is not known."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in (*TRACKERS, "none"):
            raise ValueError(f"--report-to {name!r} is not known; expected none, or some of {', '.join(TRACKERS)}")
    return tuple(name for name in dict.fromkeys(names) if name != "none")


def _report_to(text: str) -> str:
    return ",".join(tracker_names(text)) or "none"


def _comma_separated(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _metric(name: str | None) -> str | None:
    """``eval_loss`` and ``eval/loss``, as others write it, are ``loss``."""
    if name is None:
        return None
    short = re.sub(r"^eval[/_]", "", name)
    if short not in METRICS and not re.fullmatch(r"lens_jsd/\d+:\d+", short):
        raise ValueError(f"{name!r} is not measured; expected one of {', '.join(METRICS)} or a pair's lens_jsd/S:T")
    return short


def _ratio(value: float) -> float:
    if 0 < value <= 1:
        raise ValueError(f"{value} would stop any run: give a number above 1, or 0 to switch it off")
    return value


class WatchConfig(BaseModel):
    """What a run logs, measures, keeps, and stops for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    report_to: Annotated[str, BeforeValidator(_comma_separated), AfterValidator(_report_to)] = "none"
    """Where metrics also go: tensorboard, wandb, trackio, several with commas, or none."""
    run_name: str | None = None
    """Name of the run in those; the name of the output folder when not given."""
    eval_cache: Location | None = None
    """Teacher cache of held-out rows, scored at the end and every --eval-steps."""
    eval_dataset: str | None = None
    """Held-out rows to answer greedily and score by ROUGE-L, at the end and every --eval-steps; they are read as
    --template and the columns say."""
    eval_limit: PositiveInt = 64
    """Use only the first rows of --eval-dataset."""
    eval_max_new_tokens: PositiveInt = 128
    """Most tokens of an answer."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations; only at the end when not given."""
    metric_for_best_model: Annotated[str | None, AfterValidator(_metric)] = None
    """What says which checkpoint is best: loss (of the text of --eval-cache; the default), kl, lens_jsd,
    top1_agreement, calibration_error, or rouge_l (of --eval-dataset). The best checkpoint is saved when it is found,
    and kept."""
    load_best_model_at_end: bool = False
    """The student is that of the best checkpoint, not of the last step."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without progress."""
    early_stopping_threshold: Annotated[float, Field(ge=0.0)] = 0.0
    """What counts as progress: an improvement on the best by more than this."""
    save_steps: PositiveInt = 500
    """Steps between two checkpoints; the last step is always saved."""
    save_total_limit: PositiveInt | None = None
    """Checkpoints kept; the oldest go first, the best one and the last good one never."""
    max_loss_ratio: Annotated[float, Field(ge=0.0), AfterValidator(_ratio)] = 3.0
    """Stop when the loss was above this many times its running median in each of 16 steps; 0 for never."""

    @property
    def selects(self) -> bool:
        """Whether a best checkpoint is looked for."""
        return (
            self.load_best_model_at_end
            or self.early_stopping_patience is not None
            or self.metric_for_best_model is not None
        )

    @property
    def best_metric(self) -> str:
        """The metric that decides, without ``eval/``."""
        return self.metric_for_best_model or ("loss" if self.eval_cache is not None else "rouge_l")

    @model_validator(mode="after")
    def _evaluations_can_be_made(self) -> "WatchConfig":
        if self.eval_steps is not None and self.eval_cache is None and self.eval_dataset is None:
            raise ValueError("--eval-steps has nothing to measure on: give --eval-cache or --eval-dataset")
        if not self.selects:
            return self
        if self.eval_steps is None:
            raise ValueError("to choose a best checkpoint or stop early, evaluate on the way: give --eval-steps")
        if self.best_metric == "rouge_l" and self.eval_dataset is None:
            raise ValueError("rouge_l is measured on answers to held-out rows: give --eval-dataset")
        if self.best_metric != "rouge_l" and self.eval_cache is None:
            raise ValueError(f"{self.best_metric} is measured on a cache of held-out rows: give --eval-cache")
        return self
