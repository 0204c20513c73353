"""Training runs one after the other in one process of a launch: ``python run_under_ranks.py RUNS.json``.

Starting ranks costs more than a tiny run, so tests start them once for many. A run is a ``TrainConfig`` as JSON, with
``blank`` (two of three examples have no target), ``only_fused`` (no loss may take the plain way), ``one_by_one`` (no
two weights that ZeRO-3 shards may be gathered together to be saved) and ``die_in_step`` (this rank is killed in that
step, before its update) beside it.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distilllens import losses, train
from distilllens.config import TrainConfig
from distilllens.engine import Engine


class Blanked:
    """A source of examples of which two of three have no target."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.shard_of = source.shard_of
        self.num_tokens = source.num_tokens
        self.num_targets = np.where(np.arange(len(source)) % 3, 0, source.num_targets)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._blanked(self._source[index])

    def read_shard(self, number: int) -> list[Any]:
        return [self._blanked(example) for example in self._source.read_shard(number)]

    def _blanked(self, example: Any) -> Any:
        if example.index % 3 == 0:
            return example
        targets = {
            layer: replace(
                one,
                **{name: getattr(one, name)[:0] for name in ("counts", "ids", "log_probs", "log_rest")},
                codes=None if one.codes is None else one.codes[:0],
            )
            for layer, one in example.targets.items()
        }
        return replace(example, target_positions=example.target_positions[:0], targets=targets)


def refuse(*_: Any) -> None:
    """Stand in for the plain losses."""
    raise AssertionError("a loss took the plain way")


def gather_one(weights: list[Any], **options: Any) -> Any:
    """Stand in for ``deepspeed.zero.GatheredParameters``."""
    import deepspeed

    assert len(weights) == 1, f"{len(weights)} weights are gathered together"
    return deepspeed.runtime.zero.partition_parameters.GatheredParameters(weights, **options)


@contextmanager
def changed(place: Any, name: str, value: Any) -> Iterator[None]:
    """``place.name`` is ``value`` for a while."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def run(
    config: dict[str, Any],
    *,
    blank: bool = False,
    only_fused: bool = False,
    one_by_one: bool = False,
    die_in_step: int = 0,
) -> None:
    """One training run."""
    import deepspeed

    open_run, start_engine = train.open_run, train.start_engine

    def open_blanked(*arguments: Any, **options: Any) -> Any:
        opened = open_run(*arguments, **options)
        return replace(opened, source=Blanked(opened.source)) if blank else opened

    def start_mortal(*arguments: Any) -> Engine:
        engine = start_engine(*arguments)
        update, updates = engine.update, []

        def update_or_die(learning_rate: float) -> float:
            updates.append(1)
            if len(updates) == die_in_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(learning_rate)

        engine.update = update_or_die
        return engine

    with (
        changed(train, "open_run", open_blanked),
        changed(train, "start_engine", start_mortal),
        changed(losses, "_plain", refuse if only_fused else losses._plain),
        changed(deepspeed.zero, "GatheredParameters", gather_one if one_by_one else deepspeed.zero.GatheredParameters),
    ):
        train.run_train(TrainConfig(**config))


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        if each.pop("rank", os.environ.get("RANK")) != os.environ.get("RANK"):
            each.pop("die_in_step")
        run(**each)
