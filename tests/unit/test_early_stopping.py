"""Best checkpoint and early stopping: the rules of transformers, remembered across a resume."""

import dataclasses
import json
import math
import operator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from distilllens.early_stopping import BestSoFar, Selection

values = st.lists(st.floats(0, 10).map(lambda value: round(value, 1)), min_size=1, max_size=12)


def run(selection: Selection, measured: list[float]) -> BestSoFar:
    best = BestSoFar()
    for step, value in enumerate(measured, 1):
        selection.look(best, {f"eval/{selection.metric}": value}, step=step)
        if selection.is_over(best):
            break
    return best


@settings(deadline=None)
@given(values, st.sampled_from(["loss", "rouge_l"]), st.integers(1, 3), st.sampled_from([0.0, 0.5]))
def test_it_stops_where_transformers_stops_and_keeps_the_same_best(
    measured: list[float], metric: str, patience: int, threshold: float
) -> None:
    callback: Any = EarlyStoppingCallback(patience, threshold)
    arguments: Any = SimpleNamespace(greater_is_better=metric == "rouge_l", metric_for_best_model=metric)
    state, control, best = TrainerState(), TrainerControl(), BestSoFar()
    selection = Selection(metric, patience, threshold)
    for step, value in enumerate(measured, 1):
        callback.check_metric_value(arguments, state, control, value)
        is_better = operator.gt if metric == "rouge_l" else operator.lt
        if state.best_metric is None or is_better(value, state.best_metric):
            state.best_metric, state.best_global_step = value, step
        selection.look(best, {f"eval/{metric}": value}, step=step)
        assert (best.value, best.step) == (state.best_metric, state.best_global_step)
        assert best.num_without_progress == callback.early_stopping_patience_counter
        assert selection.is_over(best) == (callback.early_stopping_patience_counter >= patience)


@settings(deadline=None)
@given(values, st.integers(0, 11))
def test_a_resumed_run_decides_alike(measured: list[float], stop: int) -> None:
    selection = Selection("loss", 2, 0.1)
    whole, part = BestSoFar(), BestSoFar()
    for step, value in enumerate(measured):
        if step == stop:
            part = BestSoFar(**json.loads(json.dumps(dataclasses.asdict(part))))
        for best in (whole, part):
            selection.look(best, {"eval/loss": value}, step=step)
        assert part == whole


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    best = run(Selection("loss", 3, 0.0), [math.nan, 2.0, math.nan])
    assert (best.value, best.step, best.num_without_progress) == (2.0, 2, 1)
    assert run(Selection("loss", 2, 0.0), [math.nan, math.nan]).step is None


def test_another_metric_begins_anew() -> None:
    best = run(Selection("loss", None, 0.0), [1.0, 2.0, 3.0])
    assert best.num_without_progress == 2
    assert not Selection("kl", 1, 0.0).is_over(best)
    assert Selection("kl", 1, 0.0).look(best, {"eval/kl": 5.0}, step=4)
    assert best == BestSoFar("kl", 5.0, 4, 0)


@pytest.mark.parametrize(
    ("patience", "measured", "sentence"),
    [
        (2, [1.0, 2.0, 3.0], "eval/loss was best at step 1 (1), and the last 2 evaluations did not improve"),
        (1, [1.0, 2.0], "and the last evaluation did not improve on the best"),
        (1, [math.nan], "eval/loss was never a number"),
    ],
)
def test_the_verdict_says_why(patience: int, measured: list[float], sentence: str) -> None:
    selection = Selection("loss", patience, 0.0)
    assert sentence in selection.verdict(run(selection, measured))
