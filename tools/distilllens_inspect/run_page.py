"""What the page says of a training run: its numbers, its curves, and student beside teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilllens_inspect.curves import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, charts_of
from distilllens_inspect.run_files import RunFiles, read_run
from distilllens_inspect.side_by_side import Comparison, compare
from distilllens_inspect.text import TokenText, one_line

FACTS = (
    ("train/loss", "training loss", ".4g"),
    ("eval/loss", "loss on held-out rows", ".4g"),
    ("eval/kl", "KL to the teacher", ".4g"),
    ("eval/lens_jsd", "lens JSD, mean of pairs", ".4g"),
    ("eval/rouge_l", "ROUGE-L", ".2f"),
    ("train/tokens_per_s", "tokens per second", ",.0f"),
    ("train/peak_memory_gb", "GB of memory at most", ".2f"),
)


@dataclass(frozen=True)
class RunPage:
    """A run, laid out."""

    name: str
    facts: tuple[tuple[str, str], ...]
    """Newest values."""
    best: str
    """Which checkpoint is the best, as a sentence; empty where none was looked for."""
    charts: tuple[Chart, ...]
    comparisons: tuple[Comparison, ...]
    has_samples: bool
    samples_step: int | None
    """Step of the student in the comparisons; None where it is not known."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP


def open_run_page(folder: Path, token_text: TokenText | None, *, max_positions: int) -> RunPage:
    """The page's part about the run in ``folder``; tokens are written by ``token_text``, or the run's own tokenizer."""
    run = read_run(folder)
    comparisons: list[Comparison] = []
    step = None
    if run.samples is not None:
        text = token_text or TokenText.of_folder(run.tokenizer_folder)
        comparisons, step = compare(run.samples, text, max_positions=max_positions), run.samples.get("step")
    return RunPage(
        name=one_line(folder.resolve().name),
        facts=tuple(_facts(run)),
        best=_best(run),
        charts=tuple(charts_of(run)),
        comparisons=tuple(comparisons),
        has_samples=run.samples is not None,
        samples_step=step if isinstance(step, int) else None,
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    last = max((int(line["step"]) for line in run.lines), default=0)
    total = run.state.get("max_steps")
    steps = f"{last:,} of {total:,}" if isinstance(total, int) and total > 0 else f"{last:,}"
    found = [(label, run.last(name), form) for name, label, form in FACTS]
    return [("steps", steps), *((label, format(value, form)) for label, value, form in found if value is not None)]


def _best(run: RunFiles) -> str:
    ours: Any = run.state
    for name in ("stateful_callbacks", "distilllens", "attributes", "best"):
        ours = ours.get(name) if isinstance(ours, dict) else None
    metric = ours.get("metric") if isinstance(ours, dict) else None
    step, value = run.state.get("best_global_step"), run.state.get("best_metric")
    if not isinstance(step, int) or not isinstance(value, int | float):
        return ""
    return f"The best checkpoint is checkpoint-{step}: eval/{one_line(str(metric))} is {value:.4g}."
