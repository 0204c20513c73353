"""Results of an evaluation: numbers into a table, and through JSON."""

import math

import pytest
from rich.console import Console

from distilllens.results import (
    EvaluateResults,
    ModelScores,
    WrittenText,
    references_score,
    results_table,
    rouge_score,
)


def results(*models: ModelScores) -> EvaluateResults:
    return EvaluateResults(settings={"a": 1}, settings_digest="d", batch_size=2, models=list(models))


def lines_of(found: EvaluateResults) -> dict[str, list[str]]:
    """Cells of the printed table by the name of their line."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(results_table(found))
    rows = [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in capture.get().splitlines()]
    return {name: cells for name, *cells in rows if cells}


FULL = ModelScores(
    model="runs/a/final",
    num_rows=3,
    unusable={"empty response": 1},
    written=WrittenText(num_predictions=6, rouge_l=rouge_score({1: [10, 20], 2: [30, 40]}), num_tokens=7.5, ended=0.5),
    references=references_score(6.0, num_targets=3, num_rows=2),
    teacher_forced={
        "kl": 0.25,
        "lens_jsd/2:8": 0.125,
        "lens_jsd_low/2:8": 0.12,
        "lens_jsd_high/2:8": 0.14,
        "lens_jsd": 0.125,
        "calibration_error": None,
        "num_targets": 9.0,
    },
)


def test_scores_are_averaged_over_rows_and_then_over_seeds():
    score = rouge_score({10: [0.0, 100.0, 50.0], 20: [20.0]})
    assert score.per_seed == {10: 50.0, 20: 20.0}
    assert score.mean == 35.0
    assert score.std == pytest.approx(math.sqrt((15**2 + 15**2) / 1))
    assert rouge_score({10: [1.0]}).std is None


def test_perplexity_is_that_of_the_mean_loss_and_none_where_no_float_holds_it():
    score = references_score(6.0, num_targets=3, num_rows=1)
    assert (score.loss, score.perplexity) == (2.0, pytest.approx(math.exp(2.0)))
    assert references_score(3000.0, num_targets=3, num_rows=1).perplexity is None


def test_results_come_back_from_json_as_they_were():
    found = results(FULL, ModelScores(model="b"))
    assert EvaluateResults.model_validate_json(found.model_dump_json()) == found


def test_the_table_has_a_line_per_metric_and_a_column_per_model():
    lines = lines_of(results(FULL, ModelScores(model="runs/b/final", teacher_forced={"kl": 0.5})))
    assert lines["metric"] == ["a/final", "b/final"]
    assert lines["ROUGE-L (2 seeds)"] == ["25.00 ± 14.14", "-"]
    assert lines["answers ended by the model"] == ["50%", "-"]
    assert lines["KL to the teacher (nats)"] == ["0.2500", "0.5000"]
    assert lines["lens JSD 2:8 (nats)"] == ["0.1250 (0.1200 - 0.1400)", "-"]
    assert lines["lens JSD, mean of pairs (nats)"] == ["0.1250", "-"]
    assert not any("low" in name or "high" in name for name in lines)
    assert lines["calibration error"] == ["-", "-"]
    assert lines["target positions of the cache"] == ["9", "-"]


def test_what_was_not_measured_has_no_line():
    lines = lines_of(results(ModelScores(model="x", teacher_forced={"kl": 0.5})))
    assert set(lines) == {"metric", "KL to the teacher (nats)"}


def test_models_are_told_apart_by_the_ends_of_their_paths():
    names = ["runs/a/checkpoint-5", "runs/b/checkpoint-5", "org/other"]
    found = results(*(ModelScores(model=name, teacher_forced={"kl": 1.0}) for name in names))
    assert lines_of(found)["metric"] == ["a/checkpoint-5", "b/checkpoint-5", "org/other"]
