"""The learning rate of step n: a pure function, so a resumed run has nothing to restore."""

import math

from distilllens.config import TrainConfig


def warmup_steps(config: TrainConfig, *, num_steps: int) -> int:
    """Steps of linear warm-up in a run of ``num_steps``."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)


def learning_rate(step: int, *, num_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then cosine, linear or constant."""
    warmup = warmup_steps(config, num_steps=num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = (1 + math.cos(math.pi * progress)) / 2 if config.lr_scheduler_type == "cosine" else 1 - progress
    floor = min(config.min_learning_rate, config.learning_rate)
    return floor + (config.learning_rate - floor) * share
