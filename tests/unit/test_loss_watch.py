"""A diverged loss is noticed, ordinary noise is not, and a resumed run decides alike."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilllens.loss_watch import FEWEST, PATIENCE, SMALLEST_MEDIAN, WINDOW, LossWatch


def first_alarm(losses: list[float], ratio: float = 3.0) -> int | None:
    """Steps, counted from 1, until the watch says that the run diverged."""
    watch = LossWatch()
    return next((step for step, loss in enumerate(losses, 1) if watch.add(loss, ratio=ratio)), None)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0), st.floats(0.001, 12.0))
def test_noise_of_any_usual_size_never_stops_a_run(seed: int, sigma: float, level: float) -> None:
    """Lognormal noise: with sigma 1, one loss in seven is above three times the median."""
    random = np.random.default_rng(seed)
    trend = level * (0.2 + np.exp(-np.arange(600) / 100))
    assert first_alarm((trend * random.lognormal(0.0, sigma, 600)).tolist()) is None


@settings(deadline=None)
@given(st.integers(FEWEST, 120), st.floats(3.1, 100.0))
def test_a_loss_that_leaves_for_good_stops_the_run_after_the_patience(start: int, factor: float) -> None:
    assert first_alarm([1.0] * start + [factor] * 50) == start + PATIENCE


def test_a_spike_that_comes_back_does_not() -> None:
    assert first_alarm([1.0] * 60 + ([9.0] * (PATIENCE - 1) + [1.0]) * 5) is None


def test_losses_above_never_become_the_median() -> None:
    bursts = ([9.0] * (PATIENCE - 1) + [1.0]) * 8
    assert first_alarm([1.0] * 60 + bursts + [9.0] * 50) == 60 + len(bursts) + PATIENCE


def test_the_median_is_of_the_last_steps_alone() -> None:
    assert first_alarm([10.0] * 300 + [1.0] * WINDOW + [4.0] * 50) == 300 + WINDOW + PATIENCE


def test_nothing_is_judged_before_there_is_a_median() -> None:
    assert first_alarm([1.0] * (FEWEST - 1) + [2.9] + [2.0] * 20) is None
    assert first_alarm([1.0] * 5 + [20.0] * 40) is None


def test_a_student_that_equals_its_teacher_is_left_alone() -> None:
    assert first_alarm([1e-6] * 100 + [SMALLEST_MEDIAN] * 100) is None


def test_it_can_be_switched_off() -> None:
    assert first_alarm([1.0] * 100 + [1e6] * 100, ratio=0.0) is None


@pytest.mark.parametrize("stop", [10, 75, 85])
def test_a_resumed_watch_goes_on_where_it_was(stop: int) -> None:
    losses = [1.0] * 80 + [7.0] * 30
    watch = LossWatch()
    for loss in losses[:stop]:
        assert not watch.add(loss, ratio=3.0)
    resumed = LossWatch(**json.loads(json.dumps(dataclasses.asdict(watch))))
    assert [resumed.add(loss, ratio=3.0) for loss in losses[stop:]].index(True) == 80 + PATIENCE - 1 - stop
