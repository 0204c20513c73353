"""``examples.jsonl``: the ids of every step's examples, to see that a resumed run takes the same ones."""

import json
from pathlib import Path

from distilllens.engine import Engine
from distilllens.metrics import drop_after

FILE = "examples.jsonl"


class ExampleLog:
    """Appends one line per step, ``{"step": n, "ids": [...]}``, from what each rank really took; on the main rank."""

    def __init__(self, run: Path, engine: Engine, *, resumed_step: int) -> None:
        self._engine = engine
        self._file = run / FILE
        self._taken: list[tuple[str, ...]] = []
        if engine.is_main:
            drop_after(self._file, resumed_step)

    def add(self, ids: tuple[str, ...]) -> None:
        """A micro-batch of this rank."""
        self._taken.append(ids)

    def log(self, step: int) -> None:
        """End a step (counted from 1). Every rank calls it."""
        by_rank = self._engine.gather(self._taken)
        self._taken = []
        if self._engine.is_main:
            ids = [name for micro_batch in zip(*by_rank, strict=True) for part in micro_batch for name in part]
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "ids": ids}) + "\n")


def read_examples(run: Path) -> list[list[str]]:
    """Ids of a run's examples, step by step."""
    return [json.loads(line)["ids"] for line in (run / FILE).read_text("utf-8").splitlines()]
