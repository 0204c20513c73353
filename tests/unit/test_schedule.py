"""The learning rate: transformers' schedules, with a first step above 0 and a cosine that ends at its floor."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilllens.config import TrainConfig
from distilllens.schedule import learning_rate, warmup_steps


def config(**settings: object) -> TrainConfig:
    run = {"method": "sft", "student": "s", "dataset": "d", "output_dir": "o", "learning_rate": 0.5}
    return TrainConfig.model_validate(run | settings)


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 9), st.integers(10, 60), st.floats(0, 0.4))
def test_a_schedule_is_its_formula(kind: str, warmup: int, num_steps: int, floor: float) -> None:
    run = config(lr_scheduler_type=kind, warmup_steps=warmup, min_learning_rate=floor)
    rates = [learning_rate(step, num_steps=num_steps, config=run) for step in range(num_steps)]
    assert rates[:warmup] == pytest.approx([0.5 * n / warmup for n in range(1, warmup + 1)])
    for step in range(warmup, num_steps):
        done = (step - warmup) / (num_steps - warmup)
        share = {"cosine": math.cos(math.pi * done) / 2 + 0.5, "linear": 1 - done, "constant": 1.0}[kind]
        assert rates[step] == pytest.approx(share * 0.5 + (1 - share) * floor)


@pytest.mark.parametrize(("ratio", "num_steps", "count"), [(0.0, 40, 0), (0.1, 40, 4), (0.1, 41, 5), (1.0, 7, 7)])
def test_a_ratio_warms_up_for_its_share_of_the_steps_rounded_up(ratio: float, num_steps: int, count: int) -> None:
    assert warmup_steps(config(warmup_ratio=ratio), num_steps=num_steps) == count
    assert warmup_steps(config(warmup_ratio=ratio, warmup_steps=3), num_steps=num_steps) == 3
